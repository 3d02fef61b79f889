"""The evaluation set: documents that are taken out of the training text, or a separate text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .bad_documents import BadDocuments, listed
from .packing import Packer, Samples
from .sources import Source
from .token_shards import TokenShards, digest
from .tokenization import DocumentTokenizer


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

    def contains_digests(self, digests: np.ndarray) -> np.ndarray:
        """The same for the digests of many documents as numbers, (documents,) uint64 to (documents,) bool."""
        others = np.array([int.from_bytes(own, "big") for own in self.digests], np.uint64)
        return (digests < np.uint64(self.limit)) | np.isin(digests, others)

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
    packer: Packer,
    tokenizer: DocumentTokenizer,
    max_samples: int,
    bad_documents: BadDocuments,
) -> EvalSet:
    """Collects the first `max_samples` samples of a separate evaluation text.

    Raises:
        ValueError: there is no document, a bad document is an error, or nearly all are bad.
    """
    seen: set[bytes] = set()
    for document in (document for source in sources for document in source.read()):
        refused = [document] if document.problem else []
        if document.text and not document.text.isspace():
            [tokens], refused = tokenizer.documents([document])
            if any(map(len, tokens)):
                seen.add(digest(document.text))
            for piece in tokens:
                packer.add(piece)
        good = int(document.text is not None and not refused)
        bad_documents.note(good, refused, int(document.text is None and not document.problem))
        if packer.complete >= max_samples:
            break
    else:
        bad_documents.end_text()
    packer.flush()
    if not packer.complete:
        raise ValueError(f"--eval-text has no text{bad_documents.listed()}")
    return EvalSet(packer.samples.part(slice(max_samples)), 0, frozenset(seen))


def split_eval_set(shards: TokenShards, fraction: float, packer: Packer, max_samples: int) -> EvalSet:
    """Takes a share of the training documents, and collects their first `max_samples` samples.

    Args:
        fraction: the share. If that is no document or all documents, as in a small corpus, the document with the
            smallest digest is used.

    Raises:
        ValueError: all documents are the same, so that none can be used for evaluation only.
    """
    digests = shards.digests
    limit = limit_of(fraction)
    chosen = np.flatnonzero(digests < np.uint64(limit))
    if not 0 < len(chosen) < len(digests):
        smallest = int(digests.min())
        if smallest == int(digests.max()):
            counts = shards.counts
            found = len(digests)
            how_many = "1 document" if found == 1 else f"{found} identical documents"
            by_line = f"--documents line, if each of its {counts.lines} lines is a document; "
            raise ValueError(
                f"--eval-fraction {fraction}: the training text has {how_many}{listed(counts.bad, counts.nulls)}, "
                f"which cannot be used for both evaluation and training; give {by_line if counts.lines > found else ''}"
                "more text; a separate --eval-text; or --eval-fraction 0 to train without evaluation"
            )
        limit, chosen = smallest + 1, np.array([digests.argmin()])
    for document in chosen.tolist():
        packer.add(shards.read(document))
        if packer.complete >= max_samples:
            break
    packer.flush()
    return EvalSet(packer.samples.part(slice(max_samples)), limit)
