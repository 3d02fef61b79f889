"""Kernels that run before the others if a call has masks: they list the valid tokens and weigh the rows.

A call launches `sequences_kernel` if it has a padding or query mask, and then, or if it is packed, `weights_kernel`.
`masks.Mask` has the definitions.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .primitives import decode_integer

# Arguments whose values must not trigger a compilation.
UNSPECIALIZED: dict[str, Any] = {
    "do_not_specialize": (
        "attention_batch_stride", "attention_stride", "query_batch_stride", "query_stride", "sequences", "positions",
        "max_seqlen",
    ),
    "do_not_specialize_on_alignment": ("attention_mask", "query_mask", "cu_seqlens", "prefix_lens", "bounds"),
}  # fmt: skip

SEQUENCE, TOKEN, SUM = tl.constexpr("sequence"), tl.constexpr("token"), tl.constexpr("sum")


@triton.jit
def _faults(cu_seqlens, sequences, positions, max_seqlen, BLOCK: tl.constexpr):
    """Returns the number of reasons why `cu_seqlens` is malformed. `max_seqlen` is -1 for any length."""
    found = (tl.load(cu_seqlens) != 0).to(tl.int32)
    found += (tl.load(cu_seqlens + sequences) != positions).to(tl.int32)
    for first in range(0, sequences, BLOCK):
        n = first + tl.arange(0, BLOCK)
        exists = n < sequences
        begin = tl.load(cu_seqlens + n, mask=exists, other=0).to(tl.int64)
        length = tl.load(cu_seqlens + n + 1, mask=exists, other=0).to(tl.int64) - begin
        wrong = exists & ((length < 0) | ((max_seqlen >= 0) & (length > max_seqlen)))
        found += tl.sum(wrong.to(tl.int32), 0)
    return found


@triton.jit
def _marked(mask, at, in_bounds):
    """Returns which tokens a mask marks; all that exist if the call has no such mask."""
    if mask is not None:  # Triton compiles what follows a return
        in_bounds = tl.load(mask + at, mask=in_bounds, other=0) != 0
    return in_bounds


@triton.jit(**UNSPECIALIZED)
def sequences_kernel(
    attention_mask, attention_batch_stride, attention_stride, query_mask, query_batch_stride, query_stride,
    cu_seqlens, prefix_lens, sequences, positions, max_seqlen, indices, lengths, row_counts, prefixes, counted, out,
    columns, BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Lists the valid tokens of a sequence, counts them and the rows that count, and clears the gradients of padding.

    The grid is (sequences, parts): all parts clear gradients, and the first does the rest. `out` holds gradients, each
    with `columns` numbers per token. In malformed packings, all rows count.
    """
    n = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK).to(tl.int64)
    if tl.program_id(1) == 0:
        first = n * positions
        end = first + positions
        everything = False
        if cu_seqlens is not None:
            everything = _faults(cu_seqlens, sequences, positions, max_seqlen, BLOCK) > 0
            first = tl.maximum(tl.load(cu_seqlens + n), 0).to(tl.int64)
            end = tl.minimum(tl.load(cu_seqlens + n + 1), positions).to(tl.int64)
            for start in range(tl.program_id(0) * BLOCK, positions, sequences * BLOCK):
                exists = start + lane < positions
                counts = _marked(query_mask, (start + lane) * query_stride, exists) | everything
                tl.store(counted + start + lane, counts, mask=exists)
        attention_at = n * attention_batch_stride
        query_at = n * query_batch_stride if cu_seqlens is None else first * query_stride
        size = (end - first).to(tl.int32)
        length = 0
        for start in range(0, size, BLOCK):
            i = start + lane
            valid = _marked(attention_mask, attention_at + i * attention_stride, i < size)
            length += tl.sum(valid.to(tl.int32), 0)
        before = 0
        rows = 0
        prefix = 0
        prefix_len = 0
        if prefix_lens is not None:
            prefix_len = tl.load(prefix_lens + n)
        for start in range(0, size, BLOCK):
            i = start + lane
            exists = i < size
            valid = _marked(attention_mask, attention_at + i * attention_stride, exists)
            counts = valid & _marked(query_mask, query_at + i * query_stride, exists)
            rank = before + tl.cumsum(valid.to(tl.int32), 0) - valid.to(tl.int32)
            before += tl.sum(valid.to(tl.int32), 0)
            rows += tl.sum(counts.to(tl.int32), 0)
            prefix += tl.sum((valid & (i < prefix_len)).to(tl.int32), 0)
            if indices is not None:  # padding follows the valid tokens
                place = tl.where(valid, rank, length + i - rank)
                tl.store(indices + first + place, i, mask=exists)
            if counted is not None and cu_seqlens is None:
                tl.store(counted + first + i, counts, mask=exists)
        if lengths is not None:
            tl.store(lengths + n, length)
        if prefixes is not None:
            tl.store(prefixes + n, prefix)
        tl.store(row_counts + n, rows)

    if out is not None:
        for start in range(tl.program_id(1) * ROWS, positions, tl.num_programs(1) * ROWS):
            i = start + tl.arange(0, ROWS).to(tl.int64)
            exists = i < positions
            valid = _marked(attention_mask, n * attention_batch_stride + i * attention_stride, exists)
            for k in tl.static_range(len(out)):
                width = decode_integer(columns[k])
                for begin in range(0, width, COLUMNS):
                    column = (begin + tl.arange(0, COLUMNS))[None, :]
                    to = out[k] + ((n * positions + i) * width)[:, None] + column
                    tl.store(to, 0.0, mask=(exists & ~valid)[:, None] & (column < width))


@triton.jit(**UNSPECIALIZED)
def weights_kernel(
    cu_seqlens, row_counts, sequences, positions, max_seqlen, heads, bounds, weights,
    REDUCTION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the weight in the loss of each sequence's rows, and the bounds of packed sequences. One program.

    In malformed packings, all weights are NaN, and the bounds are those of sequences of about equal lengths, so that
    every result is NaN and no access is out of bounds.
    """
    malformed = False
    if cu_seqlens is not None:
        malformed = _faults(cu_seqlens, sequences, positions, max_seqlen, BLOCK) > 0
    nonempty = 0
    rows = tl.cast(0, tl.int64)
    for first in range(0, sequences, BLOCK):
        n = first + tl.arange(0, BLOCK)
        count = _row_count(cu_seqlens, row_counts, n, n < sequences)
        nonempty += tl.sum((count > 0).to(tl.int32), 0)
        rows += tl.sum(count, 0)
    for first in range(0, sequences, BLOCK):
        n = first + tl.arange(0, BLOCK)
        weight = tl.full([BLOCK], 1.0, tl.float32)
        if REDUCTION == TOKEN:
            weight /= heads * tl.maximum(rows, 1).to(tl.float32)
        if REDUCTION == SEQUENCE:
            count = _row_count(cu_seqlens, row_counts, n, n < sequences)
            weight /= heads * tl.maximum(nonempty, 1).to(tl.float32) * tl.maximum(count, 1).to(tl.float32)
        tl.store(weights + n, tl.where(malformed, float("nan"), weight), mask=n < sequences)
        if cu_seqlens is not None:
            bound = tl.load(cu_seqlens + n, mask=n < sequences, other=0)
            even = (n.to(tl.int64) * positions // sequences).to(tl.int32)
            tl.store(bounds + n, tl.where(malformed, even, bound), mask=n < sequences)
    if cu_seqlens is not None:
        tl.store(bounds + sequences, positions)


@triton.jit
def _row_count(cu_seqlens, row_counts, n, exists):
    """Returns the number of rows of sequences n that count, int64."""
    if row_counts is not None:
        count = tl.load(row_counts + n, mask=exists, other=0)
    else:
        begin = tl.load(cu_seqlens + n, mask=exists, other=0).to(tl.int64)
        count = tl.load(cu_seqlens + n + 1, mask=exists, other=0).to(tl.int64) - begin
    return count
