"""Kernel of the exact KL of every row, for `reduction="none"` and for evaluation without a gradient."""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import (
    LN2,
    UNSPECIALIZED,
    key_tiles,
    load_models,
    output_offset,
    partial_sums,
    row_offset,
    rows_that_count,
    score_tiles,
    tile_program,
    visible_keys,
)


@triton.jit
def _divergence(log_p, log_q):
    """Returns p (e**delta - 1 - delta) from log2 p and log2 q, with delta = log(q / p).

    For |delta| < 1/4 the result is computed as a series, because the terms of q - p - p delta, the form for larger
    |delta|, would cancel.
    """
    # static: begin row_kl
    p = tl.exp2(log_p)
    q = tl.exp2(log_q)
    # static: end row_kl
    delta = LN2 * (log_q - log_p)
    series = delta * (1 / 720 + delta * (1 / 5040 + delta * (1 / 40320)))
    series = delta * delta * (1 / 2 + delta * (1 / 6 + delta * (1 / 24 + delta * (1 / 120 + series))))
    return tl.where(tl.abs(delta) < 0.25, p * series, q - p - p * delta)


@triton.jit
def _add_row_kl(
    kl, k, t, s, row_pivot_t, row_pivot_s, log_sum_t, log_sum_s, program, i, q_position, indices,
    LAYOUT_T: tl.constexpr, LAYOUT_S: tl.constexpr, PRECISION: tl.constexpr, HAS_INDICES: tl.constexpr,
    MASK: tl.constexpr, FULL: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds the contribution of the k-th key tile to the rows' KL."""
    # static: begin row_kl
    k_start = k * BLOCK_N
    dot_t, dot_s = score_tiles(
        t, s, program, q_position, indices, k_start,
        LAYOUT_T, LAYOUT_S, PRECISION, HAS_INDICES, FULL, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    # [BLOCK_M, BLOCK_N]
    u_t = tl.fma(dot_t, t.scale, -row_pivot_t[:, None])
    u_s = tl.fma(dot_s, s.scale, -row_pivot_s[:, None])
    terms = _divergence(u_t - log_sum_t, u_s - log_sum_s)
    # static: end row_kl
    # static: begin partial
    if not FULL:
        terms = tl.where(visible_keys(i, k_start, program.length, program.prefix, MASK, BLOCK_N), terms, 0.0)
    # static: end partial
    return kl + partial_sums(terms, WIDTH)


@triton.jit(**UNSPECIALIZED)
def row_kl_kernel(
    teacher, teacher_strides, student, student_strides, query_codes, key_codes, scale_t, scale_s,
    heads, sequences, positions, total, tiles, stats_head_stride16, stats_seq_stride16,
    indices, starts, prefixes, counted, tile_map, sum_t, sum_s, pivot_t, pivot_s, kl_rows, relations, rows_out,
    D_T: tl.constexpr, D_S: tl.constexpr, DP_T: tl.constexpr, DP_S: tl.constexpr,
    ALIGN_T: tl.constexpr, ALIGN_S: tl.constexpr, PRECISION: tl.constexpr,
    SLICED_T: tl.constexpr, SLICED_S: tl.constexpr, GROUP_T: tl.constexpr, GROUP_S: tl.constexpr,
    PACKED: tl.constexpr, HAS_INDICES: tl.constexpr, HAS_QUERY_MASK: tl.constexpr, MASK: tl.constexpr,
    TO_OUTPUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Writes the exact KL of every row: to `rows_out`, (R, B, A, S) or (R, A, T), or to `kl_rows` for a reduction."""
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
    row = row_offset(program, heads, stats_head_stride16, stats_seq_stride16, PACKED) + i
    in_bounds = i < length
    row_pivot_t = tl.load(pivot_t + row, mask=in_bounds, other=0.0)
    row_pivot_s = tl.load(pivot_s + row, mask=in_bounds, other=0.0)
    log_sum_t = tl.log2(tl.load(sum_t + row, mask=in_bounds, other=1.0))[:, None]
    log_sum_s = tl.log2(tl.load(sum_s + row, mask=in_bounds, other=1.0))[:, None]
    FLOAT32: tl.constexpr = t.q_tile.dtype == tl.float32 or s.q_tile.dtype == tl.float32
    WIDTH: tl.constexpr = 1 if FLOAT32 and PRECISION == "ieee" else 8
    kl = tl.zeros([BLOCK_M, WIDTH], tl.float32)

    full, end = key_tiles(start, length, program.prefix, BLOCK_M, BLOCK_N, MASK)
    for k in range(0, full):
        kl = _add_row_kl(
            kl, k, t, s, row_pivot_t, row_pivot_s, log_sum_t, log_sum_s, program, i, q_position, indices,
            LAYOUT_T, LAYOUT_S, PRECISION, HAS_INDICES, MASK, True, WIDTH, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    for k in range(full, end):
        kl = _add_row_kl(
            kl, k, t, s, row_pivot_t, row_pivot_s, log_sum_t, log_sum_s, program, i, q_position, indices,
            LAYOUT_T, LAYOUT_S, PRECISION, HAS_INDICES, MASK, False, WIDTH, BLOCK_M, BLOCK_N,
        )  # fmt: skip

    row_kl = tl.maximum(tl.sum(kl, 1), 0.0)  # [BLOCK_M]
    if TO_OUTPUT:
        if HAS_QUERY_MASK:
            counts = rows_that_count(
                counted, indices, program, start, positions, BLOCK_M, PACKED, HAS_INDICES, HAS_QUERY_MASK
            )
            row_kl = tl.where(counts, row_kl, 0.0)
        rows_out += output_offset(program, relations, heads, positions, total, PACKED)
        tl.store(rows_out + q_position, row_kl, mask=in_bounds)
    else:
        tl.store(kl_rows + row, row_kl, mask=in_bounds)
