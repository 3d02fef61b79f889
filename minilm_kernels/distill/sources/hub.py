"""Data sets of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from minilm_kernels._extras import optional_imports

from .document import Cursor, Document, record_document


@dataclass(frozen=True)
class HubDataset:
    """A data set of the hub, or a local folder of one, streamed through `datasets`.

    A cursor is the number of rows and the state of the stream.
    """

    name: str
    config: str | None
    split: str
    text_column: str

    @property
    def path(self) -> None:
        """`None`: it is no file."""

    def _open(self) -> tuple[Any, str]:
        """Returns the stream and its revision."""
        with optional_imports("data", "reading hub data sets"):
            import datasets
        try:
            builder = datasets.load_dataset_builder(self.name, self.config)
            stream = builder.as_streaming_dataset(split=self.split)
        except Exception as error:  # the errors of datasets have no common base class
            raise ValueError(f"--dataset-name {self.name}, split {self.split!r}: cannot be opened: {error}") from error
        return stream, str(builder.hash)

    def read(self, cursor: Cursor | None = None) -> Iterator[Document]:
        stream, _ = self._open()
        if stream.column_names and self.text_column not in stream.column_names:
            raise ValueError(
                f"--dataset-name {self.name}: no column {self.text_column!r} (--text-column); "
                f"it has {', '.join(stream.column_names)}"
            )
        number = 0
        if cursor is not None:
            number, state = cursor
            stream.load_state_dict(state)
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
            yield record_document(record, self.text_column, where, [number, stream.state_dict()])

    def fingerprint(self) -> dict[str, Any]:
        return {"split": self.split, "revision": self._open()[1]}
