"""Test sets from local files: JSON lines, CSV, TSV or Parquet with named columns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

_READERS: dict[str, Any] = {
    ".jsonl": Dataset.from_json,
    ".json": Dataset.from_json,
    ".csv": Dataset.from_csv,
    ".tsv": lambda file: Dataset.from_csv(file, sep="\t"),
    ".parquet": Dataset.from_parquet,
}


def read_columns(file: str, option: str, columns: Sequence[str]) -> list[list[Any]]:
    """Reads the named columns of a file.

    Args:
        option: the option that named the file, for messages.
        columns: names of columns that the file must have.

    Returns:
        A list of values for each column, all of the same length of 1 or more.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file has another ending, lacks a column, has an empty cell, or has no row.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{option}: there is no file {file}")
    if path.suffix not in _READERS:
        raise ValueError(f"{option}: expected a file ending in {', '.join(_READERS)}, got {file}")
    try:
        rows = _READERS[path.suffix](str(path))
    except Exception as error:  # each reader has errors of its own
        raise ValueError(f"{option}: {file} cannot be read: {error}") from error
    missing = [name for name in columns if name not in rows.column_names]
    if missing:
        raise ValueError(
            f"{option}: {file} has no column {', '.join(missing)}; its columns are {', '.join(rows.column_names)}"
        )
    if not len(rows):
        raise ValueError(f"{option}: {file} has no rows")
    values = [list(rows[name]) for name in columns]
    for name, column in zip(columns, values, strict=True):
        if None in column:
            raise ValueError(f"{option}: {file} has no {name} in row {column.index(None) + 1}")
    return values
