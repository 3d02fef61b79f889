"""Bugs that are put into a copy of the sources, one at a time, to see whether the tests find them: `make mutants`.

A mutant replaces one place of one file. The lists beside this file are data; `__main__.py` applies them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One bug.

    Attributes:
        file: the source, from the repository's root.
        old, new: the text that occurs there once, and what takes its place.
        tests: pytest's arguments, files first: the tests that should find it.
        why: what a user gets.
        harmless: why no result changes, for one that may survive; the tool tells if a test finds it all the same.
    """

    file: str
    old: str
    new: str
    tests: str
    why: str
    harmless: str = ""

    @property
    def name(self) -> str:
        """A short title: the file and the first words that change."""
        return f"{self.file.removeprefix('minilm_kernels/')}: {' '.join(self.old.split())[:60]}"
