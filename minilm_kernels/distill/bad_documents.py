"""Counts documents that cannot be read, and skips them with a warning or stops the run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from .sources import Document

NAMED = 20  # number of bad documents that each get a warning at once
QUIET_SECONDS = 30.0  # minimum time between later warnings
# A corpus with more than nine bad documents in ten is probably not the intended one (a wrong --text-column, another
# format), and training on the rest would be an accident. With fewer bad documents, the rest is worth training on. A
# single bad file at the beginning can produce many bad documents, so the share is checked from this number on, and at
# the end of the text.
ENOUGH_BAD = 1000
GOOD_SHARE = 0.1


class BadDocuments:
    """Counts bad documents and nulls, and either skips bad documents or raises an error.

    Args:
        policy: "skip" or "error".
        say: is called with each warning.

    Attributes:
        bad, nulls: documents without text.
        strict: True if a bad document is an error.
    """

    def __init__(self, policy: str = "skip", say: Callable[[str], None] = lambda message: None) -> None:
        self.strict, self._say = policy == "error", say
        self.bad = self.nulls = self._good = 0
        self._latest = ""
        self._named, self._unnamed, self._last = 0, 0, 0.0

    def note(self, good: int, bad: Sequence[Document], nulls: int) -> None:
        """Counts documents.

        Raises:
            ValueError: there is a bad document and the policy is "error", or nearly all documents are bad.
        """
        if bad and self.strict:
            raise ValueError(
                f"{_described(bad[0])}; repair or remove it, or skip such documents with --bad-documents skip, "
                "then run the same command again, which keeps the text that is already tokenized"
            )
        count = sum(document.documents for document in bad)
        if bad:
            self._latest = _described(bad[-1])
        self.bad, self.nulls, self._good = self.bad + count, self.nulls + nulls, self._good + good
        if self.bad >= ENOUGH_BAD:
            self._check()
        for document in bad:
            self._warn(document)

    def end_text(self) -> None:
        """Raises `ValueError` if nearly all documents of the text were bad."""
        self._check()

    def _check(self) -> None:
        good, bad = self._good, self.bad
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
        return listed(self.bad, self.nulls)


def listed(bad: int, nulls: int) -> str:
    """Numbers of documents without text in parentheses, for a message; "" if there are none."""
    counts = {"bad": bad, "without text (null)": nulls}
    parts = [f"{count} {kind}" for kind, count in counts.items() if count]
    return f" ({', '.join(parts)})" if parts else ""


def _described(document: Document) -> str:
    return f"{document.where}: {document.problem}"
