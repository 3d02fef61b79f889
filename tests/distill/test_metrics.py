"""metrics.jsonl: lines that are kept, removed and reported."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from minilm_kernels.distill.metrics import Metrics, eval_records, read_metrics


def line(step: int, split: str = "train") -> bytes:
    return json.dumps({"step": step, "split": split, "loss": 0.5}).encode()


def test_only_a_cut_last_line_and_later_steps_are_dropped(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b"\n".join([line(0, "eval"), line(1), line(2), line(2, "eval"), line(3), line(4)[:9]]))
    Metrics(file, 2)
    assert file.read_bytes() == b"\n".join([line(0, "eval"), line(1), line(2), line(2, "eval"), b""])
    Metrics(file, 2, evaluated=False)
    assert file.read_bytes() == b"\n".join([line(0, "eval"), line(1), line(2), b""])
    file.write_bytes(line(1) + b"\n" + line(2))  # the last line has no newline
    Metrics(file, 2).write({"step": 3})
    assert [record["step"] for record in read_metrics(file)] == [1, 2, 3]
    Metrics(file, 0)
    assert file.read_bytes() == b""


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b'{"step": 2, "spl', "not JSON"),
        (b"7", "not an object with an integer step"),
        (b"[]", "not an object"),
        (b"{}", "not an object"),
        (b'{"step": "2"}', "not an object"),
        (b'{"step": null, "split": "eval"}', "not an object"),
        (b'{"step": 2, "note": "\xff"}', "not UTF-8"),
        (b"[" * 99_999, "not JSON"),
        (b"\0\0\0", "not JSON"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_bad_line_deletes_no_other(
    bad: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "metrics.jsonl"
    lines = [line(0, "eval"), line(1), bad, line(2), line(3, "eval")]
    file.write_bytes(b"".join(text + b"\n" for text in [*lines, line(4)]))
    Metrics(file, 3)
    assert file.read_bytes() == b"".join(text + b"\n" for text in lines)
    said = capsys.readouterr().err
    assert f"{file}, line 3: {message}" in said
    assert said.count("the line is kept") == 1
    first, last = eval_records(file) or (None, None)
    assert first is not None
    assert last is not None
    assert (first["step"], last["step"]) == (0, 3)


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir])
def test_what_is_no_file_is_named(make: Any, tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    make(file)
    with pytest.raises((ValueError, OSError), match=r"metrics\.jsonl"):
        Metrics(file, 1)
