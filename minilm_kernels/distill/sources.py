"""Documents from text files, JSON, CSV, Parquet and hub data sets: streamed, and readable from any place on.

A source yields a `Document` for everything that should be one; what cannot be read is a document without text that
says why, so that the caller decides whether it ends the run. `source.read(place)` continues after a document. A place
is JSON.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import json
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

from .file_kinds import (
    DAMAGED,
    DELIMITERS,
    JSONL_SUFFIXES,
    LINE_SUFFIXES,
    PARQUET_SUFFIXES,
    REFUSED,
    open_bytes,
    read_head,
    refuse_special,
    suffixes,
)
from .json_array import elements

LARGEST_DOCUMENT = 1 << 20  # bytes of plain text, characters of a record's text; what is longer is cut into several
LARGEST_RECORD = 16 << 20  # bytes of a JSON or CSV record, or a Parquet cell; a longer one is a bad document
READ_BYTES = 1 << 20
LEFT_OUT_NAMES = 5
END = "end"  # the place after which there is nothing, though the file goes on

Place = Any


class Document(NamedTuple):
    """A document, or a reason why there is none.

    Attributes:
        text: `None` for a null and for a bad document.
        where: file and line or row, for messages.
        place: what to continue from after it.
        problem: what is wrong with a bad document, "" for others.
        documents: how many this stands for; above 1 only for a damaged part of a Parquet file.
    """

    text: str | None
    where: str
    place: Place
    problem: str = ""
    documents: int = 1


class Prefix:
    """What has been read of a source: its size (bytes of a file, rows of a table) and its SHA-256."""

    def __init__(self) -> None:
        self.size = 0
        self._hash = hashlib.sha256()

    def add(self, content: bytes) -> None:
        """Appends bytes of a file."""
        self._hash.update(content)
        self.size += len(content)

    def add_row(self, value: Any, count: int = 1) -> None:
        """Appends a cell of a table."""
        self._hash.update(json.dumps([value], default=repr).encode())
        self.size += count

    def copy(self) -> Prefix:
        """The same, to be continued apart from this one."""
        other = Prefix()
        other.size, other._hash = self.size, self._hash.copy()
        return other

    def digest(self) -> str:
        """SHA-256, hexadecimal."""
        return self._hash.hexdigest()


class Source(Protocol):
    """One file or data set."""

    @property
    def name(self) -> str:
        """What must be the same for a place in it to stay valid."""

    def read(self, place: Place | None = None, prefix: Prefix | None = None) -> Iterator[Document]:
        """Documents from `place` on (`None`: from the start).

        Args:
            prefix: what was read before `place`; it grows, and holds what lies before its place when a document is
                yielded.
        """

    def prefix(self, size: int) -> Prefix:
        """The first `size` bytes or rows, read again; fewer if there are no more."""


@dataclass(frozen=True)
class ByteFile(ABC):
    """A file of lines or JSON, maybe compressed, whose places begin with an offset in its unpacked bytes."""

    path: Path
    name: str

    def check(self, option: str) -> None:
        """Raises `ValueError` if the file is not text, as its first bytes show."""
        read_head(self.path, option)

    def read(self, place: Place | None = None, prefix: Prefix | None = None) -> Iterator[Document]:
        if place == END:
            return
        prefix = Prefix() if prefix is None else prefix
        try:
            with open_bytes(self.path) as file:
                yield from self._documents(file, place, prefix)
        except (*DAMAGED, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the disk's fault; a later try may go well
            problem = f"the rest of the file cannot be unpacked: {error}"
            yield Document(None, f"{self.path}, byte {prefix.size}", END, problem)

    @abstractmethod
    def _documents(self, file: BinaryIO, place: Place | None, prefix: Prefix) -> Iterator[Document]:
        """As `read`."""

    def prefix(self, size: int) -> Prefix:
        prefix = Prefix()
        try:
            with open_bytes(self.path) as file:
                while block := file.read(min(READ_BYTES, size - prefix.size)):
                    prefix.add(block)
        except (*DAMAGED, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
        return prefix


@dataclass(frozen=True)
class TextFile(ByteFile):
    """Plain UTF-8 text. Documents are separated by blank lines, or are the lines (`by_line`).

    A document that has an undecodable line is bad as a whole.
    """

    by_line: bool

    def _documents(self, file: BinaryIO, place: Place | None, prefix: Prefix) -> Iterator[Document]:
        parts: list[str] = []
        size = begin = 0
        where = problem = ""
        after = place
        for line, raw, after in _lines(file, place, prefix):
            blank = not raw.strip()
            if not blank:
                begin = begin or line
                size += len(raw)
                try:
                    parts.append(decode(raw))
                    blank = not parts[-1].strip()
                except UnicodeDecodeError as error:
                    where, problem = where or f"{self.path}, line {line}", problem or _not_utf8(error)
            cut = not raw.endswith(b"\n")
            if size and (blank or self.by_line or cut or size >= LARGEST_DOCUMENT):
                yield self._document(parts, where or f"{self.path}, line {begin}", after, problem)
                parts, size, begin, where, problem = [], 0, 0, "", ""
        if size:
            yield self._document(parts, where or f"{self.path}, line {begin}", after, problem)

    def _document(self, parts: list[str], where: str, after: Place, problem: str) -> Document:
        return Document(None if problem else "".join(parts), where, after, problem)


@dataclass(frozen=True)
class JsonLines(ByteFile):
    """One JSON object a line, the text in one of its fields."""

    text_field: str

    def _documents(self, file: BinaryIO, place: Place | None, prefix: Prefix) -> Iterator[Document]:
        for line, raw, after in _records(file, place, prefix):
            where = f"{self.path}, line {line}"
            if raw is None:
                yield Document(None, where, after, f"the line is longer than {LARGEST_RECORD} bytes")
            elif raw.strip():
                yield _json_document(raw, self.text_field, where, after)


@dataclass(frozen=True)
class JsonArray(ByteFile):
    """One array of JSON objects, the text in one of their fields; read element by element."""

    text_field: str

    def _documents(self, file: BinaryIO, place: Place | None, prefix: Prefix) -> Iterator[Document]:
        for element in elements(file, place, prefix.add, LARGEST_RECORD):
            where = f"{self.path}, line {element.line}, element {element.number}"
            after = END if element.place is None else element.place
            if element.raw is None:
                yield Document(None, where, after, element.problem)
            else:
                yield _json_document(element.raw, self.text_field, where, after)


@dataclass(frozen=True)
class DelimitedFile(ByteFile):
    """CSV or TSV with a header, the text in one column. Quoted cells may hold delimiters, quotes and newlines.

    A record that is not read as quoted, or has another number of cells than the header, is bad; if its quotes do not
    end, reading continues with the line after its first.
    """

    text_field: str
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
        if header and header.count(self.text_field) != 1:
            raise ValueError(
                f"{self.path}: its first line must be a header with one column {self.text_field!r} (--text-field); "
                f"separated by {self.delimiter!r} it has {', '.join(map(repr, header[:9]))}"
            )
        return header

    def _reader(self, lines: _CsvLines) -> Iterator[list[str]]:
        csv.field_size_limit(max(csv.field_size_limit(), LARGEST_RECORD))  # the default is 128 KiB
        return csv.reader(lines, delimiter=self.delimiter, strict=True)

    def _documents(self, file: BinaryIO, place: Place | None, prefix: Prefix) -> Iterator[Document]:
        lines = _CsvLines(file)
        header = self._header(lines)
        if place is None:
            offset, line = lines.finish(0, 0, prefix)
        else:
            offset, line = place
            lines.seek(offset)
        reader = self._reader(lines)
        while True:
            begin, row, problem = line + 1, [], ""
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                problem = f"not {self.path.suffix[1:].upper()} ({error})"
                lines.only_first()
            problem = problem or lines.undecodable
            offset, line = lines.finish(offset, line, prefix)
            after, where = [offset, line], f"{self.path}, line {begin}"
            if problem:
                yield Document(None, where, after, problem)
            elif row and len(row) != len(header):
                yield Document(None, where, after, f"it has {len(row)} cells, the header {len(header)}")
            elif row:
                yield _document(row[header.index(self.text_field)], self.text_field, where, after)


class _CsvLines:
    """Lines for `csv.reader`, which remembers those of the present record."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._begin = True
        self._waiting: deque[bytes] = deque()  # read before, to be read again
        self._unfinished = False  # the last line goes on in the file
        self._record: list[bytes] = []
        self._size = 0  # of the record
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
            self.undecodable = self.undecodable or _not_utf8(error)
            return raw.decode("utf-8", "surrogateescape")  # its quotes and delimiters are right all the same

    def only_first(self) -> None:
        """Makes the present record end with its first line; the others are read again."""
        if len(self._record) > 1:
            self._unfinished = False
        self._waiting.extendleft(reversed(self._record[1:]))
        del self._record[1:]

    def seek(self, offset: int) -> None:
        """Continues elsewhere, with a new record."""
        self._file.seek(offset)
        self._record, self._size, self.undecodable = [], 0, ""

    def finish(self, offset: int, line: int, prefix: Prefix) -> tuple[int, int]:
        """Ends the present record, which began at `offset` after `line` lines; returns both after it."""
        for raw in self._record:
            prefix.add(raw)
            offset, line = offset + len(raw), line + 1
        if self._unfinished:
            offset += _rest_of_line(self._file, prefix)
        self._record, self._size, self._unfinished, self.undecodable = [], 0, False, ""
        return offset, line


@dataclass(frozen=True)
class ParquetFile:
    """Rows of a Parquet file, the text in one column. A place is a row number."""

    path: Path
    name: str
    text_field: str

    def check(self, option: str) -> None:
        """Raises `ValueError` if the file cannot be opened or has no column of text with that name."""
        with self._open() as file:
            names = file.schema_arrow.names
            if names.count(self.text_field) != 1:
                raise ValueError(
                    f"{self.path}: no column {self.text_field!r} (--text-field), or several; it has {', '.join(names)}"
                )
            kind = file.schema_arrow.field(self.text_field).type
            values = kind.value_type if hasattr(kind, "index_type") else kind  # of a dictionary
            if str(values) not in ("string", "large_string", "string_view", "null"):
                raise ValueError(f"{self.path}: column {self.text_field!r} (--text-field) is {kind}, expected text")

    def _open(self) -> Any:
        parquet = _import("pyarrow.parquet", "Parquet files")
        try:
            return parquet.ParquetFile(self.path, page_checksum_verification=True)
        except (ValueError, OSError) as error:  # pyarrow's ArrowInvalid is a ValueError
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise ValueError(f"{self.path}: not a readable Parquet file: {error}") from error

    def read(self, place: Place | None = None, prefix: Prefix | None = None) -> Iterator[Document]:
        prefix = Prefix() if prefix is None else prefix
        wanted = place or 0
        with self._open() as file:
            end = 0
            for group in range(file.num_row_groups):
                row, end = end, end + file.metadata.row_group(group).num_rows
                if end <= wanted:
                    continue
                try:
                    for batch in file.iter_batches(
                        self._batch_rows(file, group), row_groups=[group], columns=[self.text_field]
                    ):
                        for value, problem in _cells(batch.column(0)):
                            row += 1
                            if row > wanted:
                                prefix.add_row(value)
                                where = f"{self.path}, row {row}"
                                if problem:
                                    yield Document(None, where, row, problem)
                                else:
                                    yield _document(value, self.text_field, where, row)
                except (ValueError, OSError) as error:
                    if isinstance(error, OSError) and error.errno is not None:
                        raise
                    first = max(row, wanted)
                    prefix.add_row(None, end - first)
                    yield Document(
                        None, f"{self.path}, rows {first + 1} to {end}", end, f"damaged: {error}", end - first
                    )

    def _batch_rows(self, file: Any, group: int) -> int:
        """Rows that are decoded together: at most 1024, fewer where cells are long."""
        metadata = file.metadata.row_group(group)
        columns = (metadata.column(number) for number in range(metadata.num_columns))
        size = sum(c.total_uncompressed_size for c in columns if c.path_in_schema == self.text_field)
        return max(1, min(1024, LARGEST_RECORD * metadata.num_rows // max(1, size)))

    def prefix(self, size: int) -> Prefix:
        return _row_prefix(self, size)


def _cells(column: Any) -> Iterator[tuple[Any, str]]:
    """Value and problem of every cell; a bad cell's value only stands for it in the prefix."""
    pyarrow = _import("pyarrow", "Parquet files")
    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pyarrow.types.is_null(column.type):
        yield from [(None, "")] * len(column)
        return
    for cell in column.cast(pyarrow.large_binary(), safe=False):
        content = cell.as_buffer()
        if content is None:
            yield None, ""
        elif content.size > LARGEST_RECORD:
            yield hashlib.sha256(content).hexdigest(), f"the cell is longer than {LARGEST_RECORD} bytes"
        else:
            raw = content.to_pybytes()
            try:
                yield decode(raw), ""
            except UnicodeDecodeError as error:
                yield hashlib.sha256(raw).hexdigest(), _not_utf8(error)


@dataclass(frozen=True)
class HubDataset:
    """A data set of the hub, or a local folder of one, streamed through `datasets`.

    A place is the number of records and the stream's state. What was read of a folder is told by its records, of a data
    set of the hub by its revision: reading it again would mean to download it again.
    """

    name: str
    config: str | None
    split: str
    text_field: str

    def _open(self) -> tuple[Any, str]:
        """The stream and its revision, "" for a folder."""
        datasets = _import("datasets", "hub data sets")
        try:
            builder = datasets.load_dataset_builder(self.name, self.config)
            stream = builder.as_streaming_dataset(split=self.split)
        except Exception as error:  # the library's errors share no base class
            raise ValueError(f"--dataset {self.name}, split {self.split!r}: cannot be opened: {error}") from error
        return stream, "" if Path(self.name).exists() else str(builder.hash)

    def read(self, place: Place | None = None, prefix: Prefix | None = None) -> Iterator[Document]:
        stream, revision = self._open()
        if stream.column_names and self.text_field not in stream.column_names:
            raise ValueError(
                f"--dataset {self.name}: no field {self.text_field!r} (--text-field); "
                f"it has {', '.join(stream.column_names)}"
            )
        prefix = Prefix() if prefix is None else prefix
        number = 0
        if place is not None:
            number, state = place
            stream.load_state_dict(state)
        elif revision:
            prefix.add_row(revision, 0)
        records = iter(stream)
        while True:
            try:
                record = next(records)
            except StopIteration:
                return
            except Exception as error:
                raise ValueError(f"--dataset {self.name}: reading failed after row {number}: {error}") from error
            number += 1
            document = _record_document(
                record, self.text_field, f"--dataset {self.name}, row {number}", [number, stream.state_dict()]
            )
            if revision:
                prefix.size += 1
            else:
                prefix.add_row(document.problem or document.text)
            yield document

    def prefix(self, size: int) -> Prefix:
        _, revision = self._open()
        if not revision:
            return _row_prefix(self, size)
        prefix = Prefix()
        prefix.add_row(revision, size)
        return prefix


def _row_prefix(source: Source, size: int) -> Prefix:
    prefix = Prefix()
    if size:
        for _ in source.read(None, prefix):
            if prefix.size >= size:
                break
    return prefix


def open_sources(
    paths: Sequence[str],
    *,
    text_field: str = "text",
    by_line: bool = False,
    option: str = "--text",
    say: Callable[[str], None] = lambda message: None,
) -> list[Source]:
    """The sources of files and folders, in a stable order.

    Folders are searched recursively for files with known suffixes (hidden ones are left out); `say` is told what else
    they hold. A file that is named itself may have any suffix and is plain text unless suffix or content say otherwise.

    Raises:
        FileNotFoundError: a path is missing.
        ValueError: a folder without text; a file that is not text by its suffix or its first bytes, or lacks the column
            `text_field`; what is neither file nor folder.
    """
    files: list[tuple[Path, str]] = []
    for given in paths:
        path = Path(given)
        if not given:
            raise ValueError(f"{option}: got an empty path")
        if path.is_dir():
            files += [(file, file.relative_to(path).as_posix()) for file in _files_in(path, option, say)]
        elif path.exists():
            files.append((path, path.name))
        else:
            raise FileNotFoundError(f"{option}: there is no file or folder {path}")
    return [_open(path, name, text_field, by_line, option) for path, name in files]


def _files_in(folder: Path, option: str, say: Callable[[str], None]) -> list[Path]:
    found: list[Path] = []
    left_out: list[str] = []
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if path.is_dir() or any(part.startswith(".") for part in inside.parts):
            continue
        kind, packed = suffixes(path)
        known = kind in LINE_SUFFIXES or (kind in PARQUET_SUFFIXES and not packed)
        if known and path.is_file():
            found.append(path)
        else:
            left_out.append(str(inside))
    names = ", ".join(left_out[:LEFT_OUT_NAMES]) + (", ..." if len(left_out) > LEFT_OUT_NAMES else "")
    if not found:
        readable = ", ".join((*LINE_SUFFIXES, *PARQUET_SUFFIXES))
        raise ValueError(
            f"{option}: folder {folder} holds no text ({readable}, or the former as .gz, .bz2 or .xz)"
            + (f"; it holds {names}" if names else "")
        )
    if left_out:
        say(f"{option}: left out of folder {folder}: {len(left_out)} files that are no text by their suffix ({names})")
    return found


def _open(path: Path, name: str, text_field: str, by_line: bool, option: str) -> Source:
    refuse_special(path, option)
    kind, packed = suffixes(path)
    advice = REFUSED.get(kind) or (kind in PARQUET_SUFFIXES and packed and "unpack it first")
    if advice:
        raise ValueError(f"{option}: {path} cannot be read as text; {advice}")
    source: JsonLines | JsonArray | DelimitedFile | ParquetFile | TextFile
    if kind in PARQUET_SUFFIXES:
        source = ParquetFile(path, name, text_field)
    elif kind in DELIMITERS:
        source = DelimitedFile(path, name, text_field, DELIMITERS[kind])
    elif kind == ".json" and read_head(path, option).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        source = JsonArray(path, name, text_field)
    elif kind == ".json" or kind in JSONL_SUFFIXES:
        source = JsonLines(path, name, text_field)
    else:
        source = TextFile(path, name, by_line)
    source.check(option)
    return source


def _lines(file: BinaryIO, place: Place | None, prefix: Prefix) -> Iterator[tuple[int, bytes, Place]]:
    """(line number, line, place after it); a line of `LARGEST_DOCUMENT` bytes or more comes in parts cut at spaces."""
    offset, line = place or (0, 0)
    file.seek(offset)
    rest, whole = b"", True
    while raw := rest + file.readline(LARGEST_DOCUMENT - len(rest)):
        line += whole
        whole, rest = raw.endswith(b"\n"), b""
        if len(raw) == LARGEST_DOCUMENT and not whole:
            cut = raw.rfind(b" ") + 1 or _character_border(raw)
            raw, rest = raw[:cut], raw[cut:]
        prefix.add(raw)
        text = raw if offset else raw.removeprefix(codecs.BOM_UTF8)
        offset += len(raw)
        yield line, text, [offset, line - (not whole)]


def _records(file: BinaryIO, place: Place | None, prefix: Prefix) -> Iterator[tuple[int, bytes | None, Place]]:
    """(line number, line, place after it); `None` for a line above `LARGEST_RECORD`."""
    offset, line = place or (0, 0)
    file.seek(offset)
    while raw := file.readline(LARGEST_RECORD + 1):
        prefix.add(raw)
        text: bytes | None = raw if offset else raw.removeprefix(codecs.BOM_UTF8)
        line, offset = line + 1, offset + len(raw)
        if len(raw) > LARGEST_RECORD and not raw.endswith(b"\n"):
            text = None
            offset += _rest_of_line(file, prefix)
        yield line, text, [offset, line]


def _rest_of_line(file: BinaryIO, prefix: Prefix) -> int:
    """Reads to the end of the line; returns how many bytes."""
    size = 0
    while part := file.readline(READ_BYTES):
        prefix.add(part)
        size += len(part)
        if part.endswith(b"\n"):
            break
    return size


def _character_border(raw: bytes) -> int:
    """The end of the last whole UTF-8 character, if one of them was cut."""
    cut = len(raw)
    while cut > len(raw) - 4 and raw[cut - 1] & 0xC0 == 0x80:
        cut -= 1
    return cut - 1 if raw[cut - 1] >= 0xC0 else len(raw)


def decode(raw: bytes) -> str:
    """UTF-8 as text without surrogates: pairs become their character, lone ones U+FFFD. Raises `UnicodeDecodeError`."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return without_surrogates(raw.decode("utf-8", "surrogatepass"))


def without_surrogates(text: str) -> str:
    """`text` with U+FFFD for every lone surrogate, which neither UTF-8 nor tokenizers can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8 (byte 0x{error.object[error.start]:02x} at {error.start})"


def _json_document(raw: bytes, name: str, where: str, place: Place) -> Document:
    try:
        record = json.loads(decode(raw.strip()))
    except UnicodeDecodeError as error:
        return Document(None, where, place, _not_utf8(error))
    except (ValueError, RecursionError) as error:
        return Document(None, where, place, f"not JSON ({error})")
    return _record_document(record, name, where, place)


def _record_document(record: Any, name: str, where: str, place: Place) -> Document:
    if record is None:
        return Document(None, where, place)
    if not isinstance(record, dict):
        return Document(None, where, place, f"it is {_kind(record)}, expected an object")
    if name not in record:
        names = ", ".join(map(str, list(record)[:9])) or "none"
        return Document(None, where, place, f"no field {name!r} (--text-field); it has {names}")
    return _document(record[name], name, where, place)


def _document(value: Any, name: str, where: str, place: Place) -> Document:
    """The document of a field's value."""
    if value is None:
        return Document(None, where, place)
    if not isinstance(value, str):
        return Document(None, where, place, f"field {name!r} is {_kind(value)}, expected text")
    return Document(without_surrogates(value), where, place)


def _kind(value: Any) -> str:
    """The type of a value, in the words of JSON."""
    words = {
        dict: "an object",
        list: "an array",
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a number",
    }
    return words.get(type(value), type(value).__name__)


def _import(module: str, purpose: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{purpose} need {error.name}: pip install minilm_kernels[data]") from error
