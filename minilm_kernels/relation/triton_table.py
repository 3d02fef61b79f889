"""The block sizes that the Triton kernels are launched with, and every kernel variant as a compiler takes it.

No value was measured on a device. What stands behind the table is the static cost of the compiled code (registers,
spills, issue slots a pair; docs/triton.md has the figures and the command); which of two tables with equal cost hides
latency better is an estimate.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Blocks:
    """What one program of a kernel owns and how it is compiled."""

    block_m: int  # own tokens
    block_n: int  # tokens a turn of its inner loop
    num_warps: int
    num_stages: int


def padded(width: int) -> int:
    """The width that a tile has: tensor cores take at least 16 features, and powers of 2."""
    return max(16, 1 << (width - 1).bit_length())


def blocks(kernel: str, width_t: int, width_s: int, itemsize: int) -> Blocks:
    """Of a kernel ("lse", "rows", "gradient"), by the widths and the wider dtype of teacher and student."""
    return Blocks(64, 64, 4, 2)


INTERPRETED = Blocks(32, 16, 4, 1)
INTERPRETED_LONG = Blocks(512, 512, 4, 1)  # the interpreter's time is a program's and a turn's, whatever their size
