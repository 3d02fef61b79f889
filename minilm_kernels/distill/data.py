"""From documents to rows of tokens: held-out split, tokenising, packing, shuffling, and the state to continue from.

A row is `--seq-len` tokens: ids and, beside each, its position in its document; position 0 starts a document, position
-1 is padding. Rows are drawn from a shuffle buffer, which is emptied before a new epoch begins: every epoch sees every
row once.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .sources import Source

PADDING = -1
SHORTEST_CUT = 32  # tokens; a document is not cut into pieces below this
READ_DOCUMENTS = 256  # documents that are tokenised together, or fewer:
READ_CHARACTERS = 1 << 18
READ_AHEAD = 4

Tokens = np.ndarray  # 1-D int32


class Rows(NamedTuple):
    """`ids` and `positions`: (rows, seq_len) int32."""

    ids: np.ndarray
    positions: np.ndarray

    def part(self, rows: slice) -> Rows:
        """Some of the rows."""
        return Rows(self.ids[rows], self.positions[rows])


class Tokenizer:
    """Turns texts into tokens without special ones, and knows those that begin and end a document."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        body = self("a")
        whole = np.asarray(tokenizer("a", verbose=False)["input_ids"], np.int32)
        if not len(body):
            raise ValueError("the tokenizer gives no token for 'a', so its special tokens cannot be told apart")
        places = [i for i in range(len(whole)) if np.array_equal(whole[i : i + len(body)], body)]
        if not places:
            raise ValueError("the tokenizer changes the text's own tokens when it adds special ones")
        self.prefix, self.suffix = whole[: places[0]], whole[places[0] + len(body) :]
        self.pad = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.unknown: int | None = tokenizer.unk_token_id

    def __call__(self, text: str) -> Tokens:
        return self.batch([text])[0]

    def batch(self, texts: Sequence[str]) -> list[Tokens]:
        """Token ids of each text."""
        encoded = self._tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return [np.asarray(ids, np.int32) for ids in encoded["input_ids"]]


class Packer:
    """Lays documents into rows of `seq_len` tokens, each piece between the tokenizer's special tokens.

    With `packing`, a document that does not fit into what is left of a row is cut there, but never into a piece below
    `SHORTEST_CUT` tokens; otherwise it begins the next row. Without it every piece has its own row.
    """

    def __init__(self, tokenizer: Tokenizer, seq_len: int, packing: bool) -> None:
        self._tokenizer, self.seq_len, self._packing = tokenizer, seq_len, packing
        self._special = len(tokenizer.prefix) + len(tokenizer.suffix)
        self._shortest = max(1, min(SHORTEST_CUT, seq_len // 4))
        if seq_len < self._special + 2 * self._shortest:
            raise ValueError(f"--seq-len ({seq_len}) leaves no room beside {self._special} special tokens a document")
        self.rows: list[Rows] = []  # full rows, each of shape (seq_len,)
        self.open: list[Tokens] = []  # pieces of the row that is being filled
        self._room = seq_len

    def add(self, tokens: Tokens) -> None:
        """Appends one document to the open row, moving rows that fill up to `rows`."""
        while len(tokens):
            room = self._room - self._special
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
        """Closes the open row, padded."""
        if not self.open:
            return
        ids = np.full(self.seq_len, self._tokenizer.pad, np.int32)
        positions = np.full(self.seq_len, PADDING, np.int32)
        used = self.seq_len - self._room
        ids[:used] = np.concatenate(self.open)
        positions[:used] = np.concatenate([np.arange(len(piece), dtype=np.int32) for piece in self.open])
        self.rows.append(Rows(ids, positions))
        self.open, self._room = [], self.seq_len

    def reopen(self, ids: np.ndarray, positions: np.ndarray) -> None:
        """Restores the open row from its tokens, as `open` held them."""
        self.open = np.split(ids, np.flatnonzero(positions == 0)[1:]) if len(ids) else []
        self._room = self.seq_len - len(ids)


def stack(rows: Sequence[Rows], seq_len: int) -> Rows:
    """Rows of shape (seq_len,) as one of (rows, seq_len)."""
    empty = np.empty((0, seq_len), np.int32)
    if not rows:
        return Rows(empty, empty)
    return Rows(np.stack([row.ids for row in rows]), np.stack([row.positions for row in rows]))


def digest(text: str) -> bytes:
    """What decides, the same in every run, on which side of the held-out split a document lies."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()


@dataclass(frozen=True)
class HeldOut:
    """The held-out rows, and which documents must therefore never train."""

    rows: Rows
    contains: Callable[[str], bool]


def fraction_split(fraction: float) -> Callable[[str], bool]:
    """Whether a document is held out: decided by its content, so that a repeated document falls on one side."""
    limit = int(fraction * 2**64)
    return lambda text: int.from_bytes(digest(text), "big") < limit


def collect_heldout(
    sources: Sequence[Source], separate: bool, fraction: float, packer: Packer, tokenizer: Tokenizer, most: int
) -> HeldOut:
    """The first `most` rows of the documents held out.

    Args:
        sources: the held-out text, if `separate`, else the training text, of which `fraction` is held out.

    Raises:
        ValueError: no document is held out.
    """
    chosen = fraction_split(1.0 if separate else fraction)
    seen = set()
    for text in (text for source in sources for text, _ in source.read()):
        if chosen(text):
            if separate:
                seen.add(digest(text))
            packer.add(tokenizer(text))
            if len(packer.rows) >= most:
                break
    packer.flush()
    if not packer.rows:
        if separate:
            raise ValueError("--heldout-text holds no text")
        raise ValueError(
            f"--heldout-fraction {fraction} holds out none of the training documents: give a larger one, a separate "
            "--heldout-text, or 0 to do without the held-out loss"
        )
    rows = stack(packer.rows[:most], packer.seq_len)
    return HeldOut(rows, (lambda text: digest(text) in seen) if separate else chosen)


class RowStream:
    """An endless, seeded, resumable stream of training rows.

    Documents are read and tokenised in a thread of its own, a little ahead. `state` and `load_state` carry everything
    that decides the rows to come.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        tokenizer: Tokenizer,
        packer: Packer,
        *,
        held_out: Callable[[str], bool],
        shuffle_rows: int,
        seed: int,
    ) -> None:
        self._sources, self._tokenizer, self._packer = sources, tokenizer, packer
        self._held_out, self._shuffle_rows, self._seed = held_out, shuffle_rows, seed
        self._buffer: list[Rows] = []
        self._epoch = 0
        self._draws = 0
        self._place: list[Any] = [0, None]  # source in the epoch's order, place in it
        self._at_end = False
        self._epoch_rows = 0
        self._thread = ThreadPoolExecutor(1, "minilm-text")
        self._ahead: deque[Future[tuple[list[Tokens], list[Any]] | None]] = deque()
        self._reader: Iterator[tuple[list[Tokens], list[Any]]] | None = None

    def close(self) -> None:
        """Ends the reading thread."""
        self._thread.shutdown(cancel_futures=True)

    @property
    def epoch(self) -> int:
        """Times that the text has been read to its end."""
        return self._epoch

    def take(self, count: int) -> Rows:
        """The next `count` rows. Raises `ValueError` if a whole epoch holds no text, or for an unreadable document."""
        return stack([self._draw() for _ in range(count)], self._packer.seq_len)

    def _draw(self) -> Rows:
        while len(self._buffer) < self._shuffle_rows and not self._at_end:
            self._fill()
        if not self._buffer:
            if not self._epoch_rows:
                raise ValueError("the training text is empty: no document in --text or --dataset has any tokens")
            self._epoch, self._epoch_rows, self._at_end = self._epoch + 1, 0, False
            return self._draw()
        # Seeded by the number of the draw: nothing but that number is needed to continue.
        if self._shuffle_rows > 1:
            place = int(np.random.default_rng((self._seed, 1, self._draws)).integers(len(self._buffer)))
            self._buffer[place], self._buffer[-1] = self._buffer[-1], self._buffer[place]
            row = self._buffer.pop()
        else:
            row = self._buffer.pop(0)
        self._draws += 1
        return row

    def _fill(self) -> None:
        """Moves the rows of one reading into the buffer."""
        if self._reader is None:
            self._reader = self._read(self._epoch, self._place)
        while len(self._ahead) < READ_AHEAD:
            self._ahead.append(self._thread.submit(next, self._reader, None))
        reading = self._ahead.popleft().result()
        if reading is None:
            self._packer.flush()
            self._at_end, self._reader, self._place = True, None, [0, None]
            self._ahead.clear()  # those say only that the end was reached
        else:
            documents, self._place = reading
            for tokens in documents:
                self._packer.add(tokens)
        self._epoch_rows += len(self._packer.rows)
        self._buffer += self._packer.rows
        self._packer.rows = []

    def _read(self, epoch: int, place: Sequence[Any]) -> Iterator[tuple[list[Tokens], list[Any]]]:
        """Tokens of documents read together, with the place after them."""
        order = np.arange(len(self._sources))
        if self._shuffle_rows > 1:
            order = np.random.default_rng((self._seed, 0, epoch)).permutation(order)
        first, begin = place
        for number in range(first, len(order)):
            texts: list[str] = []
            size = 0
            for text, inside in self._sources[order[number]].read(begin):
                if self._held_out(text):
                    continue
                texts.append(text)
                size += len(text)
                if len(texts) == READ_DOCUMENTS or size >= READ_CHARACTERS:
                    yield self._tokenizer.batch(texts), [number, inside]
                    texts, size = [], 0
            begin = None
            if texts:
                yield self._tokenizer.batch(texts), [number + 1, None]

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What decides the rows to come, as JSON and as tensors."""
        buffer = stack(self._buffer, self._packer.seq_len)
        pieces = self._packer.open
        numbers = {
            "epoch": self._epoch,
            "epoch_rows": self._epoch_rows,
            "at_end": self._at_end,
            "draws": self._draws,
            "place": self._place,
            "sources": [source.identity() for source in self._sources],
        }
        arrays = {
            "buffer.ids": buffer.ids,
            "buffer.positions": buffer.positions,
            "open.ids": np.concatenate([*pieces, np.empty(0, np.int32)]).astype(np.int32),
            "open.positions": np.concatenate([*map(_positions, pieces), np.empty(0, np.int32)]).astype(np.int32),
        }
        return numbers, {name: torch.from_numpy(array) for name, array in arrays.items()}

    def load_state(self, numbers: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Continues as the stream whose `state` this is. Raises `ValueError` if the text is not the same."""
        if numbers["sources"] != [source.identity() for source in self._sources]:
            raise ValueError("the training text has changed since the checkpoint (files or their sizes)")
        self._epoch, self._epoch_rows = numbers["epoch"], numbers["epoch_rows"]
        self._at_end, self._draws, self._place = numbers["at_end"], numbers["draws"], numbers["place"]
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        self._buffer = [Rows(*row) for row in zip(arrays["buffer.ids"], arrays["buffer.positions"], strict=True)]
        self._packer.reopen(arrays["open.ids"], arrays["open.positions"])
        self._reader = None
        self._ahead.clear()


def _positions(piece: Tokens) -> np.ndarray:
    return np.arange(len(piece), dtype=np.int32)
