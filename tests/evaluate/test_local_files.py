"""Test sets from local files."""

import json
from pathlib import Path

import pytest

from minilm_kernels.evaluate.local_files import read_columns

ROWS = [{"text": "a, b", "label": "x"}, {"text": 'c "d"', "label": "y"}]
FILES = {
    "rows.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
    "rows.csv": 'text,label\n"a, b",x\n"c ""d""",y\n',
    "rows.tsv": 'label\ttext\nx\ta, b\ny\t"c ""d"""\n',
}


@pytest.mark.parametrize("name", FILES)
def test_formats_agree(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(FILES[name], encoding="utf-8")
    assert read_columns(str(tmp_path / name), "--classification", ("text", "label")) == [["a, b", 'c "d"'], ["x", "y"]]


def test_parquet(tmp_path: Path) -> None:
    from datasets import Dataset

    Dataset.from_list(ROWS).to_parquet(tmp_path / "rows.parquet")
    assert read_columns(str(tmp_path / "rows.parquet"), "--pairs", ("label",)) == [["x", "y"]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", '{"text": "a"}\n', "--pairs: .*rows.jsonl has no column label; its columns are text"),
        ("rows.jsonl", '{"text": "a", "label": null}\n', "has no label in row 1"),
        ("rows.jsonl", "", "--pairs: .*rows.jsonl"),
        ("rows.jsonl", "no JSON\n", "--pairs: .*rows.jsonl cannot be read"),
        ("rows.txt", "a", "--pairs: expected a file ending in .jsonl, .json, .csv, .tsv, .parquet"),
    ],
)
def test_errors_name_the_option_and_the_file(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_columns(str(tmp_path / name), "--pairs", ("text", "label"))


def test_missing_file() -> None:
    with pytest.raises(FileNotFoundError, match=r"--pairs: there is no file nowhere\.jsonl"):
        read_columns("nowhere.jsonl", "--pairs", ("text",))
