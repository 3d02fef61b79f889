"""Device functions that the Triton kernels share: the work of a program, loads, score tiles, masks.

Every sequence is a run of `length` valid tokens, whether it was dense, padded or packed. Row i sees key j if j <= i or
j < prefix; with a bidirectional mask it sees all keys. A program owns BLOCK_M tokens of one sequence in one head and
relation, and it loops over tiles of BLOCK_N tokens. Full tiles need no mask. Partial tiles cross a mask bound or the
end of the sequence.

Scores are in bits: the scale contains the factor log2(e), so that a softmax needs exp2 only. Row statistics are float32
of shape (relation, head, row); `row_offset` locates them. docs/triton.md has the derivations.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

# Values of the constexpr argument MASK.
BIDIRECTIONAL, CAUSAL, PREFIX = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

# Arguments whose values must not trigger a compilation. Integers in tuples are encoded for that, see `decode_integer`.
UNSPECIALIZED: dict[str, Any] = {
    "do_not_specialize": (
        "query_codes", "key_codes", "heads", "sequences", "positions", "total", "tiles", "stats_head_stride16",
        "stats_seq_stride16", "copies", "columns",
    ),
    "do_not_specialize_on_alignment": ("starts", "prefixes", "row_grads"),  # the caller's tensors
}  # fmt: skip

LN2 = tl.constexpr(0.6931471805599453)


class Program(NamedTuple):
    """The work of one program. A NamedTuple carries run-time values only: constexprs in it would become tensors."""

    relation: Any
    sequence: Any
    head: Any
    first: Any  # first token of the sequence in a packed tensor, else 0
    indices_start: Any  # first entry of the sequence in the list of token indices, else 0
    length: Any  # valid tokens of the sequence
    prefix: Any  # valid tokens in the sequence's prefix, 0 without a prefix mask
    start: Any  # first token that the program owns


class Operands(NamedTuple):
    """One model's tensors in a program: q holds the tokens that the program owns, k those that it loops over."""

    q: Any  # pointer to the sequence's position 0
    q_stride: Any
    k: Any
    k_stride: Any
    q_tile: Any  # [BLOCK_M, DP]
    scale: Any


@triton.jit
def select(items, index):
    """Returns items[index] from a tuple of pointers or numbers, for an index that is known only at run time."""
    chosen = items[0]
    for k in tl.static_range(1, len(items)):
        if index == k:
            chosen = items[k]
    return chosen


@triton.jit
def decode_integer(x):
    """Returns the integer that `launch.encode_integers` encoded, as int64."""
    return (tl.cast(x, tl.int64) - 3) >> 1


@triton.jit
def decode_relation(codes, relation):
    """Returns the tensor index of a relation: `codes` holds 5 bits for each relation."""
    return (codes >> (5 * relation)) & 31


@triton.jit
def sequence_bounds(
    sequence, positions, total, starts, prefixes, PACKED: tl.constexpr, HAS_INDICES: tl.constexpr, MASK: tl.constexpr
):
    """Returns first, indices_start, length and prefix of a sequence; see `Program`.

    `starts` holds the bounds of packed sequences, or the numbers of valid tokens of padded ones.
    Malformed cu_seqlens are clamped, so that no address is beyond the `total` tokens.
    """
    first = tl.cast(0, tl.int64)
    indices_start = first
    length = tl.cast(positions, tl.int32)
    if PACKED:
        first = tl.minimum(tl.maximum(tl.load(starts + sequence), 0), total).to(tl.int64)
        length = tl.maximum(tl.minimum(tl.load(starts + sequence + 1), total), first.to(tl.int32)) - first.to(tl.int32)
    if HAS_INDICES:
        indices_start = tl.cast(sequence, tl.int64) * positions
        length = tl.load(starts + sequence).to(tl.int32)
    prefix = tl.cast(0, tl.int32)
    if MASK == PREFIX:
        prefix = tl.minimum(tl.maximum(tl.load(prefixes + sequence), 0), length.to(tl.int64)).to(tl.int32)
    return first, indices_start, length, prefix


@triton.jit
def tile_program(
    heads, sequences, positions, total, tiles, starts, prefixes, tile_map,
    BLOCK: tl.constexpr, PACKED: tl.constexpr, HAS_INDICES: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Returns the `Program` of a grid with one program for each tile of BLOCK tokens."""
    pid = tl.program_id(0)
    head = pid % heads
    tile = pid // heads % tiles
    rest = pid // heads // tiles
    if PACKED:
        relation = rest
        sequence = tl.load(tile_map + tile).to(tl.int32)
        tile -= tl.load(starts + sequence) // BLOCK + sequence  # the sequence's first tile, see launch.tile_map
    else:
        relation = rest // sequences
        sequence = rest % sequences
    first, indices_start, length, prefix = sequence_bounds(
        sequence, positions, total, starts, prefixes, PACKED, HAS_INDICES, MASK
    )
    start = tile * BLOCK
    start = tl.where(start < 0, length, start)  # negative only if cu_seqlens is malformed
    return Program(relation, sequence, head, first, indices_start, length, prefix, start)


@triton.jit
def head_program(
    heads, sequences, positions, total, starts, prefixes,
    PACKED: tl.constexpr, HAS_INDICES: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Returns the `Program` of a grid with one program for each head of a sequence in a relation."""
    pid = tl.program_id(0)
    head = pid % heads
    sequence = pid // heads % sequences
    relation = pid // heads // sequences
    first, indices_start, length, prefix = sequence_bounds(
        sequence, positions, total, starts, prefixes, PACKED, HAS_INDICES, MASK
    )
    return Program(relation, sequence, head, first, indices_start, length, prefix, 0)


@triton.jit
def row_offset(program, heads, stats_head_stride16, stats_seq_stride16, PACKED: tl.constexpr):
    """Returns the offset of a sequence's row 0 in the row statistics (R, A, rows). The unit of strides is 16 floats."""
    head_start = (program.relation * heads + program.head).to(tl.int64) * stats_head_stride16 * 16
    return head_start + (program.first if PACKED else program.sequence.to(tl.int64) * stats_seq_stride16 * 16)


@triton.jit
def head_offset(program, heads, sequences):
    """Returns the offset of a head's four values in the head statistics (R, N, A, 4)."""
    return ((program.relation * sequences + program.sequence) * heads + program.head) * 4


@triton.jit
def output_offset(program, relations, heads, positions, total, PACKED: tl.constexpr):
    """Returns the offset of a sequence's position 0 in a tensor (R, B, A, S) or (R, A, T).

    `relations` holds the number in the call of each relation of the launch, encoded.
    """
    start = decode_integer(select(relations, program.relation)) * heads * total
    if PACKED:
        return start + program.head.to(tl.int64) * total + program.first
    return start + (program.sequence.to(tl.int64) * heads + program.head) * positions


@triton.jit
def head_pointer(tensors, strides, index, head, program, ALIGN: tl.constexpr, PACKED: tl.constexpr):
    """Returns a pointer to a sequence's position 0 in one head of tensors[index], and the stride of its tokens.

    `strides` holds batch, token and head stride of each tensor, in units of ALIGN elements and encoded.
    """
    x = tensors[0]
    batch_stride = tl.cast(strides[0], tl.int64)
    token_stride = tl.cast(strides[1], tl.int64)
    head_stride = tl.cast(strides[2], tl.int64)
    for k in tl.static_range(1, len(tensors)):
        if index == k:
            x = tensors[k]
            batch_stride = tl.cast(strides[3 * k], tl.int64)
            token_stride = tl.cast(strides[3 * k + 1], tl.int64)
            head_stride = tl.cast(strides[3 * k + 2], tl.int64)
    batch_stride = decode_integer(batch_stride)
    token_stride = decode_integer(token_stride)
    head_stride = decode_integer(head_stride)
    offset = program.first * token_stride if PACKED else program.sequence.to(tl.int64) * batch_stride
    return x + (offset + head.to(tl.int64) * head_stride) * ALIGN, token_stride


@triton.jit
def token_positions(indices, start, length, BLOCK: tl.constexpr, HAS_INDICES: tl.constexpr, FULL: tl.constexpr):
    """Returns the positions of BLOCK valid tokens from the `start`-th on. FULL means that all of them exist."""
    position = start + tl.arange(0, BLOCK)  # [BLOCK]
    if HAS_INDICES:
        in_bounds = position < length
        position = tl.load(indices + position) if FULL else tl.load(indices + position, mask=in_bounds, other=0)
    return position


@triton.jit
def load_tile(
    x, position, stride, start, length,
    BLOCK: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ALIGN: tl.constexpr, FULL: tl.constexpr, begin=0,
):  # fmt: skip
    """Loads DP features, from `begin` on, of BLOCK tokens; `start` is the index of the first token.

    Tokens from `length` on and features from D on are 0. FULL means that all tokens exist.
    """
    feature = begin + tl.arange(0, DP)[None, :]
    address = x + (position * stride)[:, None] * ALIGN + feature  # [BLOCK, DP]
    if FULL:
        if D % DP == 0:
            return tl.load(address)
        return tl.load(address, mask=feature < D, other=0.0)
    in_bounds = (start + tl.arange(0, BLOCK) < length)[:, None]
    return tl.load(address, mask=in_bounds & (feature < D), other=0.0)


@triton.jit
def load_operands(
    tensors, strides, scale, q_index, k_index, program, q_position,
    LAYOUT: tl.constexpr, PACKED: tl.constexpr, OWNS_KEYS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Returns the `Operands` of one model.

    LAYOUT is (D, DP, ALIGN, SLICED, GROUP): GROUP consecutive query heads share a key head.
    """
    key_head = program.head // LAYOUT[4]
    q_head = key_head if OWNS_KEYS else program.head
    k_head = program.head if OWNS_KEYS else key_head
    q, q_stride = head_pointer(tensors, strides, q_index, q_head, program, LAYOUT[2], PACKED)
    k, k_stride = head_pointer(tensors, strides, k_index, k_head, program, LAYOUT[2], PACKED)
    q_tile = load_tile(
        q, q_position, q_stride, program.start, program.length, BLOCK_M, LAYOUT[0], LAYOUT[1], LAYOUT[2], False
    )
    return Operands(q, q_stride, k, k_stride, q_tile, scale)


@triton.jit
def load_models(
    teacher, teacher_strides, student, student_strides, scale_t, scale_s, query_codes, key_codes, program, indices,
    LAYOUT_T: tl.constexpr, LAYOUT_S: tl.constexpr, PACKED: tl.constexpr, HAS_INDICES: tl.constexpr,
    OWNS_KEYS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Returns the owned tokens' positions [BLOCK_M] and the `Operands` of teacher and student.

    A program owns tokens of the relation's query and loops over its key. With OWNS_KEYS, it owns tokens of the key and
    loops over the query.
    """
    query = decode_relation(query_codes, program.relation)
    key = decode_relation(key_codes, program.relation)
    q_index = key if OWNS_KEYS else query
    k_index = query if OWNS_KEYS else key
    q_position = token_positions(indices, program.start, program.length, BLOCK_M, HAS_INDICES, False)
    t = load_operands(
        teacher, teacher_strides, scale_t, q_index, k_index, program, q_position, LAYOUT_T, PACKED, OWNS_KEYS, BLOCK_M
    )
    s = load_operands(
        student, student_strides, scale_s, q_index, k_index, program, q_position, LAYOUT_S, PACKED, OWNS_KEYS, BLOCK_M
    )
    return q_position, t, s


@triton.jit
def _upper_half(bits):
    """Returns the bfloat16 numbers in the upper halves of int32."""
    return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def split(x, GRID_AXIS: tl.constexpr = None):
    """Returns three bfloat16 tiles whose sum is the float32 tile x, the largest first.

    The first two are rounded to nearest, so that signs and errors of the parts are independent. They are computed as
    integers: conversions to bfloat16 would compete with the exponentials for a slow unit.
    With GRID_AXIS, the first part is a multiple of 2^-10 times the power of 2 above the largest magnitude on this axis.
    """
    first = x
    if GRID_AXIS is not None:
        largest = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, GRID_AXIS, keep_dims=True)
        # 1.5 * 2^14 times the largest magnitude's power of 2, without overflow: sums with it are rounded to the grid.
        exponent = tl.minimum(largest, 0x78000000) & 0x7F800000
        shift = (exponent + ((14 << 23) + (1 << 22))).to(tl.float32, bitcast=True)
        first = (x + shift) - shift
    high = (first.to(tl.int32, bitcast=True) + 0x8000) & -0x10000
    rest = x - high.to(tl.float32, bitcast=True)
    middle = (rest.to(tl.int32, bitcast=True) + 0x8000) & -0x10000
    low = (rest - middle.to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True)
    return _upper_half(high), _upper_half(middle), _upper_half(low)


@triton.jit
def multiply(x, y, PRECISION: tl.constexpr, SCORES: tl.constexpr = False):
    """Returns x @ y. PRECISION "bf16x6" computes float32 products on tensor cores, see docs/triton.md.

    SCORES: the largest products are added up without truncation, at the cost of an addition and of finding their grid.
    """
    if x.dtype == tl.float32 and PRECISION == "bf16x6":
        x_high, x_middle, x_low = split(x, 1 if SCORES else None)
        y_high, y_middle, y_low = split(y, 0 if SCORES else None)
        # Tensor cores truncate sums. The smallest products come first, so that few sums are truncated at full size.
        product = tl.dot(x_low, y_high)
        product = tl.dot(x_high, y_low, product)
        product = tl.dot(x_middle, y_middle, product)
        product = tl.dot(x_middle, y_high, product)
        product = tl.dot(x_high, y_middle, product)
        if SCORES:
            return tl.fma(tl.dot(x_high, y_high), 1.0, product)  # an addition would become the product's accumulator
        product = tl.dot(x_high, y_high, product)
    else:
        product = tl.dot(x, y, input_precision="ieee")
    return product


@triton.jit
def load_k_tile(x, position, start, length, LAYOUT: tl.constexpr, FULL: tl.constexpr, BLOCK: tl.constexpr):
    """Loads the tile of looped tokens that begins with the `start`-th token, [BLOCK, DP]."""
    return load_tile(x.k, position, x.k_stride, start, length, BLOCK, LAYOUT[0], LAYOUT[1], LAYOUT[2], FULL)


@triton.jit
def score_tile(
    x, k_tile, program, q_position, k_position, k_start,
    LAYOUT: tl.constexpr, PRECISION: tl.constexpr, FULL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Returns the products of the owned tile and a looped tile, [BLOCK_M, BLOCK_N], not scaled.

    With SLICED, both tiles are loaded again, 16 features at a time. This is for wide float32 rows whose products are
    ordinary multiply-adds: a thread would otherwise keep whole rows in registers.
    All kernels multiply in the same order, so that a score is the same number in every phase.
    """
    D: tl.constexpr = LAYOUT[0]
    DP: tl.constexpr = LAYOUT[1]
    ALIGN: tl.constexpr = LAYOUT[2]
    SLICED: tl.constexpr = LAYOUT[3]
    if not SLICED:
        dot = multiply(x.q_tile, tl.trans(k_tile), PRECISION, True)
    else:
        length = program.length
        dot = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for begin in range(0, DP, 16):
            q_slice = load_tile(
                x.q, q_position, x.q_stride, program.start, length, BLOCK_M, D, 16, ALIGN, False, begin
            )  # [BLOCK_M, 16]
            k_slice = load_tile(
                x.k, k_position, x.k_stride, k_start, length, BLOCK_N, D, 16, ALIGN, FULL, begin
            )  # [BLOCK_N, 16]
            dot += multiply(q_slice, tl.trans(k_slice), PRECISION)
    return dot


@triton.jit
def score_tiles(
    t, s, program, q_position, indices, k_start,
    LAYOUT_T: tl.constexpr, LAYOUT_S: tl.constexpr, PRECISION: tl.constexpr, HAS_INDICES: tl.constexpr,
    FULL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Returns the score tiles of teacher and student, each [BLOCK_M, BLOCK_N] and not scaled.

    The student's tile is loaded after the teacher's product. If it were loaded before, `row_kl_kernel` would spill
    registers in float32 on sm_90.
    """
    k_position = token_positions(indices, k_start, program.length, BLOCK_N, HAS_INDICES, FULL)
    k_tile_t = load_k_tile(t, k_position, k_start, program.length, LAYOUT_T, FULL, BLOCK_N)
    dot_t = score_tile(
        t, k_tile_t, program, q_position, k_position, k_start, LAYOUT_T, PRECISION, FULL, BLOCK_M, BLOCK_N
    )
    k_tile_s = load_k_tile(s, k_position, k_start, program.length, LAYOUT_S, FULL, BLOCK_N)
    dot_s = score_tile(
        s, k_tile_s, program, q_position, k_position, k_start, LAYOUT_S, PRECISION, FULL, BLOCK_M, BLOCK_N
    )
    return dot_t, dot_s


@triton.jit
def rows_that_count(
    counted, indices, program, start, positions,
    BLOCK: tl.constexpr, PACKED: tl.constexpr, HAS_INDICES: tl.constexpr, HAS_QUERY_MASK: tl.constexpr,
):  # fmt: skip
    """Returns which of the BLOCK rows from the `start`-th on are rows of the sequence that count, [BLOCK]."""
    counts = start + tl.arange(0, BLOCK) < program.length
    if HAS_QUERY_MASK:
        position = token_positions(indices, start, program.length, BLOCK, HAS_INDICES, False)
        counted += program.first if PACKED else program.sequence.to(tl.int64) * positions
        counts = counts & (tl.load(counted + position, mask=counts, other=0) != 0)
    return counts


@triton.jit
def rows_with_gradient(
    counted, indices, program, start, positions,
    BLOCK: tl.constexpr, PACKED: tl.constexpr, HAS_INDICES: tl.constexpr, HAS_QUERY_MASK: tl.constexpr,
    MASK: tl.constexpr,
):  # fmt: skip
    """Returns which of the BLOCK rows from the `start`-th on count and see another token, [BLOCK].

    A row that sees only itself has p = q = 1: its gradient is exactly 0, not a rounding error.
    """
    first = start + tl.arange(0, BLOCK) == 0
    alone = (program.length == 1) | (first & (program.prefix <= 1) & (MASK != BIDIRECTIONAL))
    counts = rows_that_count(counted, indices, program, start, positions, BLOCK, PACKED, HAS_INDICES, HAS_QUERY_MASK)
    return counts & (alone == 0)


@triton.jit
def rowwise_dot(x, y):
    """Returns x · y of each token, [BLOCK], with the same bits in all threads that hold the token.

    float32 products are rounded before they are added. A product contracted with the first addition across threads
    would be rounded differently in the two threads, and `floor` of the two sums could differ by 1.
    """
    if x.dtype == tl.float32:
        return tl.sum(tl.fma(x, y, 0.0), 1)
    return tl.sum(x.to(tl.float32) * y.to(tl.float32), 1)


@triton.jit
def log_ratio(l_t, l_s):
    """Returns log(l_s / l_t) as 2 artanh(r): near r = 0, where KL is small, the error of log2 would be too large."""
    r = (l_s - l_t) / (l_s + l_t)
    r2 = r * r
    series = 2.0 * r * (1.0 + r2 * (1 / 3 + r2 * (1 / 5 + r2 * (1 / 7))))
    # The logarithm of the quotient is rounded at its own size, but the quotient can overflow.
    quotient = l_s / l_t
    safe = (quotient > 2.0**-120) & (quotient < 2.0**120)
    logs = tl.where(safe, tl.log2(tl.where(safe, quotient, 1.0)), tl.log2(l_s) - tl.log2(l_t))
    return tl.where(r2 < 0.01, series, LN2 * logs)


@triton.jit
def sees(i, j, prefix):
    """Returns whether row i sees key j under a causal or prefix mask."""
    return (j <= i) | (j < prefix)


@triton.jit
def visible_keys(i, k_start, length, prefix, MASK: tl.constexpr, BLOCK_N: tl.constexpr):
    """Returns which keys of the tile at `k_start` each row of i sees: [BLOCK_M, BLOCK_N], or [1, BLOCK_N]."""
    j = (k_start + tl.arange(0, BLOCK_N))[None, :]
    visible = j < length
    if MASK != BIDIRECTIONAL:
        visible = visible & sees(i[:, None], j, prefix)
    return visible


@triton.jit
def key_tiles(start, length, prefix, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASK: tl.constexpr):
    """Returns how many key tiles are full for the BLOCK_M rows from `start` on, and how many these rows have."""
    if MASK == BIDIRECTIONAL:
        return length // BLOCK_N, tl.cdiv(length, BLOCK_N)
    full = tl.minimum(tl.maximum(start + 1, prefix), length)
    end = tl.minimum(tl.maximum(start + BLOCK_M, prefix), length)
    return full // BLOCK_N, tl.cdiv(end, BLOCK_N)


@triton.jit
def partial_sums(x, WIDTH: tl.constexpr):
    """Reduces [M, N] to the partial sums [M, WIDTH]. They are added up once, after the loop.

    In the layout of tensor-core tiles, each of a row's 8 partial sums stays within one thread.
    """
    if WIDTH == 1:
        return tl.sum(x, 1, keep_dims=True)
    return tl.sum(tl.reshape(x, [x.shape[0], x.shape[1] // WIDTH, WIDTH]), 1)
