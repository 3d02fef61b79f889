"""Data sets of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilm_kernels._extras import optional_imports

from .document import Cursor, Document, ReadPrefix, record_document, row_prefix


@dataclass(frozen=True)
class HubDataset:
    """A data set of the hub, or a local folder of one, streamed through `datasets`.

    A cursor is the number of rows and the state of the stream. The prefix of a local folder is a hash of its rows. The
    prefix of a hub data set is its revision, because reading the rows again would download them again.
    """

    name: str
    config: str | None
    split: str
    text_column: str

    def _open(self) -> tuple[Any, str]:
        """Returns the stream and its revision, which is "" for a folder."""
        with optional_imports("data", "reading hub data sets"):
            import datasets
        try:
            builder = datasets.load_dataset_builder(self.name, self.config)
            stream = builder.as_streaming_dataset(split=self.split)
        except Exception as error:  # the errors of datasets have no common base class
            raise ValueError(f"--dataset-name {self.name}, split {self.split!r}: cannot be opened: {error}") from error
        return stream, "" if Path(self.name).exists() else str(builder.hash)

    def read(self, cursor: Cursor | None = None, prefix: ReadPrefix | None = None) -> Iterator[Document]:
        stream, revision = self._open()
        if stream.column_names and self.text_column not in stream.column_names:
            raise ValueError(
                f"--dataset-name {self.name}: no column {self.text_column!r} (--text-column); "
                f"it has {', '.join(stream.column_names)}"
            )
        prefix = ReadPrefix() if prefix is None else prefix
        number = 0
        if cursor is not None:
            number, state = cursor
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
                raise ValueError(f"--dataset-name {self.name}: reading failed after row {number}: {error}") from error
            number += 1
            where = f"--dataset-name {self.name}, row {number}"
            document = record_document(record, self.text_column, where, [number, stream.state_dict()])
            if revision:
                prefix.size += 1
            else:
                prefix.add_row(document.problem or document.text)
            yield document

    def prefix(self, size: int) -> ReadPrefix:
        _, revision = self._open()
        if not revision:
            return row_prefix(self, size)
        prefix = ReadPrefix()
        prefix.add_row(revision, size)
        return prefix
