"""Training text: text files, JSON, CSV, Parquet and hub data sets, streamed as documents from any position.

A source yields a `Document` for each document, readable or not. An unreadable document has no text and describes the
problem, so that the caller can decide whether to skip it. `source.read(cursor)` continues after the document with this
cursor. Cursors are JSON, so that a file can contain them.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from pathlib import Path

from .delimited import DelimitedFile
from .document import LARGEST_DOCUMENT, Cursor, Document, Source
from .file_kinds import (
    DELIMITERS,
    JSONL_SUFFIXES,
    LINE_SUFFIXES,
    PARQUET_SUFFIXES,
    REFUSED,
    read_head,
    refuse_special,
    suffixes,
)
from .hub import HubDataset
from .lines import JsonArray, JsonLines, TextFile
from .parquet import ParquetFile

__all__ = ["LARGEST_DOCUMENT", "Cursor", "Document", "HubDataset", "Source", "open_sources"]

_LISTED = 5  # names of skipped files in a message


def open_sources(
    paths: Sequence[str],
    *,
    text_column: str = "text",
    by_line: bool = False,
    option: str = "--text",
    say: Callable[[str], None] = lambda message: None,
) -> list[Source]:
    """Opens files and folders as sources, in a stable order.

    Folders are searched recursively for files with known suffixes; hidden files are skipped. A file that is given by
    its own path may have any suffix, and is read as plain text unless its suffix or content say otherwise.

    Args:
        by_line: True if every line of a plain text file is a document; otherwise, every paragraph is one.
        option: the option that gave the paths, for messages.
        say: is called with a message about files of a folder that are not read.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: a folder has no text; a file is not text, by its suffix or its first bytes, or lacks the column
            `text_column`; or a path is neither a file nor a folder.
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
    return [_open(path, name, text_column, by_line, option) for path, name in files]


def _files_in(folder: Path, option: str, say: Callable[[str], None]) -> list[Path]:
    found: list[Path] = []
    skipped: list[str] = []
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if path.is_dir() or any(part.startswith(".") for part in inside.parts):
            continue
        kind, compression = suffixes(path)
        known = kind in LINE_SUFFIXES or (kind in PARQUET_SUFFIXES and not compression)
        if known and path.is_file():
            found.append(path)
        else:
            skipped.append(str(inside))
    names = ", ".join(skipped[:_LISTED]) + (", ..." if len(skipped) > _LISTED else "")
    if not found:
        readable = ", ".join((*LINE_SUFFIXES, *PARQUET_SUFFIXES))
        raise ValueError(
            f"{option}: folder {folder} has no text files ({readable}; all but Parquet also as .gz, .bz2 or .xz)"
            + (f"; it has {names}" if names else "")
        )
    if skipped:
        say(f"{option}: skipped {len(skipped)} files of folder {folder} without a suffix of text files ({names})")
    return found


def _open(path: Path, name: str, text_column: str, by_line: bool, option: str) -> Source:
    refuse_special(path, option)
    kind, compression = suffixes(path)
    advice = REFUSED.get(kind) or (kind in PARQUET_SUFFIXES and compression and "decompress it first")
    if advice:
        raise ValueError(f"{option}: {path} cannot be read as text; {advice}")
    source: JsonLines | JsonArray | DelimitedFile | ParquetFile | TextFile
    if kind in PARQUET_SUFFIXES:
        source = ParquetFile(path, name, text_column)
    elif kind in DELIMITERS:
        source = DelimitedFile(path, name, text_column, DELIMITERS[kind])
    elif kind == ".json" and read_head(path, option).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        source = JsonArray(path, name, text_column)
    elif kind == ".json" or kind in JSONL_SUFFIXES:
        source = JsonLines(path, name, text_column)
    else:
        source = TextFile(path, name, by_line)
    source.check(option)
    return source
