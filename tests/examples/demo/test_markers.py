"""Replacement of the generated part of a Markdown file."""

import pytest

from examples.demo.markers import check_markers, markers, update

BEGIN, END = markers("demo")


def test_update_keeps_everything_outside_the_markers(tmp_path):
    file = tmp_path / "README.md"
    file.write_bytes(f"# Tïtle\r\n{BEGIN}\nold\nold\n{END}\r\n\ntail without end".encode())
    file.chmod(0o640)
    update(file, "demo", "| new |\n")
    assert file.read_bytes() == f"# Tïtle\r\n{BEGIN}\n| new |\n{END}\r\n\ntail without end".encode()
    assert file.stat().st_mode & 0o777 == 0o640
    update(file, "demo", "again")
    assert file.read_bytes() == f"# Tïtle\r\n{BEGIN}\nagain\n{END}\r\n\ntail without end".encode()
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("text", ["nothing", BEGIN, f"{END}\n{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"])
def test_missing_markers_are_named(tmp_path, text):
    file = tmp_path / "README.md"
    file.write_text(text)
    with pytest.raises(ValueError, match="demo:begin"):
        check_markers(file, "demo")
    with pytest.raises(ValueError, match="demo:begin"):
        update(file, "demo", "x")
    assert file.read_text() == text


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.md"):
        check_markers(tmp_path / "absent.md", "demo")
