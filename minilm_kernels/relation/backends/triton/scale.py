"""The kernel of the backward: scales the stored gradients, adds up those of one tensor and rounds them to its dtype."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .primitives import decode_integer

UNSPECIALIZED: dict[str, Any] = {"do_not_specialize": (), "do_not_specialize_on_alignment": ("upstream",)}


@triton.jit
def _write(
    out, parts, upstream, relations, weights, offset, mask,
    FIRST: tl.constexpr, COUNT: tl.constexpr, STRIDE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Writes the sum of COUNT parts, from part FIRST on, each times its factor."""
    total = 0.0
    for p in tl.static_range(FIRST, FIRST + COUNT):
        factor = tl.load(upstream + decode_integer(relations[p]) * STRIDE) * weights[p]
        x = tl.load(parts[p] + offset, mask=mask) if MASKED else tl.load(parts[p] + offset)
        total += x * factor
    if MASKED:
        tl.store(out + offset, tl.cast(total, out.dtype.element_ty), mask=mask)
    else:
        tl.store(out + offset, tl.cast(total, out.dtype.element_ty))


@triton.jit(**UNSPECIALIZED)
def scale_kernel(
    out, parts, upstream, relations, weights, sizes, blocks,
    FIRSTS: tl.constexpr, COUNTS: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes every gradient of a call. Output k is the sum of COUNTS[k] parts, from part FIRSTS[k] on.

    It has sizes[k] numbers and ends before program blocks[k]. STRIDE: that of the upstream gradient, or 0 for a scalar.
    Full blocks have no mask, so that loads and stores are as wide as possible.
    """
    pid = tl.program_id(0).to(tl.int64)
    begin = tl.cast(0, tl.int64)
    for k in tl.static_range(len(out)):
        end = decode_integer(blocks[k])
        if (pid >= begin) & (pid < end):
            size = decode_integer(sizes[k])
            start = (pid - begin) * BLOCK
            offset = start + tl.arange(0, BLOCK)
            if start + BLOCK <= size:
                _write(out[k], parts, upstream, relations, weights, offset, None, FIRSTS[k], COUNTS[k], STRIDE, False)
            else:
                mask = offset < size
                _write(out[k], parts, upstream, relations, weights, offset, mask, FIRSTS[k], COUNTS[k], STRIDE, True)
        begin = end
