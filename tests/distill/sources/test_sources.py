"""Documents of files and data sets: reading from any cursor, and messages about unreadable input."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import os
import random
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from minilm_kernels.distill.sources import HubDataset, Source, delimited, open_sources
from minilm_kernels.distill.sources import lines as line_files
from minilm_kernels.distill.sources import parquet as parquet_files
from tests.distill.tiny import make_texts

TEXTS = [text + " größe €" for text in make_texts(25, longest=8)]


Make = Callable[[Path, list[str]], Source]


def opened(path: Path, **options: Any) -> Source:
    [source] = open_sources([str(path)], **options)
    return source


def paragraphs(folder: Path, texts: list[str]) -> Source:
    file = folder / "a.txt"
    file.write_bytes("\n \n\n".join(text.replace(" ", "\n", 1) for text in texts).encode("utf-8-sig"))
    return opened(file)


def lines(folder: Path, texts: list[str]) -> Source:
    file = folder / "b.txt"
    file.write_bytes("\r\n".join(texts).encode() + b"\r\n\r\n")
    return opened(file, by_line=True)


def carriage_returns(folder: Path, texts: list[str]) -> Source:
    file = folder / "b.md"
    file.write_bytes("\r\r".join(text.replace(" ", "\r", 1) for text in texts).encode())
    return opened(file)


def jsonl(folder: Path, texts: list[str]) -> Source:
    file = folder / "c.jsonl"
    file.write_text("\n\n".join(json.dumps({"text": text, "n": 1}, ensure_ascii=False) for text in texts), "utf-8")
    return opened(file)


def packed(folder: Path, texts: list[str]) -> Source:
    plain = vars(jsonl(folder, texts))["path"]
    file = folder / "c.ndjson.gz"
    file.write_bytes(gzip.compress(plain.read_bytes()[:100]) + gzip.compress(plain.read_bytes()[100:]))
    return opened(file)


def json_lines(folder: Path, texts: list[str]) -> Source:
    file = folder / "lines.json"
    file.write_bytes(("\n".join(json.dumps({"text": text}) for text in texts) + "\n").encode("utf-8-sig"))
    return opened(file)


def array(folder: Path, texts: list[str]) -> Source:
    file = folder / "array.json"
    records = [{"n": [1, {"a": ']}\\"'}], "text": text, "m": {}} for text in texts]
    file.write_bytes(json.dumps(records, indent=2).encode("utf-8-sig"))
    return opened(file)


def array_in_one_line(folder: Path, texts: list[str]) -> Source:
    file = folder / "array.json.xz"
    file.write_bytes(lzma.compress(json.dumps([{"text": text} for text in texts], ensure_ascii=False).encode()))
    return opened(file)


def comma_separated(folder: Path, texts: list[str]) -> Source:
    file = folder / "d.csv"
    with file.open("w", encoding="utf-8-sig", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["n", "text", 'a "quoted" name'])
        writer.writerows([n, text.replace(" ", '\n"', 1).replace(" ", ",", 1), ""] for n, text in enumerate(texts))
    return opened(file)


def tab_separated(folder: Path, texts: list[str]) -> Source:
    file = folder / "e.tsv.bz2"
    file.write_bytes(bz2.compress(("text\tn\n" + "".join(f"{text}\t1\n\n" for text in texts)).encode()))
    return opened(file)


def parquet(folder: Path, texts: list[str]) -> Source:
    file = folder / "d.parquet"
    rows = [text for pair in zip(texts, [None] * len(texts), strict=True) for text in pair]
    pq.write_table(pa.table({"text": rows, "n": range(len(rows))}), file, row_group_size=7)
    return opened(file)


def dictionary(folder: Path, texts: list[str]) -> Source:
    file = folder / "e.parquet"
    pq.write_table(pa.table({"text": pa.array(texts).dictionary_encode()}), file, row_group_size=9)
    return opened(file)


def hub(folder: Path, texts: list[str]) -> Source:
    (folder / "set").mkdir()
    for part in range(2):
        pq.write_table(pa.table({"text": texts[part::2]}), folder / "set" / f"train-{part}.parquet")
    return HubDataset(str(folder / "set"), None, "train", "text")


ALL = [
    paragraphs,
    lines,
    carriage_returns,
    jsonl,
    packed,
    json_lines,
    array,
    array_in_one_line,
    comma_separated,
    tab_separated,
    parquet,
    dictionary,
    hub,
]


def words(text: str | None) -> list[str]:
    return (text or "").replace('"', " ").replace(",", " ").split()


@pytest.mark.parametrize("make", ALL)
def test_every_cursor_continues_where_it_was_taken(make: Make, tmp_path: Path) -> None:
    source = make(tmp_path, TEXTS)
    expected = [words(text) for text in (TEXTS if make is not hub else TEXTS[::2] + TEXTS[1::2])]
    read = []
    for document in source.read():
        assert not document.problem
        read.append((words(document.text), json.loads(json.dumps(document.cursor))))
    assert [text for text, _ in read if text] == expected
    for number in range(0, len(read), 6 if make is hub else 1):
        rest = list(source.read(read[number][1]))
        assert [words(document.text) for document in rest] == [text for text, _ in read[number + 1 :]]
        if make is not hub:  # the state of a hub stream may depend on the position at which reading began
            cursors = [json.loads(json.dumps(document.cursor)) for document in rest]
            assert cursors == [cursor for _, cursor in read[number + 1 :]]
        assert [document.where for document in rest] == [d.where for d in list(source.read())[number + 1 :]]


@pytest.mark.parametrize("make", [make for make in ALL if make is not hub])
def test_fingerprints_change_with_the_file(make: Make, tmp_path: Path) -> None:
    source = make(tmp_path, TEXTS)
    before = source.fingerprint()
    assert before == make(tmp_path, TEXTS).fingerprint() or before["bytes"] == source.fingerprint()["bytes"]
    assert source.path is not None
    os.utime(source.path, ns=(1, 1))
    assert source.fingerprint() == {**before, "changed": 1}


def test_reading_on_does_not_read_again(tmp_path: Path) -> None:
    source = lines(tmp_path, TEXTS)
    *_, last = source.read()
    assert last.cursor[0] >= vars(source)["path"].stat().st_size - 2
    assert list(source.read(last.cursor)) == []


def test_a_line_of_any_length_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line_files, "LARGEST_DOCUMENT", 64)
    file = tmp_path / "long.txt"
    text = " ".join(f"wörd{i}" for i in range(100))
    file.write_text(text, "utf-8")
    parts = list(opened(file).read())
    assert len(parts) > 5
    assert max(len((part.text or "").encode()) for part in parts) <= 2 * 64
    assert "".join(part.text or "" for part in parts).split() == text.split()  # no word is cut
    for number, part in enumerate(parts):
        assert list(opened(file).read(part.cursor)) == parts[number + 1 :]
        assert part.where.endswith("line 1")

    file.write_text("€" * 100, "utf-8")  # three bytes per character, and no spaces
    assert "".join(part.text or "" for part in opened(file).read()) == "€" * 100


def test_a_document_of_any_length_is_cut_at_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line_files, "LARGEST_DOCUMENT", 64)
    file = tmp_path / "long.txt"
    file.write_text("\n".join(["some words in a line"] * 20))
    parts = [document.text or "" for document in opened(file).read()]
    assert len(parts) == 5
    assert "".join(parts) == file.read_text()


@pytest.mark.parametrize("make", [jsonl, packed, array, array_in_one_line, comma_separated, tab_separated, parquet])
def test_a_record_beyond_the_bound_is_bad(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (line_files, delimited, parquet_files):
        monkeypatch.setattr(module, "LARGEST_RECORD", 200)
    monkeypatch.setattr(line_files, "READ_BYTES", 64)
    source = make(tmp_path, ["w1 a b", "w2 " * 1000, "w3 a b", "w4 " * 20, "w5 a b"])
    documents = [document for document in source.read() if document.text or document.problem]
    assert [words(document.text)[:1] for document in documents if document.text] == [["w1"], ["w3"], ["w4"], ["w5"]]
    long = [document for document in documents if document.problem]
    assert len(long) == (
        2 if make is comma_separated else 1
    )  # one bad document per line, because the quote does not end within the limit
    assert all("200 bytes" in document.problem for document in long)
    for number, document in enumerate(documents):
        rest = [document for document in source.read(document.cursor) if document.text or document.problem]
        assert rest == documents[number + 1 :]


def test_folders_are_searched_in_a_stable_order(tmp_path: Path) -> None:
    names = ("b/y.txt", "b/.hidden.txt", ".git/x.txt", "a/z.jsonl", "a/picture.png", "a/b/c.TXT", "a/b/c.tsv.gz")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(gzip.compress(b"text") if name.endswith(".gz") else b"x")
    (tmp_path / "plain").write_text("x")
    os.mkfifo(tmp_path / "pipe.txt")
    said: list[str] = []
    found = open_sources([str(tmp_path), str(tmp_path / "plain")], say=said.append)
    assert [source.name for source in found] == ["a/b/c.TXT", "a/b/c.tsv.gz", "a/z.jsonl", "b/y.txt", "plain"]
    kinds = ["TextFile", "DelimitedFile", "JsonLines", "TextFile", "TextFile"]
    assert [type(source).__name__ for source in found] == kinds
    [line] = said
    assert "skipped" in line
    assert all(name in line for name in ("a/picture.png", "pipe.txt", "plain"))
    assert "hidden" not in line


GOOD = b'{"text": "good"}'


@pytest.mark.parametrize(
    ("name", "content", "where", "problem"),
    [
        ("a.txt", b"one\ntwo \xff\n\ngood", "line 2", r"not UTF-8 \(byte 0xff at 4\)"),
        ("a.jsonl", GOOD + b'\n{"text": \n', "line 2", "not JSON"),
        ("a.jsonl", GOOD + b'\n\n{"body": "b", "n": 1}\n', "line 3", "no column 'text'.*has body, n"),
        ("a.jsonl", b'["text"]\n' + GOOD, "line 1", "it is an array, expected an object"),
        ("a.jsonl", b'{"text": 3}\n' + GOOD, "line 1", "column 'text' is a number"),
        ("a.jsonl", b'{"text": NaN}\n' + GOOD, "line 1", "column 'text' is a number"),
        ("a.jsonl", b'{"text": ["a"]}\n' + GOOD, "line 1", "column 'text' is an array"),
        ("a.jsonl", b"[" * 100_000 + b"\n" + GOOD, "line 1", "not JSON"),
        ("a.jsonl", b'{"text": "a", "n": ' + b"9" * 5000 + b"}\n" + GOOD, "line 1", "not JSON"),
        ("a.jsonl", GOOD + b'\n{"text": "\xe9"}', "line 2", "not UTF-8"),
        ("a.json", b"[" + GOOD + b',\n{"text": 3}]', "line 2, element 2", "column 'text' is a number"),
        ("a.json", b"[" + GOOD + b',\n{"text": }]', "line 2, element 2", "not JSON"),
        ("a.json", b"[" + GOOD + b", \xe9]", "line 1, element 2", "not UTF-8"),
        ("a.json", b'[{"text": "x", ' + GOOD + b"]", "line 1, element 1", "an object does not end before the next"),
        ("a.json", b'[\n{"text": "x},\n ' + GOOD + b"]", "line 2, element 1", "a quote does not end on its line"),
        ("a.json", b'[\n["x"},\n ' + GOOD + b"]", "line 2, element 1", "brackets do not match"),
        ("a.json", b"[" + GOOD + b', {"text": "x"', "line 1, element 2", "do not end; the rest of the file cannot"),
        ("a.json", b"[" + GOOD + b", " + GOOD, "line 1, element 2", "not end"),
        ("a.json", b"[" + GOOD + b",", "line 1, element 2", "the array does not end"),
        ("a.json", b"[" + GOOD + b"]\n" + GOOD, "line 2, element 2", "more after the end of the array"),
        ("a.csv", b"text,n\ngood,1\na,b,2\n", "line 3", "3 cells, the header 2"),
        ("a.csv", b"text,n\ngood,1\na\n", "line 3", "1 cells, the header 2"),
        ("a.csv", b'text,n\n"x,1\ngood,1\n', "line 2", "not CSV"),
        ("a.csv", b'text,n\n"x"y,1\ngood,1\n', "line 2", "not CSV"),
        ("a.csv", b'text,n\n"x\n\xff",1\ngood,1\n', "line 2", "not UTF-8"),
        ("a.tsv", b'text\tn\n"x\t1\ngood\t1\n', "line 2", "not TSV"),
    ],
)
def test_a_bad_document_is_named_and_the_others_are_read(
    name: str, content: bytes, where: str, problem: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    documents = list(opened(tmp_path / name).read())
    [bad] = [document for document in documents if document.problem]
    assert bad.where == f"{tmp_path / name}, {where}"
    assert re.search(problem, bad.problem)
    good = [(document.text or "").strip() for document in documents if not document.problem]
    assert good == ["good"]
    cursor = json.loads(json.dumps(bad.cursor))
    assert list(opened(tmp_path / name).read(cursor)) == documents[documents.index(bad) + 1 :]


@pytest.mark.parametrize("make", [jsonl, json_lines, array, parquet])
def test_nulls_are_documents_without_text(make: Make, tmp_path: Path) -> None:
    texts: Any = ["a b c", None, "d e f"]
    documents = list(make(tmp_path, texts).read())
    assert [document.text for document in documents if document.text] == ["a b c", "d e f"]
    assert any(document.text is None for document in documents)
    assert not any(document.problem for document in documents)


@pytest.mark.parametrize("make", [jsonl, json_lines, array, parquet])
def test_lone_surrogates_are_replaced(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json, "dumps", partial(json.dumps, ensure_ascii=True))
    texts = ["a", "half \ud83d of it", "whole \ud83d\ude00 pair", "b"]
    if make is parquet:
        raw = [text.encode("utf-8", "surrogatepass") for text in texts]
        column = pa.Array.from_buffers(pa.string(), 4, pa.array(raw).buffers())
        pq.write_table(pa.table({"text": column}), tmp_path / "s.parquet")
        source = opened(tmp_path / "s.parquet")
    elif make is jsonl:
        (tmp_path / "s.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
        source = opened(tmp_path / "s.jsonl")
    else:
        source = make(tmp_path, texts)
    assert [document.text for document in source.read()] == ["a", "half \ufffd of it", "whole \U0001f600 pair", "b"]


def test_surrogates_in_text_files_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("half \ud83d, pair \ud83d\ude00".encode("utf-8", "surrogatepass"))
    assert [document.text for document in opened(tmp_path / "a.txt").read()] == ["half \ufffd, pair \U0001f600"]


def test_bad_cells_and_damaged_pages_of_parquet(tmp_path: Path) -> None:
    raw = [b"one", b"\xff", b"three"]
    column = pa.Array.from_buffers(pa.string(), 3, pa.array(raw).buffers())
    pq.write_table(pa.table({"text": column}), tmp_path / "cell.parquet")
    documents = list(opened(tmp_path / "cell.parquet").read())
    assert [document.text for document in documents] == ["one", None, "three"]
    assert documents[1].where.endswith("cell.parquet, row 2")
    assert documents[1].problem.startswith("not UTF-8")

    file = tmp_path / "page.parquet"
    texts = [f"text number {n}" for n in range(40)]
    pq.write_table(
        pa.table({"text": texts}),
        file,
        row_group_size=10,
        write_page_checksum=True,
        compression="none",
        use_dictionary=False,
    )
    content = file.read_bytes()
    assert content.count(b"number 25") >= 1
    file.write_bytes(content.replace(b"number 25", b"number 77", 1))
    documents = list(opened(file).read())
    assert [document.text for document in documents if document.text] == texts[:20] + texts[30:]
    [bad] = [document for document in documents if document.problem]
    assert (bad.where, bad.documents) == (f"{file}, rows 21 to 30", 10)
    assert list(opened(file).read(bad.cursor)) == documents[21:]
    assert list(opened(file).read(documents[9].cursor)) == documents[10:]


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [
        (".gz", gzip.compress),
        (".bz2", partial(bz2.compress, compresslevel=1)),
        (".xz", partial(lzma.compress, preset=0)),
    ],
)
def test_damaged_compression_loses_the_rest_of_the_file(
    suffix: str, pack: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    chance = random.Random(0)
    content = "\n".join(f'{{"text": "{chance.random()}"}}' for _ in range(8_000)).encode()
    file = tmp_path / f"a.jsonl{suffix}"
    file.write_bytes(pack(content)[:-1000])
    *good, bad = opened(file).read()
    assert len(good) > 1000
    assert bad.where == f"{file}, after byte {good[-1].cursor[0]}"
    assert all(document.text for document in good)
    assert "rest of the file cannot be decompressed" in bad.problem
    assert list(opened(file).read(bad.cursor)) == []
    file.write_bytes(pack(content)[:1000])
    with pytest.raises(ValueError, match=r"a\.jsonl\..* cannot be decompressed"):
        opened(file)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"body;n\nx;1\n", "--text-column.*separated by ',' it has 'body;n'"),
        ("a.csv", b"text,text\nx,1\n", "one column 'text'"),
        ("a.tsv", b"text,n\nx,1\n", r"separated by '\\t' it has 'text,n'"),
        ("a.parquet", b"PAR1 no", r"a\.parquet: not a readable Parquet file"),
        ("a.parquet.gz", b"", "decompress it first"),
    ],
)
def test_files_that_cannot_hold_the_text_are_refused_at_once(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_sources([str(tmp_path / name)])


def test_missing_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"--eval-text: there is no file or folder .*nowhere"):
        open_sources([str(tmp_path / "nowhere")], option="--eval-text")
    with pytest.raises(ValueError, match="empty path"):
        open_sources([""])
    with pytest.raises(ValueError, match="has no text files"):
        open_sources([str(tmp_path)])
    (tmp_path / "a.txt.zst").write_bytes(b"")
    with pytest.raises(ValueError, match=r"has no text files.*it has a\.txt\.zst"):
        open_sources([str(tmp_path)])
    file = vars(parquet(tmp_path, TEXTS))["path"]
    with pytest.raises(ValueError, match=r"expected one column 'body'.*has text, n"):
        opened(file, text_column="body")
    with pytest.raises(ValueError, match=r"column 'n'.*int64, expected text"):
        opened(file, text_column="n")
    pq.write_table(pa.table({"text": [["a list"]]}), tmp_path / "list.parquet")
    with pytest.raises(ValueError, match=r"column 'text'.*list.*, expected text"):
        opened(tmp_path / "list.parquet")
    with pytest.raises(ValueError, match=r"--dataset-name .*nowhere"):
        list(HubDataset(str(tmp_path / "nowhere"), None, "train", "text").read())
    with pytest.raises(ValueError, match=r"no column 'body'.*it has text"):
        list(HubDataset(str(vars(hub(tmp_path, TEXTS))["name"]), None, "train", "body").read())


@pytest.mark.parametrize(("module", "make"), [("pyarrow.parquet", parquet), ("datasets", hub)])
def test_a_missing_library_is_named(module: str, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make(tmp_path, TEXTS)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r'pip install "minilm_kernels\[data\]"'):
        list(source.read())
