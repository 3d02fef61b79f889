"""Recognizes files that can be read as text, by their suffix and their first bytes."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import re
import stat
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

TEXT_SUFFIXES = (".txt", ".text", ".md")
JSONL_SUFFIXES = (".jsonl", ".ndjson")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
PARQUET_SUFFIXES = (".parquet",)
LINE_SUFFIXES = (*TEXT_SUFFIXES, *JSONL_SUFFIXES, ".json", *DELIMITERS)
PACKED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}

_UNPACK = "decompress it first"
_EXTRACT = "extract its text into a .txt or .jsonl file first"
_EXPORT = "export its text into a .txt, .jsonl or .parquet file first"
REFUSED = {
    **dict.fromkeys((".zip", ".7z", ".rar", ".tar", ".tgz", ".tbz2", ".txz", ".zst", ".lz4", ".br", ".z"), _UNPACK),
    **dict.fromkeys((".html", ".htm", ".xhtml", ".xml", ".rtf", ".epub", ".svg"), _EXTRACT),
    **dict.fromkeys((".pdf", ".ps", ".doc", ".docx", ".odt", ".ppt", ".pptx", ".xls", ".xlsx", ".ods"), _EXTRACT),
    **dict.fromkeys((".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".gguf", ".onnx", ".npy", ".npz"), _EXPORT),
    **dict.fromkeys((".pkl", ".pickle", ".h5", ".hdf5", ".arrow", ".feather", ".orc", ".avro", ".db"), _EXPORT),
    **dict.fromkeys((".sqlite", ".exe", ".so", ".o", ".png", ".jpg", ".jpeg", ".gif", ".mp3", ".mp4"), _EXPORT),
}
_SIGNATURES = {
    b"\x1f\x8b": ("data compressed with gzip", "decompress it, or give it the suffix .gz"),
    b"BZh": ("data compressed with bzip2", "decompress it, or give it the suffix .bz2"),
    b"\xfd7zXZ\x00": ("data compressed with xz", "decompress it, or give it the suffix .xz"),
    b"\x28\xb5\x2f\xfd": ("data compressed with zstd", _UNPACK),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", _UNPACK),
    b"PK\x03\x04": ("a zip archive (so are .docx, .pt and .npz files)", _EXPORT),
    b"PK\x05\x06": ("an empty zip archive", _EXPORT),
    b"Rar!": ("a rar archive", _UNPACK),
    b"%PDF": ("a PDF document", _EXTRACT),
    b"%!PS": ("a PostScript document", _EXTRACT),
    b"{\\rtf": ("an RTF document", _EXTRACT),
    b"\xd0\xcf\x11\xe0": ("an old Office document", _EXTRACT),
    b"PAR1": ("a Parquet file", "give it the suffix .parquet"),
    b"ARROW1": ("an Arrow file", _EXPORT),
    b"SQLite format 3": ("an SQLite database", _EXPORT),
    b"\x93NUMPY": ("a NumPy array", _EXPORT),
    b"\x89HDF": ("an HDF5 file", _EXPORT),
    b"GGUF": ("a GGUF model", _EXPORT),
    b"\x7fELF": ("a program", _EXPORT),
    b"\x89PNG": ("a picture", _EXPORT),
    b"\xff\xd8\xff": ("a picture", _EXPORT),
    b"GIF8": ("a picture", _EXPORT),
}
_MARKUP = (b"<!doctype html", b"<html", b"<?xml")
_BYTE_ORDER_MARKS = {  # UTF-32 first, because its mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_CONTROL = re.compile(rb"[\x00-\x06\x0e-\x1a\x1c-\x1f]")  # without those that occur in text files
_HEAD = 1 << 16  # number of first bytes that are examined
_PART = 200  # undecodable text is counted by parts: lines, cut to this number of characters
_FEW, _MANY = 3, 20  # thresholds of undecodable parts, see _other_encoding
_ESCAPED = re.compile("[\udc80-\udcff]")

DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError)


def suffixes(path: Path) -> tuple[str, str]:
    """The suffixes of content and compression in lower case, for example (".txt", ".gz") or (".txt", "")."""
    last = path.suffix.lower()
    return (Path(path.stem).suffix.lower(), last) if last in PACKED else (last, "")


def refuse_special(path: Path, option: str) -> None:
    """Raises `ValueError` if the path is neither a file nor a folder, because reading it might never end."""
    mode = path.stat().st_mode
    kinds = {
        "a FIFO": stat.S_ISFIFO(mode),
        "a device": stat.S_ISCHR(mode) or stat.S_ISBLK(mode),
        "a socket": stat.S_ISSOCK(mode),
    }
    for kind, true in kinds.items():
        if true:
            raise ValueError(f"{option}: {path} is {kind}, expected a file or folder; write its text to a file first")


def open_bytes(path: Path) -> BinaryIO:
    """Opens a file for reading, decompressed. Carriage returns become newlines if the file has no other line ends."""
    opener = PACKED.get(path.suffix.lower())
    file: BinaryIO = path.open("rb") if opener is None else opener(path, "rb")
    try:
        head = file.read(_HEAD)
        file.seek(0)
    except BaseException:
        file.close()
        raise
    if b"\r" in head and b"\n" not in head:
        return io.BufferedReader(_CarriageReturns(file))  # type: ignore[type-var]
    return file


class _CarriageReturns(io.RawIOBase):
    """A file whose carriage returns are read as newlines; sizes and offsets stay the same."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        content = self._file.read(len(buffer)).replace(b"\r", b"\n")
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        self._file.close()
        super().close()


def read_head(path: Path, option: str) -> bytes:
    """The first (decompressed) bytes. Raises `ValueError` that names the file if they are not UTF-8 text."""
    try:
        with open_bytes(path) as file:
            head = file.read(_HEAD)
    except (*DAMAGED, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{option}: {path} cannot be decompressed: {error}") from error
    found = _not_text(head, suffixes(path)[0])
    if found:
        kind, advice = found
        raise ValueError(f"{option}: {path} is not plain UTF-8 text but {kind}; {advice}")
    return head


def _not_text(head: bytes, suffix: str) -> tuple[str, str] | None:
    """Returns (kind of file, advice) for a file with these first bytes; `None` for text."""
    for mark, name in _BYTE_ORDER_MARKS.items():
        if head.startswith(mark):
            return name, f"convert it first: iconv -f {name} -t UTF-8"
    for signature, found in _SIGNATURES.items():
        if head.startswith(signature):
            return found
    if head[5:9] == b"\0\0\0{":
        return "a safetensors file", _EXPORT
    if suffix not in LINE_SUFFIXES and head.lstrip()[:16].lower().startswith(_MARKUP):
        return "markup", _EXTRACT
    # In UTF-16 and UTF-32, every second byte or three of four bytes are NUL or control characters, and such text may
    # be valid UTF-8 by accident. Single control characters are allowed.
    controls = len(_CONTROL.findall(head))
    if controls > 1 and controls * 10 >= len(head):
        name = "UTF-32" if head.count(0) * 2 > len(head) + 2 else "UTF-16"
        return (
            f"{name} without a byte order mark, or binary",
            f"convert it first: iconv -f {name}LE (or {name}BE) -t UTF-8",
        )
    return _other_encoding(head)


def _other_encoding(head: bytes) -> tuple[str, str] | None:
    # Invalid bytes are decoded to characters that valid bytes never give.
    text = (
        head[:-4].decode("utf-8", "surrogateescape") if len(head) == _HEAD else head.decode("utf-8", "surrogateescape")
    )
    parts = [line[i : i + _PART] for line in text.splitlines() if line.strip() for i in range(0, len(line), _PART)]
    bad = sum(_ESCAPED.search(part) is not None for part in parts)
    # A few bad parts mean damage, and their documents are skipped. The file has another encoding if most parts are bad,
    # or if many parts are bad and the text has no valid character beyond ASCII.
    some_right = any(character > "\x7f" and not _ESCAPED.match(character) for character in set(text))
    if (bad >= _FEW and bad * 2 > len(parts)) or (bad >= _MANY and bad * 10 > len(parts) and not some_right):
        return (
            f"text in another encoding ({bad} of the first {len(parts)} lines are not UTF-8)",
            "convert it first, for example: iconv -f LATIN1 -t UTF-8",
        )
    return None
