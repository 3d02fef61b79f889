"""Sources of given documents and streams of their samples, for tests of reading and packing."""

from __future__ import annotations

import atexit
import hashlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minilm_kernels.distill.bad_documents import BadDocuments
from minilm_kernels.distill.packing import PADDING, Packer, Samples
from minilm_kernels.distill.preparation import TokenFolder
from minilm_kernels.distill.sample_stream import SampleStream
from minilm_kernels.distill.sources import Cursor, Document, Source
from minilm_kernels.distill.token_shards import TokenShards
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

    path = None

    def __init__(self, texts: list[Any], name: str = "given") -> None:
        self.texts, self.name, self.began = texts, name, list[Any]()

    def read(self, cursor: Cursor | None = None) -> Iterator[Document]:
        self.began.append(cursor)
        for number in range(cursor or 0, len(self.texts)):
            text = self.texts[number]
            where = f"{self.name}, row {number + 1}"
            yield Document(None if text is ... else text, where, number + 1, "is bad" if text is ... else "")

    def fingerprint(self) -> dict[str, Any]:
        return {"texts": hashlib.sha256(repr(self.texts).encode()).hexdigest()}


@atexit.register
def _remove_folders() -> None:
    for folder in _folders:
        shutil.rmtree(folder, ignore_errors=True)


_folders: list[str] = []


def shards_of(
    sources: Sequence[Source],
    policy: str = "skip",
    *,
    said: list[str] | None = None,
    tokenizer: DocumentTokenizer = TOKENIZER,
    folder: Path | None = None,
    processes: int = 1,
    most_documents: int | None = None,
) -> TokenShards:
    """The token shards of a text, in a folder that is removed at the end of the process unless it is given."""
    if folder is None:
        _folders.append(tempfile.mkdtemp())
        folder = Path(_folders[-1])
    target = TokenFolder(folder, sources, tokenizer, {}, most_documents)
    for _ in target.prepare(BadDocuments(policy, [].append if said is None else said.append), processes):
        pass
    return TokenShards(folder)


def stream(sources: Sequence[Source] | TokenShards, policy: str = "skip", **changes: Any) -> SampleStream:
    """The samples of 24 tokens of a text."""
    arguments = {"eval_set": None, "seed": 0, **changes}
    packer = Packer(TOKENIZER, 24, arguments.pop("packing", True))
    said = arguments.pop("said", None)
    shards = sources if isinstance(sources, TokenShards) else shards_of(sources, policy, said=said)
    return SampleStream(shards, packer, **arguments)


def words(samples: Samples) -> list[int]:
    return sorted(token for piece in pieces(samples) for token in piece)


def same(one: Samples, other: Samples) -> bool:
    return np.array_equal(one.ids, other.ids) and np.array_equal(one.positions, other.positions)
