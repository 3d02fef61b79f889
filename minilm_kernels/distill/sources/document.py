"""Documents, the interface of a source, and helpers that turn bytes and JSON values into documents."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

LARGEST_DOCUMENT = 1 << 20  # bytes of plain text, or characters of a column's text; longer text is split
LARGEST_RECORD = 16 << 20  # bytes of a JSON or CSV record or a Parquet cell; a longer one is a bad document
READ_BYTES = 1 << 20
END = "end"  # a cursor after which nothing is read, although the file continues

Cursor = Any  # JSON


class Document(NamedTuple):
    """A document, or the reason why it could not be read.

    Attributes:
        text: the text; `None` for null values and bad documents.
        where: file and line or row, for messages.
        cursor: the position after the document, at which reading can continue.
        problem: description of a bad document, "" for others.
        documents: number of documents that this one represents; above 1 only for a damaged part of a Parquet file.
    """

    text: str | None
    where: str
    cursor: Cursor
    problem: str = ""
    documents: int = 1


class Source(Protocol):
    """A file or data set that yields documents."""

    @property
    def name(self) -> str:
        """Identifies the source: a cursor is only valid for a source of the same name."""

    @property
    def path(self) -> Path | None:
        """The file; `None` for a data set."""

    def read(self, cursor: Cursor | None = None) -> Iterator[Document]:
        """Yields documents.

        Args:
            cursor: a document's cursor to continue after; `None` starts from the beginning.
        """

    def fingerprint(self) -> dict[str, Any]:
        """Its size and date, or its revision, as JSON: without reading the text, it tells whether it has changed."""


def file_fingerprint(path: Path) -> dict[str, Any]:
    """`Source.fingerprint` of a file: its size in bytes, and the time of its last change in nanoseconds."""
    found = path.stat()
    return {"bytes": found.st_size, "changed": found.st_mtime_ns}


def decode(raw: bytes) -> str:
    """Decodes UTF-8. Surrogate pairs become their character, lone surrogates U+FFFD. Raises `UnicodeDecodeError`."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return without_surrogates(raw.decode("utf-8", "surrogatepass"))


def without_surrogates(text: str) -> str:
    """Replaces lone surrogates, which UTF-8 cannot encode and tokenizers refuse, by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def not_utf8(error: UnicodeDecodeError) -> str:
    """Describes a decoding error."""
    return f"not UTF-8 (byte 0x{error.object[error.start]:02x} at {error.start})"


def json_document(raw: bytes, column: str, where: str, cursor: Cursor) -> Document:
    """The document of a JSON object, with its text in the member `column`."""
    try:
        record = json.loads(decode(raw.strip()))
    except UnicodeDecodeError as error:
        return Document(None, where, cursor, not_utf8(error))
    except (ValueError, RecursionError) as error:
        return Document(None, where, cursor, f"not JSON ({error})")
    return record_document(record, column, where, cursor)


def record_document(record: Any, column: str, where: str, cursor: Cursor) -> Document:
    """The document of a parsed record, with its text in `column`."""
    if record is None:
        return Document(None, where, cursor)
    if not isinstance(record, dict):
        return Document(None, where, cursor, f"it is {_kind(record)}, expected an object")
    if column not in record:
        names = ", ".join(map(str, list(record)[:9])) or "none"
        return Document(None, where, cursor, f"no column {column!r} (--text-column); it has {names}")
    return text_document(record[column], column, where, cursor)


def text_document(value: Any, column: str, where: str, cursor: Cursor) -> Document:
    """The document of a column's value."""
    if value is None:
        return Document(None, where, cursor)
    if not isinstance(value, str):
        return Document(None, where, cursor, f"column {column!r} is {_kind(value)}, expected text")
    return Document(without_surrogates(value), where, cursor)


def _kind(value: Any) -> str:
    """The name of a value's type in JSON."""
    words = {
        dict: "an object",
        list: "an array",
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a number",
    }
    return words.get(type(value), type(value).__name__)
