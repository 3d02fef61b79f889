"""Files of text lines, JSON lines or a JSON array, optionally compressed."""

from __future__ import annotations

import codecs
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from .document import (
    END,
    LARGEST_DOCUMENT,
    LARGEST_RECORD,
    READ_BYTES,
    Cursor,
    Document,
    decode,
    file_fingerprint,
    json_document,
    not_utf8,
)
from .file_kinds import DAMAGED, open_bytes, read_head
from .json_array import elements


@dataclass(frozen=True)
class ByteFile(ABC):
    """A file whose cursors begin with an offset into its (decompressed) bytes."""

    path: Path
    name: str

    def check(self, option: str) -> None:
        """Raises `ValueError` if the first bytes of the file are not text."""
        read_head(self.path, option)

    def read(self, cursor: Cursor | None = None) -> Iterator[Document]:
        if cursor == END:
            return
        after = cursor
        try:
            with open_bytes(self.path) as file:
                for document in self._documents(file, cursor):
                    after = document.cursor
                    yield document
        except (*DAMAGED, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # a disk error: a later attempt may succeed
            problem = f"the rest of the file cannot be decompressed: {error}"
            yield Document(None, f"{self.path}, after byte {after[0] if after else 0}", END, problem)

    @abstractmethod
    def _documents(self, file: BinaryIO, cursor: Cursor | None) -> Iterator[Document]:
        """Implements `read` for an open file."""

    def fingerprint(self) -> dict[str, Any]:
        return file_fingerprint(self.path)


@dataclass(frozen=True)
class TextFile(ByteFile):
    """Plain UTF-8 text. Documents are paragraphs, separated by blank lines, or lines (`by_line`).

    A document with a line that is not UTF-8 is bad as a whole.
    """

    by_line: bool

    def _documents(self, file: BinaryIO, cursor: Cursor | None) -> Iterator[Document]:
        parts: list[str] = []
        size = begin = 0
        where = problem = ""
        after = cursor
        for line, raw, after in _lines(file, cursor):
            blank = not raw.strip()
            if not blank:
                begin = begin or line
                size += len(raw)
                try:
                    parts.append(decode(raw))
                    blank = not parts[-1].strip()
                except UnicodeDecodeError as error:
                    where, problem = where or f"{self.path}, line {line}", problem or not_utf8(error)
            cut = not raw.endswith(b"\n")
            if size and (blank or self.by_line or cut or size >= LARGEST_DOCUMENT):
                yield self._document(parts, where or f"{self.path}, line {begin}", after, problem)
                parts, size, begin, where, problem = [], 0, 0, "", ""
        if size:
            yield self._document(parts, where or f"{self.path}, line {begin}", after, problem)

    def _document(self, parts: list[str], where: str, after: Cursor, problem: str) -> Document:
        return Document(None if problem else "".join(parts), where, after, problem)


@dataclass(frozen=True)
class JsonLines(ByteFile):
    """One JSON object per line, with the text in one of its members."""

    text_column: str

    def _documents(self, file: BinaryIO, cursor: Cursor | None) -> Iterator[Document]:
        for line, raw, after in _records(file, cursor):
            where = f"{self.path}, line {line}"
            if raw is None:
                yield Document(None, where, after, f"the line is longer than {LARGEST_RECORD} bytes")
            elif raw.strip():
                yield json_document(raw, self.text_column, where, after)


@dataclass(frozen=True)
class JsonArray(ByteFile):
    """An array of JSON objects, with the text in one of their members. The array is read element by element."""

    text_column: str

    def _documents(self, file: BinaryIO, cursor: Cursor | None) -> Iterator[Document]:
        for element in elements(file, cursor, LARGEST_RECORD):
            where = f"{self.path}, line {element.line}, element {element.number}"
            after = END if element.cursor is None else element.cursor
            if element.raw is None:
                yield Document(None, where, after, element.problem)
            else:
                yield json_document(element.raw, self.text_column, where, after)


def _lines(file: BinaryIO, cursor: Cursor | None) -> Iterator[tuple[int, bytes, Cursor]]:
    """Yields (line number, line, cursor after it). Lines of `LARGEST_DOCUMENT` bytes or more are split at spaces."""
    offset, line = cursor or (0, 0)
    file.seek(offset)
    rest, whole = b"", True
    while raw := rest + file.readline(LARGEST_DOCUMENT - len(rest)):
        line += whole
        whole, rest = raw.endswith(b"\n"), b""
        if len(raw) == LARGEST_DOCUMENT and not whole:
            cut = raw.rfind(b" ") + 1 or _character_border(raw)
            raw, rest = raw[:cut], raw[cut:]
        text = raw if offset else raw.removeprefix(codecs.BOM_UTF8)
        offset += len(raw)
        yield line, text, [offset, line - (not whole)]


def _records(file: BinaryIO, cursor: Cursor | None) -> Iterator[tuple[int, bytes | None, Cursor]]:
    """Yields (line number, line, cursor after it), with `None` for lines longer than `LARGEST_RECORD`."""
    offset, line = cursor or (0, 0)
    file.seek(offset)
    while raw := file.readline(LARGEST_RECORD + 1):
        text: bytes | None = raw if offset else raw.removeprefix(codecs.BOM_UTF8)
        line, offset = line + 1, offset + len(raw)
        if len(raw) > LARGEST_RECORD and not raw.endswith(b"\n"):
            text = None
            offset += rest_of_line(file)
        yield line, text, [offset, line]


def rest_of_line(file: BinaryIO) -> int:
    """Reads to the end of the line. Returns the number of bytes."""
    size = 0
    while part := file.readline(READ_BYTES):
        size += len(part)
        if part.endswith(b"\n"):
            break
    return size


def _character_border(raw: bytes) -> int:
    """The end of the last complete UTF-8 character."""
    cut = len(raw)
    while cut > len(raw) - 4 and raw[cut - 1] & 0xC0 == 0x80:
        cut -= 1
    return cut - 1 if raw[cut - 1] >= 0xC0 else len(raw)
