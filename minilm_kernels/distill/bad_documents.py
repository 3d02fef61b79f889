"""Documents that cannot be read: whether they end the run, how often the log names them, how many there were."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from .sources import Document

NAMED = 20  # warnings at once; then
QUIET_SECONDS = 30.0  # between two of them
# A corpus of which more than nine in ten documents are bad is not the one that was meant (a wrong --text-field, another
# format): what would train is what is left of it by accident. With fewer, the rest is worth training on. Early on,
# one bad file may stand for all, so the share is looked at only from so many bad documents on, or at the epoch's end.
ENOUGH_BAD = 1000
GOOD_SHARE = 0.1


class BadDocuments:
    """Counts bad documents and nulls, and skips the bad ones or raises for them.

    Args:
        policy: "skip" or "error".
        say: is given the warnings.

    Attributes:
        bad, nulls: documents without text since the run began, each time they were met.
    """

    def __init__(self, policy: str = "skip", say: Callable[[str], None] = lambda message: None) -> None:
        self._policy, self._say = policy, say
        self.bad = self.nulls = 0
        self._epoch_good = self._epoch_bad = 0
        self._latest = ""
        self._named, self._unnamed, self._last = 0, 0, 0.0

    def note(self, good: int, bad: Sequence[Document], nulls: int, *, warn: bool = True) -> None:
        """Counts documents that were read.

        Raises:
            ValueError: a bad one, if they are errors; or nearly all documents of the epoch are bad.
        """
        if bad and self._policy == "error":
            raise ValueError(
                f"{_described(bad[0])}; repair or remove it, or skip such documents with --bad-documents skip, "
                "and continue with --resume"
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
        """Begins to count anew for an epoch. Raises `ValueError` if nearly all documents of the last were bad."""
        self._check(self._epoch_good, self._epoch_bad)
        self._epoch_good = self._epoch_bad = 0

    def _check(self, good: int, bad: int) -> None:
        if bad and good < GOOD_SHARE * (good + bad):
            raise ValueError(
                f"{bad} of the first {good + bad} documents cannot be read; is it the right text, and the right "
                f"--text-field? The latest: {self._latest}"
            )

    def _warn(self, document: Document) -> None:
        now = time.monotonic()
        if self._named >= NAMED and now - self._last < QUIET_SECONDS:
            self._unnamed += 1
            return
        others = f" (and {self._unnamed} others since the last such line)" if self._unnamed else ""
        self._say(f"skipped a document: {_described(document)}{others}")
        self._named, self._unnamed, self._last = self._named + 1, 0, now

    def listed(self) -> str:
        """The counts in brackets, for a message; "" if there are none."""
        counts = {"bad": self.bad, "without text (null)": self.nulls}
        parts = [f"{count} {kind}" for kind, count in counts.items() if count]
        return f" ({', '.join(parts)})" if parts else ""

    def summary(self) -> str:
        """How many were bad, for the end of a run; "" if none was."""
        if not self.bad:
            return ""
        return f"skipped bad documents: {self.bad} (each counts once an epoch)"

    def state(self) -> dict[str, Any]:
        """The counts, as JSON."""
        return {"bad": self.bad, "nulls": self.nulls, "epoch_good": self._epoch_good, "epoch_bad": self._epoch_bad}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continues with the counts of `state`."""
        self.bad, self.nulls = state["bad"], state["nulls"]
        self._epoch_good, self._epoch_bad = state["epoch_good"], state["epoch_bad"]


def _described(document: Document) -> str:
    return f"{document.where}: {document.problem}"
