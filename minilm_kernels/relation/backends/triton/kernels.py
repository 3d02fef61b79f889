"""The Triton kernels: log-sum-exps, what links the phases, exact rows, and the student's gradient.

Every sequence is a run of L real tokens, however it was masked or packed; row i of it sees the keys j <= i and
j < prefix, or all. One program owns BLOCK_M tokens of one head, sequence and relation and loops over tiles of BLOCK_N
others: whole tiles without any mask, and apart from them the few that cross a bound. Scores are in bits (log2 e is
folded into the scale), statistics are float32 and lie at (relation, head, row): `_statistics`. Derivations and costs:
docs/triton.md. `triton_backend.py` launches these kernels; what their arguments mean is said there.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Values of the constexpr arguments MASK and ROLE.
BIDIRECTIONAL, CAUSAL, PREFIX = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# The gradient of a self relation's tensor, of a cross relation's query, of its key.
SELF, QUERY, KEY = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

# Arguments of which no value gets a compilation of its own.
_SIZES = (
    "teacher_strides", "student_strides", "queries", "keys", "heads", "sequences", "positions", "total", "tiles",
    "rows16", "span16",
)  # fmt: skip

# Sums of 2**(score - the row's score with itself) beyond which a tile is done again with an online maximum.
_OVERFLOW = tl.constexpr(2.0**100)
# Range of the rows' scores with themselves in one head, in bits, up to which one base serves all of its pairs.
_RANGE = tl.constexpr(160.0)
_LN2 = tl.constexpr(0.6931471805599453)

# Where a whole tile of others lies, below or above the program's own tokens; or that it crosses a bound.
_BELOW, _ABOVE, _BOUND = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _pick(items, index):
    """items[index] of a tuple of pointers; `index` is known only when the kernel runs."""
    chosen = items[0]
    for k in tl.static_range(1, len(items)):
        if index == k:
            chosen = items[k]
    return chosen


@triton.jit
def _sequence_of(
    sequence, positions, total, starts, prefixes, PACKED: tl.constexpr, LIST: tl.constexpr, MASK: tl.constexpr
):
    """A sequence's first token (packed) and first entry of the token list, its length and prefix.

    cu_seqlens may hold anything: nothing beyond the `total` tokens is ever pointed at.
    """
    first = tl.cast(0, tl.int64)
    listed = first
    length = tl.cast(positions, tl.int32)
    if PACKED:
        first = tl.minimum(tl.maximum(tl.load(starts + sequence), 0), total).to(tl.int64)
        length = tl.maximum(tl.minimum(tl.load(starts + sequence + 1), total), first.to(tl.int32)) - first.to(tl.int32)
    if LIST:
        listed = tl.load(starts + sequence)
        length = (tl.load(starts + sequence + 1) - listed).to(tl.int32)
    prefix = tl.cast(0, tl.int32)
    if MASK == PREFIX:
        prefix = tl.minimum(tl.maximum(tl.load(prefixes + sequence), 0), length.to(tl.int64)).to(tl.int32)
    return first, listed, length, prefix


@triton.jit
def _program(
    heads, sequences, positions, total, tiles, starts, prefixes, tile_map,
    BLOCK: tl.constexpr, PACKED: tl.constexpr, LIST: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Of this program: relation, sequence, head; its sequence as in `_sequence_of`; the first of its own tokens."""
    pid = tl.program_id(0)
    head = pid % heads
    tile = pid // heads % tiles
    rest = pid // heads // tiles
    if PACKED:
        relation = rest
        sequence = tl.load(tile_map + tile).to(tl.int32)
        tile -= tl.load(starts + sequence) // BLOCK + sequence  # the first tile of the sequence, see tile_map_of
    else:
        relation = rest // sequences
        sequence = rest % sequences
    first, listed, length, prefix = _sequence_of(sequence, positions, total, starts, prefixes, PACKED, LIST, MASK)
    start = tile * BLOCK
    start = tl.where(start < 0, length, start)  # a tile before its sequence: cu_seqlens is malformed
    return relation, sequence, head, first, listed, length, prefix, start


@triton.jit
def _statistics(relation, head, heads, sequence, first, rows16, span16, PACKED: tl.constexpr):
    """Offset of a sequence's first row among the statistics (R, A, 16 rows16); dense sequences take 16 span16 rows."""
    at = (relation * heads + head).to(tl.int64) * rows16 * 16
    return at + (first if PACKED else sequence.to(tl.int64) * span16 * 16)


@triton.jit
def _result(head, heads, sequence, first, positions, total, PACKED: tl.constexpr):
    """Offset of a sequence's position 0 in a tensor (B, A, S) or (A, T)."""
    if PACKED:
        return head.to(tl.int64) * total + first
    return (sequence.to(tl.int64) * heads + head) * positions


@triton.jit
def _head(tensors, strides, index, sequence, head, first, ALIGN: tl.constexpr, PACKED: tl.constexpr):
    """Pointer to a sequence's position 0 in one head of a tensor, and the stride of its tokens.

    Strides are in units of ALIGN elements, of batch, token and head of every tensor one after another.
    """
    x = tensors[0]
    batch = tl.cast(strides[0], tl.int64)
    token = tl.cast(strides[1], tl.int64)
    across = tl.cast(strides[2], tl.int64)
    for k in tl.static_range(1, len(tensors)):
        if index == k:
            x = tensors[k]
            batch = tl.cast(strides[3 * k], tl.int64)
            token = tl.cast(strides[3 * k + 1], tl.int64)
            across = tl.cast(strides[3 * k + 2], tl.int64)
    offset = first * token if PACKED else sequence.to(tl.int64) * batch
    return x + (offset + head.to(tl.int64) * across) * ALIGN, token


@triton.jit
def _positions(tokens, start, length, BLOCK: tl.constexpr, LIST: tl.constexpr, WHOLE: tl.constexpr):
    """(BLOCK,) positions of the real tokens from the `start`-th on."""
    index = start + tl.arange(0, BLOCK)
    if LIST:
        index = tl.load(tokens + index) if WHOLE else tl.load(tokens + index, mask=index < length, other=0)
    return index


@triton.jit
def _tile(
    x, position, stride, start, length,
    BLOCK: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ALIGN: tl.constexpr, WHOLE: tl.constexpr, begin=0,
):  # fmt: skip
    """(BLOCK, DP) features from `begin` on of the tokens from the `start`-th on.

    Zeros beyond `length` (nothing is when WHOLE) and beyond D features.
    """
    feature = begin + tl.arange(0, DP)[None, :]
    at = x + (position * stride)[:, None] * ALIGN + feature
    if WHOLE:
        if D % DP == 0:
            return tl.load(at)
        return tl.load(at, mask=feature < D, other=0.0)
    here = (start + tl.arange(0, BLOCK) < length)[:, None]
    return tl.load(at, mask=here & (feature < D), other=0.0)


@triton.jit
def _products(
    q, k, x, x_stride, own, i, y, y_stride, other, j, length,
    D: tl.constexpr, DP: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr, PARTS: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Products of the own tile `q`, tokens of x from i on, and a tile of others `k`, tokens of y from j on.

    PARTS: both are fetched part by part, 16 features at a time. Wide rows in float32 are multiplied by ordinary
    multiply-adds, for which a thread would keep whole rows of both sides in its registers. All kernels do it alike, so
    that a score is the same number in every phase.
    """
    if not PARTS:
        return tl.dot(q, tl.trans(k), input_precision=PRECISION)
    dot = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for begin in range(0, DP, 16):
        part_x = _tile(x, own, x_stride, i, length, BLOCK_M, D, 16, ALIGN, False, begin)
        part_y = _tile(y, other, y_stride, j, length, BLOCK_N, D, 16, ALIGN, WHOLE, begin)
        dot = tl.dot(part_x, tl.trans(part_y), dot, input_precision=PRECISION)
    return dot


@triton.jit
def _scores_with_itself(x, y):
    """(BLOCK,) sums of x·y over the features of each token, the same bits in all threads that hold the token.

    float32 products are rounded by themselves. Contracted with the first addition across threads, a thread would round
    its own product apart from its partner's: sums would differ by a unit between threads, and floors of them by one.
    """
    if x.dtype == tl.float32:
        return tl.sum(tl.fma(x, y, 0.0), 1)
    return tl.sum(x.to(tl.float32) * y.to(tl.float32), 1)


@triton.jit
def _sees(i, j, prefix):
    """Row i sees key j under a causal or prefix mask."""
    return (j <= i) | (j < prefix)


@triton.jit
def _key_tiles(start, length, prefix, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASK: tl.constexpr):
    """Of the tiles of keys that the rows from `start` see: how many come first that need no mask, how many in all."""
    if MASK == BIDIRECTIONAL:
        return length // BLOCK_N, tl.cdiv(length, BLOCK_N)
    whole = tl.minimum(tl.maximum(start + 1, prefix), length)
    end = tl.minimum(tl.maximum(start + BLOCK_M, prefix), length)
    return whole // BLOCK_N, tl.cdiv(end, BLOCK_N)


@triton.jit
def _partial_sums(x, WIDTH: tl.constexpr):
    """(M, N) to (M, WIDTH); the rest is added behind the loop.

    Tensor cores lay a tile out so that 8 sums a row are each within one thread.
    """
    if WIDTH == 1:
        return tl.sum(x, 1, keep_dims=True)
    return tl.sum(tl.reshape(x, [x.shape[0], x.shape[1] // WIDTH, WIDTH]), 1)


@triton.jit
def _nth(k, first, count, second):
    """The k-th tile of two runs, the first of `count` tiles."""
    return tl.where(k < count, first + k, second + k - count)


@triton.jit(do_not_specialize=_SIZES)
def base_kernel(
    teacher, teacher_strides, student, student_strides, queries, scale_t, scale_s,
    heads, sequences, positions, total, tokens, starts, prefixes, links,
    D_T: tl.constexpr, D_S: tl.constexpr, DP_T: tl.constexpr, DP_S: tl.constexpr,
    ALIGN_T: tl.constexpr, ALIGN_S: tl.constexpr,
    PACKED: tl.constexpr, LIST: tl.constexpr, MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of self relations, one program a head, sequence and relation: a base for all its scores, where one can serve.

    No score is larger than the largest score of a token with itself, so the middle of these scores' range serves, as
    long as the range is small: no row's sum overflows, and none underflows. Bases are whole numbers, so that moving
    from one to another is exact. To `links`: base_t, base_s, and 1 where they serve.
    """
    pid = tl.program_id(0)
    head = pid % heads
    sequence = pid // heads % sequences
    relation = pid // heads // sequences
    first, listed, length, _ = _sequence_of(sequence, positions, total, starts, prefixes, PACKED, LIST, MASK)
    query = (queries >> (4 * relation)) & 15
    x_t, x_t_stride = _head(teacher, teacher_strides, query, sequence, head, first, ALIGN_T, PACKED)
    x_s, x_s_stride = _head(student, student_strides, query, sequence, head, first, ALIGN_S, PACKED)
    if LIST:
        tokens += listed
    low_t = tl.full([BLOCK], float("inf"), tl.float32)
    low_s = tl.full([BLOCK], float("inf"), tl.float32)
    high_t = tl.full([BLOCK], float("-inf"), tl.float32)
    high_s = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, length, BLOCK):
        here = start + tl.arange(0, BLOCK) < length
        own = _positions(tokens, start, length, BLOCK, LIST, False)
        t = _tile(x_t, own, x_t_stride, start, length, BLOCK, D_T, DP_T, ALIGN_T, False)
        s = _tile(x_s, own, x_s_stride, start, length, BLOCK, D_S, DP_S, ALIGN_S, False)
        own_t = scale_t * _scores_with_itself(t, t)
        own_s = scale_s * _scores_with_itself(s, s)
        low_t = tl.minimum(low_t, tl.where(here, own_t, float("inf")))
        low_s = tl.minimum(low_s, tl.where(here, own_s, float("inf")))
        high_t = tl.maximum(high_t, tl.where(here, own_t, float("-inf")))
        high_s = tl.maximum(high_s, tl.where(here, own_s, float("-inf")))
    least_t = tl.min(low_t, 0)
    least_s = tl.min(low_s, 0)
    most_t = tl.max(high_t, 0)
    most_s = tl.max(high_s, 0)
    serves = (least_t >= 0.0) & (least_s >= 0.0) & (most_t - least_t <= _RANGE) & (most_s - least_s <= _RANGE)
    links += pid * 4
    tl.store(links, tl.where(serves, tl.floor(0.5 * (least_t + most_t)), 0.0))
    tl.store(links + 1, tl.where(serves, tl.floor(0.5 * (least_s + most_s)), 0.0))
    tl.store(links + 2, serves.to(tl.float32))


@triton.jit(do_not_specialize=_SIZES)
def lse_kernel(
    teacher, teacher_strides, student, student_strides, queries, keys, scale_t, scale_s,
    heads, sequences, positions, total, tiles, rows16, span16, tokens, starts, prefixes, tile_map,
    links, sum_t, sum_s, base_t, base_s, kl_rows,
    D_T: tl.constexpr, D_S: tl.constexpr, DP_T: tl.constexpr, DP_S: tl.constexpr,
    ALIGN_T: tl.constexpr, ALIGN_S: tl.constexpr, PRECISION: tl.constexpr,
    PARTS_T: tl.constexpr, PARTS_S: tl.constexpr,
    PACKED: tl.constexpr, LIST: tl.constexpr, MASK: tl.constexpr, SELF_RELATION: tl.constexpr,
    VALUE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Of every row the sum of 2**(score - base), and the base; with VALUE also its KL, in the cheap form.

    A row's base is its head's, see `base_kernel`, or else its score with itself, which every mask lets it see: no sum
    underflows, and no maximum is kept. Where one overflows, the tile is done again with an online maximum.
    """
    relation, sequence, head, first, listed, length, prefix, start = _program(
        heads, sequences, positions, total, tiles, starts, prefixes, tile_map, BLOCK_M, PACKED, LIST, MASK
    )
    if start >= length:
        return
    query = (queries >> (4 * relation)) & 15
    key = (keys >> (4 * relation)) & 15
    x_t, x_t_stride = _head(teacher, teacher_strides, query, sequence, head, first, ALIGN_T, PACKED)
    y_t, y_t_stride = _head(teacher, teacher_strides, key, sequence, head, first, ALIGN_T, PACKED)
    x_s, x_s_stride = _head(student, student_strides, query, sequence, head, first, ALIGN_S, PACKED)
    y_s, y_s_stride = _head(student, student_strides, key, sequence, head, first, ALIGN_S, PACKED)
    if LIST:
        tokens += listed

    i = start + tl.arange(0, BLOCK_M)
    own = _positions(tokens, start, length, BLOCK_M, LIST, False)
    q_t = _tile(x_t, own, x_t_stride, start, length, BLOCK_M, D_T, DP_T, ALIGN_T, False)
    q_s = _tile(x_s, own, x_s_stride, start, length, BLOCK_M, D_S, DP_S, ALIGN_S, False)
    own_t = _tile(y_t, own, y_t_stride, start, length, BLOCK_M, D_T, DP_T, ALIGN_T, False)
    own_s = _tile(y_s, own, y_s_stride, start, length, BLOCK_M, D_S, DP_S, ALIGN_S, False)
    ref_t = tl.floor(scale_t * _scores_with_itself(q_t, own_t))
    ref_s = tl.floor(scale_s * _scores_with_itself(q_s, own_s))
    if SELF_RELATION:
        link = links + ((relation * sequences + sequence) * heads + head) * 4
        serves = tl.load(link + 2) > 0.5
        ref_t = tl.where(serves, tl.load(link), ref_t)
        ref_s = tl.where(serves, tl.load(link + 1), ref_s)
    WIDTH: tl.constexpr = 1 if q_t.dtype == tl.float32 or q_s.dtype == tl.float32 else 8
    part_t = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    part_s = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    part_v = tl.zeros([BLOCK_M, WIDTH], tl.float32)  # of e_t (u_s - u_t)

    whole, end = _key_tiles(start, length, prefix, BLOCK_M, BLOCK_N, MASK)
    for k in range(0, whole):
        # static: begin lse
        other = _positions(tokens, k * BLOCK_N, length, BLOCK_N, LIST, True)
        k_t = _tile(y_t, other, y_t_stride, k * BLOCK_N, length, BLOCK_N, D_T, DP_T, ALIGN_T, True)
        p_t = _products(
            q_t, k_t, x_t, x_t_stride, own, start, y_t, y_t_stride, other, k * BLOCK_N, length,
            D_T, DP_T, ALIGN_T, PRECISION, PARTS_T, True, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        k_s = _tile(y_s, other, y_s_stride, k * BLOCK_N, length, BLOCK_N, D_S, DP_S, ALIGN_S, True)
        p_s = _products(
            q_s, k_s, x_s, x_s_stride, own, start, y_s, y_s_stride, other, k * BLOCK_N, length,
            D_S, DP_S, ALIGN_S, PRECISION, PARTS_S, True, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        u_t = tl.fma(p_t, scale_t, -ref_t[:, None])
        u_s = tl.fma(p_s, scale_s, -ref_s[:, None])
        e_t = tl.exp2(u_t)
        e_s = tl.exp2(u_s)
        part_t += _partial_sums(e_t, WIDTH)
        part_s += _partial_sums(e_s, WIDTH)
        if VALUE:
            part_v += _partial_sums(e_t * (u_s - u_t), WIDTH)
        # static: end lse
    for k in range(whole, end):
        other = _positions(tokens, k * BLOCK_N, length, BLOCK_N, LIST, False)
        k_t = _tile(y_t, other, y_t_stride, k * BLOCK_N, length, BLOCK_N, D_T, DP_T, ALIGN_T, False)
        p_t = _products(
            q_t, k_t, x_t, x_t_stride, own, start, y_t, y_t_stride, other, k * BLOCK_N, length,
            D_T, DP_T, ALIGN_T, PRECISION, PARTS_T, False, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        k_s = _tile(y_s, other, y_s_stride, k * BLOCK_N, length, BLOCK_N, D_S, DP_S, ALIGN_S, False)
        p_s = _products(
            q_s, k_s, x_s, x_s_stride, own, start, y_s, y_s_stride, other, k * BLOCK_N, length,
            D_S, DP_S, ALIGN_S, PRECISION, PARTS_S, False, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        u_t = tl.fma(p_t, scale_t, -ref_t[:, None])
        u_s = tl.fma(p_s, scale_s, -ref_s[:, None])
        j = (k * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
        sees = j < length
        if MASK != BIDIRECTIONAL:
            sees = sees & _sees(i[:, None], j, prefix)
        e_t = tl.where(sees, tl.exp2(u_t), 0.0)
        e_s = tl.where(sees, tl.exp2(u_s), 0.0)
        part_t += _partial_sums(e_t, WIDTH)
        part_s += _partial_sums(e_s, WIDTH)
        if VALUE:
            part_v += _partial_sums(tl.where(sees, e_t * (u_s - u_t), 0.0), WIDTH)
    l_t = tl.sum(part_t, 1)
    l_s = tl.sum(part_s, 1)
    v = tl.sum(part_v, 1)

    largest = tl.max(tl.where(i < length, tl.maximum(l_t, l_s), 0.0), 0)
    if largest > _OVERFLOW:
        l_t = tl.zeros([BLOCK_M], tl.float32)
        l_s = tl.zeros([BLOCK_M], tl.float32)
        v = tl.zeros([BLOCK_M], tl.float32)  # sum of e_t (score_s - score_t)
        for k in range(0, end):
            other = _positions(tokens, k * BLOCK_N, length, BLOCK_N, LIST, False)
            k_t = _tile(y_t, other, y_t_stride, k * BLOCK_N, length, BLOCK_N, D_T, DP_T, ALIGN_T, False)
            p_t = _products(
                q_t, k_t, x_t, x_t_stride, own, start, y_t, y_t_stride, other, k * BLOCK_N, length,
                D_T, DP_T, ALIGN_T, PRECISION, PARTS_T, False, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            k_s = _tile(y_s, other, y_s_stride, k * BLOCK_N, length, BLOCK_N, D_S, DP_S, ALIGN_S, False)
            p_s = _products(
                q_s, k_s, x_s, x_s_stride, own, start, y_s, y_s_stride, other, k * BLOCK_N, length,
                D_S, DP_S, ALIGN_S, PRECISION, PARTS_S, False, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            s_t = p_t * scale_t
            s_s = p_s * scale_s
            j = (k * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
            sees = j < length
            if MASK != BIDIRECTIONAL:
                sees = sees & _sees(i[:, None], j, prefix)
            max_t = tl.maximum(ref_t, tl.ceil(tl.max(tl.where(sees, s_t, float("-inf")), 1)))
            max_s = tl.maximum(ref_s, tl.ceil(tl.max(tl.where(sees, s_s, float("-inf")), 1)))
            e_t = tl.where(sees, tl.exp2(tl.fma(p_t, scale_t, -max_t[:, None])), 0.0)
            e_s = tl.where(sees, tl.exp2(tl.fma(p_s, scale_s, -max_s[:, None])), 0.0)
            fade = tl.exp2(ref_t - max_t)
            l_t = l_t * fade + tl.sum(e_t, 1)
            l_s = l_s * tl.exp2(ref_s - max_s) + tl.sum(e_s, 1)
            if VALUE:
                v = v * fade + tl.sum(tl.where(sees, e_t * (s_s - s_t), 0.0), 1)
            ref_t = max_t
            ref_s = max_s
        v += (ref_t - ref_s) * l_t

    row = _statistics(relation, head, heads, sequence, first, rows16, span16, PACKED) + i
    tl.store(sum_t + row, l_t, mask=i < length)
    tl.store(sum_s + row, l_s, mask=i < length)
    tl.store(base_t + row, ref_t, mask=i < length)
    tl.store(base_s + row, ref_s, mask=i < length)
    if VALUE:
        # log(l_s / l_t) as 2 artanh r: near r = 0, where small divergences lie, the logarithm's own error is too large.
        r = (l_s - l_t) / (l_s + l_t)
        r2 = r * r
        near = 2.0 * r * (1.0 + r2 * (1 / 3 + r2 * (1 / 5 + r2 * (1 / 7))))
        ratio = tl.where(r2 < 0.01, near, _LN2 * (tl.log2(l_s) - tl.log2(l_t)))
        tl.store(kl_rows + row, ratio - _LN2 * (v / l_t), mask=i < length)


@triton.jit(do_not_specialize=_SIZES)
def rows_kernel(
    teacher, teacher_strides, student, student_strides, queries, keys, scale_t, scale_s,
    heads, sequences, positions, total, tiles, rows16, span16, tokens, starts, prefixes, tile_map,
    sum_t, sum_s, base_t, base_s, kl_rows, out,
    D_T: tl.constexpr, D_S: tl.constexpr, DP_T: tl.constexpr, DP_S: tl.constexpr,
    ALIGN_T: tl.constexpr, ALIGN_S: tl.constexpr, PRECISION: tl.constexpr,
    PARTS_T: tl.constexpr, PARTS_S: tl.constexpr,
    PACKED: tl.constexpr, LIST: tl.constexpr, MASK: tl.constexpr, RESULT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Exact KL of every row, the sum of p (e**delta - 1 - delta): as a result (R, B, A, S), or among the statistics."""
    relation, sequence, head, first, listed, length, prefix, start = _program(
        heads, sequences, positions, total, tiles, starts, prefixes, tile_map, BLOCK_M, PACKED, LIST, MASK
    )
    if start >= length:
        return
    query = (queries >> (4 * relation)) & 15
    key = (keys >> (4 * relation)) & 15
    x_t, x_t_stride = _head(teacher, teacher_strides, query, sequence, head, first, ALIGN_T, PACKED)
    y_t, y_t_stride = _head(teacher, teacher_strides, key, sequence, head, first, ALIGN_T, PACKED)
    x_s, x_s_stride = _head(student, student_strides, query, sequence, head, first, ALIGN_S, PACKED)
    y_s, y_s_stride = _head(student, student_strides, key, sequence, head, first, ALIGN_S, PACKED)
    if LIST:
        tokens += listed

    i = start + tl.arange(0, BLOCK_M)
    own = _positions(tokens, start, length, BLOCK_M, LIST, False)
    q_t = _tile(x_t, own, x_t_stride, start, length, BLOCK_M, D_T, DP_T, ALIGN_T, False)
    q_s = _tile(x_s, own, x_s_stride, start, length, BLOCK_M, D_S, DP_S, ALIGN_S, False)
    row = _statistics(relation, head, heads, sequence, first, rows16, span16, PACKED) + i
    here = i < length
    own_t = tl.load(base_t + row, mask=here, other=0.0)
    own_s = tl.load(base_s + row, mask=here, other=0.0)
    log_t = tl.log2(tl.load(sum_t + row, mask=here, other=1.0))[:, None]
    log_s = tl.log2(tl.load(sum_s + row, mask=here, other=1.0))[:, None]
    WIDTH: tl.constexpr = 1 if q_t.dtype == tl.float32 or q_s.dtype == tl.float32 else 8
    part = tl.zeros([BLOCK_M, WIDTH], tl.float32)

    whole, end = _key_tiles(start, length, prefix, BLOCK_M, BLOCK_N, MASK)
    for k in range(0, whole):
        # static: begin rows
        other = _positions(tokens, k * BLOCK_N, length, BLOCK_N, LIST, True)
        k_t = _tile(y_t, other, y_t_stride, k * BLOCK_N, length, BLOCK_N, D_T, DP_T, ALIGN_T, True)
        p_t = _products(
            q_t, k_t, x_t, x_t_stride, own, start, y_t, y_t_stride, other, k * BLOCK_N, length,
            D_T, DP_T, ALIGN_T, PRECISION, PARTS_T, True, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        k_s = _tile(y_s, other, y_s_stride, k * BLOCK_N, length, BLOCK_N, D_S, DP_S, ALIGN_S, True)
        p_s = _products(
            q_s, k_s, x_s, x_s_stride, own, start, y_s, y_s_stride, other, k * BLOCK_N, length,
            D_S, DP_S, ALIGN_S, PRECISION, PARTS_S, True, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        u_t = tl.fma(p_t, scale_t, -own_t[:, None])
        u_s = tl.fma(p_s, scale_s, -own_s[:, None])
        part += _partial_sums(_divergence(u_t - log_t, u_s - log_s), WIDTH)
        # static: end rows
    for k in range(whole, end):
        other = _positions(tokens, k * BLOCK_N, length, BLOCK_N, LIST, False)
        k_t = _tile(y_t, other, y_t_stride, k * BLOCK_N, length, BLOCK_N, D_T, DP_T, ALIGN_T, False)
        p_t = _products(
            q_t, k_t, x_t, x_t_stride, own, start, y_t, y_t_stride, other, k * BLOCK_N, length,
            D_T, DP_T, ALIGN_T, PRECISION, PARTS_T, False, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        k_s = _tile(y_s, other, y_s_stride, k * BLOCK_N, length, BLOCK_N, D_S, DP_S, ALIGN_S, False)
        p_s = _products(
            q_s, k_s, x_s, x_s_stride, own, start, y_s, y_s_stride, other, k * BLOCK_N, length,
            D_S, DP_S, ALIGN_S, PRECISION, PARTS_S, False, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        u_t = tl.fma(p_t, scale_t, -own_t[:, None])
        u_s = tl.fma(p_s, scale_s, -own_s[:, None])
        j = (k * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
        sees = j < length
        if MASK != BIDIRECTIONAL:
            sees = sees & _sees(i[:, None], j, prefix)
        part += _partial_sums(tl.where(sees, _divergence(u_t - log_t, u_s - log_s), 0.0), WIDTH)

    kl = tl.sum(part, 1)
    if RESULT:
        result = _pick(out, relation) + _result(head, heads, sequence, first, positions, total, PACKED)
        tl.store(result + own, tl.maximum(kl, 0.0), mask=i < length)
    else:
        tl.store(kl_rows + row, tl.maximum(kl, 0.0), mask=i < length)


@triton.jit
def _divergence(log_p, log_q):
    """p (e**delta - 1 - delta) from logarithms in bits; a series where |delta| < 1/4, q - p - p delta elsewhere."""
    p = tl.exp2(log_p)
    q = tl.exp2(log_q)
    delta = _LN2 * (log_q - log_p)
    series = delta * (1 / 720 + delta * (1 / 5040 + delta * (1 / 40320)))
    series = delta * delta * (1 / 2 + delta * (1 / 6 + delta * (1 / 24 + delta * (1 / 120 + series))))
    return tl.where(tl.abs(delta) < 0.25, p * series, q - p - p * delta)


@triton.jit(do_not_specialize=_SIZES)
def link_kernel(
    heads, sequences, positions, total, rows16, span16, tokens, starts, prefixes,
    sum_t, sum_s, base_t, base_s, kl_rows, values, links, row_grads, weights,
    PACKED: tl.constexpr, LIST: tl.constexpr, MASK: tl.constexpr,
    SELF_RELATION: tl.constexpr, VALUE: tl.constexpr, GRADIENT: tl.constexpr, ROWS: tl.constexpr,
    SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Between the phases, one program a head, sequence and relation: what all of its rows together decide.

    VALUE: the sum of its rows' KL. ROWS: the rows' weights over the largest, which goes to `links`. GRADIENT: in the
    place of each sum its inverse times 2**SHIFT and the row's weight, relative to the head's base where one serves.
    """
    pid = tl.program_id(0)
    head = pid % heads
    sequence = pid // heads % sequences
    relation = pid // heads // sequences
    first, listed, length, prefix = _sequence_of(sequence, positions, total, starts, prefixes, PACKED, LIST, MASK)
    row = _statistics(relation, head, heads, sequence, first, rows16, span16, PACKED)
    lane = tl.arange(0, BLOCK)
    links += pid * 4

    if VALUE:
        value = tl.zeros([BLOCK], tl.float32)
        for start in range(0, length, BLOCK):
            value += tl.load(kl_rows + row + start + lane, mask=start + lane < length, other=0.0)
        tl.store(values + pid, tl.sum(value, 0))

    shrink = 1.0
    if LIST:
        tokens += listed
    if ROWS:
        row_grads = _pick(row_grads, relation) + _result(head, heads, sequence, first, positions, total, PACKED)
        largest = tl.zeros([BLOCK], tl.float32)
        for start in range(0, length, BLOCK):
            position = _positions(tokens, start, length, BLOCK, LIST, False)
            weight = tl.load(row_grads + position, mask=start + lane < length, other=0.0)
            tl.store(weights + row + start + lane, weight, mask=start + lane < length)
            largest = tl.maximum(largest, tl.abs(weight))
        greatest = tl.max(largest, 0)
        tl.store(links + 3, greatest)
        shrink = 1.0 / tl.maximum(greatest, 1e-37)

    if GRADIENT:
        if SELF_RELATION:
            narrow = tl.load(links + 2) > 0.5
            ref_t = tl.load(links)
            ref_s = tl.load(links + 1)
        for start in range(0, length, BLOCK):
            here = start + lane < length
            at = row + start + lane
            l_t = tl.load(sum_t + at, mask=here, other=1.0)
            l_s = tl.load(sum_s + at, mask=here, other=1.0)
            shift_t = tl.zeros([BLOCK], tl.float32) + SHIFT
            shift_s = shift_t
            if SELF_RELATION:
                shift_t += tl.where(narrow, ref_t - tl.load(base_t + at, mask=here, other=0.0), 0.0)
                shift_s += tl.where(narrow, ref_s - tl.load(base_s + at, mask=here, other=0.0), 0.0)
            # A row that sees itself only has no gradient, not even that of a rounding.
            alone = (length == 1) | ((start + lane == 0) & (prefix <= 1) & (MASK != BIDIRECTIONAL))
            t = tl.where(alone, 0.0, tl.exp2(shift_t) / l_t)
            s = tl.where(alone, 0.0, tl.exp2(shift_s) / l_s)
            if ROWS:
                weight = shrink * tl.load(weights + at, mask=here, other=0.0)
                t *= weight
                s *= weight
            tl.store(sum_t + at, t, mask=here)
            tl.store(sum_s + at, s, mask=here)


@triton.jit
def _coefficients(own, other, i, j, prefix, MASK: tl.constexpr, WHERE: tl.constexpr):
    """(M, N): what the pair's two directions weigh, own_i where row i sees j plus other_j where row j sees i."""
    if MASK == BIDIRECTIONAL:
        return own[:, None] + other[None, :]
    if WHERE == _BOUND:
        forth = tl.where(_sees(i[:, None], j[None, :], prefix), own[:, None], 0.0)
        return forth + tl.where(_sees(j[None, :], i[:, None], prefix), other[None, :], 0.0)
    if WHERE == _BELOW:
        if MASK == CAUSAL:
            return own[:, None] + tl.zeros_like(other)[None, :]
        return (i < prefix).to(tl.float32)[:, None] * other[None, :] + own[:, None]
    if MASK == CAUSAL:
        return tl.zeros_like(own)[:, None] + other[None, :]
    return (j < prefix).to(tl.float32)[None, :] * own[:, None] + other[None, :]


@triton.jit
def _add_tile(
    acc, k, q_t, x_t, x_t_stride, q_s, x_s, x_s_stride, own, own_start,
    own_t, own_s, ref_t, ref_s, i, length, prefix, scale_t, scale_s,
    y_t, y_t_stride, y_s, y_s_stride, tokens, sum_t, sum_s, base_t, base_s,
    D_T: tl.constexpr, D_S: tl.constexpr, DP_T: tl.constexpr, DP_S: tl.constexpr,
    ALIGN_T: tl.constexpr, ALIGN_S: tl.constexpr, PRECISION: tl.constexpr, LIST: tl.constexpr, MASK: tl.constexpr,
    ROLE: tl.constexpr, NARROW: tl.constexpr, WHERE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PARTS_T: tl.constexpr, PARTS_S: tl.constexpr,
):  # fmt: skip
    """acc plus what the k-th tile of other tokens gives to the gradient of the program's own."""
    # static: begin gradient
    start = k * BLOCK_N
    j = start + tl.arange(0, BLOCK_N)
    position = _positions(tokens, start, length, BLOCK_N, LIST, WHERE != _BOUND)
    k_t = _tile(y_t, position, y_t_stride, start, length, BLOCK_N, D_T, DP_T, ALIGN_T, WHERE != _BOUND)
    k_s = _tile(y_s, position, y_s_stride, start, length, BLOCK_N, D_S, DP_S, ALIGN_S, WHERE != _BOUND)
    p_t = _products(
        q_t, k_t, x_t, x_t_stride, own, own_start, y_t, y_t_stride, position, start, length,
        D_T, DP_T, ALIGN_T, PRECISION, PARTS_T, WHERE != _BOUND, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    p_s = _products(
        q_s, k_s, x_s, x_s_stride, own, own_start, y_s, y_s_stride, position, start, length,
        D_S, DP_S, ALIGN_S, PRECISION, PARTS_S, WHERE != _BOUND, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    if ROLE != QUERY:
        here = j < length
        other_t = tl.load(sum_t + j, mask=here, other=0.0) if WHERE == _BOUND else tl.load(sum_t + j)
        other_s = tl.load(sum_s + j, mask=here, other=0.0) if WHERE == _BOUND else tl.load(sum_s + j)
    if ROLE == KEY or not NARROW:
        from_t = tl.load(base_t + j, mask=j < length, other=0.0)[None, :]
        from_s = tl.load(base_s + j, mask=j < length, other=0.0)[None, :]

    if ROLE == SELF and NARROW:
        e_t = tl.exp2(tl.fma(p_t, scale_t, -ref_t))
        e_s = tl.exp2(tl.fma(p_s, scale_s, -ref_s))
        m = e_s * _coefficients(own_s, other_s, i, j, prefix, MASK, WHERE)
        m -= e_t * _coefficients(own_t, other_t, i, j, prefix, MASK, WHERE)
    elif ROLE == SELF:
        forth = tl.exp2(tl.fma(p_s, scale_s, -ref_s[:, None])) * own_s[:, None]
        forth -= tl.exp2(tl.fma(p_t, scale_t, -ref_t[:, None])) * own_t[:, None]
        back = tl.exp2(tl.fma(p_s, scale_s, -from_s)) * other_s[None, :]
        back -= tl.exp2(tl.fma(p_t, scale_t, -from_t)) * other_t[None, :]
        if MASK != BIDIRECTIONAL:
            forth = tl.where(_sees(i[:, None], j[None, :], prefix), forth, 0.0)
            back = tl.where(_sees(j[None, :], i[:, None], prefix), back, 0.0)
        m = forth + back
    elif ROLE == QUERY:
        e_t = tl.exp2(tl.fma(p_t, scale_t, -ref_t[:, None]))
        e_s = tl.exp2(tl.fma(p_s, scale_s, -ref_s[:, None]))
        m = e_s * own_s[:, None] - e_t * own_t[:, None]
        if WHERE == _BOUND and MASK != BIDIRECTIONAL:
            m = tl.where(_sees(i[:, None], j[None, :], prefix), m, 0.0)
    else:
        e_t = tl.exp2(tl.fma(p_t, scale_t, -from_t))
        e_s = tl.exp2(tl.fma(p_s, scale_s, -from_s))
        m = e_s * other_s[None, :] - e_t * other_t[None, :]
        if WHERE == _BOUND and MASK != BIDIRECTIONAL:
            m = tl.where(_sees(j[None, :], i[:, None], prefix), m, 0.0)
    # static: end gradient
    # static: begin bound
    if WHERE == _BOUND:
        m = tl.where((j < length)[None, :], m, 0.0)
    # static: end bound
    return tl.dot(m.to(k_s.dtype), k_s, acc, input_precision=PRECISION)


@triton.jit(do_not_specialize=_SIZES)
def gradient_kernel(
    teacher, teacher_strides, student, student_strides, queries, keys, scale_t, scale_s, gradient_scale,
    heads, sequences, positions, total, tiles, rows16, span16, tokens, starts, prefixes, tile_map,
    sum_t, sum_s, base_t, base_s, links, weights, out,
    D_T: tl.constexpr, D_S: tl.constexpr, DP_T: tl.constexpr, DP_S: tl.constexpr,
    ALIGN_T: tl.constexpr, ALIGN_S: tl.constexpr, PRECISION: tl.constexpr,
    PARTS_T: tl.constexpr, PARTS_S: tl.constexpr,
    PACKED: tl.constexpr, LIST: tl.constexpr, MASK: tl.constexpr, ROLE: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The gradient of one of the student's tensors, (B, S, A, D_S) or (T, A, D_S) in each of `out`, weights included.

    Sums are as the link kernel leaves them. `weights`: one a sequence; with ROWS they are in the sums already.
    """
    relation, sequence, head, first, listed, length, prefix, start = _program(
        heads, sequences, positions, total, tiles, starts, prefixes, tile_map, BLOCK_M, PACKED, LIST, MASK
    )
    if start >= length:
        return
    query = (queries >> (4 * relation)) & 15
    key = (keys >> (4 * relation)) & 15
    mine = key if ROLE == KEY else query
    others = query if ROLE == KEY else key
    x_t, x_t_stride = _head(teacher, teacher_strides, mine, sequence, head, first, ALIGN_T, PACKED)
    y_t, y_t_stride = _head(teacher, teacher_strides, others, sequence, head, first, ALIGN_T, PACKED)
    x_s, x_s_stride = _head(student, student_strides, mine, sequence, head, first, ALIGN_S, PACKED)
    y_s, y_s_stride = _head(student, student_strides, others, sequence, head, first, ALIGN_S, PACKED)
    if LIST:
        tokens += listed
    row = _statistics(relation, head, heads, sequence, first, rows16, span16, PACKED)
    sum_t += row
    sum_s += row
    i = start + tl.arange(0, BLOCK_M)
    link = links + ((relation * sequences + sequence) * heads + head) * 4

    own = _positions(tokens, start, length, BLOCK_M, LIST, False)
    q_t = _tile(x_t, own, x_t_stride, start, length, BLOCK_M, D_T, DP_T, ALIGN_T, False)
    q_s = _tile(x_s, own, x_s_stride, start, length, BLOCK_M, D_S, DP_S, ALIGN_S, False)
    own_t = tl.load(sum_t + i, mask=i < length, other=0.0)
    own_s = tl.load(sum_s + i, mask=i < length, other=0.0)
    base_t += row
    base_s += row
    if ROLE == SELF:
        ref_t = tl.load(link)
        ref_s = tl.load(link + 1)
    else:
        ref_t = tl.load(base_t + i, mask=i < length, other=0.0)
        ref_s = tl.load(base_s + i, mask=i < length, other=0.0)

    # Tiles of others: [0, below) whole, [bound, above) at the bound, [above, whole) whole, [whole, end) at the bound.
    whole = length // BLOCK_N
    end = tl.cdiv(length, BLOCK_N)
    below = whole
    bound = whole
    above = whole
    if ROLE == QUERY:
        below, end = _key_tiles(start, length, prefix, BLOCK_M, BLOCK_N, MASK)
        bound = below
        above = end
        whole = end
    elif MASK != BIDIRECTIONAL:
        if ROLE == SELF:
            below = start // BLOCK_N
            bound = below
            above = tl.cdiv(start + BLOCK_M, BLOCK_N)
        else:
            below = whole * 0
            bound = tl.where(start < prefix, 0, start // BLOCK_N)
            above = tl.where(start + BLOCK_M <= prefix, 0, tl.cdiv(start + BLOCK_M - 1, BLOCK_N))
        above = tl.minimum(tl.maximum(above, bound), end)
        whole = tl.maximum(whole, above)

    acc = tl.zeros([BLOCK_M, DP_S], tl.float32)
    if ROLE != SELF or tl.load(link + 2) > 0.5:
        for k in range(0, below):
            acc = _add_tile(
                acc, k, q_t, x_t, x_t_stride, q_s, x_s, x_s_stride, own, start,
                own_t, own_s, ref_t, ref_s, i, length, prefix, scale_t, scale_s,
                y_t, y_t_stride, y_s, y_s_stride, tokens, sum_t, sum_s, base_t, base_s,
                D_T, D_S, DP_T, DP_S, ALIGN_T, ALIGN_S, PRECISION, LIST, MASK, ROLE, True,
                _BELOW, BLOCK_M, BLOCK_N, PARTS_T, PARTS_S,
            )  # fmt: skip
        if ROLE != QUERY and MASK != BIDIRECTIONAL:
            for k in range(above, whole):
                acc = _add_tile(
                    acc, k, q_t, x_t, x_t_stride, q_s, x_s, x_s_stride, own, start,
                    own_t, own_s, ref_t, ref_s, i, length, prefix, scale_t, scale_s,
                    y_t, y_t_stride, y_s, y_s_stride, tokens, sum_t, sum_s, base_t, base_s,
                    D_T, D_S, DP_T, DP_S, ALIGN_T, ALIGN_S, PRECISION, LIST, MASK, ROLE, True,
                    _ABOVE, BLOCK_M, BLOCK_N, PARTS_T, PARTS_S,
                )  # fmt: skip
        for k in range(0, above - bound + end - whole):
            nth = _nth(k, bound, above - bound, whole)
            acc = _add_tile(
                acc, nth, q_t, x_t, x_t_stride, q_s, x_s, x_s_stride, own, start,
                own_t, own_s, ref_t, ref_s, i, length, prefix, scale_t, scale_s,
                y_t, y_t_stride, y_s, y_s_stride, tokens, sum_t, sum_s, base_t, base_s,
                D_T, D_S, DP_T, DP_S, ALIGN_T, ALIGN_S, PRECISION, LIST, MASK, ROLE, True,
                _BOUND, BLOCK_M, BLOCK_N, PARTS_T, PARTS_S,
            )  # fmt: skip
    else:
        row_t = tl.load(base_t + i, mask=i < length, other=0.0)
        row_s = tl.load(base_s + i, mask=i < length, other=0.0)
        for k in range(0, end):
            acc = _add_tile(
                acc, k, q_t, x_t, x_t_stride, q_s, x_s, x_s_stride, own, start,
                own_t, own_s, row_t, row_s, i, length, prefix, scale_t, scale_s,
                y_t, y_t_stride, y_s, y_s_stride, tokens, sum_t, sum_s, base_t, base_s,
                D_T, D_S, DP_T, DP_S, ALIGN_T, ALIGN_S, PRECISION, LIST, MASK, ROLE, False,
                _BOUND, BLOCK_M, BLOCK_N, PARTS_T, PARTS_S,
            )  # fmt: skip

    factor = tl.load(link + 3) if ROWS else tl.load(weights + sequence)
    acc *= factor * gradient_scale
    position = own.to(tl.int64) + (first if PACKED else sequence.to(tl.int64) * positions)
    feature = tl.arange(0, DP_S)[None, :]
    at = _pick(out, relation) + ((position * heads + head) * D_S)[:, None] + feature
    tl.store(at, acc, mask=(i < length)[:, None] & (feature < D_S))
