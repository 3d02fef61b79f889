"""Sources of given documents and streams of their samples, for tests of reading and packing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from minilm_kernels.distill.bad_documents import BadDocuments
from minilm_kernels.distill.packing import PADDING, Packer, Samples
from minilm_kernels.distill.sample_stream import SampleStream
from minilm_kernels.distill.sources import Cursor, Document, ReadPrefix, Source
from minilm_kernels.distill.tokenization import DocumentTokenizer

from .tiny import make_tokenizer

TOKENIZER = DocumentTokenizer(make_tokenizer())


def pieces(samples: Samples) -> list[list[int]]:
    """The token ids of every piece without special tokens, after checking the layout of each sample."""
    found = []
    for ids, positions in zip(*samples, strict=True):
        used = int((positions != PADDING).sum())
        assert (positions[used:] == PADDING).all()
        assert (ids[used:] == 0).all()
        for piece, order in zip(
            np.split(ids[:used], np.flatnonzero(positions[:used] == 0)[1:]),
            np.split(positions[:used], np.flatnonzero(positions[:used] == 0)[1:]),
            strict=True,
        ):
            assert order.tolist() == list(range(len(piece)))
            assert (piece[0], piece[-1]) == (2, 3)
            found.append(piece[1:-1].tolist())
    return found


class Documents:
    """A source of given texts (`None`: null, `...`: a bad document) that records at which positions reading began."""

    def __init__(self, texts: list[Any], name: str = "given") -> None:
        self.texts, self.name, self.began = texts, name, list[Any]()

    def read(self, cursor: Cursor | None = None, prefix: ReadPrefix | None = None) -> Iterator[Document]:
        self.began.append(cursor)
        for number in range(cursor or 0, len(self.texts)):
            text = self.texts[number]
            if prefix is not None:
                prefix.add_row(text)
            where = f"{self.name}, row {number + 1}"
            yield Document(None if text is ... else text, where, number + 1, "is bad" if text is ... else "")

    def prefix(self, size: int) -> ReadPrefix:
        prefix = ReadPrefix()
        for text in self.texts[:size]:
            prefix.add_row(text)
        return prefix


def stream(sources: list[Source], policy: str = "skip", **changes: Any) -> SampleStream:
    arguments = {"eval_set": None, "shuffle_buffer_size": 10, "seed": 0, "packing": True, **changes}
    packer = Packer(TOKENIZER, 24, arguments.pop("packing"))
    said = arguments.pop("said", [])
    return SampleStream(sources, TOKENIZER, packer, bad_documents=BadDocuments(policy, said.append), **arguments)


def words(samples: Samples) -> list[int]:
    return sorted(token for piece in pieces(samples) for token in piece)


def same(one: Samples, other: Samples) -> bool:
    return np.array_equal(one.ids, other.ids) and np.array_equal(one.positions, other.positions)
