"""Documents from text files, JSONL, Parquet and hub data sets: streamed, and readable from any place on.

A source yields `(text, place)`; `source.read(place)` continues after that document. A place is JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

TEXT_SUFFIXES = (".txt", ".text", ".md")
JSONL_SUFFIXES = (".jsonl", ".ndjson")
PARQUET_SUFFIXES = (".parquet",)
PACKED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".tar", ".tgz")
LARGEST_DOCUMENT = 1 << 20  # bytes; longer plain text is cut, so that no file is ever held whole

Place = Any


class Source(Protocol):
    """One file or data set."""

    def read(self, place: Place | None = None) -> Iterator[tuple[str, Place]]:
        """Documents from `place` on (`None`: from the start), each with the place after it."""

    def identity(self) -> list[Any]:
        """What must be the same for a place in it to stay valid."""


@dataclass(frozen=True)
class TextFile:
    """Plain UTF-8 text. Documents are separated by blank lines, or are the lines (`by_line`)."""

    path: Path
    by_line: bool

    def identity(self) -> list[Any]:
        return [self.path.name, self.path.stat().st_size]

    def read(self, place: Place | None = None) -> Iterator[tuple[str, Place]]:
        parts: list[str] = []
        size = 0
        with self.path.open("rb") as file:
            for _, text, place_after in _lines(file, self.path, place, LARGEST_DOCUMENT):
                blank = not text.strip()
                if not blank:
                    parts.append(text)
                    size += len(text)
                if parts and (blank or self.by_line or size >= LARGEST_DOCUMENT):
                    yield "".join(parts), place_after
                    parts, size = [], 0
            if parts:
                yield "".join(parts), place_after


@dataclass(frozen=True)
class JsonLines:
    """One JSON object a line, the text in one of its fields."""

    path: Path
    text_field: str

    def identity(self) -> list[Any]:
        return [self.path.name, self.path.stat().st_size]

    def read(self, place: Place | None = None) -> Iterator[tuple[str, Place]]:
        with self.path.open("rb") as file:
            for line, text, place_after in _lines(file, self.path, place, -1):
                if not text.strip():
                    continue
                where = f"{self.path}, line {line}"
                try:
                    record = json.loads(text)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{where}: not JSON ({error}); repair or remove the line") from None
                if not isinstance(record, dict):
                    raise ValueError(f"{where}: expected a JSON object, got {type(record).__name__}")
                yield _field(record, self.text_field, where), place_after


@dataclass(frozen=True)
class ParquetFile:
    """Rows of a Parquet file, the text in one column; rows without text are skipped. A place is a row number."""

    path: Path
    text_field: str

    def identity(self) -> list[Any]:
        return [self.path.name, self.path.stat().st_size]

    def read(self, place: Place | None = None) -> Iterator[tuple[str, Place]]:
        parquet = _import("pyarrow.parquet", "Parquet files")
        try:
            file = parquet.ParquetFile(self.path)
        except (ValueError, OSError) as error:  # pyarrow's ArrowInvalid is a ValueError
            raise ValueError(f"{self.path}: not a readable Parquet file: {error}") from error
        with file:
            names = file.schema_arrow.names
            if self.text_field not in names:
                raise ValueError(
                    f"{self.path}: no column {self.text_field!r} (--text-field); it has {', '.join(names)}"
                )
            first, wanted = 0, place or 0
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if first + rows > wanted:
                    row = first
                    for batch in file.iter_batches(1024, row_groups=[group], columns=[self.text_field]):
                        for text in batch.column(0).to_pylist():
                            row += 1
                            if row > wanted and text is not None:
                                yield _text(text, self.text_field, f"{self.path}, row {row}"), row
                first += rows


@dataclass(frozen=True)
class HubDataset:
    """A data set of the hub, or a local folder of one, streamed through `datasets`. A place is its stream's state."""

    name: str
    config: str | None
    split: str
    text_field: str

    def identity(self) -> list[Any]:
        return [self.name, self.config, self.split]

    def read(self, place: Place | None = None) -> Iterator[tuple[str, Place]]:
        datasets = _import("datasets", "hub data sets")
        try:
            stream = datasets.load_dataset(self.name, self.config, split=self.split, streaming=True)
        except Exception as error:  # the library's errors share no base class
            raise ValueError(f"--dataset {self.name}, split {self.split!r}: cannot be opened: {error}") from error
        if place is not None:
            stream.load_state_dict(place)
        for record in stream:
            yield _field(record, self.text_field, f"--dataset {self.name}"), stream.state_dict()


def open_sources(
    paths: Sequence[str], *, text_field: str = "text", by_line: bool = False, option: str = "--text"
) -> list[Source]:
    """The sources of files and folders, in a stable order.

    Folders are searched recursively for the suffixes above (hidden files are left out); a file that is named itself may
    have any suffix and is plain text unless it has one of the others. Raises `FileNotFoundError` for a missing path and
    `ValueError` for a folder without text and for compressed files.
    """
    known = TEXT_SUFFIXES + JSONL_SUFFIXES + PARQUET_SUFFIXES
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(
                file
                for file in path.rglob("*")
                if file.is_file()
                and file.suffix.lower() in known
                and not any(part.startswith(".") for part in file.relative_to(path).parts)
            )
            if not found:
                raise ValueError(f"{option}: folder {path} holds no text ({', '.join(known)})")
            files += found
        elif path.exists():
            files.append(path)
        else:
            raise FileNotFoundError(f"{option}: there is no file or folder {path}")
    return [_open(file, text_field, by_line, option) for file in files]


def _open(path: Path, text_field: str, by_line: bool, option: str) -> Source:
    suffix = path.suffix.lower()
    if suffix in PACKED_SUFFIXES:
        raise ValueError(f"{option}: {path} is compressed; unpack it first")
    if suffix in JSONL_SUFFIXES:
        return JsonLines(path, text_field)
    if suffix in PARQUET_SUFFIXES:
        return ParquetFile(path, text_field)
    return TextFile(path, by_line)


def _lines(file: BinaryIO, path: Path, place: Place | None, limit: int) -> Iterator[tuple[int, str, Place]]:
    """(line number, decoded line, place after it); a line of `limit` bytes or more comes in parts cut at spaces."""
    offset, line = place or (0, 0)
    file.seek(offset)
    whole = True
    while raw := file.readline(limit):
        line += whole
        whole = raw.endswith(b"\n")
        if len(raw) == limit and not whole:
            cut = raw.rfind(b" ") + 1 or _character_border(raw)
            file.seek(cut - len(raw), 1)
            raw = raw[:cut]
        try:
            text = raw.decode("utf-8-sig" if offset == 0 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}, line {line}: not UTF-8 (byte 0x{raw[error.start]:02x} at {error.start}); convert the file, "
                "for example with iconv"
            ) from None
        offset = file.tell()
        yield line, text, [offset, line]


def _character_border(raw: bytes) -> int:
    """The end of the last whole UTF-8 character, if one of them was cut."""
    cut = len(raw)
    while cut > len(raw) - 4 and raw[cut - 1] & 0xC0 == 0x80:
        cut -= 1
    return cut - 1 if raw[cut - 1] >= 0xC0 else len(raw)


def _field(record: dict[str, Any], name: str, where: str) -> str:
    if name not in record:
        raise ValueError(f"{where}: no field {name!r} (--text-field); it has {', '.join(map(str, record)) or 'none'}")
    return _text(record[name], name, where)


def _text(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: field {name!r} is {type(value).__name__}, expected text")
    return value


def _import(module: str, purpose: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{purpose} need {error.name}: pip install minilm_kernels[data]") from error
