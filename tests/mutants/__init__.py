"""Known bugs that `make mutants` puts into copies of the sources, one at a time, to check that the tests find them.

A mutant replaces one text in one file. The modules of this package list the mutants; `__main__.py` applies them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One bug.

    Attributes:
        file: the source, from the repository's root.
        old: a text that occurs once in the file.
        new: its replacement.
        tests: arguments of pytest that select the tests which should find the bug, files first.
        why: the effect that a user would notice.
        harmless: the reason why no result changes, if the mutant may survive. A test that finds it is reported.
    """

    file: str
    old: str
    new: str
    tests: str
    why: str
    harmless: str = ""

    @property
    def name(self) -> str:
        """A short title: the file, and the beginning of the replaced text."""
        return f"{self.file.removeprefix('minilm_kernels/')}: {' '.join(self.old.split())[:60]}"
