"""`SampleStream`: an endless, shuffled stream of training samples whose position can be saved and restored.

Samples are drawn from a shuffle buffer. The buffer is emptied before a new epoch begins, so that every epoch yields
every sample once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .bad_documents import BadDocuments
from .eval_set import EMPTY, EvalSet
from .packing import Packer, Samples, piece_positions, stack
from .sources import Document, ReadPrefix, Source
from .tokenization import DocumentTokenizer, Tokens

READ_DOCUMENTS = 256  # largest number of documents to tokenize at once
READ_CHARACTERS = 1 << 18  # largest number of characters to tokenize at once
READ_AHEAD = 4
CHANGED = "--resume-from-checkpoint: the training text has changed since the checkpoint"


class _Chunk(NamedTuple):
    """Documents that were read and tokenized together.

    Attributes:
        tokens: token ids of each piece of the training documents.
        good, in_eval_set, bad, nulls: the documents by kind: bad documents as a list, the others as numbers.
        cursor: the position after the documents, [index of the source in the order of the epoch, cursor in the source].
        source, prefix: index of the source, and the part of it that has been read.
    """

    tokens: list[Tokens]
    good: int
    in_eval_set: int
    bad: list[Document]
    nulls: int
    cursor: list[Any]
    source: int
    prefix: ReadPrefix


class SampleStream:
    """An endless stream of training samples, which depends only on the seed and on the sequence of good documents.

    A thread reads and tokenizes documents ahead. `state` and `load_state` save and restore everything on which the
    following samples depend. If `take` raises, the state before the call remains.

    Args:
        sources: the training text.
        eval_set: documents of this set are left out.
        shuffle_buffer_size: number of samples in the shuffle buffer; 1 keeps the order of the text.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        tokenizer: DocumentTokenizer,
        packer: Packer,
        *,
        eval_set: EvalSet | None,
        shuffle_buffer_size: int,
        seed: int,
        bad_documents: BadDocuments | None = None,
    ) -> None:
        self._sources, self._tokenizer, self._packer = sources, tokenizer, packer
        self.eval_set, self._shuffle_buffer_size, self._seed = eval_set, shuffle_buffer_size, seed
        self.bad_documents = bad_documents or BadDocuments()
        self._buffer: list[Samples] = []
        self._drawn: list[Samples] = []  # samples that were drawn by a `take` that raised, or put back
        self._epoch = 0
        self._draws = 0
        self._cursor: list[Any] = [0, None]  # index of the source in the order of the epoch, cursor in the source
        self._prefixes: dict[int, ReadPrefix] = {}  # source -> the part of it that was read in this epoch
        self._at_end = False
        self._epoch_samples = self._epoch_in_eval_set = 0
        self._thread = ThreadPoolExecutor(1, "minilm-text")
        self._ahead: deque[Future[_Chunk | None]] = deque()
        self._reader: Iterator[_Chunk] | None = None

    def close(self) -> None:
        """Ends the reading thread."""
        self._thread.shutdown(cancel_futures=True)

    @property
    def epoch(self) -> int:
        """Number of complete passes over the text."""
        return self._epoch

    def take(self, count: int) -> Samples:
        """Returns the next `count` samples.

        Raises:
            ValueError: an epoch has no text, a bad document is an error, or nearly all documents are bad.
        """
        while len(self._drawn) < count:
            self._drawn.append(self._draw())
        taken, self._drawn = self._drawn[:count], self._drawn[count:]
        return stack(taken, self._packer.max_seq_length)

    def put_back(self, samples: Samples) -> None:
        """Undoes the last `take`, which returned `samples`."""
        self._drawn = [Samples(*sample) for sample in zip(*samples, strict=True)] + self._drawn

    def _draw(self) -> Samples:
        while len(self._buffer) < self._shuffle_buffer_size and not self._at_end:
            self._fill()
        if not self._buffer:
            if not self._epoch_samples:
                used = f"; {self._epoch_in_eval_set} are in the evaluation set" if self._epoch_in_eval_set else ""
                raise ValueError(f"{EMPTY}{self.bad_documents.listed()}{used}")
            self._epoch, self._epoch_samples, self._at_end = self._epoch + 1, 0, False
            self._epoch_in_eval_set, self._prefixes = 0, {}
            return self._draw()
        # Each draw has its own generator, so that the number of draws is the only state. Documents are read in chunks,
        # so the buffer may have more than `shuffle_buffer_size` samples; the last ones are not drawn yet.
        last = min(len(self._buffer), self._shuffle_buffer_size) - 1
        chosen = int(np.random.default_rng((self._seed, 1, self._draws)).integers(last + 1)) if last else 0
        self._buffer[chosen], self._buffer[last] = self._buffer[last], self._buffer[chosen]
        self._draws += 1
        return self._buffer.pop(last)

    def _fill(self) -> None:
        """Moves the samples of one chunk into the buffer."""
        if self._reader is None:
            self._reader = self._read(self._epoch, self._cursor)
        while len(self._ahead) < READ_AHEAD:
            self._ahead.append(self._thread.submit(next, self._reader, None))
        try:
            chunk = self._ahead.popleft().result()
            if chunk is None:
                self.bad_documents.end_epoch()
            else:
                warn = self._epoch == 0  # later epochs have the same bad documents
                self.bad_documents.note(chunk.good, chunk.bad, chunk.nulls, warn=warn)
        except BaseException:
            self._restart()
            raise
        if chunk is None:
            self._packer.flush()
            self._at_end, self._cursor = True, [0, None]
            self._restart()  # the remaining futures only report the end, too
        else:
            self._cursor, self._prefixes[chunk.source] = chunk.cursor, chunk.prefix
            self._epoch_in_eval_set += chunk.in_eval_set
            for tokens in chunk.tokens:
                self._packer.add(tokens)
        self._epoch_samples += len(self._packer.samples)
        self._buffer += self._packer.samples
        self._packer.samples = []

    def _restart(self) -> None:
        """Drops the chunks that were read ahead; reading continues at the cursor."""
        self._reader = None
        self._ahead.clear()

    def _order(self, epoch: int) -> list[int]:
        """Order of the sources in an epoch."""
        order = np.arange(len(self._sources))
        if self._shuffle_buffer_size > 1:
            order = np.random.default_rng((self._seed, 0, epoch)).permutation(order)
        return order.tolist()

    def _read(self, epoch: int, cursor: Sequence[Any]) -> Iterator[_Chunk]:
        order = self._order(epoch)
        first, begin = cursor
        for number in range(first, len(order)):
            source = order[number]
            prefix = ReadPrefix() if begin is None else self._prefixes[source].copy()
            documents: list[Document] = []
            size = 0
            for document in self._sources[source].read(begin, prefix):
                documents.append(document)
                size += len(document.text or "")
                if len(documents) == READ_DOCUMENTS or size >= READ_CHARACTERS:
                    yield self._chunk(documents, [number, document.cursor], source, prefix)
                    documents, size = [], 0
            begin = None
            yield self._chunk(documents, [number + 1, None], source, prefix)

    def _chunk(self, documents: list[Document], cursor: list[Any], source: int, prefix: ReadPrefix) -> _Chunk:
        texts = [document for document in documents if document.text is not None]
        trained = [d for d in texts if self.eval_set is None or not self.eval_set.contains(d.text or "")]
        tokens, refused = self._tokenizer.documents(trained) if trained else ([], [])
        bad = [document for document in documents if document.problem]
        nulls = len(documents) - len(texts) - len(bad)
        return _Chunk(
            tokens,
            len(texts) - len(refused),
            len(texts) - len(trained),
            bad + refused,
            nulls,
            cursor,
            source,
            prefix.copy(),
        )

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Everything on which the following samples depend, as JSON and as tensors."""
        pieces = self._packer.open
        state = {
            "epoch": self._epoch,
            "epoch_samples": self._epoch_samples,
            "at_end": self._at_end,
            "draws": self._draws,
            "cursor": self._cursor,
            "sources": [source.name for source in self._sources],
            "read": [[source, prefix.size, prefix.digest()] for source, prefix in self._prefixes.items()],
            "bad_documents": self.bad_documents.state(),
            "eval_set": None,
        }
        arrays = {
            "open.ids": np.concatenate([*pieces, np.empty(0, np.int32)]).astype(np.int32),
            "open.positions": np.concatenate([*map(piece_positions, pieces), np.empty(0, np.int32)]).astype(np.int32),
        }
        for name, samples in {"buffer": self._buffer, "drawn": self._drawn}.items():
            ids, positions = stack(samples, self._packer.max_seq_length)
            arrays |= {f"{name}.ids": ids, f"{name}.positions": positions}
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        if self.eval_set is not None:
            state["eval_set"], eval_tensors = self.eval_set.state()
            tensors |= eval_tensors
        return state, tensors

    def load_state(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Continues the stream that had this `state`.

        The part of the text that was read in the current epoch is read again, to verify that it is unchanged. Text
        after the cursor may change.

        Raises:
            ValueError: the sources are different, or text that had been read has changed.
        """
        names = [source.name for source in self._sources]
        if state["sources"] != names:
            raise ValueError(f"{CHANGED}: {_difference(state['sources'], names)}")
        self._prefixes = {}
        for source, size, expected in state["read"]:
            prefix = self._sources[source].prefix(size)
            if prefix.digest() != expected:
                raise ValueError(
                    f"{CHANGED}: {names[source]} differs within its first {size} bytes or rows, which have been read "
                    "already; only the text after them may change. Restore them, or start again in another --output-dir"
                )
            self._prefixes[source] = prefix
        self._epoch, self._epoch_samples = state["epoch"], state["epoch_samples"]
        self._at_end, self._draws, self._cursor = state["at_end"], state["draws"], state["cursor"]
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        self._buffer, self._drawn = (
            [Samples(*sample) for sample in zip(arrays[f"{name}.ids"], arrays[f"{name}.positions"], strict=True)]
            for name in ("buffer", "drawn")
        )
        self._packer.reopen(arrays["open.ids"], arrays["open.positions"])
        self.bad_documents.load_state(state["bad_documents"])
        self.eval_set = None if state["eval_set"] is None else EvalSet.from_state(state["eval_set"], tensors)
        self._restart()


def _difference(before: Sequence[str], now: Sequence[str]) -> str:
    """Describes how the list of sources has changed."""
    gone, new = ([name for name in a if name not in b] for a, b in ((before, now), (now, before)))
    parts = [f"{word} {', '.join(names[:5])}" for word, names in (("missing:", gone), ("new:", new)) if names]
    return ", ".join(parts) or "its files have another order or number"
