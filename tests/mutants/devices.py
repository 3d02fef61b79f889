"""Mutants of the GPU kernels. Triton kernels run in Triton's interpreter; CUDA kernels are emulated on the host."""

from . import Mutant

_TRITON = "minilm_kernels/relation/backends/triton/"
_CUDA = "csrc/cuda/device/"

# A part of the contract tests and of the tests of these kernels. The interpreter runs it in a few seconds.
_SOME = "tests/relation/test_contract.py -k 'test_masks and (holes-self or packed-prefix-cross) and (sequence or none)'"
_TILES = "tests/relation/backends/test_triton_kernels.py -k tiles_of_every_kind"
_WIDE = "tests/relation/backends/test_triton_kernels.py -k 'beyond_one_pivot and (holes or causal)'"
_EMULATED = (
    "tests/relation/backends/test_cuda_emulated.py -k "
    "'unordered_pairs or malformed or masks_and_reductions or range_of_norms or beyond_shared or lengths "
    "or nan'"
)
_MEANS = "tests/relation/backends/test_cuda_emulated.py -k common_component_of_both_orders"
_STRIPS = "tests/relation/backends/test_cuda_emulated.py -k 'unordered_pairs or strips'"
_ROWS_AND_GROUPS = (
    "tests/relation/backends/test_cuda_emulated.py -k "
    "'rows_that_count or grouped_keys or range_of_norms or queries_that_do_not_count or several_relations_with'"
)

MUTANTS = [
    Mutant(
        _TRITON + "primitives.py",
        "    return (j <= i) | (j < prefix)",
        "    return (j <= i) | (j <= prefix)",
        _SOME,
        "rows see the first key after the prefix",
    ),
    Mutant(
        _TRITON + "row_stats.py",
        "e_t = tl.where(visible, e_t, 0.0)",
        "e_t = e_t",
        _SOME,
        "keys after a sequence's end count in the teacher's sums",
    ),
    Mutant(
        _TRITON + "primitives.py",
        "full = tl.minimum(tl.maximum(start + 1, prefix), length)",
        "full = tl.minimum(tl.maximum(start + BLOCK_M, prefix), length)",
        _TILES,
        "tiles that cross a causal bound are treated as full ones",
    ),
    Mutant(
        _TRITON + "gradient.py",
        "return (i < prefix).to(tl.float32)[:, None] * k_inv[None, :] + q_inv[:, None]",
        "return k_inv[None, :] + q_inv[:, None]",
        _TILES,
        "gradients of a prefix mask count pairs that are not seen",
    ),
    Mutant(
        _TRITON + "row_stats.py",
        "            l_s = l_s * tl.exp2(own_pivot_s - max_s) + tl.sum(e_s, 1)",
        "            l_s = l_s + tl.sum(e_s, 1)",
        _WIDE,
        "the running maximum does not rescale: sharp relations are wrong",
    ),
    Mutant(
        _TRITON + "row_stats.py",
        "& (max_t - min_t <= _SHARED_PIVOT_RANGE)",
        "& (max_t - min_t <= 100 * _SHARED_PIVOT_RANGE)",
        "tests/relation/backends/test_triton_kernels.py -k one_model_beyond",
        "rows share a pivot although their scores differ too much: sums overflow or underflow",
    ),
    Mutant(
        _TRITON + "row_kl.py",
        "return tl.where(tl.abs(delta) < 0.25, p * series, q - p - p * delta)",
        "return tl.where(tl.abs(delta) < 0.25, q - p - p * delta, p * series)",
        "tests/relation/test_contract.py -k 'single_rows_near'",
        "single rows of small KL are lost in rounding",
    ),
    Mutant(
        _TRITON + "gradient.py",
        "acc *= tl.load(weights + program.sequence)",
        "acc *= tl.load(weights)",
        _SOME,
        "every sequence has the weight of the first",
    ),
    Mutant(
        _TRITON + "launch.py",
        "x.to(dtype) if x.stride(-1) == 1 or x.shape[-1] == 1 else x.to(dtype).contiguous()",
        "x.to(dtype)",
        "tests/relation/backends/test_triton_kernels.py -k side_by_side",
        "tensors whose features are not adjacent are read incorrectly",
    ),
    Mutant(
        _TRITON + "launch.py",
        '"scale_s": self.scale_s * _LOG2_E,',
        '"scale_s": self.scale_s,',
        _SOME,
        "the student's scores are multiplied by the wrong factor",
    ),
    Mutant(
        _CUDA + "symmetric.cuh",
        "if (j >= i || i >= bound) mirror = 0.0f;",
        "if (j >= i || i > bound) mirror = 0.0f;",
        _EMULATED,
        "one row too many sees the keys of the prefix",
    ),
    Mutant(
        _CUDA + "symmetric.cuh",
        "range.high = finite ? fmaxf(range.high, norm) : 3e38f;",
        "range.high = finite ? fmaxf(range.high, norm) : range.high;",
        _EMULATED,
        "a token that is not finite",
        harmless="the other end of the range is infinite as well",
    ),
    Mutant(
        _CUDA + "symmetric.cuh",
        "constexpr float kMaxNormRange = 200.0f;",
        "constexpr float kMaxNormRange = 2000.0f;",
        _EMULATED,
        "sharp relations overflow",
    ),
    Mutant(
        _CUDA + "row_wise.cuh",
        "bool visible = origin.other + column < bound_of(sequence, origin.own + row);",
        "bool visible = origin.other + column <= bound_of(sequence, origin.own + row);",
        _EMULATED,
        "rows see one key too many",
    ),
    Mutant(
        _CUDA + "row_wise.cuh",
        "float key_grad = row < visible_to_other ? other_weight * (q - p) : 0.0f;",
        "float key_grad = row < visible_to_other ? (q - p) : 0.0f;",
        _EMULATED,
        'with reduction="none" the keys\' gradients ignore the upstream gradient',
    ),
    Mutant(
        _CUDA + "symmetric.cuh",
        "l_s = counted ? 1.0f / l_s : 0.0f;",
        "l_s = i < state.sequence.length ? 1.0f / l_s : 0.0f;",
        _ROWS_AND_GROUPS,
        "rows that do not count have a gradient",
    ),
    Mutant(
        _CUDA + "row_wise.cuh",
        "log2_sum[row] = !counts(sequence, first + row) ? -kNegInf : kExact",
        "log2_sum[row] = kExact",
        _ROWS_AND_GROUPS,
        "rows that do not count have a loss",
    ),
    Mutant(
        _CUDA + "row_wise.cuh",
        "weights[i] = !counts(sequence, first + i) ? 0.0f\n                   : given                      ?",
        "weights[i] = given ?",
        _ROWS_AND_GROUPS,
        "a NaN in the upstream gradient of a row that does not count reaches the keys",
    ),
    Mutant(
        _CUDA + "row_wise.cuh",
        "format_s, forward && !is_self(relation), forward",
        "format_s, false, forward",
        _ROWS_AND_GROUPS,
        "a NaN in a query that does not count changes the result",
    ),
    Mutant(
        _CUDA + "row_wise.cuh",
        "load_tokens(own_x_t, sequence, forward ? head : key_head_t, work.first",
        "load_tokens(own_x_t, sequence, forward ? head : key_head_s, work.first",
        _ROWS_AND_GROUPS,
        "the teacher's keys are grouped as the student's are",
    ),
    Mutant(
        _CUDA + "row_wise.cuh",
        "if (first == streamed.first) {",
        "if (first == streamed.first && head == work.head) {",
        _ROWS_AND_GROUPS,
        "all query heads of a group meet the teacher's keys of the first one",
    ),
    Mutant(
        _CUDA + "row_wise.cuh",
        "if (kForward) key_grads[m][half] += key_grad;",
        "if (!kForward) key_grads[m][half] += key_grad;",
        _MEANS,
        "gradients of keys lack their multiple of the mean",
    ),
    Mutant(
        _CUDA + "row_wise.cuh",
        "return fabsf(delta) < 0.25f ? small : large;",
        "return fabsf(delta) < 4.0f ? small : large;",
        _EMULATED,
        "the series is used outside its range",
    ),
    Mutant(
        _CUDA + "sequences.cuh",
        "params.weights[n] = malformed ? as_float(0x7fc00000u) : weight;",
        "params.weights[n] = weight;",
        _EMULATED,
        "malformed cu_seqlens yield a finite loss",
    ),
    Mutant(
        _CUDA + "row_wise.cuh",
        "const float factor = relation.student.scale * weight_of(call, work.n);",
        "const float factor = relation.student.scale;",
        _EMULATED,
        "gradients of cross relations ignore the weights of sequences",
    ),
    Mutant(
        _CUDA + "schedule.cuh",
        "(round > 0 && 2 * round == strips && strip >= round)",
        "(round > 0 && 2 * round == strips && strip > round)",
        _STRIPS,
        "two strips meet twice",
    ),
    Mutant(
        _CUDA + "strips.cuh",
        "i + 8 * n < bound ? 0.5f : 1.0f",
        "0.5f",
        _STRIPS,
        "with a causal mask, pairs of a token with itself count half",
    ),
    Mutant(
        _CUDA + "strips.cuh",
        "factors.word[0] = exists && seen ? 0x3f803f80u : 0u;",
        "factors.word[0] = exists ? 0x3f803f80u : 0u;",
        _STRIPS,
        "gradients count pairs that a causal mask hides",
    ),
    Mutant(
        _CUDA + "strips.cuh",
        "if (j >= length || (kCausal && j > i && j >= bound)) x_t = x_s = 0.0f;",
        "if (kCausal && j > i && j >= bound) x_t = x_s = 0.0f;",
        _STRIPS,
        "tokens beyond the end of a sequence are keys",
    ),
    Mutant(
        _CUDA + "schedule.cuh",
        "  if (a >= rotating) a -= rotating;\n",
        "  if (a >= rotating) a = 0;\n",
        "tests/relation/backends/test_cuda_emulated.py -k 'schedule or unordered_pairs'",
        "some pairs of tiles are never processed",
    ),
    Mutant(
        "csrc/cuda/host/launch_plan.cpp",
        "planes.student_splits == 3 && planes.schedule.strip_rows   ? 32",
        "planes.student_splits == 3 && planes.schedule.strip_rows   ? 8",
        _EMULATED,
        "float32 students write beyond their shared memory",
    ),
]
