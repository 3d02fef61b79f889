"""Second phase of the Triton backend: the gradient of the student's tensors.

A program owns a tile of tokens of one student tensor and sums the contributions of all other tokens to their gradient.
In a self relation, an owned token i and another token j contribute twice: as the (forward) pair (i, j), where i is the
row, and as the mirrored pair (j, i), where j is the row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import (
    BIDIRECTIONAL,
    CAUSAL,
    UNSPECIALIZED,
    head_offset,
    key_tiles,
    load_k_tile,
    load_models,
    multiply,
    row_offset,
    score_tile,
    sees,
    select,
    tile_program,
    token_positions,
)

# Values of the constexpr argument ROLE: the student tensor is that of a self relation, or query or key of a cross one.
SELF, QUERY, KEY = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

# Values of the constexpr argument REGION: full tiles before the owned tokens, full tiles after them, partial tiles.
_BELOW, _ABOVE, _PARTIAL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _pair_weights(q_inv, k_inv, i, j, prefix, MASK: tl.constexpr, REGION: tl.constexpr):
    """Returns [BLOCK_M, BLOCK_N]: q_inv[i] where row i sees j, plus k_inv[j] where row j sees i."""
    if MASK == BIDIRECTIONAL:
        return q_inv[:, None] + k_inv[None, :]
    if REGION == _PARTIAL:
        fwd = tl.where(sees(i[:, None], j[None, :], prefix), q_inv[:, None], 0.0)
        return fwd + tl.where(sees(j[None, :], i[:, None], prefix), k_inv[None, :], 0.0)
    if REGION == _BELOW:
        if MASK == CAUSAL:
            return q_inv[:, None] + tl.zeros_like(k_inv)[None, :]
        return (i < prefix).to(tl.float32)[:, None] * k_inv[None, :] + q_inv[:, None]
    if MASK == CAUSAL:
        return tl.zeros_like(q_inv)[:, None] + k_inv[None, :]
    return (j < prefix).to(tl.float32)[None, :] * q_inv[:, None] + k_inv[None, :]


@triton.jit
def _excess(dot_t, dot_s, scale_t, scale_s, pivot_t, pivot_s, weights_t, weights_s):
    """Returns q - p [BLOCK_M, BLOCK_N], the exponentials of both models times `weights`, such as their inverse sums."""
    # static: begin gradient
    e_t = tl.exp2(tl.fma(dot_t, scale_t, -pivot_t))
    e_s = tl.exp2(tl.fma(dot_s, scale_s, -pivot_s))
    return e_s * weights_s - e_t * weights_t
    # static: end gradient


@triton.jit
def _add_tile(
    acc, k, t, s, q_inv_t, q_inv_s, q_pivot_t, q_pivot_s, program, i, q_position,
    indices, sum_t, sum_s, pivot_t, pivot_s,
    LAYOUT_T: tl.constexpr, LAYOUT_S: tl.constexpr, PRECISION: tl.constexpr, HAS_INDICES: tl.constexpr,
    MASK: tl.constexpr, ROLE: tl.constexpr, SHARED_PIVOT: tl.constexpr, REGION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Returns acc [BLOCK_M, DP_S] plus the k-th looped tile's contribution to the gradient of the owned tokens."""
    # static: begin gradient
    FULL: tl.constexpr = REGION != _PARTIAL
    start = k * BLOCK_N
    length = program.length
    prefix = program.prefix
    scale_t = t.scale
    scale_s = s.scale
    j = start + tl.arange(0, BLOCK_N)
    k_position = token_positions(indices, start, length, BLOCK_N, HAS_INDICES, FULL)
    # Both tiles are loaded before the first product: the other order costs 0.4 issue slots a pair on sm_90.
    k_tile_t = load_k_tile(t, k_position, start, length, LAYOUT_T, FULL, BLOCK_N)
    k_tile_s = load_k_tile(s, k_position, start, length, LAYOUT_S, FULL, BLOCK_N)
    dot_t = score_tile(t, k_tile_t, program, q_position, k_position, start, LAYOUT_T, PRECISION, FULL, BLOCK_M, BLOCK_N)
    dot_s = score_tile(s, k_tile_s, program, q_position, k_position, start, LAYOUT_S, PRECISION, FULL, BLOCK_M, BLOCK_N)
    # [BLOCK_N]
    in_bounds = j < length
    if ROLE != QUERY:
        k_inv_t = tl.load(sum_t + j) if FULL else tl.load(sum_t + j, mask=in_bounds, other=0.0)
        k_inv_s = tl.load(sum_s + j) if FULL else tl.load(sum_s + j, mask=in_bounds, other=0.0)
    if ROLE == KEY or not SHARED_PIVOT:
        k_pivot_t = tl.load(pivot_t + j, mask=in_bounds, other=0.0)
        k_pivot_s = tl.load(pivot_s + j, mask=in_bounds, other=0.0)

    # [BLOCK_M, BLOCK_N]
    if ROLE == SELF and SHARED_PIVOT:
        weights_t = _pair_weights(q_inv_t, k_inv_t, i, j, prefix, MASK, REGION)
        weights_s = _pair_weights(q_inv_s, k_inv_s, i, j, prefix, MASK, REGION)
        excess = _excess(dot_t, dot_s, scale_t, scale_s, q_pivot_t, q_pivot_s, weights_t, weights_s)
    else:
        if ROLE != KEY:
            excess = _excess(
                dot_t, dot_s, scale_t, scale_s,
                q_pivot_t[:, None], q_pivot_s[:, None], q_inv_t[:, None], q_inv_s[:, None],
            )  # fmt: skip
            if not FULL and MASK != BIDIRECTIONAL:
                excess = tl.where(sees(i[:, None], j[None, :], prefix), excess, 0.0)
        if ROLE != QUERY:
            mirrored = _excess(
                dot_t, dot_s, scale_t, scale_s,
                k_pivot_t[None, :], k_pivot_s[None, :], k_inv_t[None, :], k_inv_s[None, :],
            )  # fmt: skip
            if not FULL and MASK != BIDIRECTIONAL:
                mirrored = tl.where(sees(j[None, :], i[:, None], prefix), mirrored, 0.0)
            excess = mirrored if ROLE == KEY else excess + mirrored
    # static: end gradient
    # static: begin partial
    if not FULL:
        excess = tl.where(in_bounds[None, :], excess, 0.0)
    # static: end partial
    return acc + multiply(excess.to(k_tile_s.dtype), k_tile_s, PRECISION)


@triton.jit(**UNSPECIALIZED)
def gradient_kernel(
    teacher, teacher_strides, student, student_strides, query_codes, key_codes, scale_t, scale_s, gradient_scale,
    heads, sequences, positions, total, tiles, stats_head_stride16, stats_seq_stride16,
    indices, starts, prefixes, tile_map, sum_t, sum_s, pivot_t, pivot_s, head_stats, weights, out,
    D_T: tl.constexpr, D_S: tl.constexpr, DP_T: tl.constexpr, DP_S: tl.constexpr,
    ALIGN_T: tl.constexpr, ALIGN_S: tl.constexpr, PRECISION: tl.constexpr,
    SLICED_T: tl.constexpr, SLICED_S: tl.constexpr, GROUP_T: tl.constexpr, GROUP_S: tl.constexpr,
    PACKED: tl.constexpr, HAS_INDICES: tl.constexpr, MASK: tl.constexpr, ROLE: tl.constexpr,
    ROW_WEIGHTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of one student tensor per relation to `out`, (B, S, A, D_S) or (T, A, D_S).

    `sum_t` and `sum_s` hold the inverse sums that `finalize_kernel` wrote. `weights` has one weight per sequence; if it
    is None, gradient_scale contains the weight of all. With
    ROW_WEIGHTS, `weights` is unused, because the inverse sums already contain the row weights.
    """
    program = tile_program(
        heads, sequences, positions, total, tiles, starts, prefixes, tile_map, BLOCK_M, PACKED, HAS_INDICES, MASK
    )
    length = program.length
    start = program.start
    prefix = program.prefix
    if start >= length:
        return
    LAYOUT_T: tl.constexpr = (D_T, DP_T, ALIGN_T, SLICED_T, GROUP_T)
    LAYOUT_S: tl.constexpr = (D_S, DP_S, ALIGN_S, SLICED_S, GROUP_S)
    if HAS_INDICES:
        indices += program.indices_start
    row = row_offset(program, heads, stats_head_stride16, stats_seq_stride16, PACKED)
    sum_t += row
    sum_s += row
    pivot_t += row
    pivot_s += row
    head_stats += head_offset(program, heads, sequences)

    i = start + tl.arange(0, BLOCK_M)
    in_bounds = i < length
    q_position, t, s = load_models(
        teacher, teacher_strides, student, student_strides, scale_t, scale_s, query_codes, key_codes, program, indices,
        LAYOUT_T, LAYOUT_S, PACKED, HAS_INDICES, ROLE == KEY, BLOCK_M,
    )  # fmt: skip
    q_inv_t = tl.load(sum_t + i, mask=in_bounds, other=0.0)
    q_inv_s = tl.load(sum_s + i, mask=in_bounds, other=0.0)
    if ROLE == SELF:
        q_pivot_t = tl.load(head_stats)
        q_pivot_s = tl.load(head_stats + 1)
    else:
        q_pivot_t = tl.load(pivot_t + i, mask=in_bounds, other=0.0)
        q_pivot_s = tl.load(pivot_s + i, mask=in_bounds, other=0.0)

    # Looped tiles: [0, below) full, [partial, above) partial, [above, full) full, [full, end) partial.
    full = length // BLOCK_N
    end = tl.cdiv(length, BLOCK_N)
    below = full
    partial = full
    above = full
    if ROLE == QUERY:
        below, end = key_tiles(start, length, prefix, BLOCK_M, BLOCK_N, MASK)
        partial = below
        above = end
        full = end
    elif MASK != BIDIRECTIONAL:
        if ROLE == SELF:
            below = start // BLOCK_N
            partial = below
            above = tl.cdiv(start + BLOCK_M, BLOCK_N)
        else:
            below = full * 0
            partial = tl.where(start < prefix, 0, start // BLOCK_N)
            above = tl.where(start + BLOCK_M <= prefix, 0, tl.cdiv(start + BLOCK_M - 1, BLOCK_N))
        above = tl.minimum(tl.maximum(above, partial), end)
        full = tl.maximum(full, above)

    acc = tl.zeros([BLOCK_M, DP_S], tl.float32)
    if ROLE != SELF or tl.load(head_stats + 2) > 0.5:
        for k in range(0, below):
            acc = _add_tile(
                acc, k, t, s, q_inv_t, q_inv_s, q_pivot_t, q_pivot_s, program, i, q_position,
                indices, sum_t, sum_s, pivot_t, pivot_s,
                LAYOUT_T, LAYOUT_S, PRECISION, HAS_INDICES, MASK, ROLE, True, _BELOW, BLOCK_M, BLOCK_N,
            )  # fmt: skip
        if ROLE != QUERY and MASK != BIDIRECTIONAL:
            for k in range(above, full):
                acc = _add_tile(
                    acc, k, t, s, q_inv_t, q_inv_s, q_pivot_t, q_pivot_s, program, i, q_position,
                    indices, sum_t, sum_s, pivot_t, pivot_s,
                    LAYOUT_T, LAYOUT_S, PRECISION, HAS_INDICES, MASK, ROLE, True, _ABOVE, BLOCK_M, BLOCK_N,
                )  # fmt: skip
        for n in range(0, above - partial + end - full):
            k = tl.where(n < above - partial, partial + n, full + n - (above - partial))
            acc = _add_tile(
                acc, k, t, s, q_inv_t, q_inv_s, q_pivot_t, q_pivot_s, program, i, q_position,
                indices, sum_t, sum_s, pivot_t, pivot_s,
                LAYOUT_T, LAYOUT_S, PRECISION, HAS_INDICES, MASK, ROLE, True, _PARTIAL, BLOCK_M, BLOCK_N,
            )  # fmt: skip
    else:
        row_pivot_t = tl.load(pivot_t + i, mask=in_bounds, other=0.0)
        row_pivot_s = tl.load(pivot_s + i, mask=in_bounds, other=0.0)
        for k in range(0, end):
            acc = _add_tile(
                acc, k, t, s, q_inv_t, q_inv_s, row_pivot_t, row_pivot_s, program, i, q_position,
                indices, sum_t, sum_s, pivot_t, pivot_s,
                LAYOUT_T, LAYOUT_S, PRECISION, HAS_INDICES, MASK, ROLE, False, _PARTIAL, BLOCK_M, BLOCK_N,
            )  # fmt: skip

    if ROW_WEIGHTS:
        acc *= tl.load(head_stats + 3)
    elif weights is not None:
        acc *= tl.load(weights + program.sequence)
    acc *= gradient_scale
    position = q_position.to(tl.int64) + (program.first if PACKED else program.sequence.to(tl.int64) * positions)
    feature = tl.arange(0, DP_S)[None, :]
    offset = ((position * heads + program.head) * D_S)[:, None] + feature  # [BLOCK_M, DP_S]
    tl.store(select(out, program.relation) + offset, acc, mask=in_bounds[:, None] & (feature < D_S))
