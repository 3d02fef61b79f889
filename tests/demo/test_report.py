"""The table says what the rows say, and only what stands between the markers of a Markdown file changes."""

import pytest

from minilm_kernels.demo.report import BEGIN, END, check_markers, table, update

BEFORE = {"model": "before", "heldout_kl": 2.0, "bbc_accuracy": 0.5, "lee_r": -0.25}
AFTER = {"model": "seed 3", "heldout_kl": 0.5, "bbc_accuracy": 0.75, "lee_r": 0.125, "training_seconds": 61.6}


def cells(text):
    return {line[0]: line[1:] for line in ([c.strip() for c in row.strip("|").split("|")] for row in text.splitlines())}


def test_table_holds_the_rows():
    lines = cells(table([BEFORE, AFTER]))
    assert lines[""] == ["before", "seed 3"]
    assert lines["held-out relation KL"] == ["2.000", "0.500 (0.25 ×)"]
    assert lines["BBC accuracy"] == ["0.500", "0.750"]
    assert lines["Lee r"] == ["-0.250", "0.125"]
    assert lines["training, s"] == ["–", "62"]


def test_table_is_aligned_markdown():
    lines = table([BEFORE, AFTER, {"model": "a much longer title"}]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert set(lines[1]) == set("|-: ")


def test_update_keeps_everything_outside_the_markers(tmp_path):
    file = tmp_path / "README.md"
    file.write_bytes(f"# Tïtle\r\n{BEGIN}\nold\nold\n{END}\r\n\ntail without end".encode())
    file.chmod(0o640)
    update(file, "| new |\n")
    assert file.read_bytes() == f"# Tïtle\r\n{BEGIN}\n| new |\n{END}\r\n\ntail without end".encode()
    assert file.stat().st_mode & 0o777 == 0o640
    update(file, "again")
    assert file.read_bytes() == f"# Tïtle\r\n{BEGIN}\nagain\n{END}\r\n\ntail without end".encode()
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("text", ["nothing", BEGIN, f"{END}\n{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"])
def test_missing_markers_are_named(tmp_path, text):
    file = tmp_path / "README.md"
    file.write_text(text)
    with pytest.raises(ValueError, match="demo:begin"):
        check_markers(file)
    with pytest.raises(ValueError, match="demo:begin"):
        update(file, "x")
    assert file.read_text() == text


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.md"):
        check_markers(tmp_path / "absent.md")
