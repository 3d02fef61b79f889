"""Collects the mistakes of emulated launches. They are not raised as errors, so that one run shows all of them."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Finding:
    """One kind of mistake at one instruction. `count` threads made it; `example` describes the first of them."""

    kind: str
    kernel: str
    line: int  # line of the PTX
    text: str
    source: str  # "file:line" of the kernel's source, if the PTX names it
    example: str
    count: int = 0

    @property
    def is_note(self) -> bool:
        """True for code that is formally undefined, but has no effect that the emulator can detect."""
        return self.kind.startswith("note")

    def __str__(self) -> str:
        where = f" ({self.source})" if self.source else ""
        place = f"{self.kernel}, PTX line {self.line}{where}: `{self.text}`"
        return f"{self.kind}: {place}: {self.example}; {self.count} in all"


@dataclass
class Findings:
    """All findings of a run, one for each kind and instruction."""

    items: dict[tuple[str, str, int], Finding] = field(default_factory=dict)

    def add(self, kind: str, kernel: str, instruction, example: str, count: int = 1) -> None:
        key = (kind, kernel, instruction.line)
        if key not in self.items:
            self.items[key] = Finding(kind, kernel, instruction.line, instruction.text, instruction.source, example)
        self.items[key].count += count

    def take(self) -> list[Finding]:
        """Returns the findings so far and removes them."""
        found, self.items = list(self.items.values()), {}
        return found
