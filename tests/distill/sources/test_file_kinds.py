"""Refusal of files that are not text, by suffix, type and content."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import socket
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from minilm_kernels.distill.sources import open_sources
from minilm_kernels.distill.sources.file_kinds import REFUSED

ENGLISH = "Some words in a line, and more of them.\n\n" * 40
GERMAN = "Größe, Straße, Übung und Äpfel: schöne Wörter.\n\n" * 40
RUSSIAN = "Несколько слов в строке, и ещё немного.\n\n" * 40
CHINESE = "一行中的几个词,还有更多。\n\n" * 40


def texts(path: Path) -> list[str]:
    [source] = open_sources([str(path)])
    return [document.text or "" for document in source.read()]


def zipped() -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("a.txt", ENGLISH)
    return content.getvalue()


def pickled() -> bytes:
    content = io.BytesIO()
    torch.save({"a": torch.ones(3)}, content)
    return content.getvalue()


def array() -> bytes:
    content = io.BytesIO()
    np.save(content, np.arange(9))
    return content.getvalue()


@pytest.mark.parametrize("suffix", sorted(REFUSED))
def test_suffixes_that_are_no_text_are_refused(suffix: str, tmp_path: Path) -> None:
    for name in (f"file{suffix}", f"FILE{suffix.upper()}", f"a{suffix}.gz"):
        (tmp_path / name).write_text("text")
        with pytest.raises(ValueError, match=rf"--text: .*{name} cannot be read as text; .* first"):
            open_sources([str(tmp_path / name)])


@pytest.mark.parametrize("name", ["text.txt", "text", "text.log", "text.jsonl", "text.json", "text.csv"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: gzip.compress(ENGLISH.encode()), "gzip; decompress it"),
        (lambda: bz2.compress(ENGLISH.encode()), "bzip2"),
        (lambda: lzma.compress(ENGLISH.encode()), "xz"),
        (zipped, "zip archive"),
        (pickled, "zip archive"),
        (array, "NumPy"),
        (lambda: save({"weight": torch.zeros(2, 2)}), "safetensors"),
        (lambda: b"%PDF-1.7\n" + ENGLISH.encode(), "PDF"),
        (lambda: np.random.default_rng(0).bytes(5000), ""),
        (lambda: np.arange(5000, dtype=np.int32).tobytes(), ""),
        *[
            (lambda t=text, e=encoding: t.encode(e), f"{encoding[:6]}.*iconv -f {encoding[:6]}")
            for text in (ENGLISH, GERMAN, RUSSIAN)
            for encoding in ("UTF-16", "UTF-16-LE", "UTF-16-BE", "UTF-32", "UTF-32-LE", "UTF-32-BE")
        ],
        (lambda: CHINESE.encode("utf-16"), "UTF-16"),
        (lambda: CHINESE.encode("utf-16-le"), ""),
        (lambda: GERMAN.encode("latin-1"), "another encoding .*iconv"),
        (lambda: RUSSIAN.encode("cp1251"), "another encoding .*iconv"),
        (lambda: CHINESE.encode("gb18030"), "another encoding .*iconv"),
        (lambda: ("\n".join(["plain"] * 7 + ["caf\xe9"]) + "\n").encode("latin-1") * 30, "another encoding"),
    ],
)
def test_content_that_is_no_text_is_refused(
    name: str, content: Callable[[], bytes], message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content())
    with pytest.raises(ValueError, match=rf"--text: .*{name} is not plain UTF-8 text but .*{message}"):
        open_sources([str(tmp_path / name)])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "a stray \0 passes, here it is",
        "\x1b[31mred\x1b[0m, \f and \b and \t",
        GERMAN + "€",
        RUSSIAN,
        CHINESE,
        "\ufeff" + CHINESE,
        "<!doctype of a sentence",
        "<html> is the first word of this text",
        "one",
    ],
)
def test_text_is_text(text: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(text, "utf-8")
    assert "".join(texts(tmp_path / "text.txt")).split() == text.removeprefix("\ufeff").split()


def test_some_bad_lines_do_not_make_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "small.txt").write_bytes("plain\n\ncaf\xe9\n\nplain\n\ncaf\xe9".encode("latin-1"))
    assert texts(tmp_path / "small.txt") == ["plain\n", "", "plain\n", ""]
    lines = [b"good words in a line"] * 300
    lines[5:24] = [b"bad \xff\xfe words"] * 19
    (tmp_path / "few.txt").write_bytes(b"\n\n".join(lines))
    assert len(list(filter(None, texts(tmp_path / "few.txt")))) == 281
    lines[5:105] = [b"bad \xff\xfe words"] * 100
    lines[0] = "größe".encode()  # this makes the file UTF-8 with damage in a third of its lines
    (tmp_path / "many.txt").write_bytes(b"\n\n".join(lines))
    assert len(list(filter(None, texts(tmp_path / "many.txt")))) == 200
    records = [json.dumps({"text": "words of a record"}).encode()] * 300
    records[7] = b'{"text": "' + b"\xe9" * 150 + b'"}'
    (tmp_path / "line.json").write_bytes(b"[" + b", ".join(records) + b"]")
    assert len(list(filter(None, texts(tmp_path / "line.json")))) == 299


@pytest.mark.parametrize("content", ["<!DOCTYPE html>\n<p>", "\n <html lang=en>", "<?xml version='1.0'?>"])
def test_markup_without_a_suffix_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "page").write_text(content)
    with pytest.raises(ValueError, match=r"page is not plain UTF-8 text but markup; extract its text"):
        open_sources([str(tmp_path / "page")])


def test_what_is_no_regular_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.txt")
        (tmp_path / "link.txt").symlink_to(tmp_path / "pipe.txt")
        for path, kind in {
            "pipe.txt": "a FIFO",
            "link.txt": "a FIFO",
            "socket.txt": "a socket",
            "/dev/zero": "a device",
            "/dev/null": "a device",
        }.items():
            with pytest.raises(ValueError, match=f"--eval-text: {path} is {kind}, expected a file or folder"):
                open_sources([path], option="--eval-text")
