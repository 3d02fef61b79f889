"""Packs tokenized documents into samples of `max_seq_length` tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .tokenization import DocumentTokenizer, Tokens

PADDING = -1  # position of a padding token
SHORTEST_CUT = 32  # tokens of the shortest piece into which a document is cut, if samples are not very short


class Samples(NamedTuple):
    """Packed training sequences.

    Attributes:
        ids: token ids, (samples, max_seq_length) int32.
        positions: position of each token in its document, of the same shape. Position 0 starts a document, `PADDING`
            is padding.
    """

    ids: np.ndarray
    positions: np.ndarray

    def part(self, samples: slice) -> Samples:
        """A slice of the samples."""
        return Samples(self.ids[samples], self.positions[samples])


class Packer:
    """Packs documents into samples; each piece of a document gets the tokenizer's special tokens.

    With `packing`, a document that does not fit into the current sample is cut into pieces of at least `SHORTEST_CUT`
    tokens (or a quarter of `max_seq_length`, if that is less). If the first piece would be shorter, the document starts
    the next sample. Without `packing`, every piece is a sample.

    Args:
        max_seq_length: tokens of a sample, special tokens included.
        max_document_length: tokens of the longest piece, special tokens included; by default, `max_seq_length`.

    Attributes:
        samples: complete samples, each of shape (max_seq_length,).
        open: pieces of the sample that is being filled.

    Raises:
        ValueError: `max_seq_length` leaves no room beside the special tokens.
    """

    def __init__(
        self, tokenizer: DocumentTokenizer, max_seq_length: int, packing: bool, max_document_length: int | None = None
    ) -> None:
        self._tokenizer, self.max_seq_length, self._packing = tokenizer, max_seq_length, packing
        self._special = len(tokenizer.prefix) + len(tokenizer.suffix)
        longest = min(max_seq_length, max_document_length or max_seq_length)
        self._longest = longest - self._special
        self._shortest = max(1, min(SHORTEST_CUT, longest // 4))
        if self._longest < 2 * self._shortest:
            option = "--max-seq-length" if longest == max_seq_length else "--max-document-length"
            raise ValueError(f"{option} ({longest}) leaves no room beside {self._special} special tokens per document")
        self.samples: list[Samples] = []
        self.open: list[Tokens] = []
        self._room = max_seq_length

    def add(self, tokens: Tokens) -> None:
        """Appends a document to the open sample. Samples that become full move to `samples`."""
        while len(tokens):
            room = min(self._room - self._special, self._longest)
            take = len(tokens)
            if take > room:
                take = min(room, take - self._shortest)
                if take < self._shortest:
                    self.flush()
                    continue
            self._append(np.concatenate([self._tokenizer.prefix, tokens[:take], self._tokenizer.suffix]))
            tokens = tokens[take:]

    def _append(self, piece: Tokens) -> None:
        self.open.append(piece)
        self._room -= len(piece)
        if not self._packing or self._room <= self._special:
            self.flush()

    def flush(self) -> None:
        """Pads the open sample and moves it to `samples`."""
        if not self.open:
            return
        ids = np.full(self.max_seq_length, self._tokenizer.pad, np.int32)
        positions = np.full(self.max_seq_length, PADDING, np.int32)
        used = self.max_seq_length - self._room
        ids[:used] = np.concatenate(self.open)
        positions[:used] = np.concatenate([piece_positions(piece) for piece in self.open])
        self.samples.append(Samples(ids, positions))
        self.open, self._room = [], self.max_seq_length

    def clear(self) -> None:
        """Drops all samples."""
        self.samples, self.open, self._room = [], [], self.max_seq_length

    def reopen(self, ids: np.ndarray, positions: np.ndarray) -> None:
        """Restores the open sample from the concatenated tokens of `open`."""
        self.open = np.split(ids, np.flatnonzero(positions == 0)[1:]) if len(ids) else []
        self._room = self.max_seq_length - len(ids)


def piece_positions(piece: Tokens) -> np.ndarray:
    """Positions of the tokens of a piece, from 0."""
    return np.arange(len(piece), dtype=np.int32)


def stack(samples: Sequence[Samples], max_seq_length: int) -> Samples:
    """Stacks samples of shape (max_seq_length,) into one `Samples` of shape (samples, max_seq_length)."""
    empty = np.empty((0, max_seq_length), np.int32)
    if not samples:
        return Samples(empty, empty)
    return Samples(np.stack([sample.ids for sample in samples]), np.stack([sample.positions for sample in samples]))
