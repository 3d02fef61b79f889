"""`SampleStream`: an endless, shuffled sequence of training samples, of which a process reads only its own.

An epoch has all documents in a random order. The borders of samples follow from the lengths of the documents, so that
every process finds those of all samples and reads the tokens of a few. A place in the sequence is four numbers, for any
number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from .eval_set import EvalSet
from .packing import Packer, Samples
from .token_shards import EMPTY, TokenShards

PLANNED_DOCUMENTS = 1 << 12  # documents whose lengths are read at once


class Place(NamedTuple):
    """A place between two samples.

    Attributes:
        epoch: number of complete passes over the text.
        sample: number of earlier samples of the epoch.
        document, token: where the next sample begins: an index in the order of the epoch, and a token of this document.
    """

    epoch: int = 0
    sample: int = 0
    document: int = 0
    token: int = 0


class _Planned(NamedTuple):
    """A sample whose tokens are not read yet.

    Attributes:
        pieces: (document, first token, token after the last) of each piece.
        after: the place behind the sample.
    """

    pieces: list[tuple[int, int, int]]
    after: Place


class SampleStream:
    """An endless sequence of training samples, which depends only on the seed, the shards and the evaluation set.

    Args:
        shards: the tokenized text.
        packer: lengths and special tokens of samples.
        eval_set: documents of this set are left out.

    Attributes:
        place: the place of the next sample. It may be set to an earlier value, to take samples again.
    """

    def __init__(self, shards: TokenShards, packer: Packer, *, eval_set: EvalSet | None, seed: int) -> None:
        self.shards, self._packer, self.eval_set, self._seed = shards, packer, eval_set, seed
        self.place = Place()
        self._orders: dict[int, np.ndarray] = {}
        self._plan: Iterator[_Planned] = iter(())
        self._planned_to: Place | None = None

    @property
    def epoch(self) -> int:
        """Number of complete passes over the text."""
        return self.place.epoch

    def take(self, count: int, own: slice = slice(None)) -> Samples:
        """Returns the next `count` samples.

        Args:
            own: the samples whose tokens are read. The token ids of the others are padding; their positions are those
                of all samples, so that weights can be computed from them.

        Raises:
            ValueError: an epoch has no text, or the shards are damaged. The place is then the same as before.
        """
        if self._planned_to != self.place:
            self._plan = self._samples(self.place)
        self._planned_to = None  # if anything fails, the plan begins again
        planned = [next(self._plan) for _ in range(count)]
        samples = self._packer.layout([[stop - start for _, start, stop in sample.pieces] for sample in planned])
        for ids, sample in zip(samples.ids[own], planned[own], strict=True):
            self._packer.fill(ids, [self.shards.read(*piece) for piece in sample.pieces])
        if planned:
            self.place = planned[-1].after
        self._planned_to = self.place
        return samples

    def _samples(self, place: Place) -> Iterator[_Planned]:
        """Plans the samples after a place."""
        epoch, number, first, token = place
        while True:
            order = self._order(epoch)
            self._packer.begin()
            pieces: list[tuple[int, int, int]] = []
            current = 0
            for begin in range(first, len(order), PLANNED_DOCUMENTS):
                documents = order[begin : begin + PLANNED_DOCUMENTS]
                lengths = self.shards.lengths(documents).tolist()
                for index, document in enumerate(documents.tolist()):
                    for sample, start, stop in self._packer.place(lengths[index], token):
                        if sample != current:
                            number += 1
                            yield _Planned(pieces, Place(epoch, number, begin + index, start))
                            pieces, current = [], sample
                        pieces.append((document, start, stop))
                    token = 0
            if pieces:
                yield _Planned(pieces, Place(epoch + 1))
            epoch, number, first = epoch + 1, 0, 0

    def _order(self, epoch: int) -> np.ndarray:
        """The documents of an epoch, in their order, (documents,) int32, or int64 if there are too many."""
        if epoch not in self._orders:
            count = len(self.shards)
            # Sorted random bits, because numpy guarantees their sequence, but not that of its permutations.
            bits = np.random.PCG64(np.random.SeedSequence((self._seed, 0, epoch))).random_raw(count)
            order = np.argsort(bits, kind="stable").astype(np.int32 if count < 2**31 else np.int64)
            if self.eval_set is not None:
                order = order[~self.eval_set.contains_digests(self.shards.digests)[order]]
            if not len(order):
                used = f"; {self.shards.counts.good} are in the evaluation set" if self.shards.counts.good else ""
                raise ValueError(f"{EMPTY}{used}")
            self._orders = {epoch: order}
        return self._orders[epoch]

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Everything on which the following samples depend, as JSON and as tensors."""
        state: dict[str, Any] = {"place": list(self.place), "tokens": self.shards.digest, "eval_set": None}
        tensors: dict[str, Tensor] = {}
        if self.eval_set is not None:
            state["eval_set"], tensors = self.eval_set.state()
        return state, tensors

    def load_state(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Continues the sequence that had this `state`.

        Raises:
            ValueError: the shards have other tokens.
        """
        if state["tokens"] != self.shards.digest:
            raise ValueError(
                f"--resume-from-checkpoint: {self.shards.folder} has other tokens than at the checkpoint; the training "
                "text has changed. Restore it, or start again in another --output-dir"
            )
        place = Place(*state["place"])
        if len(state["place"]) != len(place) or not all(type(number) is int and number >= 0 for number in place):
            raise TypeError(f"place is {state['place']!r}")
        self.eval_set = None if state["eval_set"] is None else EvalSet.from_state(state["eval_set"], tensors)
        self.place, self._planned_to, self._orders = place, None, {}
