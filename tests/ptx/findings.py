"""Mistakes of emulated launches: collected, not raised, so that one run shows all of them."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Finding:
    """One kind of mistake at one instruction; `count` threads made it, `example` is the first of them."""

    kind: str
    kernel: str
    line: int  # line of the PTX
    text: str
    source: str  # "file:line" of the kernel's source, where the PTX says it
    example: str
    count: int = 0

    @property
    def is_note(self) -> bool:
        """Undefined by the letter, without consequence as far as the emulator can tell."""
        return self.kind.startswith("note")

    def __str__(self) -> str:
        where = f" ({self.source})" if self.source else ""
        place = f"{self.kernel}, PTX line {self.line}{where}: `{self.text}`"
        return f"{self.kind}: {place}: {self.example}; {self.count} in all"


@dataclass
class Findings:
    """All findings of a run, one a kind and instruction."""

    items: dict[tuple[str, str, int], Finding] = field(default_factory=dict)

    def add(self, kind: str, kernel: str, instruction, example: str, count: int = 1) -> None:
        key = (kind, kernel, instruction.line)
        if key not in self.items:
            self.items[key] = Finding(kind, kernel, instruction.line, instruction.text, instruction.source, example)
        self.items[key].count += count

    def take(self) -> list[Finding]:
        """The findings so far, which are forgotten."""
        found, self.items = list(self.items.values()), {}
        return found
