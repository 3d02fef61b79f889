"""The evaluation set: documents that are taken out of the training text, or a separate text."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .bad_documents import BadDocuments
from .packing import Packer, Samples, stack
from .sources import Document, Source
from .tokenization import DocumentTokenizer, Tokens

EMPTY = "the training text is empty: no document in --text or --dataset-name has any tokens"


def digest(text: str) -> bytes:
    """A hash of a document's content, which decides whether the document is used for training or evaluation."""
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


@dataclass(frozen=True)
class EvalSet:
    """The evaluation samples, and the rule that keeps their documents out of training.

    Checkpoints contain both, so that a resumed run uses the same samples even if the text has been repaired since.

    Attributes:
        samples: (samples, max_seq_length).
        limit: a document is used for evaluation if its digest, as a number, is below this limit.
        digests: digests of further evaluation documents.
    """

    samples: Samples
    limit: int
    digests: frozenset[bytes] = frozenset()

    def contains(self, text: str) -> bool:
        """True for evaluation documents. Copies of a document always belong to the same set."""
        own = digest(text)
        return int.from_bytes(own, "big") < self.limit or own in self.digests

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The content as JSON and as tensors, for a checkpoint."""
        state = {"limit": self.limit, "digests": sorted(digest.hex() for digest in self.digests)}
        samples = {"eval.ids": self.samples.ids, "eval.positions": self.samples.positions}
        return state, {name: torch.from_numpy(array) for name, array in samples.items()}

    @classmethod
    def from_state(cls, state: dict[str, Any], tensors: dict[str, Tensor]) -> EvalSet:
        """Restores an evaluation set from its `state`."""
        samples = Samples(tensors["eval.ids"].numpy(), tensors["eval.positions"].numpy())
        return cls(samples, state["limit"], frozenset(map(bytes.fromhex, state["digests"])))


def limit_of(fraction: float) -> int:
    """The limit below which the digests of a share `fraction` of all documents lie."""
    return int(fraction * 2**64)


def collect_eval_set(
    sources: Sequence[Source],
    separate: bool,
    fraction: float,
    packer: Packer,
    tokenizer: DocumentTokenizer,
    max_samples: int,
    bad_documents: BadDocuments,
) -> EvalSet:
    """Collects the first `max_samples` samples of the evaluation documents.

    Args:
        sources: the evaluation text if `separate`, otherwise the training text. `fraction` of the training text is
            used. If that is no document or all documents, as in a small corpus, the document with the smallest digest
            is used.

    Raises:
        ValueError: no document can be used for evaluation, a bad document is an error, or nearly all are bad.
    """
    limit = 0 if separate else limit_of(fraction)
    seen: set[bytes] = set()
    smallest, smallest_tokens = 1 << 64, list[Tokens]()
    different = set[int]()  # digests of the first two different documents
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
            if len(different) < 2:
                different.add(number)
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
        if len(packer.samples) >= max_samples:
            break
    else:
        bad_documents.end_epoch()
        if not separate and not (trained and (packer.samples or packer.open)):  # a small corpus
            packer.clear()
            if len(different) > 1:
                limit = smallest + 1
                for piece in smallest_tokens:
                    packer.add(piece)
    packer.flush()
    if not packer.samples:
        if separate:
            raise ValueError(f"--eval-text has no text{bad_documents.listed()}")
        if not smallest_tokens:
            raise ValueError(f"{EMPTY}{bad_documents.listed()}")
        how_many = "1 document" if found == 1 else f"{found} identical documents"
        by_line = f"--documents line, if each of its {lines} lines is a document; " if lines > found else ""
        raise ValueError(
            f"--eval-fraction {fraction}: the training text has {how_many}{bad_documents.listed()}, which cannot be "
            f"used for both evaluation and training; give {by_line}more text; a separate --eval-text; or "
            "--eval-fraction 0 to train without evaluation"
        )
    return EvalSet(stack(packer.samples[:max_samples], packer.max_seq_length), limit, frozenset(seen))
