"""Self relations of narrow heads: the scores of a pair serve both of its orders, which halves the exponentials.

A program owns a head and cuts its tokens into strips of BLOCK_M rows, and what remains at the end into strips of half
as many, because comparisons with the sequence's end take registers. Each strip meets tiles of BLOCK_N earlier tokens,
then itself, the diagonal. Contributions to the strip's own rows stay in registers. Those to earlier rows are added to
global memory: within a strip every tile has its own rows, and a strip stores its rows before later strips add to them.
No other program touches them, so the order of additions is fixed. They are atomic only to return nothing: no thread
waits for a load.

Rows of a strip see all earlier tokens, under every mask. An earlier token sees a row i of the strip if the mask is
bidirectional or i < prefix. Only the diagonal compares positions.

Heads with a wide range of scores have no shared pivot (`row_stats.shared_pivots`), so that a pair's two orders have
different exponentials. Their strips meet all tokens in the way of the diagonal, and write to their own rows only.

If there are few heads, several programs share each of them (SPLIT). The strips are dealt out. Every program adds to
copies of its own instead of to earlier rows, and the copies are added in a fixed order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .primitives import (
    BIDIRECTIONAL,
    CAUSAL,
    LN2,
    PREFIX,
    UNSPECIALIZED,
    decode_integer,
    decode_relation,
    head_pointer,
    head_program,
    load_tile,
    log_ratio,
    row_offset,
    rows_with_gradient,
    sees,
    select,
    token_positions,
    visible_keys,
)
from .row_stats import shared_pivots


class Head(NamedTuple):
    """One model's tensor in a program, and the statistics of its rows."""

    x: Any  # pointer to the sequence's position 0
    stride: Any
    scale: Any
    pivot: Any  # shared by all rows, unless the head is wide


@triton.jit
def _load_tokens(head, position, start, length, LAYOUT: tl.constexpr, FULL: tl.constexpr, BLOCK: tl.constexpr):
    """Returns the tokens from `start` on, [BLOCK, DP]. LAYOUT is (D, DP, ALIGN)."""
    return load_tile(head.x, position, head.stride, start, length, BLOCK, LAYOUT[0], LAYOUT[1], LAYOUT[2], FULL)


@triton.jit
def _row_pairs(stats, rows):
    """Returns pointers to a statistic of teacher and student in each row, [BLOCK, 2]."""
    return stats + 2 * rows[:, None] + tl.arange(0, 2)[None, :]


@triton.jit
def _load_pairs(stats, rows, length, FULL: tl.constexpr):
    """Returns a statistic of teacher and student in each row; those beyond the sequence are 0."""
    address = _row_pairs(stats, rows)
    return tl.load(address) if FULL else tl.load(address, mask=(rows < length)[:, None], other=0.0)


@triton.jit
def _store_pairs(stats, rows, length, x_t, x_s, FULL: tl.constexpr):
    tl.store(_row_pairs(stats, rows), tl.join(x_t, x_s), mask=None if FULL else (rows < length)[:, None])


@triton.jit
def _dot(tile, k_tile, PRECISION: tl.constexpr):
    return tl.dot(tile, tl.trans(k_tile), input_precision=PRECISION)


@triton.jit
def _seen(i, program, MASK: tl.constexpr):
    """Returns 1.0 for the rows of i that earlier tokens see, and 0.0 for the others, [BLOCK_M, 1]."""
    limit = program.length if MASK == BIDIRECTIONAL else program.prefix
    return (i < limit).to(tl.float32)[:, None]


@triton.jit
def _find_row_pivots(
    i, tile_t, tile_s, t, s, pivots, program, indices,
    LAYOUT_T: tl.constexpr, LAYOUT_S: tl.constexpr, PRECISION: tl.constexpr, HAS_INDICES: tl.constexpr,
    MASK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Returns each row's largest score, rounded up to whole bits, [BLOCK_M, 1], and stores it."""
    length = program.length
    pivot_t = tl.full([BLOCK_M], float("-inf"), tl.float32)
    pivot_s = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for k_start in range(0, length, BLOCK_N):
        k_position = token_positions(indices, k_start, length, BLOCK_N, HAS_INDICES, False)
        k_tile_t = _load_tokens(t, k_position, k_start, length, LAYOUT_T, False, BLOCK_N)
        k_tile_s = _load_tokens(s, k_position, k_start, length, LAYOUT_S, False, BLOCK_N)
        score_t = t.scale * _dot(tile_t, k_tile_t, PRECISION)
        score_s = s.scale * _dot(tile_s, k_tile_s, PRECISION)
        visible = visible_keys(i, k_start, length, program.prefix, MASK, BLOCK_N)
        pivot_t = tl.maximum(pivot_t, tl.max(tl.where(visible, score_t, float("-inf")), 1))
        pivot_s = tl.maximum(pivot_s, tl.max(tl.where(visible, score_s, float("-inf")), 1))
    pivot_t = tl.ceil(pivot_t)
    pivot_s = tl.ceil(pivot_s)
    _store_pairs(pivots, i, length, pivot_t, pivot_s, False)
    return pivot_t[:, None], pivot_s[:, None]


@triton.jit
def _strip_sums(
    start, t, s, sums, earlier_sums, pivots, program, indices,
    LAYOUT_T: tl.constexpr, LAYOUT_S: tl.constexpr, PRECISION: tl.constexpr, HAS_INDICES: tl.constexpr,
    MASK: tl.constexpr, FULL: tl.constexpr, WIDE: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Stores the sums of a strip's rows over all keys up to its end, and adds the strip's part to earlier rows.

    In a wide head, stores the pivots of the strip's rows and their sums over all keys.
    """
    length = program.length
    i = start + tl.arange(0, BLOCK_M)
    q_position = token_positions(indices, start, length, BLOCK_M, HAS_INDICES, FULL)
    tile_t = _load_tokens(t, q_position, start, length, LAYOUT_T, FULL, BLOCK_M)
    tile_s = _load_tokens(s, q_position, start, length, LAYOUT_S, FULL, BLOCK_M)
    seen = _seen(i, program, MASK)
    sums_t = tl.zeros([BLOCK_M, 4], tl.float32)
    sums_s = tl.zeros([BLOCK_M, 4], tl.float32)
    if WIDE:
        begin = 0
        end = length
        pivot_t, pivot_s = _find_row_pivots(
            i, tile_t, tile_s, t, s, pivots, program, indices,
            LAYOUT_T, LAYOUT_S, PRECISION, HAS_INDICES, MASK, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    else:
        begin = start
        end = start + BLOCK_M if FULL else tl.minimum(start + BLOCK_M, length)
        pivot_t = t.pivot
        pivot_s = s.pivot
        for k_start in range(0, start, BLOCK_N):
            # static: begin sums
            j = k_start + tl.arange(0, BLOCK_N)
            k_position = token_positions(indices, k_start, length, BLOCK_N, HAS_INDICES, True)
            k_tile_t = _load_tokens(t, k_position, k_start, length, LAYOUT_T, True, BLOCK_N)
            k_tile_s = _load_tokens(s, k_position, k_start, length, LAYOUT_S, True, BLOCK_N)
            e_t = tl.exp2(tl.fma(_dot(tile_t, k_tile_t, PRECISION), t.scale, -pivot_t))
            e_s = tl.exp2(tl.fma(_dot(tile_s, k_tile_s, PRECISION), s.scale, -pivot_s))
            sums_t += _row_sums(e_t)
            sums_s += _row_sums(e_s)
            if MASK == PREFIX or not FULL:
                e_t *= seen
                e_s *= seen
            if MASK != CAUSAL:
                tl.atomic_add(_row_pairs(earlier_sums, j), tl.join(tl.sum(e_t, 0), tl.sum(e_s, 0)), sem="relaxed")
            # static: end sums
    for k_start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        # static: begin sums_diagonal
        k_position = token_positions(indices, k_start, length, BLOCK_N, HAS_INDICES, FULL)
        k_tile_t = _load_tokens(t, k_position, k_start, length, LAYOUT_T, FULL, BLOCK_N)
        k_tile_s = _load_tokens(s, k_position, k_start, length, LAYOUT_S, FULL, BLOCK_N)
        e_t = tl.exp2(tl.fma(_dot(tile_t, k_tile_t, PRECISION), t.scale, -pivot_t))
        e_s = tl.exp2(tl.fma(_dot(tile_s, k_tile_s, PRECISION), s.scale, -pivot_s))
        if MASK != BIDIRECTIONAL or not FULL:
            visible = visible_keys(i, k_start, length, program.prefix, MASK, BLOCK_N)
            e_t = tl.where(visible, e_t, 0.0)
            e_s = tl.where(visible, e_s, 0.0)
        sums_t += _row_sums(e_t)
        sums_s += _row_sums(e_s)
        # static: end sums_diagonal
    _store_pairs(sums, i, length, tl.sum(sums_t, 1), tl.sum(sums_s, 1), FULL)
    tl.debug_barrier()  # other threads add to these sums


@triton.jit
def _row_sums(x):
    """Reduces [M, N] to [M, 4]. In the layout of tensor-core tiles, sums stay within the threads."""
    return tl.sum(tl.sum(tl.reshape(x, [x.shape[0], x.shape[1] // 8, 4, 2]), 3), 1)


@triton.jit
def _invert_sums(sums, copies, copy_stride, start, has_gradient, length, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    """Replaces the sums of BLOCK rows by their inverses times 2**SHIFT, and by 0 where there is no gradient."""
    i = start + tl.arange(0, BLOCK)
    address = _row_pairs(sums, i)
    in_bounds = (i < length)[:, None]
    total = tl.load(address, mask=in_bounds, other=1.0)
    for copy in range(1, copies + 1):
        total += tl.load(address + copy * copy_stride, mask=in_bounds, other=0.0)
    tl.store(address, tl.where(has_gradient[:, None], 2.0**SHIFT / total, 0.0), mask=in_bounds)


@triton.jit
def _add_exactly(total, lost, x):
    """Returns the sum of total and x, and `lost` plus its rounding error (Knuth's TwoSum)."""
    added = total + x
    part = added - total
    return added, lost + ((total - (added - part)) + (x - part))


@triton.jit
def _thread_sums(x, WARPS: tl.constexpr):
    """Reduces [M, N] to [WARPS * 8, 8]. In the layout of tensor-core tiles, sums stay within the threads."""
    M: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1]
    x = tl.sum(tl.reshape(x, [M // (16 * WARPS), WARPS, 2, 8, N // 8, 8]), 4)
    return tl.reshape(tl.sum(tl.sum(x, 2), 0), [WARPS * 8, 8])


class Tokens(NamedTuple):
    """A block of tokens in the gradient."""

    i: Any
    position: Any
    tile_t: Any
    tile_s: Any
    tile_g: Any  # the student's, as an operand of the gradient
    inverses: Any  # [BLOCK, 2]


@triton.jit
def _load_gradient_tokens(
    start, t, s, inverses, program, indices,
    LAYOUT_T: tl.constexpr, LAYOUT_S: tl.constexpr, LAYOUT_G: tl.constexpr, HAS_INDICES: tl.constexpr,
    FULL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Returns the `Tokens` from `start` on."""
    length = program.length
    i = start + tl.arange(0, BLOCK)
    position = token_positions(indices, start, length, BLOCK, HAS_INDICES, FULL)
    inverses = _load_pairs(inverses, i, length, FULL)
    tile_t = _load_tokens(t, position, start, length, LAYOUT_T, FULL, BLOCK)
    tile_s = _load_tokens(s, position, start, length, LAYOUT_S, FULL, BLOCK)
    tile_g = tile_s if LAYOUT_G == LAYOUT_S else _load_tokens(s, position, start, length, LAYOUT_G, FULL, BLOCK)
    return Tokens(i, position, tile_t, tile_s, tile_g, inverses)


@triton.jit
def _inverses(rows, keys):
    """Returns the inverse sums of teacher and student, of rows as columns and of keys as rows of a tile."""
    q_inv_t, q_inv_s = tl.split(rows.inverses)
    k_inv_t, k_inv_s = tl.split(keys.inverses)
    return q_inv_t[:, None], q_inv_s[:, None], k_inv_t[None, :], k_inv_s[None, :]


@triton.jit
def _earlier_pairs(
    rows, keys, acc, excess_sum, product_sum, t, s, program,
    PRECISION: tl.constexpr, MASK: tl.constexpr, FULL: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Returns q - p of the rows' pairs with earlier tokens and of the mirrored pairs, added up, and `acc` with their
    part of the rows' gradient; adds to the sums of q - p and of p (u_s - u_t)."""
    # static: begin gradients
    q_inv_t, q_inv_s, k_inv_t, k_inv_s = _inverses(rows, keys)
    u_t = tl.fma(_dot(rows.tile_t, keys.tile_t, PRECISION), t.scale, -t.pivot)
    u_s = tl.fma(_dot(rows.tile_s, keys.tile_s, PRECISION), s.scale, -s.pivot)
    if MASK == CAUSAL:
        p = tl.exp2(u_t) * q_inv_t
        excess = tl.exp2(u_s) * q_inv_s - p
    elif MASK == BIDIRECTIONAL and FULL:
        p = tl.exp2(u_t) * (q_inv_t + k_inv_t)
        excess = tl.exp2(u_s) * (q_inv_s + k_inv_s) - p
    else:
        seen = _seen(rows.i, program, MASK)
        p = tl.exp2(u_t) * tl.fma(seen, k_inv_t, q_inv_t)
        excess = tl.exp2(u_s) * tl.fma(seen, k_inv_s, q_inv_s) - p
    excess_sum += _thread_sums(excess, WARPS)
    product_sum += _thread_sums(p * (u_s - u_t), WARPS)
    excess = excess.to(keys.tile_g.dtype)
    acc = tl.dot(excess, keys.tile_g, acc, input_precision=PRECISION)
    # static: end gradients
    return excess, acc, excess_sum, product_sum


@triton.jit
def _diagonal_pairs(
    rows, keys, acc, excess_sum, product_sum, t, s, pivots, program,
    PRECISION: tl.constexpr, MASK: tl.constexpr, FULL: tl.constexpr, WIDE: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Returns `acc` with the gradient of the rows' pairs, in both orders; adds to the sums of q - p and of
    p (u_s - u_t)."""
    # static: begin gradients_diagonal
    length = program.length
    i = rows.i[:, None]
    j = keys.i[None, :]
    q_inv_t, q_inv_s, k_inv_t, k_inv_s = _inverses(rows, keys)
    dot_t = _dot(rows.tile_t, keys.tile_t, PRECISION)
    dot_s = _dot(rows.tile_s, keys.tile_s, PRECISION)
    # static: end gradients_diagonal
    # static: begin wide
    if WIDE:
        pivot_t, pivot_s = tl.split(_load_pairs(pivots, rows.i, length, False))
        u_t = tl.fma(dot_t, t.scale, -pivot_t[:, None])
        u_s = tl.fma(dot_s, s.scale, -pivot_s[:, None])
        fwd = j < length
        mirrored = i < length
        if MASK != BIDIRECTIONAL:
            fwd = fwd & sees(i, j, program.prefix)
            mirrored = mirrored & sees(j, i, program.prefix)
        p = tl.where(fwd, tl.exp2(u_t) * q_inv_t, 0.0)
        excess = tl.where(fwd, tl.exp2(u_s) * q_inv_s, 0.0) - p
        excess_sum += _thread_sums(excess, WARPS)  # as a row; the other order is a row of another strip
        product_sum += _thread_sums(tl.where(fwd, p * (u_s - u_t), 0.0), WARPS)
        pivot_t, pivot_s = tl.split(_load_pairs(pivots, keys.i, length, False))
        u_t = tl.fma(dot_t, t.scale, -pivot_t[None, :])
        u_s = tl.fma(dot_s, s.scale, -pivot_s[None, :])
        excess += tl.where(mirrored, tl.exp2(u_s) * k_inv_s - tl.exp2(u_t) * k_inv_t, 0.0)
    # static: end wide
    # static: begin gradients_diagonal
    else:
        u_t = tl.fma(dot_t, t.scale, -t.pivot)
        u_s = tl.fma(dot_s, s.scale, -s.pivot)
        if MASK == BIDIRECTIONAL:
            p = tl.exp2(u_t) * (q_inv_t + k_inv_t)
            excess = tl.exp2(u_s) * (q_inv_s + k_inv_s) - p
        else:
            fwd = sees(i, j, program.prefix)
            mirrored = sees(j, i, program.prefix)
            p = tl.exp2(u_t) * (tl.where(fwd, q_inv_t, 0.0) + tl.where(mirrored, k_inv_t, 0.0))
            excess = tl.exp2(u_s) * (tl.where(fwd, q_inv_s, 0.0) + tl.where(mirrored, k_inv_s, 0.0)) - p
        if not FULL:
            in_bounds = (i < length) & (j < length)
            p = tl.where(in_bounds, p, 0.0)
            excess = tl.where(in_bounds, excess, 0.0)
        excess_sum += 0.5 * _thread_sums(excess, WARPS)  # the diagonal visits both orders of a pair
        product_sum += 0.5 * _thread_sums(p * (u_s - u_t), WARPS)
    acc = tl.dot(excess.to(keys.tile_g.dtype), keys.tile_g, acc, input_precision=PRECISION)
    # static: end gradients_diagonal
    return acc, excess_sum, product_sum


@triton.jit
def _gradient_of(out, position, out_stride, WIDTH: tl.constexpr):
    """Returns pointers to the gradient of the tokens at `position`, [BLOCK, WIDTH]."""
    address = out + ((position * out_stride)[:, None] + tl.arange(0, WIDTH)[None, :])
    # A thread of a product has two features side by side. In this layout no value goes to another thread.
    return tl.max_contiguous(address, (1, 2))


@triton.jit
def _store_gradient(out, out_stride, rows, gradient, length, D_S: tl.constexpr, FULL: tl.constexpr):
    WIDTH: tl.constexpr = gradient.shape[1]
    address = _gradient_of(out, rows.position, out_stride, WIDTH)
    if FULL and D_S == WIDTH:
        tl.store(address, gradient)
    else:
        tl.store(address, gradient, mask=(rows.i < length)[:, None] & (tl.arange(0, WIDTH)[None, :] < D_S))


@triton.jit
def _strip_gradient(
    start, value, lost, t, s, inverses, pivots, program, indices, out, earlier_out, out_stride, factor,
    LAYOUT_T: tl.constexpr, LAYOUT_S: tl.constexpr, DG: tl.constexpr, PRECISION: tl.constexpr,
    HAS_INDICES: tl.constexpr, MASK: tl.constexpr, FULL: tl.constexpr, WIDE: tl.constexpr,
    STAGES: tl.constexpr, WARPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Stores the gradient of a strip's rows and adds the strip's part to the gradients of earlier rows.

    Adds the strip's sum of (q - p) - log(2) p (u_s - u_t) to `value` and its rounding error to `lost`.

    A turn takes one half of the rows after the other, which halves the registers that hold scores.
    """
    length = program.length
    # If DG is 8, half of a product of padded width would be wasted.
    LAYOUT_G: tl.constexpr = LAYOUT_S if WIDE else (LAYOUT_S[0], DG, LAYOUT_S[2])
    D_S: tl.constexpr = LAYOUT_G[0]
    WIDTH: tl.constexpr = LAYOUT_G[1]
    HALF: tl.constexpr = BLOCK_M // 2
    rows_0 = _load_gradient_tokens(
        start, t, s, inverses, program, indices, LAYOUT_T, LAYOUT_S, LAYOUT_G, HAS_INDICES, FULL, HALF
    )
    rows_1 = _load_gradient_tokens(
        start + HALF, t, s, inverses, program, indices, LAYOUT_T, LAYOUT_S, LAYOUT_G, HAS_INDICES, FULL, HALF
    )
    acc_0 = tl.zeros([HALF, WIDTH], tl.float32)
    acc_1 = tl.zeros([HALF, WIDTH], tl.float32)
    excess_sum = tl.zeros([WARPS * 8, 8], tl.float32)
    product_sum = tl.zeros([WARPS * 8, 8], tl.float32)
    begin = 0
    end = length
    if not WIDE:
        begin = start
        end = start + BLOCK_M if FULL else tl.minimum(start + BLOCK_M, length)
        for k_start in range(0, start, BLOCK_N):
            keys = _load_gradient_tokens(
                k_start, t, s, inverses, program, indices, LAYOUT_T, LAYOUT_S, LAYOUT_G, HAS_INDICES, True, BLOCK_N
            )
            excess, acc_0, excess_sum, product_sum = _earlier_pairs(
                rows_0, keys, acc_0, excess_sum, product_sum, t, s, program, PRECISION, MASK, FULL, WARPS
            )
            mirrored = tl.dot(tl.trans(excess), rows_0.tile_g, input_precision=PRECISION)
            excess, acc_1, excess_sum, product_sum = _earlier_pairs(
                rows_1, keys, acc_1, excess_sum, product_sum, t, s, program, PRECISION, MASK, FULL, WARPS
            )
            mirrored = tl.dot(tl.trans(excess), rows_1.tile_g, mirrored, input_precision=PRECISION)
            address = _gradient_of(earlier_out, keys.position, out_stride, WIDTH)
            mask = None if D_S == WIDTH else tl.arange(0, WIDTH)[None, :] < D_S
            tl.atomic_add(address, factor * mirrored, mask=mask, sem="relaxed")
    for k_start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        keys = _load_gradient_tokens(
            k_start, t, s, inverses, program, indices, LAYOUT_T, LAYOUT_S, LAYOUT_G, HAS_INDICES, FULL, BLOCK_N
        )
        acc_0, excess_sum, product_sum = _diagonal_pairs(
            rows_0, keys, acc_0, excess_sum, product_sum, t, s, pivots, program, PRECISION, MASK, FULL, WIDE, WARPS
        )
        acc_1, excess_sum, product_sum = _diagonal_pairs(
            rows_1, keys, acc_1, excess_sum, product_sum, t, s, pivots, program, PRECISION, MASK, FULL, WIDE, WARPS
        )
    _store_gradient(out, out_stride, rows_0, factor * acc_0, length, D_S, FULL)
    _store_gradient(out, out_stride, rows_1, factor * acc_1, length, D_S, FULL)
    tl.debug_barrier()  # other threads add to these rows
    return _add_exactly(value, lost, excess_sum - LN2 * product_sum)


@triton.jit
def _strip(step, part, parts, BLOCK_M: tl.constexpr, SPLIT: tl.constexpr):
    """Returns the start of a program's `step`-th strip. Later strips take longer: they are dealt out back and forth."""
    if SPLIT:
        step = step * parts + tl.where(step % 2 == 0, part, parts - 1 - part)
    return step * BLOCK_M


@triton.jit(**UNSPECIALIZED)
def unordered_kernel(
    teacher, teacher_strides, student, student_strides, query_codes, scale_t, scale_s, gradient_scale,
    heads, sequences, positions, total, stats_head_stride16, stats_seq_stride16, copies,
    indices, starts, prefixes, counted, sums, pivots, weights, values, out,
    D_T: tl.constexpr, D_S: tl.constexpr, DP_T: tl.constexpr, DP_S: tl.constexpr, DG: tl.constexpr,
    ALIGN_T: tl.constexpr, ALIGN_S: tl.constexpr, PRECISION: tl.constexpr, SHIFT: tl.constexpr,
    PACKED: tl.constexpr, HAS_INDICES: tl.constexpr, HAS_QUERY_MASK: tl.constexpr, MASK: tl.constexpr,
    SUMS: tl.constexpr, INVERSES: tl.constexpr, GRADIENT: tl.constexpr, SPLIT: tl.constexpr,
    SUM_STAGES: tl.constexpr, STAGES: tl.constexpr, WARPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of a head to `out`, and the sum of its rows' KL to `values`. A grid of (heads, parts).

    The phases are SUMS of every row, their INVERSES a, and the GRADIENT with the value. With SPLIT, each is a launch of
    its own, and `copies` programs share a head; they have their copies behind `sums` and `out`.

    The sum of KL is that of log(a_t / a_s) minus that of log(2) p (u_s - u_t). These cancel when KL is small, so
    rounding errors of their sum are kept. The sum of q - p is 0 but for the rounding of a, which it corrects to first
    order.
    """
    program = head_program(heads, sequences, positions, total, starts, prefixes, PACKED, HAS_INDICES, MASK)
    length = program.length
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    LAYOUT_T: tl.constexpr = (D_T, DP_T, ALIGN_T)
    LAYOUT_S: tl.constexpr = (D_S, DP_S, ALIGN_S)
    if HAS_INDICES:
        indices += program.indices_start
    index = decode_relation(query_codes, program.relation)
    x_t, stride_t = head_pointer(teacher, teacher_strides, index, program.head, program, ALIGN_T, PACKED)
    x_s, stride_s = head_pointer(student, student_strides, index, program.head, program, ALIGN_S, PACKED)
    shared_t, shared_s, shared = shared_pivots(
        x_t, stride_t, x_s, stride_s, scale_t, scale_s, program, indices, LAYOUT_T, LAYOUT_S, HAS_INDICES, BLOCK_M
    )
    row = row_offset(program, heads, stats_head_stride16, stats_seq_stride16, PACKED)
    copy_stride = (tl.num_programs(0) // sequences).to(tl.int64) * stats_head_stride16 * 32
    sums += 2 * row
    earlier_sums = sums
    if SPLIT:
        earlier_sums += (1 + part) * copy_stride
    pivots += 2 * row
    t = Head(x_t, stride_t, scale_t, shared_t)
    s = Head(x_s, stride_s, scale_s, shared_s)
    full = length // BLOCK_M
    rest = full * BLOCK_M  # start of the remaining rows
    steps = full
    rest_end = length
    if SPLIT:
        steps = full // parts
        owner = full % parts  # the part that has the next strip
        owner = tl.where(steps % 2 == 0, owner, parts - 1 - owner)
        steps += (_strip(steps, part, parts, BLOCK_M, SPLIT) < rest).to(tl.int32)
        rest_end = tl.where(owner == part, length, rest)
    HALF: tl.constexpr = BLOCK_M // 2

    if SUMS:
        if shared:
            for step in range(0, steps):
                _strip_sums(
                    _strip(step, part, parts, BLOCK_M, SPLIT), t, s, sums, earlier_sums, pivots, program, indices,
                    LAYOUT_T, LAYOUT_S, PRECISION, HAS_INDICES, MASK, True, False, SUM_STAGES, BLOCK_M, BLOCK_N,
                )  # fmt: skip
            for start in range(rest, rest_end, HALF):
                _strip_sums(
                    start, t, s, sums, earlier_sums, pivots, program, indices,
                    LAYOUT_T, LAYOUT_S, PRECISION, HAS_INDICES, MASK, False, False, SUM_STAGES, HALF, BLOCK_N,
                )  # fmt: skip
        else:
            for start in range(part * HALF, length, parts * HALF):
                _strip_sums(
                    start, t, s, sums, earlier_sums, pivots, program, indices,
                    LAYOUT_T, LAYOUT_S, PRECISION, HAS_INDICES, MASK, False, True, SUM_STAGES, HALF, BLOCK_N,
                )  # fmt: skip

    if INVERSES:
        added = tl.where(shared, copies, 0) if SPLIT else 0
        for start in range(0, length, BLOCK_M):
            has_gradient = rows_with_gradient(
                counted, indices, program, start, positions, BLOCK_M, PACKED, HAS_INDICES, HAS_QUERY_MASK, MASK
            )
            _invert_sums(sums, added, copy_stride, start, has_gradient, length, SHIFT, BLOCK_M)
        tl.debug_barrier()  # other threads read these inverses

    if GRADIENT:
        first = program.first if PACKED else program.sequence.to(tl.int64) * positions
        out = select(out, program.relation) + (first * heads + program.head) * D_S
        out_stride = heads * D_S
        earlier_out = out
        if SPLIT:
            earlier_out += (1 + part) * tl.cast(total, tl.int64) * out_stride
        factor = gradient_scale
        if weights is not None:
            factor *= tl.load(weights + program.sequence)
        # [WARPS * 8, 8]
        value = tl.zeros([WARPS * 8, 8], tl.float32)
        lost = tl.zeros([WARPS * 8, 8], tl.float32)
        if shared:
            for step in range(0, steps):
                value, lost = _strip_gradient(
                    _strip(step, part, parts, BLOCK_M, SPLIT), value, lost, t, s, sums, pivots, program, indices,
                    out, earlier_out, out_stride, factor, LAYOUT_T, LAYOUT_S, DG, PRECISION,
                    HAS_INDICES, MASK, True, False, STAGES, WARPS, BLOCK_M, BLOCK_N,
                )  # fmt: skip
            for start in range(rest, rest_end, HALF):
                value, lost = _strip_gradient(
                    start, value, lost, t, s, sums, pivots, program, indices,
                    out, earlier_out, out_stride, factor, LAYOUT_T, LAYOUT_S, DG, PRECISION,
                    HAS_INDICES, MASK, False, False, STAGES, WARPS, HALF, BLOCK_N,
                )  # fmt: skip
        else:
            for start in range(part * HALF, length, parts * HALF):
                value, lost = _strip_gradient(
                    start, value, lost, t, s, sums, pivots, program, indices,
                    out, earlier_out, out_stride, factor, LAYOUT_T, LAYOUT_S, DG, PRECISION,
                    HAS_INDICES, MASK, False, True, STAGES, WARPS, HALF, BLOCK_N,
                )  # fmt: skip
        for start in range(part * 64 * WARPS, length, parts * 64 * WARPS):
            # The inverses are 0 in rows that do not count or see only themselves.
            inverse_t, inverse_s = tl.split(_load_pairs(sums, start + tl.arange(0, 64 * WARPS), length, False))
            inverse_s = tl.where(inverse_t > 0.0, inverse_s, 1.0)
            ratio = log_ratio(inverse_s, tl.where(inverse_t > 0.0, inverse_t, 1.0))
            value, lost = _add_exactly(value, lost, tl.reshape(ratio * 2.0**SHIFT, [WARPS * 8, 8]))
        kl = tl.sum(tl.sum(value, 1), 0) + tl.sum(tl.sum(lost, 1), 0)
        tl.store(values + tl.program_id(0) * parts + part, kl * 2.0**-SHIFT)


@triton.jit
def _loss(values, weights, sequences, columns, weight, BLOCK: tl.constexpr):
    """Returns the loss of a relation: its values (sequences, columns) times the sequences' weights, at least 0.

    Without `weights`, all sequences have the same weight.
    """
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, sequences * columns, BLOCK):
        k = start + tl.arange(0, BLOCK)
        in_bounds = k < sequences * columns
        value = tl.load(values + k, mask=in_bounds, other=0.0)
        if weights is not None:
            value *= tl.load(weights + k // columns, mask=in_bounds, other=0.0)
        total += value
    loss = tl.sum(total, 0) * weight
    return tl.where(loss < 0.0, 0.0, loss)


@triton.jit(**UNSPECIALIZED)
def total_kernel(
    values, weights, losses, relations, sequences, columns, weight, relation_weights,
    ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the loss of each relation or, with `relation_weights`, their weighted sum, by one program.

    ADD: adds to the sum of another launch.
    """
    size = sequences.to(tl.int64) * columns
    if relation_weights is None:
        values += tl.program_id(0) * size
        loss = _loss(values, weights, sequences, columns, weight, BLOCK)
        tl.store(losses + decode_integer(select(relations, tl.program_id(0))), loss)
    else:
        total = tl.load(losses) if ADD else 0.0
        for r in tl.static_range(len(relation_weights)):
            total += relation_weights[r] * _loss(values + r * size, weights, sequences, columns, weight, BLOCK)
        tl.store(losses, total)
