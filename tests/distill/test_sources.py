"""Documents from files and data sets: what is read, from any place on, and what is said about unreadable input."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from minilm_kernels.distill import sources
from minilm_kernels.distill.sources import HubDataset, JsonLines, ParquetFile, Source, TextFile, open_sources

from .tiny import make_texts

TEXTS = [text + " größe €" for text in make_texts(25, longest=8)]


def paragraphs(folder: Path) -> Source:
    file = folder / "a.txt"
    file.write_bytes("\n \n\n".join(text.replace(" ", "\n", 1) for text in TEXTS).encode("utf-8-sig"))
    return TextFile(file, by_line=False)


def lines(folder: Path) -> Source:
    file = folder / "b.txt"
    file.write_bytes("\r\n".join(TEXTS).encode() + b"\r\n\r\n")
    return TextFile(file, by_line=True)


def jsonl(folder: Path) -> Source:
    file = folder / "c.jsonl"
    file.write_text("\n\n".join(json.dumps({"text": text, "n": 1}, ensure_ascii=False) for text in TEXTS), "utf-8")
    return JsonLines(file, "text")


def parquet(folder: Path) -> Source:
    file = folder / "d.parquet"
    rows = [text for pair in zip(TEXTS, [None] * len(TEXTS), strict=True) for text in pair]
    pq.write_table(pa.table({"text": rows, "n": range(len(rows))}), file, row_group_size=7)
    return ParquetFile(file, "text")


def hub(folder: Path) -> Source:
    (folder / "set").mkdir()
    for part in range(2):
        pq.write_table(pa.table({"text": TEXTS[part * 13 : (part + 1) * 13]}), folder / "set" / f"train-{part}.parquet")
    return HubDataset(str(folder / "set"), None, "train", "text")


@pytest.mark.parametrize("make", [paragraphs, lines, jsonl, parquet, hub])
def test_every_place_continues_where_it_was_taken(make: Callable[[Path], Source], tmp_path: Path) -> None:
    source = make(tmp_path)
    read = [(" ".join(text.split()), json.loads(json.dumps(place))) for text, place in source.read()]
    assert [text for text, _ in read] == TEXTS
    for number, (_, place) in list(enumerate(read))[:: 6 if make is hub else 1]:
        assert [" ".join(text.split()) for text, _ in source.read(place)] == TEXTS[number + 1 :]


def test_reading_on_does_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = lines(tmp_path)
    *_, (_, place) = source.read()
    assert isinstance(source, TextFile)
    seen = []
    monkeypatch.setattr(sources, "_lines", lambda file, path, at, limit: seen.append(at) or iter(()))
    assert list(source.read(place)) == []
    assert seen == [place]
    assert place[0] >= source.path.stat().st_size - 2


def test_a_line_of_any_length_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LARGEST_DOCUMENT", 64)
    file = tmp_path / "long.txt"
    words = [f"wörd{i}" for i in range(100)]
    file.write_text(" ".join(words), "utf-8")
    parts = list(TextFile(file, by_line=False).read())
    assert len(parts) > 5
    assert max(len(text.encode()) for text, _ in parts) <= 2 * 64
    assert "".join(text for text, _ in parts).split() == words  # no word is cut

    file.write_text("€" * 100, "utf-8")  # three bytes each, and no space to cut at
    assert "".join(text for text, _ in TextFile(file, by_line=False).read()) == "€" * 100


def test_a_document_of_any_length_is_cut_at_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LARGEST_DOCUMENT", 64)
    file = tmp_path / "long.txt"
    file.write_text("\n".join(["some words in a line"] * 20))
    parts = [text for text, _ in TextFile(file, by_line=False).read()]
    assert len(parts) == 5
    assert "".join(parts) == file.read_text()


def test_folders_are_searched_in_a_stable_order(tmp_path: Path) -> None:
    for name in ("b/y.txt", "b/.hidden.txt", ".git/x.txt", "a/z.jsonl", "a/picture.png", "a/b/c.parquet"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    found = open_sources([str(tmp_path), str(tmp_path / "a" / "picture.png")])
    assert [type(source).__name__ for source in found] == ["ParquetFile", "JsonLines", "TextFile", "TextFile"]
    assert [Path(vars(source)["path"]).name for source in found] == ["c.parquet", "z.jsonl", "y.txt", "picture.png"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"one\ntwo \xff\n", r"a\.txt, line 2: not UTF-8 \(byte 0xff at 4\)"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a\.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"text": "a"}\n\n{"body": "b", "n": 1}\n', r"a\.jsonl, line 3: no field 'text'.*has body, n"),
        ("a.jsonl", b'["text"]\n', r"a\.jsonl, line 1: expected a JSON object"),
        ("a.jsonl", b'{"text": 3}\n', r"a\.jsonl, line 1: field 'text' is int"),
        ("a.parquet", b"PAR1 no", r"a\.parquet: not a readable Parquet file"),
    ],
)
def test_unreadable_input_is_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    [source] = open_sources([str(tmp_path / name)])
    with pytest.raises(ValueError, match=message):
        list(source.read())


def test_missing_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"--heldout-text: there is no file or folder .*nowhere"):
        open_sources([str(tmp_path / "nowhere")], option="--heldout-text")
    with pytest.raises(ValueError, match="holds no text"):
        open_sources([str(tmp_path)])
    (tmp_path / "a.txt.gz").write_bytes(b"")
    with pytest.raises(ValueError, match="compressed"):
        open_sources([str(tmp_path / "a.txt.gz")])
    with pytest.raises(ValueError, match=r"no column 'body'.*it has text, n"):
        list(ParquetFile(vars(parquet(tmp_path))["path"], "body").read())
    with pytest.raises(ValueError, match=r"--dataset .*nowhere"):
        list(HubDataset(str(tmp_path / "nowhere"), None, "train", "text").read())
    with pytest.raises(ValueError, match="no field 'body'"):
        list(HubDataset(str(vars(hub(tmp_path))["name"]), None, "train", "body").read())


@pytest.mark.parametrize(("module", "make"), [("pyarrow.parquet", parquet), ("datasets", hub)])
def test_a_missing_library_is_named(
    module: str, make: Callable[[Path], Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"pip install minilm_kernels\[data\]"):
        list(source.read())
