"""The block sizes that the Triton kernels are launched with, and every kernel variant as a compiler takes it.

No value was measured on a device. What stands behind the table is the static cost of the compiled code (registers,
spills, issue slots a pair; docs/triton.md has the figures and the command); which of two tables with equal cost hides
latency better is an estimate.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any


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


@cache
def _pipelined() -> bool:
    """Whether loops may run in several stages: from Triton 3.7.1 on wgmma sees what cp.async has written.

    Before, the compiler leaves out the proxy fence between the two, and the read is unordered. In one stage a loop has
    ordinary stores, which every version fences. tests/ptx/fences.py looks for it in the PTX.
    """
    import triton

    return tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:3]) >= (3, 7, 1)


def blocks(kernel: str, width: int, itemsize: int, listed_prefix: bool = False) -> Blocks:
    """Of a kernel ("lse", "rows", "gradient"), by the wider padded width and dtype of teacher and student.

    Two exponentials take the time of 16 issue slots, so what counts below that is how many warps hide each other's
    waiting. sm_90, (16, 8), slots a pair and registers: lse 64 x 32 in two stages 12.7 and 96 (20 warps a
    multiprocessor), in one 10.9 and 127 (with Triton 3.6 10.5 and 87, 20 warps), 64 x 64 10 and 160 (12 warps);
    gradient 64 x 32 in one stage 12.1 and 112 (16 warps), in two 14 and about as many, 64 x 64 10.8 and 161. float32
    has no tensor core that multiplies exactly: a thread keeps parts of rows in registers, and the largest blocks tried
    that do not spill were taken.
    """
    if itemsize < 4:
        if kernel == "gradient" and listed_prefix:
            return Blocks(64, 16, 4, 1)  # both masks at once: 64 x 32 spills on sm_80, 128 x 32 on sm_100
        return Blocks(64, 32, 4, 2 if kernel == "lse" and _pipelined() else 1)
    if width <= 64:
        return Blocks(64 if width <= 16 and kernel != "gradient" else 32, 32, 8, 1)
    return Blocks(32, 16, 2 if kernel == "gradient" else 4, 1)


def in_parts(padded_width: int, itemsize: int) -> bool:
    """Rows are fetched part by part (`_products`)."""
    return itemsize == 4 and padded_width > 64


FUSION = {"enable_fp_fusion": True}  # products and sums become one instruction; Triton 3.10 turns its default around
BASE_BLOCK = 128  # rows that the base kernel takes at a time; estimate
LINK_BLOCK = 512  # rows that the link kernel takes at a time; estimate
INTERPRETED = Blocks(32, 16, 4, 1)
INTERPRETED_LONG = Blocks(512, 512, 4, 1)  # the interpreter's time is a program's and a turn's, whatever their size


@dataclass(frozen=True)
class Loop:
    """What one turn of a kernel's main loop does, for the whole program."""

    phase: str
    pairs: int  # ordered pairs
    exponentials: int
    tensor_macs: int  # 0 where the products are not the tensor cores'
    marker: str  # the source lines between "# static: begin" and "# static: end" of this name
    trips: float  # turns a program at S = 512
    copies: int = 1  # machine loops of it, which share the pairs evenly


@dataclass(frozen=True)
class Variant:
    """One compilation of a kernel."""

    kernel: str
    fn: Any
    signature: dict[str, Any]
    constants: dict[str, Any]
    divisible_by_16: tuple[str, ...]
    options: dict[str, int]
    dtype: str
    d_t: int
    d_s: int
    loops: tuple[Loop, ...]
    group: str


def variants(arch: int = 90) -> Iterator[Variant]:
    """Every kernel variant: each dtype, narrow and wide heads, and each mask and role, with its blocks of the table."""
    for dtype in ("bfloat16", "float16", "float32"):
        yield from variants_of(dtype, 16, 8, "self", arch, once=True)
        for widths in ((12, 6), (64, 32), (128, 128)):
            yield from variants_of(dtype, *widths, "self", arch)
        for group in ("self rows", "self packed causal", "self list prefix", "cross", "cross list prefix rows"):
            yield from variants_of(dtype, 16, 8, group, arch)


_TYPES = {"bfloat16": ("*bf16", 2), "float16": ("*fp16", 2), "float32": ("*fp32", 4)}


def variants_of(dtype: str, d_t: int, d_s: int, group: str, arch: int = 90, once: bool = False) -> Iterator[Variant]:
    """Of one loss with its gradient; `group` is words that tell relation ("self", "cross"), masks and rows.

    `once`: also the kernels outside the phases, whose time does not grow with the pairs.
    """
    from . import kernels

    pointer, itemsize = _TYPES[dtype]
    packed, listed = "packed" in group, "list" in group
    mask = kernels.PREFIX if "prefix" in group else kernels.CAUSAL if "causal" in group else kernels.BIDIRECTIONAL
    align = {d: math.gcd(16 // itemsize, d) for d in (d_t, d_s)}
    row_weights = "rows" in group
    constants = {
        "D_T": d_t,
        "D_S": d_s,
        "DP_T": padded(d_t),
        "DP_S": padded(d_s),
        "ALIGN_T": align[d_t],
        "ALIGN_S": align[d_s],
        "PARTS_T": in_parts(padded(d_t), itemsize),
        "PARTS_S": in_parts(padded(d_s), itemsize),
        "PRECISION": "ieee",
        "PACKED": packed,
        "LIST": listed,
        "MASK": mask.value,
        "SHIFT": 14.0 if dtype == "float16" else 0.0,
        "ROWS": row_weights,
        "SELF_RELATION": "self" in group,
    }
    signature = {
        "teacher": (pointer,) * 3,
        "teacher_strides": ("i32",) * 9,
        "student": (pointer,) * 3,
        "student_strides": ("i32",) * 9,
        "queries": "i32",
        "keys": "i32",
        "scale_t": "fp32",
        "scale_s": "fp32",
        "gradient_scale": "fp32",
        "heads": "i32",
        "sequences": "i32",
        "positions": "i32",
        "total": "i32",
        "tiles": "i32",
        "rows16": "i32",
        "span16": "i32",
        "sum_t": "*fp32",
        "sum_s": "*fp32",
        "base_t": "*fp32",
        "base_s": "*fp32",
        "kl_rows": "*fp32",
        "values": "*fp32",
        "links": "*fp32",
        "weights": "*fp32",
        "row_grads": ("*fp32",) * 3,
        "out": ("*fp32",) * 3,
        "tokens": "*i64",
        "starts": "*i32" if packed else "*i64",
        "prefixes": "*i64",
        "tile_map": "*i64",
    }
    absent = [
        *([] if listed else ["tokens"]),
        *([] if listed or packed else ["starts"]),
        *([] if mask == kernels.PREFIX else ["prefixes"]),
        *([] if packed else ["tile_map"]),
    ]

    def variant(name: str, fn: Any, phase: str | None, kernel: str, absent_here: list[str], **more: Any) -> Variant:
        values = {**constants, **more, **dict.fromkeys((*absent, *absent_here))}
        loops: tuple[Loop, ...] = ()
        options: dict[str, int] = dict(FUSION)
        if phase is not None:
            chosen = blocks(kernel, padded(max(d_t, d_s)), itemsize, listed and mask == kernels.PREFIX)
            values |= {"BLOCK_M": chosen.block_m, "BLOCK_N": chosen.block_n}
            options = {"num_warps": chosen.num_warps, "num_stages": chosen.num_stages, **FUSION}
            pairs = chosen.block_m * chosen.block_n
            features = padded(d_t) + padded(d_s) * (2 if kernel == "gradient" else 1)
            macs = 0 if dtype == "float32" else pairs * features
            # A self relation's gradient has a loop below the diagonal and one above it.
            copies = 2 if phase == "gradient" and mask != kernels.BIDIRECTIONAL and "self" in group else 1
            loops = (Loop(phase, pairs, 2 * pairs, macs, kernel, 512 / chosen.block_n, copies),)
        arguments = {n: signature.get(n, "constexpr") if n not in values else "constexpr" for n in fn.arg_names}
        pointers = tuple(n for n in arguments if "*" in str(arguments[n]))
        return Variant(
            name, fn, arguments, {n: v for n, v in values.items() if n in arguments}, pointers, options,
            dtype, d_t, d_s, loops, group,
        )  # fmt: skip

    cheap = not row_weights
    if once:
        yield variant("base", kernels.base_kernel, None, "base", [], BLOCK=BASE_BLOCK)
    yield variant("lse", kernels.lse_kernel, "lse", "lse", [] if cheap else ["kl_rows"], VALUE=cheap)
    if row_weights:
        yield variant("rows", kernels.rows_kernel, "rows", "rows", ["kl_rows"], RESULT=True)
    if once or row_weights:
        absent_link = ["kl_rows"] if row_weights else ["row_grads", "weights"]
        link = {"VALUE": cheap, "GRADIENT": True, "BLOCK": LINK_BLOCK}
        yield variant("link", kernels.link_kernel, None, "link", absent_link, **link)
    for role in (kernels.QUERY, kernels.KEY) if "cross" in group else (kernels.SELF,):
        name = {kernels.SELF.value: "gradient", kernels.QUERY.value: "gradient of query"}.get(
            role.value, "gradient of key"
        )
        yield variant(name, kernels.gradient_kernel, name, "gradient", [], ROLE=role.value)


def compile_variant(variant: Variant, arch: int) -> Any:
    """The compiled kernel, for an NVIDIA architecture such as 90; needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    attributes: dict[tuple[int, ...], list] = {}
    for index, name in enumerate(variant.signature):
        if name in variant.divisible_by_16:
            kind = variant.signature[name]
            paths = [(index, k) for k in range(len(kind))] if isinstance(kind, tuple) else [(index,)]
            attributes |= {path: [["tt.divisibility", 16]] for path in paths}
    source = ASTSource(variant.fn, dict(variant.signature), dict(variant.constants), attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(variant.options))
