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

    A document of more than `max_document_length` tokens is cut into pieces, with `packing` also one that does not fit
    into the current sample. Pieces have at least `SHORTEST_CUT` tokens (or a quarter of the longest piece, if that is
    less). If the first piece would be shorter, the document starts the next sample. Without `packing`, every piece is a
    sample.

    Borders depend on the lengths of the documents alone (`place`), so that they are known before any token is read.

    Args:
        max_seq_length: tokens of a sample, special tokens included.
        max_document_length: tokens of the longest piece, special tokens included; by default, `max_seq_length`.

    Raises:
        ValueError: one of the lengths leaves no room beside the special tokens.
    """

    def __init__(
        self, tokenizer: DocumentTokenizer, max_seq_length: int, packing: bool, max_document_length: int | None = None
    ) -> None:
        self._tokenizer, self.max_seq_length, self._packing = tokenizer, max_seq_length, packing
        self._special = len(tokenizer.prefix) + len(tokenizer.suffix)
        longest = max_seq_length if max_document_length is None else min(max_seq_length, max_document_length)
        self._shortest = max(1, min(SHORTEST_CUT, longest // 4))
        self._longest = longest - self._special
        if self._longest < 2 * self._shortest:
            option = "--max-seq-length" if longest == max_seq_length else "--max-document-length"
            raise ValueError(f"{option} ({longest}) leaves no room beside {self._special} special tokens per document")
        self.begin()

    def begin(self) -> None:
        """Drops all pieces and begins with an empty sample."""
        self._room, self._sample = self.max_seq_length, 0
        self._pieces: list[list[Tokens]] = []

    def place(self, length: int, start: int = 0) -> list[tuple[int, int, int]]:
        """Assigns the tokens `start` to `length` of a document to samples.

        Returns:
            For each piece, the number of its sample, counted from the latest `begin`, and the range of its tokens.
        """
        placed = []
        while start < length:
            room = min(self._room - self._special, self._longest)
            take = length - start
            if take > room:
                take = min(room, take - self._shortest)
                if take < self._shortest:
                    self.flush()
                    continue
            placed.append((self._sample, start, start + take))
            start += take
            self._room -= take + self._special
            if not self._packing or self._room <= self._special:
                self.flush()
        return placed

    def flush(self) -> None:
        """Completes the sample that is being filled."""
        if self._room < self.max_seq_length:
            self._room, self._sample = self.max_seq_length, self._sample + 1

    def add(self, tokens: Tokens) -> None:
        """Appends a document."""
        for sample, start, stop in self.place(len(tokens)):
            if sample == len(self._pieces):
                self._pieces.append([])
            self._pieces[sample].append(tokens[start:stop])

    @property
    def complete(self) -> int:
        """Number of complete samples since `begin`."""
        return self._sample

    @property
    def samples(self) -> Samples:
        """The complete samples of the documents that were added."""
        pieces = self._pieces[: self._sample]
        samples = self.layout([[len(piece) for piece in sample] for sample in pieces])
        for ids, sample in zip(samples.ids, pieces, strict=True):
            self.fill(ids, sample)
        return samples

    def layout(self, lengths: Sequence[Sequence[int]]) -> Samples:
        """Samples without their tokens.

        Args:
            lengths: tokens of each piece of each sample, without special tokens.
        """
        shape = (len(lengths), self.max_seq_length)
        ids = np.full(shape, self._tokenizer.pad, np.int32) if self._tokenizer.pad else np.zeros(shape, np.int32)
        positions = np.full(shape, PADDING, np.int32)
        order = np.arange(self.max_seq_length, dtype=np.int32)
        for row, sample in zip(positions, lengths, strict=True):
            end = 0
            for length in sample:
                begin, end = end, end + length + self._special
                row[begin:end] = order[: end - begin]
        return Samples(ids, positions)

    def fill(self, ids: np.ndarray, pieces: Sequence[Tokens]) -> None:
        """Writes the tokens of a sample's pieces into its row of `layout`."""
        prefix, suffix = self._tokenizer.prefix, self._tokenizer.suffix
        row = np.concatenate([part for piece in pieces for part in (prefix, piece, suffix)])
        ids[: len(row)] = row
