"""First phase of the Triton backend: the kernels of the row statistics and of the training loss.

A row's statistics are its pivot, a whole number of bits, and the sum of 2**(score - pivot) over its keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import (
    LN2,
    UNSPECIALIZED,
    decode_relation,
    head_offset,
    head_pointer,
    head_program,
    key_tiles,
    load_models,
    load_tile,
    log_ratio,
    output_offset,
    partial_sums,
    row_offset,
    rows_that_count,
    rows_with_gradient,
    rowwise_dot,
    score_tiles,
    tile_program,
    token_positions,
    visible_keys,
)

# A row sum above this bound sends its tile to the second pass, which keeps a running maximum.
_OVERFLOW = tl.constexpr(2.0**100)
# Largest range, in bits, of a head's self scores (token with itself) for which all of its rows share one pivot.
_SHARED_PIVOT_RANGE = tl.constexpr(160.0)


@triton.jit
def shared_pivots(
    x_t, stride_t, x_s, stride_s, scale_t, scale_s, program, indices,
    LAYOUT_T: tl.constexpr, LAYOUT_S: tl.constexpr, HAS_INDICES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Returns a pivot of teacher and student for all scores of a head in a self relation, and whether one is enough.

    A self score is the score of a token with itself. No score exceeds the largest self score. If the range of the self
    scores is small, its middle is therefore a safe pivot: no row sum overflows or underflows. Pivots are whole numbers,
    so that a change of pivot is exact. LAYOUT is (D, DP, ALIGN, ...).
    """
    length = program.length
    low_t = tl.full([BLOCK], float("inf"), tl.float32)
    low_s = tl.full([BLOCK], float("inf"), tl.float32)
    high_t = tl.full([BLOCK], float("-inf"), tl.float32)
    high_s = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, length, BLOCK):
        in_bounds = start + tl.arange(0, BLOCK) < length
        position = token_positions(indices, start, length, BLOCK, HAS_INDICES, False)
        tile_t = load_tile(x_t, position, stride_t, start, length, BLOCK, LAYOUT_T[0], LAYOUT_T[1], LAYOUT_T[2], False)
        tile_s = load_tile(x_s, position, stride_s, start, length, BLOCK, LAYOUT_S[0], LAYOUT_S[1], LAYOUT_S[2], False)
        self_t = scale_t * rowwise_dot(tile_t, tile_t)
        self_s = scale_s * rowwise_dot(tile_s, tile_s)
        low_t = tl.minimum(low_t, tl.where(in_bounds, self_t, float("inf")))
        low_s = tl.minimum(low_s, tl.where(in_bounds, self_s, float("inf")))
        high_t = tl.maximum(high_t, tl.where(in_bounds, self_t, float("-inf")))
        high_s = tl.maximum(high_s, tl.where(in_bounds, self_s, float("-inf")))
    min_t = tl.min(low_t, 0)
    min_s = tl.min(low_s, 0)
    max_t = tl.max(high_t, 0)
    max_s = tl.max(high_s, 0)
    nonnegative = (min_t >= 0.0) & (min_s >= 0.0)
    enough = nonnegative & (max_t - min_t <= _SHARED_PIVOT_RANGE) & (max_s - min_s <= _SHARED_PIVOT_RANGE)
    pivot_t = tl.floor(0.5 * (min_t + max_t))
    pivot_s = tl.floor(0.5 * (min_s + max_s))
    # Models with like scores get equal pivots. Otherwise a bit per row would have to cancel in a small KL.
    return pivot_t, tl.where(tl.abs(pivot_s - pivot_t) < 1.5, pivot_t, pivot_s), enough


@triton.jit(**UNSPECIALIZED)
def pivot_kernel(
    teacher, teacher_strides, student, student_strides, query_codes, scale_t, scale_s,
    heads, sequences, positions, total, indices, starts, prefixes, head_stats,
    D_T: tl.constexpr, D_S: tl.constexpr, DP_T: tl.constexpr, DP_S: tl.constexpr,
    ALIGN_T: tl.constexpr, ALIGN_S: tl.constexpr,
    PACKED: tl.constexpr, HAS_INDICES: tl.constexpr, MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Chooses the pivots of a head in a self relation. One program per head.

    Writes to head_stats: teacher's pivot, student's pivot, and 1 if they are shared by all rows.
    """
    program = head_program(heads, sequences, positions, total, starts, prefixes, PACKED, HAS_INDICES, MASK)
    q_index = decode_relation(query_codes, program.relation)
    q_t, q_t_stride = head_pointer(teacher, teacher_strides, q_index, program.head, program, ALIGN_T, PACKED)
    q_s, q_s_stride = head_pointer(student, student_strides, q_index, program.head, program, ALIGN_S, PACKED)
    if HAS_INDICES:
        indices += program.indices_start
    LAYOUT_T: tl.constexpr = (D_T, DP_T, ALIGN_T)
    LAYOUT_S: tl.constexpr = (D_S, DP_S, ALIGN_S)
    pivot_t, pivot_s, shared = shared_pivots(
        q_t, q_t_stride, q_s, q_s_stride, scale_t, scale_s, program, indices, LAYOUT_T, LAYOUT_S, HAS_INDICES, BLOCK
    )
    head_stats += tl.program_id(0) * 4
    tl.store(head_stats, tl.where(shared, pivot_t, 0.0))
    tl.store(head_stats + 1, tl.where(shared, pivot_s, 0.0))
    tl.store(head_stats + 2, shared.to(tl.float32))


@triton.jit
def _self_score(x, program, q_position, LAYOUT: tl.constexpr, BLOCK_M: tl.constexpr):
    """Returns the score of each owned token with the key at its position, rounded down to whole bits, [BLOCK_M]."""
    tile = load_tile(
        x.k, q_position, x.k_stride, program.start, program.length, BLOCK_M, LAYOUT[0], LAYOUT[1], LAYOUT[2], False
    )
    return tl.floor(x.scale * rowwise_dot(x.q_tile, tile))


@triton.jit
def _add_row_stats(
    sums_t, sums_s, weighted, k, t, s, pivot_t, pivot_s, program, i, q_position, indices,
    LAYOUT_T: tl.constexpr, LAYOUT_S: tl.constexpr, PRECISION: tl.constexpr, HAS_INDICES: tl.constexpr,
    MASK: tl.constexpr, FULL: tl.constexpr, COMPUTE_KL: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds the k-th key tile to the sums of exponentials and, with COMPUTE_KL, of e_t (u_s - u_t)."""
    # static: begin row_stats
    k_start = k * BLOCK_N
    dot_t, dot_s = score_tiles(
        t, s, program, q_position, indices, k_start,
        LAYOUT_T, LAYOUT_S, PRECISION, HAS_INDICES, FULL, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    # [BLOCK_M, BLOCK_N]
    u_t = tl.fma(dot_t, t.scale, -pivot_t[:, None])
    u_s = tl.fma(dot_s, s.scale, -pivot_s[:, None])
    e_t = tl.exp2(u_t)
    e_s = tl.exp2(u_s)
    # static: end row_stats
    # static: begin partial
    if not FULL:
        visible = visible_keys(i, k_start, program.length, program.prefix, MASK, BLOCK_N)
        e_t = tl.where(visible, e_t, 0.0)
        e_s = tl.where(visible, e_s, 0.0)
    # static: end partial
    # static: begin row_stats
    sums_t += partial_sums(e_t, WIDTH)
    sums_s += partial_sums(e_s, WIDTH)
    if COMPUTE_KL:
        product = e_t * (u_s - u_t)
        weighted += partial_sums(product if FULL else tl.where(visible, product, 0.0), WIDTH)
    # static: end row_stats
    return sums_t, sums_s, weighted


@triton.jit(**UNSPECIALIZED)
def row_stats_kernel(
    teacher, teacher_strides, student, student_strides, query_codes, key_codes, scale_t, scale_s,
    heads, sequences, positions, total, tiles, stats_head_stride16, stats_seq_stride16,
    indices, starts, prefixes, tile_map, head_stats, sum_t, sum_s, pivot_t, pivot_s, kl_rows,
    D_T: tl.constexpr, D_S: tl.constexpr, DP_T: tl.constexpr, DP_S: tl.constexpr,
    ALIGN_T: tl.constexpr, ALIGN_S: tl.constexpr, PRECISION: tl.constexpr,
    SLICED_T: tl.constexpr, SLICED_S: tl.constexpr, GROUP_T: tl.constexpr, GROUP_S: tl.constexpr,
    PACKED: tl.constexpr, HAS_INDICES: tl.constexpr, MASK: tl.constexpr, SELF_RELATION: tl.constexpr,
    COMPUTE_KL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Writes pivot and sum of every row and, with COMPUTE_KL, its KL in the form that training uses.

    A row's pivot is the shared pivot of its head (`pivot_kernel`) or, if there is none, the row's self score. Every row
    sees its own position, with any mask, so no sum underflows and no running maximum is needed. If a sum overflows, the
    program repeats its tile with a running maximum.
    """
    program = tile_program(
        heads, sequences, positions, total, tiles, starts, prefixes, tile_map, BLOCK_M, PACKED, HAS_INDICES, MASK
    )
    length = program.length
    start = program.start
    if start >= length:
        return
    LAYOUT_T: tl.constexpr = (D_T, DP_T, ALIGN_T, SLICED_T, GROUP_T)
    LAYOUT_S: tl.constexpr = (D_S, DP_S, ALIGN_S, SLICED_S, GROUP_S)
    if HAS_INDICES:
        indices += program.indices_start
    i = start + tl.arange(0, BLOCK_M)
    q_position, t, s = load_models(
        teacher, teacher_strides, student, student_strides, scale_t, scale_s, query_codes, key_codes, program, indices,
        LAYOUT_T, LAYOUT_S, PACKED, HAS_INDICES, False, BLOCK_M,
    )  # fmt: skip
    own_pivot_t = _self_score(t, program, q_position, LAYOUT_T, BLOCK_M)
    own_pivot_s = _self_score(s, program, q_position, LAYOUT_S, BLOCK_M)
    if SELF_RELATION:
        head_stats += head_offset(program, heads, sequences)
        shared_pivot = tl.load(head_stats + 2) > 0.5
        own_pivot_t = tl.where(shared_pivot, tl.load(head_stats), own_pivot_t)
        own_pivot_s = tl.where(shared_pivot, tl.load(head_stats + 1), own_pivot_s)
    WIDTH: tl.constexpr = 1 if t.q_tile.dtype == tl.float32 or s.q_tile.dtype == tl.float32 else 8
    sums_t = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    sums_s = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    weighted = tl.zeros([BLOCK_M, WIDTH], tl.float32)  # sums of e_t (u_s - u_t)

    full, end = key_tiles(start, length, program.prefix, BLOCK_M, BLOCK_N, MASK)
    for k in range(0, full):
        sums_t, sums_s, weighted = _add_row_stats(
            sums_t, sums_s, weighted, k, t, s, own_pivot_t, own_pivot_s, program, i, q_position, indices,
            LAYOUT_T, LAYOUT_S, PRECISION, HAS_INDICES, MASK, True, COMPUTE_KL, WIDTH, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    for k in range(full, end):
        sums_t, sums_s, weighted = _add_row_stats(
            sums_t, sums_s, weighted, k, t, s, own_pivot_t, own_pivot_s, program, i, q_position, indices,
            LAYOUT_T, LAYOUT_S, PRECISION, HAS_INDICES, MASK, False, COMPUTE_KL, WIDTH, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    # [BLOCK_M]
    l_t = tl.sum(sums_t, 1)
    l_s = tl.sum(sums_s, 1)
    v = tl.sum(weighted, 1)

    largest = tl.max(tl.where(i < length, tl.maximum(l_t, l_s), 0.0), 0)
    if largest > _OVERFLOW:
        l_t = tl.zeros([BLOCK_M], tl.float32)
        l_s = tl.zeros([BLOCK_M], tl.float32)
        v = tl.zeros([BLOCK_M], tl.float32)  # sum of e_t (score_s - score_t)
        for k in range(0, end):
            dot_t, dot_s = score_tiles(
                t, s, program, q_position, indices, k * BLOCK_N,
                LAYOUT_T, LAYOUT_S, PRECISION, HAS_INDICES, False, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            # [BLOCK_M, BLOCK_N]
            score_t = dot_t * scale_t
            score_s = dot_s * scale_s
            visible = visible_keys(i, k * BLOCK_N, length, program.prefix, MASK, BLOCK_N)
            max_t = tl.maximum(own_pivot_t, tl.ceil(tl.max(tl.where(visible, score_t, float("-inf")), 1)))
            max_s = tl.maximum(own_pivot_s, tl.ceil(tl.max(tl.where(visible, score_s, float("-inf")), 1)))
            e_t = tl.where(visible, tl.exp2(tl.fma(dot_t, scale_t, -max_t[:, None])), 0.0)
            e_s = tl.where(visible, tl.exp2(tl.fma(dot_s, scale_s, -max_s[:, None])), 0.0)
            # [BLOCK_M]
            rescale_t = tl.exp2(own_pivot_t - max_t)
            l_t = l_t * rescale_t + tl.sum(e_t, 1)
            l_s = l_s * tl.exp2(own_pivot_s - max_s) + tl.sum(e_s, 1)
            if COMPUTE_KL:
                v = v * rescale_t + tl.sum(tl.where(visible, e_t * (score_s - score_t), 0.0), 1)
            own_pivot_t = max_t
            own_pivot_s = max_s
        v += (own_pivot_t - own_pivot_s) * l_t

    row = row_offset(program, heads, stats_head_stride16, stats_seq_stride16, PACKED) + i
    in_bounds = i < length
    tl.store(sum_t + row, l_t, mask=in_bounds)
    tl.store(sum_s + row, l_s, mask=in_bounds)
    tl.store(pivot_t + row, own_pivot_t, mask=in_bounds)
    tl.store(pivot_s + row, own_pivot_s, mask=in_bounds)
    if COMPUTE_KL:
        tl.store(kl_rows + row, log_ratio(l_t, l_s) - LN2 * (v / l_t), mask=in_bounds)


@triton.jit(**UNSPECIALIZED)
def finalize_kernel(
    heads, sequences, positions, total, stats_head_stride16, stats_seq_stride16, indices, starts, prefixes, counted,
    sum_t, sum_s, pivot_t, pivot_s, kl_rows, values, head_stats, relations, row_grads, weights,
    PACKED: tl.constexpr, HAS_INDICES: tl.constexpr, HAS_QUERY_MASK: tl.constexpr, MASK: tl.constexpr,
    SELF_RELATION: tl.constexpr, COMPUTE_KL: tl.constexpr, GRADIENT: tl.constexpr, ROW_WEIGHTS: tl.constexpr,
    SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Reduces each head's rows and prepares their statistics for the gradient. One program per head.

    COMPUTE_KL: writes the sum of the rows' KL to `values`.
    ROW_WEIGHTS: writes the upstream gradients to `weights`, and the largest magnitude among them to head_stats.
    GRADIENT: replaces each sum by its inverse times 2**SHIFT and, with ROW_WEIGHTS, times the row's weight divided by
        the largest weight. If the head has a shared pivot, the sum is relative to that pivot.

    A row that does not count has KL, weight and inverse 0, so that neither p nor q of this row enters a gradient.
    """
    program = head_program(heads, sequences, positions, total, starts, prefixes, PACKED, HAS_INDICES, MASK)
    length = program.length
    row = row_offset(program, heads, stats_head_stride16, stats_seq_stride16, PACKED)
    lane = tl.arange(0, BLOCK)
    head_stats += tl.program_id(0) * 4
    if HAS_INDICES:
        indices += program.indices_start

    if COMPUTE_KL:
        total_kl = tl.zeros([BLOCK], tl.float32)
        for start in range(0, length, BLOCK):
            counts = rows_that_count(
                counted, indices, program, start, positions, BLOCK, PACKED, HAS_INDICES, HAS_QUERY_MASK
            )
            total_kl += tl.load(kl_rows + row + start + lane, mask=counts, other=0.0)
        tl.store(values + tl.program_id(0), tl.sum(total_kl, 0))

    inverse_largest = 1.0
    if ROW_WEIGHTS:
        row_grads += output_offset(program, relations, heads, positions, total, PACKED)
        magnitudes = tl.zeros([BLOCK], tl.float32)
        for start in range(0, length, BLOCK):
            position = token_positions(indices, start, length, BLOCK, HAS_INDICES, False)
            counts = rows_that_count(
                counted, indices, program, start, positions, BLOCK, PACKED, HAS_INDICES, HAS_QUERY_MASK
            )
            weight = tl.load(row_grads + position, mask=counts, other=0.0)
            tl.store(weights + row + start + lane, weight, mask=start + lane < length)
            magnitudes = tl.maximum(magnitudes, tl.abs(weight))
        largest = tl.max(magnitudes, 0)
        tl.store(head_stats + 3, largest)
        inverse_largest = 1.0 / tl.maximum(largest, 1e-37)

    if GRADIENT:
        if SELF_RELATION:
            shared_pivot = tl.load(head_stats + 2) > 0.5
            shared_t = tl.load(head_stats)
            shared_s = tl.load(head_stats + 1)
        for start in range(0, length, BLOCK):
            # [BLOCK]
            in_bounds = start + lane < length
            offset = row + start + lane
            l_t = tl.load(sum_t + offset, mask=in_bounds, other=1.0)
            l_s = tl.load(sum_s + offset, mask=in_bounds, other=1.0)
            shift_t = tl.zeros([BLOCK], tl.float32) + SHIFT
            shift_s = shift_t
            if SELF_RELATION:
                row_t = tl.load(pivot_t + offset, mask=in_bounds, other=0.0)
                row_s = tl.load(pivot_s + offset, mask=in_bounds, other=0.0)
                shift_t += tl.where(shared_pivot, shared_t - row_t, 0.0)
                shift_s += tl.where(shared_pivot, shared_s - row_s, 0.0)
            has_gradient = rows_with_gradient(
                counted, indices, program, start, positions, BLOCK, PACKED, HAS_INDICES, HAS_QUERY_MASK, MASK
            )
            inverse_t = tl.where(has_gradient, tl.exp2(shift_t) / l_t, 0.0)
            inverse_s = tl.where(has_gradient, tl.exp2(shift_s) / l_s, 0.0)
            if ROW_WEIGHTS:
                weight = inverse_largest * tl.load(weights + offset, mask=in_bounds, other=0.0)
                inverse_t *= weight
                inverse_s *= weight
            tl.store(sum_t + offset, inverse_t, mask=in_bounds)
            tl.store(sum_s + offset, inverse_s, mask=in_bounds)
