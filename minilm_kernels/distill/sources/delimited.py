"""CSV and TSV files."""

from __future__ import annotations

import codecs
import csv
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from .document import LARGEST_RECORD, Cursor, Document, decode, not_utf8, text_document
from .file_kinds import open_bytes
from .lines import ByteFile, rest_of_line


@dataclass(frozen=True)
class DelimitedFile(ByteFile):
    """CSV or TSV with a header, with the text in one column. Quoted cells may contain delimiters, quotes and newlines.

    A record with broken quotes, or with another number of cells than the header, is bad. If a quote does not end,
    reading continues on the line after the record's first line.
    """

    text_column: str
    delimiter: str

    def check(self, option: str) -> None:
        super().check(option)
        with open_bytes(self.path) as file:
            self._header(_CsvLines(file))

    def _header(self, lines: _CsvLines) -> list[str]:
        try:
            header = next(filter(None, self._reader(lines)), [])
        except csv.Error as error:
            raise ValueError(f"{self.path}: no header can be read: {error}") from error
        if header and header.count(self.text_column) != 1:
            raise ValueError(
                f"{self.path}: its first line must be a header with one column {self.text_column!r} (--text-column); "
                f"separated by {self.delimiter!r} it has {', '.join(map(repr, header[:9]))}"
            )
        return header

    def _reader(self, lines: _CsvLines) -> Iterator[list[str]]:
        csv.field_size_limit(max(csv.field_size_limit(), LARGEST_RECORD))  # the default is 128 KiB
        return csv.reader(lines, delimiter=self.delimiter, strict=True)

    def _documents(self, file: BinaryIO, cursor: Cursor | None) -> Iterator[Document]:
        lines = _CsvLines(file)
        header = self._header(lines)
        if cursor is None:
            offset, line = lines.finish(0, 0)
        else:
            offset, line = cursor
            lines.seek(offset)
        reader = self._reader(lines)
        while True:
            begin, cells, problem = line + 1, [], ""
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                problem = f"not {self.path.suffix[1:].upper()} ({error})"
                lines.keep_first()
            problem = problem or lines.undecodable
            offset, line = lines.finish(offset, line)
            after, where = [offset, line], f"{self.path}, line {begin}"
            if problem:
                yield Document(None, where, after, problem)
            elif cells and len(cells) != len(header):
                yield Document(None, where, after, f"it has {len(cells)} cells, the header {len(header)}")
            elif cells:
                yield text_document(cells[header.index(self.text_column)], self.text_column, where, after)


class _CsvLines:
    """An iterator of lines for `csv.reader` that remembers the lines of the current record."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._begin = True
        self._waiting: deque[bytes] = deque()  # lines to be read again
        self._unfinished = False  # the last line continues in the file
        self._record: list[bytes] = []
        self._size = 0  # bytes of the record
        self.undecodable = ""

    def __iter__(self) -> _CsvLines:
        return self

    def __next__(self) -> str:
        if self._size > LARGEST_RECORD:
            raise csv.Error(f"a quote does not end within {LARGEST_RECORD} bytes")
        raw = self._waiting.popleft() if self._waiting else self._file.readline(LARGEST_RECORD + 1)
        if not raw:
            raise StopIteration
        self._record.append(raw)
        self._size += len(raw)
        if len(raw) > LARGEST_RECORD and not raw.endswith(b"\n"):
            self._unfinished = True
            raise csv.Error(f"the line is longer than {LARGEST_RECORD} bytes")
        begin, self._begin = self._begin, False
        if begin:
            raw = raw.removeprefix(codecs.BOM_UTF8)
        try:
            return decode(raw)
        except UnicodeDecodeError as error:
            self.undecodable = self.undecodable or not_utf8(error)
            return raw.decode("utf-8", "surrogateescape")  # quotes and delimiters are still recognized

    def keep_first(self) -> None:
        """Ends the current record after its first line; the other lines will be read again."""
        if len(self._record) > 1:
            self._unfinished = False
        self._waiting.extendleft(reversed(self._record[1:]))
        del self._record[1:]

    def seek(self, offset: int) -> None:
        """Continues at an offset of the file, with a new record."""
        self._file.seek(offset)
        self._record, self._size, self.undecodable = [], 0, ""

    def finish(self, offset: int, line: int) -> tuple[int, int]:
        """Ends the current record, which began at `offset` after `line` lines. Returns both after the record."""
        for raw in self._record:
            offset, line = offset + len(raw), line + 1
        if self._unfinished:
            offset += rest_of_line(self._file)
        self._record, self._size, self._unfinished, self.undecodable = [], 0, False, ""
        return offset, line
