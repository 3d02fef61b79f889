"""Self relations of narrow heads: the scores of a pair serve both of its orders, which halves the exponentials.

A program owns a head and cuts its tokens into strips of BLOCK_M rows, and what remains at the end into strips of half
as many, because comparisons with the sequence's end take registers. Each strip meets tiles of BLOCK_N earlier tokens,
then itself, the diagonal. Contributions to the strip's own rows stay in registers. Those to earlier rows are added to
global memory: within a strip every tile has its own rows, and a strip stores its rows before later strips add to them.
No other program touches them, so there are no atomics, and the order of additions is fixed.

Rows of a strip see all earlier tokens, under every mask. An earlier token sees a row i of the strip if the mask is
bidirectional or i < prefix. Only the diagonal compares positions.

The kernels serve heads with a shared pivot (`row_stats.pivot_kernel`). The square kernels follow for the others.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .primitives import (
    BIDIRECTIONAL,
    LN2,
    UNSPECIALIZED,
    decode_relation,
    head_pointer,
    head_program,
    load_tile,
    log_ratio,
    partial_sums,
    row_offset,
    sees,
    select,
    token_positions,
)


class Head(NamedTuple):
    """One model's tensor in a program."""

    x: Any  # pointer to the sequence's position 0
    stride: Any
    scale: Any
    pivot: Any


@triton.jit
def _load_heads(
    teacher, teacher_strides, student, student_strides, scale_t, scale_s, query_codes, head_stats, program,
    ALIGN_T: tl.constexpr, ALIGN_S: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Returns the `Head` of teacher and student."""
    index = decode_relation(query_codes, program.relation)
    x_t, stride_t = head_pointer(teacher, teacher_strides, index, program.head, program, ALIGN_T, PACKED)
    x_s, stride_s = head_pointer(student, student_strides, index, program.head, program, ALIGN_S, PACKED)
    pivot_t = tl.load(head_stats)
    pivot_s = tl.load(head_stats + 1)
    return Head(x_t, stride_t, scale_t, pivot_t), Head(x_s, stride_s, scale_s, pivot_s)


@triton.jit
def _load_tokens(head, position, start, length, LAYOUT: tl.constexpr, FULL: tl.constexpr, BLOCK: tl.constexpr):
    """Returns the tokens from `start` on, [BLOCK, DP]. LAYOUT is (D, DP, ALIGN)."""
    return load_tile(head.x, position, head.stride, start, length, BLOCK, LAYOUT[0], LAYOUT[1], LAYOUT[2], FULL)


@triton.jit
def _bits(head, tile, k_tile, PRECISION: tl.constexpr):
    """Returns the scores of two tiles minus the pivot, [BLOCK_M, BLOCK_N]."""
    return tl.fma(tl.dot(tile, tl.trans(k_tile), input_precision=PRECISION), head.scale, -head.pivot)


@triton.jit
def _seen(i, program, MASK: tl.constexpr):
    """Returns 1.0 for the rows of i that earlier tokens see, and 0.0 for the others, [BLOCK_M, 1]."""
    limit = program.length if MASK == BIDIRECTIONAL else program.prefix
    return (i < limit).to(tl.float32)[:, None]


@triton.jit
def _load_rows(x, rows, length, FULL: tl.constexpr):
    """Loads statistics of rows; those beyond the sequence are 0."""
    return tl.load(x + rows) if FULL else tl.load(x + rows, mask=rows < length, other=0.0)


@triton.jit
def _strip_sums(
    start, t, s, program, indices, sum_t, sum_s,
    LAYOUT_T: tl.constexpr, LAYOUT_S: tl.constexpr, PRECISION: tl.constexpr, HAS_INDICES: tl.constexpr,
    MASK: tl.constexpr, FULL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Stores the sums of a strip's rows over all keys up to its end, and adds the strip's part to earlier rows."""
    length = program.length
    i = start + tl.arange(0, BLOCK_M)
    q_position = token_positions(indices, start, length, BLOCK_M, HAS_INDICES, FULL)
    tile_t = _load_tokens(t, q_position, start, length, LAYOUT_T, FULL, BLOCK_M)
    tile_s = _load_tokens(s, q_position, start, length, LAYOUT_S, FULL, BLOCK_M)
    seen = _seen(i, program, MASK)
    sums_t = tl.zeros([BLOCK_M, 8], tl.float32)
    sums_s = tl.zeros([BLOCK_M, 8], tl.float32)
    for k_start in range(0, start, BLOCK_N):
        # static: begin unordered
        j = k_start + tl.arange(0, BLOCK_N)
        k_position = token_positions(indices, k_start, length, BLOCK_N, HAS_INDICES, True)
        before_t = tl.load(sum_t + j)
        before_s = tl.load(sum_s + j)
        k_tile_t = _load_tokens(t, k_position, k_start, length, LAYOUT_T, True, BLOCK_N)
        k_tile_s = _load_tokens(s, k_position, k_start, length, LAYOUT_S, True, BLOCK_N)
        e_t = tl.exp2(_bits(t, tile_t, k_tile_t, PRECISION))
        e_s = tl.exp2(_bits(s, tile_s, k_tile_s, PRECISION))
        sums_t += partial_sums(e_t, 8)
        sums_s += partial_sums(e_s, 8)
        if MASK != BIDIRECTIONAL or not FULL:
            e_t *= seen
            e_s *= seen
        tl.store(sum_t + j, before_t + tl.sum(e_t, 0))
        tl.store(sum_s + j, before_s + tl.sum(e_s, 0))
        # static: end unordered
    end = start + BLOCK_M if FULL else tl.minimum(start + BLOCK_M, length)
    for k_start in range(start, end, BLOCK_N):
        # static: begin diagonal
        j = k_start + tl.arange(0, BLOCK_N)
        k_position = token_positions(indices, k_start, length, BLOCK_N, HAS_INDICES, FULL)
        k_tile_t = _load_tokens(t, k_position, k_start, length, LAYOUT_T, FULL, BLOCK_N)
        k_tile_s = _load_tokens(s, k_position, k_start, length, LAYOUT_S, FULL, BLOCK_N)
        e_t = tl.exp2(_bits(t, tile_t, k_tile_t, PRECISION))
        e_s = tl.exp2(_bits(s, tile_s, k_tile_s, PRECISION))
        if MASK != BIDIRECTIONAL or not FULL:
            visible = (j < length)[None, :]
            if MASK != BIDIRECTIONAL:
                visible = visible & sees(i[:, None], j[None, :], program.prefix)
            e_t = tl.where(visible, e_t, 0.0)
            e_s = tl.where(visible, e_s, 0.0)
        sums_t += partial_sums(e_t, 8)
        sums_s += partial_sums(e_s, 8)
        # static: end diagonal
    tl.store(sum_t + i, tl.sum(sums_t, 1), mask=i < length)
    tl.store(sum_s + i, tl.sum(sums_s, 1), mask=i < length)
    tl.debug_barrier()  # other threads add to these sums


@triton.jit(**UNSPECIALIZED)
def unordered_sums_kernel(
    teacher, teacher_strides, student, student_strides, query_codes, scale_t, scale_s,
    heads, sequences, positions, total, stats_head_stride16, stats_seq_stride16,
    indices, starts, prefixes, head_stats, sum_t, sum_s, pivot_t, pivot_s, kl_rows,
    D_T: tl.constexpr, D_S: tl.constexpr, DP_T: tl.constexpr, DP_S: tl.constexpr,
    ALIGN_T: tl.constexpr, ALIGN_S: tl.constexpr, PRECISION: tl.constexpr,
    PACKED: tl.constexpr, HAS_INDICES: tl.constexpr, MASK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Writes pivot and sum of every row, and log(l_s / l_t) to `kl_rows`. One program per head."""
    program = head_program(heads, sequences, positions, total, starts, prefixes, PACKED, HAS_INDICES, MASK)
    length = program.length
    head_stats += tl.program_id(0) * 4
    if tl.load(head_stats + 2) < 0.5:
        return
    LAYOUT_T: tl.constexpr = (D_T, DP_T, ALIGN_T)
    LAYOUT_S: tl.constexpr = (D_S, DP_S, ALIGN_S)
    if HAS_INDICES:
        indices += program.indices_start
    row = row_offset(program, heads, stats_head_stride16, stats_seq_stride16, PACKED)
    sum_t += row
    sum_s += row
    pivot_t += row
    pivot_s += row
    kl_rows += row
    t, s = _load_heads(
        teacher, teacher_strides, student, student_strides, scale_t, scale_s, query_codes, head_stats, program,
        ALIGN_T, ALIGN_S, PACKED,
    )  # fmt: skip
    cut = length // BLOCK_M * BLOCK_M
    for start in range(0, cut, BLOCK_M):
        _strip_sums(
            start, t, s, program, indices, sum_t, sum_s,
            LAYOUT_T, LAYOUT_S, PRECISION, HAS_INDICES, MASK, True, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    for start in range(cut, length, BLOCK_M // 2):
        _strip_sums(
            start, t, s, program, indices, sum_t, sum_s,
            LAYOUT_T, LAYOUT_S, PRECISION, HAS_INDICES, MASK, False, BLOCK_M // 2, BLOCK_N,
        )  # fmt: skip
    for start in range(0, length, BLOCK_M):
        i = start + tl.arange(0, BLOCK_M)
        in_bounds = i < length
        ratio = log_ratio(tl.load(sum_t + i, mask=in_bounds, other=1.0), tl.load(sum_s + i, mask=in_bounds, other=1.0))
        tl.store(kl_rows + i, ratio, mask=in_bounds)
        tl.store(pivot_t + i, tl.zeros([BLOCK_M], tl.float32) + t.pivot, mask=in_bounds)
        tl.store(pivot_s + i, tl.zeros([BLOCK_M], tl.float32) + s.pivot, mask=in_bounds)


@triton.jit
def _add_exactly(total, lost, x):
    """Returns the sum of total and x, and `lost` plus its rounding error (Knuth's TwoSum)."""
    added = total + x
    part = added - total
    return added, lost + ((total - (added - part)) + (x - part))


@triton.jit
def _thread_sums(x):
    """Reduces [M, N] to [8, 8]. In the layout of tensor-core tiles, a warp's sums stay within its threads."""
    M: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1]
    return tl.sum(tl.sum(tl.reshape(x, [M // 8, 8, N // 8, 8]), 2), 0)


@triton.jit
def _strip_gradient(
    start, value, lost, t, s, program, indices, sum_t, sum_s, out, out_stride, factor,
    LAYOUT_T: tl.constexpr, LAYOUT_S: tl.constexpr, DG: tl.constexpr, PRECISION: tl.constexpr,
    HAS_INDICES: tl.constexpr, MASK: tl.constexpr, FULL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Stores the gradient of a strip's rows and adds the strip's part to the gradients of earlier rows.

    Adds the strip's sum of (q - p) - log(2) p (u_s - u_t) to `value` and its rounding error to `lost`, both [8, 8].
    """
    length = program.length
    D_S: tl.constexpr = LAYOUT_S[0]
    i = start + tl.arange(0, BLOCK_M)
    q_position = token_positions(indices, start, length, BLOCK_M, HAS_INDICES, FULL)
    tile_t = _load_tokens(t, q_position, start, length, LAYOUT_T, FULL, BLOCK_M)
    tile_s = _load_tokens(s, q_position, start, length, LAYOUT_S, FULL, BLOCK_M)
    # Operands of the gradient are DG wide: where DG is 8, half of a product of padded width would be wasted.
    tile_g = load_tile(s.x, q_position, s.stride, start, length, BLOCK_M, D_S, DG, LAYOUT_S[2], FULL)
    seen = _seen(i, program, MASK)
    q_inv_t = _load_rows(sum_t, i, length, FULL)[:, None]
    q_inv_s = _load_rows(sum_s, i, length, FULL)[:, None]
    feature = tl.arange(0, DG)[None, :]
    acc = tl.zeros([BLOCK_M, DG], tl.float32)
    excess_sum = tl.zeros([8, 8], tl.float32)
    product_sum = tl.zeros([8, 8], tl.float32)
    for k_start in range(0, start, BLOCK_N):
        # static: begin unordered
        j = k_start + tl.arange(0, BLOCK_N)
        k_position = token_positions(indices, k_start, length, BLOCK_N, HAS_INDICES, True)
        k_inv_t = tl.load(sum_t + j)[None, :]
        k_inv_s = tl.load(sum_s + j)[None, :]
        k_tile_g = load_tile(s.x, k_position, s.stride, k_start, length, BLOCK_N, D_S, DG, LAYOUT_S[2], True)
        k_tile_t = _load_tokens(t, k_position, k_start, length, LAYOUT_T, True, BLOCK_N)
        k_tile_s = _load_tokens(s, k_position, k_start, length, LAYOUT_S, True, BLOCK_N)
        u_t = _bits(t, tile_t, k_tile_t, PRECISION)
        u_s = _bits(s, tile_s, k_tile_s, PRECISION)
        if MASK == BIDIRECTIONAL and FULL:
            p = tl.exp2(u_t) * (q_inv_t + k_inv_t)
            excess = tl.exp2(u_s) * (q_inv_s + k_inv_s) - p
        else:
            p = tl.exp2(u_t) * tl.fma(seen, k_inv_t, q_inv_t)
            excess = tl.exp2(u_s) * tl.fma(seen, k_inv_s, q_inv_s) - p
        excess_sum += _thread_sums(excess)
        product_sum += _thread_sums(p * (u_s - u_t))
        excess = excess.to(k_tile_g.dtype)
        acc = tl.dot(excess, k_tile_g, acc, input_precision=PRECISION)
        address = out + (k_position * out_stride)[:, None] + feature
        mirrored = factor * tl.dot(tl.trans(excess), tile_g, input_precision=PRECISION)
        if D_S == DG:
            tl.store(address, tl.load(address) + mirrored)
        else:
            before = tl.load(address, mask=feature < D_S, other=0.0)
            tl.store(address, before + mirrored, mask=feature < D_S)
        # static: end unordered
    end = start + BLOCK_M if FULL else tl.minimum(start + BLOCK_M, length)
    for k_start in range(start, end, BLOCK_N):
        # static: begin diagonal
        j = k_start + tl.arange(0, BLOCK_N)
        k_position = token_positions(indices, k_start, length, BLOCK_N, HAS_INDICES, FULL)
        k_inv_t = _load_rows(sum_t, j, length, FULL)[None, :]
        k_inv_s = _load_rows(sum_s, j, length, FULL)[None, :]
        k_tile_g = load_tile(s.x, k_position, s.stride, k_start, length, BLOCK_N, D_S, DG, LAYOUT_S[2], FULL)
        k_tile_t = _load_tokens(t, k_position, k_start, length, LAYOUT_T, FULL, BLOCK_N)
        k_tile_s = _load_tokens(s, k_position, k_start, length, LAYOUT_S, FULL, BLOCK_N)
        u_t = _bits(t, tile_t, k_tile_t, PRECISION)
        u_s = _bits(s, tile_s, k_tile_s, PRECISION)
        if MASK == BIDIRECTIONAL:
            p = tl.exp2(u_t) * (q_inv_t + k_inv_t)
            excess = tl.exp2(u_s) * (q_inv_s + k_inv_s) - p
        else:
            fwd = sees(i[:, None], j[None, :], program.prefix)
            mirrored = sees(j[None, :], i[:, None], program.prefix)
            p = tl.exp2(u_t) * (tl.where(fwd, q_inv_t, 0.0) + tl.where(mirrored, k_inv_t, 0.0))
            excess = tl.exp2(u_s) * (tl.where(fwd, q_inv_s, 0.0) + tl.where(mirrored, k_inv_s, 0.0)) - p
        if not FULL:
            in_bounds = (i < length)[:, None] & (j < length)[None, :]
            p = tl.where(in_bounds, p, 0.0)
            excess = tl.where(in_bounds, excess, 0.0)
        # The diagonal visits both orders of a pair.
        excess_sum += 0.5 * _thread_sums(excess)
        product_sum += 0.5 * _thread_sums(p * (u_s - u_t))
        acc = tl.dot(excess.to(k_tile_g.dtype), k_tile_g, acc, input_precision=PRECISION)
        # static: end diagonal
    address = out + (q_position * out_stride)[:, None] + feature
    tl.store(address, factor * acc, mask=(i < length)[:, None] & (feature < D_S))
    tl.debug_barrier()  # other threads add to these rows
    return _add_exactly(value, lost, excess_sum - LN2 * product_sum)


@triton.jit(**UNSPECIALIZED)
def unordered_gradient_kernel(
    teacher, teacher_strides, student, student_strides, query_codes, scale_t, scale_s, gradient_scale,
    heads, sequences, positions, total, stats_head_stride16, stats_seq_stride16,
    indices, starts, prefixes, head_stats, sum_t, sum_s, kl_rows, weights, values, out,
    D_T: tl.constexpr, D_S: tl.constexpr, DP_T: tl.constexpr, DP_S: tl.constexpr, DG: tl.constexpr,
    ALIGN_T: tl.constexpr, ALIGN_S: tl.constexpr, PRECISION: tl.constexpr, SHIFT: tl.constexpr,
    PACKED: tl.constexpr, HAS_INDICES: tl.constexpr, MASK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of a head to `out`, and the sum of its rows' KL to `values`. One program per head.

    `sum_t` and `sum_s` hold the inverse sums of `finalize_kernel`, and `kl_rows` log(l_s / l_t). The sum of KL is that
    of log(l_s / l_t) minus that of p (u_s - u_t). These cancel when KL is small, so rounding errors of their sum are
    kept. The sum of q - p is 0 but for the rounding of l, which it corrects to first order.
    """
    program = head_program(heads, sequences, positions, total, starts, prefixes, PACKED, HAS_INDICES, MASK)
    length = program.length
    head_stats += tl.program_id(0) * 4
    if tl.load(head_stats + 2) < 0.5:
        return
    LAYOUT_T: tl.constexpr = (D_T, DP_T, ALIGN_T)
    LAYOUT_S: tl.constexpr = (D_S, DP_S, ALIGN_S)
    if HAS_INDICES:
        indices += program.indices_start
    row = row_offset(program, heads, stats_head_stride16, stats_seq_stride16, PACKED)
    sum_t += row
    sum_s += row
    kl_rows += row
    t, s = _load_heads(
        teacher, teacher_strides, student, student_strides, scale_t, scale_s, query_codes, head_stats, program,
        ALIGN_T, ALIGN_S, PACKED,
    )  # fmt: skip
    first = program.first if PACKED else program.sequence.to(tl.int64) * positions
    out = select(out, program.relation) + (first * heads + program.head) * D_S
    out_stride = heads * D_S
    factor = tl.load(weights + program.sequence) * gradient_scale

    # [8, 8]
    value = tl.zeros([8, 8], tl.float32)
    lost = tl.zeros([8, 8], tl.float32)
    cut = length // BLOCK_M * BLOCK_M
    for start in range(0, cut, BLOCK_M):
        value, lost = _strip_gradient(
            start, value, lost, t, s, program, indices, sum_t, sum_s, out, out_stride, factor,
            LAYOUT_T, LAYOUT_S, DG, PRECISION, HAS_INDICES, MASK, True, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    for start in range(cut, length, BLOCK_M // 2):
        value, lost = _strip_gradient(
            start, value, lost, t, s, program, indices, sum_t, sum_s, out, out_stride, factor,
            LAYOUT_T, LAYOUT_S, DG, PRECISION, HAS_INDICES, MASK, False, BLOCK_M // 2, BLOCK_N,
        )  # fmt: skip
    for start in range(0, length, 64):
        i = start + 8 * tl.arange(0, 8)[:, None] + tl.arange(0, 8)[None, :]  # [8, 8]
        ratio = tl.load(kl_rows + i, mask=i < length, other=0.0)
        # The inverse sum is 0 in rows that do not count or see only themselves.
        has_kl = tl.load(sum_t + i, mask=i < length, other=0.0) > 0.0
        value, lost = _add_exactly(value, lost, tl.where(has_kl, ratio * 2.0**SHIFT, 0.0))
    kl = tl.sum(tl.sum(value, 1), 0) + tl.sum(tl.sum(lost, 1), 0)
    tl.store(values + tl.program_id(0), kl * 2.0**-SHIFT)
