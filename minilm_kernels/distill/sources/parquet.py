"""Parquet files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilm_kernels._extras import optional_imports

from .document import LARGEST_RECORD, Cursor, Document, decode, file_fingerprint, not_utf8, text_document


@dataclass(frozen=True)
class ParquetFile:
    """Rows of a Parquet file, with the text in one column. A cursor is a number of rows."""

    path: Path
    name: str
    text_column: str

    def check(self, option: str) -> None:
        """Raises `ValueError` if the file cannot be opened, or has no text column of the given name."""
        with self._open() as file:
            names = file.schema_arrow.names
            if names.count(self.text_column) != 1:
                raise ValueError(
                    f"{self.path}: expected one column {self.text_column!r} (--text-column); the file has "
                    f"{', '.join(names)}"
                )
            kind = file.schema_arrow.field(self.text_column).type
            values = kind.value_type if hasattr(kind, "index_type") else kind  # a dictionary's values
            if str(values) not in ("string", "large_string", "string_view", "null"):
                raise ValueError(f"{self.path}: column {self.text_column!r} (--text-column) is {kind}, expected text")

    def _open(self) -> Any:
        with optional_imports("data", "reading Parquet files"):
            import pyarrow.parquet as parquet
        try:
            return parquet.ParquetFile(self.path, page_checksum_verification=True)
        except (ValueError, OSError) as error:  # pyarrow's ArrowInvalid is a ValueError
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise ValueError(f"{self.path}: not a readable Parquet file: {error}") from error

    def read(self, cursor: Cursor | None = None) -> Iterator[Document]:
        done = cursor or 0
        with self._open() as file:
            end = 0
            for group in range(file.num_row_groups):
                row, end = end, end + file.metadata.row_group(group).num_rows
                if end <= done:
                    continue
                try:
                    for batch in file.iter_batches(
                        self._batch_rows(file, group), row_groups=[group], columns=[self.text_column]
                    ):
                        for value, problem in _cells(batch.column(0)):
                            row += 1
                            if row > done:
                                where = f"{self.path}, row {row}"
                                if problem:
                                    yield Document(None, where, row, problem)
                                else:
                                    yield text_document(value, self.text_column, where, row)
                except (ValueError, OSError) as error:
                    if isinstance(error, OSError) and error.errno is not None:
                        raise
                    first = max(row, done)
                    yield Document(
                        None, f"{self.path}, rows {first + 1} to {end}", end, f"damaged: {error}", end - first
                    )

    def _batch_rows(self, file: Any, group: int) -> int:
        """Number of rows to decode at once: at most 1024, fewer if the cells are long."""
        metadata = file.metadata.row_group(group)
        columns = (metadata.column(number) for number in range(metadata.num_columns))
        size = sum(c.total_uncompressed_size for c in columns if c.path_in_schema == self.text_column)
        return max(1, min(1024, LARGEST_RECORD * metadata.num_rows // max(1, size)))

    def fingerprint(self) -> dict[str, Any]:
        return file_fingerprint(self.path)


def _cells(column: Any) -> Iterator[tuple[Any, str]]:
    """Yields (value, problem) of each cell."""
    import pyarrow

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
            yield None, f"the cell is longer than {LARGEST_RECORD} bytes"
        else:
            try:
                yield decode(content.to_pybytes()), ""
            except UnicodeDecodeError as error:
                yield None, not_utf8(error)
