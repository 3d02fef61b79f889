"""Counts documents that cannot be read, and skips them with a warning or stops the run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from .sources import Document

NAMED = 20  # number of bad documents that each get a warning at once
QUIET_SECONDS = 30.0  # minimum time between later warnings
# A corpus with more than nine bad documents in ten is probably not the intended one (a wrong --text-column, another
# format), and training on the rest would be an accident. With fewer bad documents, the rest is worth training on. A
# single bad file at the beginning can produce many bad documents, so the share is checked from this number on, and at
# the end of the epoch.
ENOUGH_BAD = 1000
GOOD_SHARE = 0.1


class BadDocuments:
    """Counts bad documents and nulls, and either skips bad documents or raises an error.

    Args:
        policy: "skip" or "error".
        say: is called with each warning.

    Attributes:
        bad, nulls: documents without text since the start of the run, counted every time they are read.
    """

    def __init__(self, policy: str = "skip", say: Callable[[str], None] = lambda message: None) -> None:
        self._policy, self._say = policy, say
        self.bad = self.nulls = 0
        self._epoch_good = self._epoch_bad = 0
        self._latest = ""
        self._named, self._unnamed, self._last = 0, 0, 0.0

    def note(self, good: int, bad: Sequence[Document], nulls: int, *, warn: bool = True) -> None:
        """Counts documents.

        Raises:
            ValueError: there is a bad document and the policy is "error", or nearly all documents of the epoch are bad.
        """
        if bad and self._policy == "error":
            raise ValueError(
                f"{_described(bad[0])}; repair or remove it, or skip such documents with --bad-documents skip, "
                "then continue with --resume-from-checkpoint"
            )
        count = sum(document.documents for document in bad)
        if bad:
            self._latest = _described(bad[-1])
        if self._epoch_bad + count >= ENOUGH_BAD:
            self._check(self._epoch_good + good, self._epoch_bad + count)
        self.bad, self.nulls = self.bad + count, self.nulls + nulls
        self._epoch_good, self._epoch_bad = self._epoch_good + good, self._epoch_bad + count
        for document in bad if warn else ():
            self._warn(document)

    def end_epoch(self) -> None:
        """Resets the counts of the epoch. Raises `ValueError` if nearly all of its documents were bad."""
        self._check(self._epoch_good, self._epoch_bad)
        self._epoch_good = self._epoch_bad = 0

    def _check(self, good: int, bad: int) -> None:
        if bad and good < GOOD_SHARE * (good + bad):
            raise ValueError(
                f"{bad} of the first {good + bad} documents cannot be read; check the text and --text-column. "
                f"The latest: {self._latest}"
            )

    def _warn(self, document: Document) -> None:
        now = time.monotonic()
        if self._named >= NAMED and now - self._last < QUIET_SECONDS:
            self._unnamed += 1
            return
        others = f" (and {self._unnamed} others since the last warning)" if self._unnamed else ""
        self._say(f"skipped a document: {_described(document)}{others}")
        self._named, self._unnamed, self._last = self._named + 1, 0, now

    def listed(self) -> str:
        """The counts in parentheses, for a message; "" if there are none."""
        counts = {"bad": self.bad, "without text (null)": self.nulls}
        parts = [f"{count} {kind}" for kind, count in counts.items() if count]
        return f" ({', '.join(parts)})" if parts else ""

    def summary(self) -> str:
        """The number of bad documents, for the end of a run; "" if there are none."""
        if not self.bad:
            return ""
        return f"skipped bad documents: {self.bad} (each is counted once per epoch)"

    def state(self) -> dict[str, Any]:
        """The counts as JSON, for a checkpoint."""
        return {"bad": self.bad, "nulls": self.nulls, "epoch_good": self._epoch_good, "epoch_bad": self._epoch_bad}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores the counts that `state` returned."""
        self.bad, self.nulls = state["bad"], state["nulls"]
        self._epoch_good, self._epoch_bad = state["epoch_good"], state["epoch_bad"]


def _described(document: Document) -> str:
    return f"{document.where}: {document.problem}"
