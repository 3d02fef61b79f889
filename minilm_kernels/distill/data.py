"""From documents to rows of tokens: held-out split, tokenising, packing, shuffling, and the state to continue from.

A row is `--seq-len` tokens: ids and, beside each, its position in its document; position 0 starts a document, position
-1 is padding. Rows are drawn from a shuffle buffer, which is emptied before a new epoch begins: every epoch sees every
row once.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .bad_documents import BadDocuments
from .sources import LARGEST_DOCUMENT, Document, Prefix, Source

PADDING = -1
SHORTEST_CUT = 32  # tokens; a document is not cut into pieces below this
READ_DOCUMENTS = 256  # documents that are tokenised together, or fewer:
READ_CHARACTERS = 1 << 18
READ_AHEAD = 4
EMPTY = "the training text is empty: no document in --text or --dataset has any tokens"
CHANGED = "--resume: the training text has changed since the checkpoint"

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

    def documents(self, documents: Sequence[Document]) -> tuple[list[Tokens], list[Document]]:
        """Token ids of documents with text, a long one in several pieces; and those that the tokenizer refuses."""
        pieces = [_pieces(document.text or "") for document in documents]
        try:
            return self.batch([piece for parts in pieces for piece in parts]), []
        except BaseException as error:  # tokenizers in Rust panic with one that is no Exception
            if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
                raise
            if len(documents) == 1:
                problem = f"the tokenizer refuses it ({type(error).__name__}: {error})"
                return [], [documents[0]._replace(text=None, problem=problem)]
        tokens: list[Tokens] = []
        refused: list[Document] = []
        for document in documents:
            good, bad = self.documents([document])
            tokens += good
            refused += bad
        return tokens, refused


def _pieces(text: str) -> list[str]:
    """`text` in pieces of at most `LARGEST_DOCUMENT` characters, cut at spaces."""
    pieces = []
    while len(text) > LARGEST_DOCUMENT:
        cut = text.rfind(" ", 0, LARGEST_DOCUMENT) + 1 or LARGEST_DOCUMENT
        pieces.append(text[:cut])
        text = text[cut:]
    return [*pieces, text]


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

    def clear(self) -> None:
        """Forgets all rows."""
        self.rows, self.open, self._room = [], [], self.seq_len

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
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


@dataclass(frozen=True)
class HeldOut:
    """The held-out rows, and which documents must therefore never train.

    A checkpoint keeps both: a resumed run measures on the rows of its beginning, whatever was repaired since.

    Attributes:
        rows: (rows, seq_len).
        limit: documents whose digest, as a number, lies below it are held out.
        digests: documents that are held out besides.
    """

    rows: Rows
    limit: int
    digests: frozenset[bytes] = frozenset()

    def contains(self, text: str) -> bool:
        """Whether the document is held out: decided by its content, so that a repeated one falls on one side."""
        own = digest(text)
        return int.from_bytes(own, "big") < self.limit or own in self.digests

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """All of it, as JSON and as tensors."""
        numbers = {"limit": self.limit, "digests": sorted(digest.hex() for digest in self.digests)}
        rows = {"heldout.ids": self.rows.ids, "heldout.positions": self.rows.positions}
        return numbers, {name: torch.from_numpy(array) for name, array in rows.items()}

    @classmethod
    def from_state(cls, numbers: dict[str, Any], tensors: dict[str, Tensor]) -> HeldOut:
        """The one whose `state` this is."""
        rows = Rows(tensors["heldout.ids"].numpy(), tensors["heldout.positions"].numpy())
        return cls(rows, numbers["limit"], frozenset(map(bytes.fromhex, numbers["digests"])))


def limit_of(fraction: float) -> int:
    """The number below which the digests of `fraction` of all documents lie."""
    return int(fraction * 2**64)


def collect_heldout(
    sources: Sequence[Source],
    separate: bool,
    fraction: float,
    packer: Packer,
    tokenizer: Tokenizer,
    most: int,
    bad_documents: BadDocuments,
) -> HeldOut:
    """The first `most` rows of the documents held out.

    Args:
        sources: the held-out text, if `separate`, else the training text, of which `fraction` is held out. If that is
            none or all of a small corpus, the document with the smallest digest is.

    Raises:
        ValueError: no document can be held out; a bad one is an error, or nearly all are bad.
    """
    limit = 0 if separate else limit_of(fraction)
    seen: set[bytes] = set()
    smallest, smallest_tokens = 1 << 64, list[Tokens]()
    numbers = set[int]()  # of the first two different documents
    found = lines = trained = 0
    for document in (document for source in sources for document in source.read()):
        refused: list[Document] = []
        text = document.text
        if text and not text.isspace():
            own = digest(text)
            number = int.from_bytes(own, "big")
            chosen = separate or number < limit
            trained += not chosen
            found, lines = found + 1, lines + len(text.strip().splitlines())
            if len(numbers) < 2:
                numbers.add(number)
            if chosen or number < smallest:
                tokens, refused = tokenizer.documents([document])
                if chosen and any(map(len, tokens)) and separate:
                    seen.add(own)
                for piece in tokens if chosen else ():
                    packer.add(piece)
                if number < smallest and any(map(len, tokens)):
                    smallest, smallest_tokens = number, tokens
        elif document.problem:
            refused = [document]
        good = int(text is not None and not refused)
        bad_documents.note(good, refused, int(text is None and not document.problem))
        if len(packer.rows) >= most:
            break
    else:
        bad_documents.end_epoch()
        if not separate and not (trained and (packer.rows or packer.open)):  # a small corpus
            packer.clear()
            if len(numbers) > 1:
                limit = smallest + 1
                for piece in smallest_tokens:
                    packer.add(piece)
    packer.flush()
    if not packer.rows:
        if separate:
            raise ValueError(f"--heldout-text holds no text{bad_documents.listed()}")
        if not smallest_tokens:
            raise ValueError(f"{EMPTY}{bad_documents.listed()}")
        how_many = "1 document" if found == 1 else f"{found} documents, all the same"
        by_line = f"--documents line, if each of its {lines} lines is a document; " if lines > found else ""
        raise ValueError(
            f"--heldout-fraction {fraction}: the training text holds {how_many}{bad_documents.listed()}, which cannot "
            f"be held out and train; give {by_line}more text; a separate --heldout-text; or --heldout-fraction 0 to do "
            "without the held-out loss"
        )
    return HeldOut(stack(packer.rows[:most], packer.seq_len), limit, frozenset(seen))


class _Reading(NamedTuple):
    """Documents that were read together.

    Attributes:
        tokens: of each piece of a document that trains.
        place: after them: the source in the epoch's order, place in it.
        source, prefix: the source, and what has been read of it.
    """

    tokens: list[Tokens]
    good: int
    held_out: int
    bad: list[Document]
    nulls: int
    place: list[Any]
    source: int
    prefix: Prefix


class RowStream:
    """An endless, seeded, resumable stream of training rows, which depends on nothing but the good documents' order.

    Documents are read and tokenised in a thread of its own, a little ahead. `state` and `load_state` carry everything
    that decides the rows to come; after an error of `take` the state is that before it.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        tokenizer: Tokenizer,
        packer: Packer,
        *,
        held_out: HeldOut | None,
        shuffle_rows: int,
        seed: int,
        bad_documents: BadDocuments | None = None,
    ) -> None:
        self._sources, self._tokenizer, self._packer = sources, tokenizer, packer
        self.held_out, self._shuffle_rows, self._seed = held_out, shuffle_rows, seed
        self.bad_documents = bad_documents or BadDocuments()
        self._buffer: list[Rows] = []
        self._drawn: list[Rows] = []  # drawn by a `take` that did not come to its end
        self._epoch = 0
        self._draws = 0
        self._place: list[Any] = [0, None]  # source in the epoch's order, place in it
        self._prefixes: dict[int, Prefix] = {}  # what was read in this epoch, by source
        self._at_end = False
        self._epoch_rows = self._epoch_held_out = 0
        self._thread = ThreadPoolExecutor(1, "minilm-text")
        self._ahead: deque[Future[_Reading | None]] = deque()
        self._reader: Iterator[_Reading] | None = None

    def close(self) -> None:
        """Ends the reading thread."""
        self._thread.shutdown(cancel_futures=True)

    @property
    def epoch(self) -> int:
        """Times that the text has been read to its end."""
        return self._epoch

    def take(self, count: int) -> Rows:
        """The next `count` rows.

        Raises:
            ValueError: a whole epoch holds no text; a bad document is an error, or nearly all of them are bad.
        """
        while len(self._drawn) < count:
            self._drawn.append(self._draw())
        taken, self._drawn = self._drawn[:count], self._drawn[count:]
        return stack(taken, self._packer.seq_len)

    def put_back(self, rows: Rows) -> None:
        """Makes the rows of the last `take` the next ones again."""
        self._drawn = [Rows(*row) for row in zip(*rows, strict=True)] + self._drawn

    def _draw(self) -> Rows:
        while len(self._buffer) < self._shuffle_rows and not self._at_end:
            self._fill()
        if not self._buffer:
            if not self._epoch_rows:
                held_out = f"; {self._epoch_held_out} are held out" if self._epoch_held_out else ""
                raise ValueError(f"{EMPTY}{self.bad_documents.listed()}{held_out}")
            self._epoch, self._epoch_rows, self._at_end = self._epoch + 1, 0, False
            self._epoch_held_out, self._prefixes = 0, {}
            return self._draw()
        # Seeded by the number of the draw: nothing but that number is needed to continue. Rows beyond `shuffle_rows`,
        # read because documents are read together, wait.
        last = min(len(self._buffer), self._shuffle_rows) - 1
        place = int(np.random.default_rng((self._seed, 1, self._draws)).integers(last + 1)) if last else 0
        self._buffer[place], self._buffer[last] = self._buffer[last], self._buffer[place]
        self._draws += 1
        return self._buffer.pop(last)

    def _fill(self) -> None:
        """Moves the rows of one reading into the buffer."""
        if self._reader is None:
            self._reader = self._read(self._epoch, self._place)
        while len(self._ahead) < READ_AHEAD:
            self._ahead.append(self._thread.submit(next, self._reader, None))
        try:
            reading = self._ahead.popleft().result()
            if reading is None:
                self.bad_documents.end_epoch()
            else:
                warn = self._epoch == 0  # later ones say the same again
                self.bad_documents.note(reading.good, reading.bad, reading.nulls, warn=warn)
        except BaseException:
            self._restart()
            raise
        if reading is None:
            self._packer.flush()
            self._at_end, self._place = True, [0, None]
            self._restart()  # what was read ahead says only that the end was reached
        else:
            self._place, self._prefixes[reading.source] = reading.place, reading.prefix
            self._epoch_held_out += reading.held_out
            for tokens in reading.tokens:
                self._packer.add(tokens)
        self._epoch_rows += len(self._packer.rows)
        self._buffer += self._packer.rows
        self._packer.rows = []

    def _restart(self) -> None:
        """Forgets what was read ahead: reading goes on from the place."""
        self._reader = None
        self._ahead.clear()

    def _order(self, epoch: int) -> list[int]:
        """The sources' order in an epoch."""
        order = np.arange(len(self._sources))
        if self._shuffle_rows > 1:
            order = np.random.default_rng((self._seed, 0, epoch)).permutation(order)
        return order.tolist()

    def _read(self, epoch: int, place: Sequence[Any]) -> Iterator[_Reading]:
        order = self._order(epoch)
        first, begin = place
        for number in range(first, len(order)):
            source = order[number]
            prefix = Prefix() if begin is None else self._prefixes[source].copy()
            documents: list[Document] = []
            size = 0
            for document in self._sources[source].read(begin, prefix):
                documents.append(document)
                size += len(document.text or "")
                if len(documents) == READ_DOCUMENTS or size >= READ_CHARACTERS:
                    yield self._reading(documents, [number, document.place], source, prefix)
                    documents, size = [], 0
            begin = None
            yield self._reading(documents, [number + 1, None], source, prefix)

    def _reading(self, documents: list[Document], place: list[Any], source: int, prefix: Prefix) -> _Reading:
        texts = [document for document in documents if document.text is not None]
        trained = [d for d in texts if self.held_out is None or not self.held_out.contains(d.text or "")]
        tokens, refused = self._tokenizer.documents(trained) if trained else ([], [])
        bad = [document for document in documents if document.problem]
        nulls = len(documents) - len(texts) - len(bad)
        return _Reading(
            tokens,
            len(texts) - len(refused),
            len(texts) - len(trained),
            bad + refused,
            nulls,
            place,
            source,
            prefix.copy(),
        )

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What decides the rows to come, as JSON and as tensors."""
        pieces = self._packer.open
        numbers = {
            "epoch": self._epoch,
            "epoch_rows": self._epoch_rows,
            "at_end": self._at_end,
            "draws": self._draws,
            "place": self._place,
            "sources": [source.name for source in self._sources],
            "read": [[source, prefix.size, prefix.digest()] for source, prefix in self._prefixes.items()],
            "bad_documents": self.bad_documents.state(),
            "held_out": None,
        }
        arrays = {
            "open.ids": np.concatenate([*pieces, np.empty(0, np.int32)]).astype(np.int32),
            "open.positions": np.concatenate([*map(_positions, pieces), np.empty(0, np.int32)]).astype(np.int32),
        }
        for name, rows in {"buffer": self._buffer, "drawn": self._drawn}.items():
            ids, positions = stack(rows, self._packer.seq_len)
            arrays |= {f"{name}.ids": ids, f"{name}.positions": positions}
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        if self.held_out is not None:
            numbers["held_out"], rows_held_out = self.held_out.state()
            tensors |= rows_held_out
        return numbers, tensors

    def load_state(self, numbers: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Continues as the stream whose `state` this is.

        Reads again what was read in the epoch so far, to see that it is the same. Text behind the place may differ.

        Raises:
            ValueError: text that was read has changed, or there are other sources.
        """
        names = [source.name for source in self._sources]
        if numbers["sources"] != names:
            raise ValueError(f"{CHANGED}: {_difference(numbers['sources'], names)}")
        self._prefixes = {}
        for source, size, expected in numbers["read"]:
            prefix = self._sources[source].prefix(size)
            if prefix.digest() != expected:
                raise ValueError(
                    f"{CHANGED}: {names[source]} differs within its first {size} bytes or rows, which were read "
                    "before; only what lies behind them may change. Put them back as they were, or begin in another "
                    "--output"
                )
            self._prefixes[source] = prefix
        self._epoch, self._epoch_rows = numbers["epoch"], numbers["epoch_rows"]
        self._at_end, self._draws, self._place = numbers["at_end"], numbers["draws"], numbers["place"]
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        self._buffer, self._drawn = (
            [Rows(*row) for row in zip(arrays[f"{name}.ids"], arrays[f"{name}.positions"], strict=True)]
            for name in ("buffer", "drawn")
        )
        self._packer.reopen(arrays["open.ids"], arrays["open.positions"])
        self.bad_documents.load_state(numbers["bad_documents"])
        self.held_out = None if numbers["held_out"] is None else HeldOut.from_state(numbers["held_out"], tensors)
        self._restart()


def _difference(before: Sequence[str], now: Sequence[str]) -> str:
    """What became of the sources."""
    gone, new = ([name for name in a if name not in b] for a, b in ((before, now), (now, before)))
    parts = [f"{word} {', '.join(names[:5])}" for word, names in (("without", gone), ("now with", new)) if names]
    return " and ".join(parts) or "its files come in another order or number"


def _positions(piece: Tokens) -> np.ndarray:
    return np.arange(len(piece), dtype=np.int32)
