"""Launch configurations of the Triton kernels: tile sizes, warps and pipeline stages.

None of these values was measured on a GPU. They were chosen by the static cost of the compiled code (registers, spills,
issue slots per pair), which `python -m benchmarks static --backends triton` prints. See docs/triton.md.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Any

FUSION = {"enable_fp_fusion": True}  # contract products and sums into one instruction; Triton 3.10 changes the default
PIVOT_BLOCK = 128  # rows that the pivot kernel loads at a time; not tuned
FINALIZE_BLOCK = 512  # rows that the finalize kernel loads at a time; not tuned
SEQUENCE_BLOCK = 512  # tokens, or sequences, that the kernels of masks load at a time; not tuned
CLEARING_PROGRAMS = 8  # programs that clear a sequence's padding; not tuned
SCALE_BLOCK = 2048  # numbers of a program of the scale kernel; not tuned
TOTAL_BLOCK = 1024  # values that the total kernel loads at a time; not tuned
FULL_GPU = 12  # warps of a multiprocessor that the kernel of unordered pairs can use


def padded_width(width: int) -> int:
    """Returns the width of a tile: a power of 2, as Triton requires, and at least 16, as tensor cores require."""
    return max(16, 1 << (width - 1).bit_length())


def sliced(padded: int, itemsize: int) -> bool:
    """Returns whether score products load 16 features at a time (`primitives.score_tile`)."""
    return itemsize == 4 and padded > 64


# Compute capabilities with at least 1 024 bfloat16 multiply-adds per clock and multiprocessor. The six products of
# "bf16x6" would take longer than multiply-adds on the GPUs in between, which have 256.
_FAST_TENSOR_CORES = ((8, 0), (9, 0), (10, 0), (10, 3))


def float32_precision(width: int, capability: tuple[int, int] | None) -> str:
    """Returns how products of float32 numbers are computed: "ieee" or "bf16x6" (`primitives.multiply`).

    Args:
        width: the larger padded head width of teacher and student. Wider heads than 64 would spill.
        capability: compute capability of the GPU; None in the interpreter and on GPUs of other vendors.
    """
    return "bf16x6" if width <= 64 and capability in _FAST_TENSOR_CORES else "ieee"


@cache
def _version() -> tuple[int, ...]:
    """Returns the version of Triton as three numbers."""
    import triton

    return tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:3])


def supports_pipelining() -> bool:
    """Returns whether loops may have several pipeline stages. True from Triton 3.7.1 on.

    Older compilers leave out the proxy fence between cp.async and wgmma, so that wgmma may read stale shared memory. A
    loop with one stage uses ordinary stores, which all versions fence. tests/ptx/fences.py checks the fences.
    """
    return _version() >= (3, 7, 1)


def diagonal_stages(arch: int) -> tuple[int, int]:
    """Returns the stages of the diagonal's loops in the kernel of unordered pairs, of the sums and of the gradient.

    With more, loops spill. On sm_80, two stages of the sums take 20.53 slots at S = 128, and one stage 20.43.
    """
    if arch > 90 or _version() < (3, 9):
        return 1, 1
    return (2 if arch == 90 else 1), 2


@dataclass(frozen=True)
class LaunchConfig:
    """Tile sizes and compiler options of one launch."""

    block_m: int  # tokens that a program owns
    block_n: int  # tokens per iteration of its main loop
    num_warps: int
    num_stages: int
    maxnreg: int | None = None  # registers of a thread; None: the assembler chooses

    @property
    def options(self) -> dict[str, Any]:
        """Compiler options, as keyword arguments of a launch."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "maxnreg": self.maxnreg} | FUSION
        return {name: value for name, value in options.items() if value is not None}

    @classmethod
    def choose(
        cls,
        kernel: str,
        width: int,
        itemsize: int,
        precision: str,
        arch: int,
        intricate: bool,
        indices_and_prefix: bool,
    ) -> LaunchConfig:
        """Returns the configuration of a kernel, "row_stats", "row_kl" or "gradient".

        Args:
            kernel: name of the kernel.
            width: the larger padded head width of teacher and student.
            itemsize: the larger item size of their dtypes, in bytes.
            precision: how products of float32 numbers are computed.
            arch: compute capability, such as 90.
            intricate: whether the call has a causal or prefix mask, or rows that are not loaded 16 bytes at a time.
            indices_and_prefix: whether the call has both a padding mask and a prefix mask.
        """
        older = _version() < (3, 9)
        if itemsize == 4 and precision == "bf16x6":
            # 128 rows share the work of splitting a looped tile. On sm_100, older Tritons spill them, and 3.8 also
            # spills 64 x 32 at widths above 32.
            tight = older and arch >= 100
            rows = 128 if width <= 32 and not tight else 64
            if kernel == "gradient":  # some intricate gradients spill, to reach 168 registers, unless more are allowed
                return cls(rows, 16, 4, 1, 255 if intricate or tight else None)
            # 168 registers spill on sm_80. On sm_90, Triton 3.8 computes an exponential twice to save some.
            ample = indices_and_prefix or tight or (arch == 90 and _version()[:2] == (3, 8))
            return cls(rows, 16 if tight and width > 32 else 32, 4, 1, 255 if ample else None)
        if itemsize == 4:
            # Each thread holds slices of rows. Of the tiles that were tried, these are the largest that do not spill.
            if width > 64:
                return cls(32, 16, 2 if kernel == "gradient" else 4, 1)
            # The assemblers of Triton 3.6 and 3.8 spill a few registers, to reach 64 or 128, unless more are allowed.
            # Gradients that did not spill become 2 % slower.
            registers = {"gradient": 128, "row_kl": 168}.get(kernel) if older else None
            return cls(64 if width <= 16 and kernel != "gradient" else 32, 32, 8, 1, registers)
        if kernel == "gradient" and indices_and_prefix:
            return cls(64, 16, 4, 1, 128)  # 64 x 32 spills on sm_80, 128 x 32 on sm_100, 56 registers there, too
        if kernel == "row_stats" and width > 64 and not supports_pipelining():
            return cls(64, 32, 4, 1, 255)  # Triton 3.6 spills to reach 168 registers
        if kernel == "row_stats" and supports_pipelining():
            return cls(64, 32, 4, 2)  # sm_90, (16, 8): 96 registers, 20 warps/SM; 127 in one stage; 160 with 64 x 64
        return cls(64, 32, 4, 1)  # gradient, sm_90, (16, 8): 12.1 slots, 112 registers; in two stages 14 slots

    @classmethod
    def unordered(cls, widths: tuple[int, int], longest: int, bidirectional: bool, arch: int) -> LaunchConfig:
        """Returns the configuration of the kernel of unordered pairs.

        Heads that run at the same time must fit into the L2 cache. Longer sequences therefore get programs of more
        warps, of which fewer run at once.

        Args:
            widths: head widths of teacher and student.
            longest: length of the longest sequence, or a number of that size.
            bidirectional: whether the mask is neither causal nor a prefix.
            arch: compute capability, such as 90.
        """
        warps = 1 if longest < 1024 else 2 if longest < 2048 else 4
        # A scheduler holds 3 warps with 168 registers, and 2 with up to 255. In all other cases, 168 spill in a loop.
        many = warps == 1 and bidirectional and arch <= 90 and _version() >= (3, 9)
        many = many and not any(width % 8 for width in widths)
        # Four warps multiply by wgmma, and with more stages Triton 3.7 stores between a fence and the product.
        stages = 3 if warps < 4 or _version() >= (3, 8) else 1
        return cls(64 * warps, 16, warps, stages, 168 if many else 255)

    @classmethod
    def for_interpreter(cls, positions: int, packed: bool) -> LaunchConfig:
        """Returns tile sizes for Triton's interpreter, whose time per loop iteration hardly depends on their size."""
        return cls(64, 16, 1, 1) if positions <= 300 or packed else cls(512, 256, 1, 1)
