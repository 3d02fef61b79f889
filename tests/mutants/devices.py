"""Mutants of the GPU kernels: Triton's run in its interpreter, CUDA's are compiled for the host and emulated."""

from . import Mutant

_TRITON = "minilm_kernels/relation/backends/triton/kernels.py"
_BACKEND = "minilm_kernels/relation/backends/triton/launch.py"
_CUDA = "csrc/cuda/device/"

# A part of the contract that takes the interpreter a few seconds, and of what is particular to these kernels.
_SOME = "tests/relation/test_contract.py -k 'test_masks and (holes-self or packed-prefix-cross) and (sequence or none)'"
_TILES = "tests/relation/backends/test_triton_kernels.py -k tiles_of_every_kind"
_WIDE = "tests/relation/backends/test_triton_kernels.py -k 'beyond_one_base and (holes or causal)'"
_EMULATED = (
    "tests/relation/backends/test_cuda_emulated.py -k "
    "'unordered_pairs or malformed or bounds or masks_and_reductions or range_of_norms or beyond_shared or lengths "
    "or nan'"
)

MUTANTS = [
    Mutant(
        _TRITON,
        "    return (j <= i) | (j < prefix)",
        "    return (j <= i) | (j <= prefix)",
        _SOME,
        "rows see the first key behind the prefix",
    ),
    Mutant(
        _TRITON,
        "e_t = tl.where(sees, tl.exp2(u_t), 0.0)",
        "e_t = tl.exp2(u_t)",
        _SOME,
        "keys behind a sequence's end count in the teacher's sums",
    ),
    Mutant(
        _TRITON,
        "whole = tl.minimum(tl.maximum(start + 1, prefix), length)",
        "whole = tl.minimum(tl.maximum(start + BLOCK_M, prefix), length)",
        _TILES,
        "tiles that cross a causal bound are taken for whole ones",
    ),
    Mutant(
        _TRITON,
        "return (i < prefix).to(tl.float32)[:, None] * other[None, :] + own[:, None]",
        "return other[None, :] + own[:, None]",
        _TILES,
        "gradients of a prefix mask count pairs that are not seen",
    ),
    Mutant(
        _TRITON,
        "            l_s = l_s * tl.exp2(ref_s - max_s) + tl.sum(e_s, 1)",
        "            l_s = l_s + tl.sum(e_s, 1)",
        _WIDE,
        "the online maximum does not rescale: sharp relations are wrong",
    ),
    Mutant(
        _TRITON,
        "& (most_t - least_t <= _RANGE)",
        "& (most_t - least_t <= 100 * _RANGE)",
        "tests/relation/test_triton_kernels.py -k one_model_beyond",
        "one base where none serves: sums overflow or vanish",
    ),
    Mutant(
        _TRITON,
        "return tl.where(tl.abs(delta) < 0.25, p * series, q - p - p * delta)",
        "return tl.where(tl.abs(delta) < 0.25, q - p - p * delta, p * series)",
        "tests/relation/test_contract.py -k 'single_rows_near'",
        "single rows of small KL are lost in rounding",
    ),
    Mutant(
        _TRITON,
        "factor = tl.load(link + 3) if ROWS else tl.load(weights + sequence)",
        "factor = tl.load(link + 3) if ROWS else tl.load(weights)",
        _SOME,
        "every sequence has the weight of the first",
    ),
    Mutant(
        _BACKEND,
        "x.to(dtype) if x.stride(-1) == 1 or x.shape[-1] == 1 else x.to(dtype).contiguous()",
        "x.to(dtype)",
        "tests/relation/backends/test_triton_kernels.py -k side_by_side",
        "tensors whose features do not lie side by side are read wrongly",
    ),
    Mutant(
        _BACKEND,
        '"scale_s": self.scale_s * _LOG2_E,',
        '"scale_s": self.scale_s,',
        _SOME,
        "the student's relation has another temperature",
    ),
    Mutant(
        _CUDA + "fused.cuh",
        "if (j >= i || i >= bound) mirror = 0.0f;",
        "if (j >= i || i > bound) mirror = 0.0f;",
        _EMULATED,
        "one row too many is seen through a prefix",
    ),
    Mutant(
        _CUDA + "fused.cuh",
        "range.high = finite ? fmaxf(range.high, norm) : 3e38f;",
        "range.high = finite ? fmaxf(range.high, norm) : range.high;",
        _EMULATED,
        "a token that is not finite",
        harmless="the other end of the range says so as well",
    ),
    Mutant(
        _CUDA + "fused.cuh",
        "constexpr float kWidestRange = 200.0f;",
        "constexpr float kWidestRange = 2000.0f;",
        _EMULATED,
        "sharp relations overflow",
    ),
    Mutant(
        _CUDA + "visit.cuh",
        "bool visible = place.other + column < bound_of(sequence, place.own + row);",
        "bool visible = place.other + column <= bound_of(sequence, place.own + row);",
        _EMULATED,
        "rows see one key too many",
    ),
    Mutant(
        _CUDA + "visit.cuh",
        "excess += row < visible_to_other ? other_weight * (q - p) : 0.0f;",
        "excess += row < visible_to_other ? (q - p) : 0.0f;",
        _EMULATED,
        'with reduction="none" the keys\' gradients ignore the upstream gradient',
    ),
    Mutant(
        _CUDA + "visit.cuh",
        "return fabsf(delta) < 0.25f ? small : large;",
        "return fabsf(delta) < 4.0f ? small : large;",
        _EMULATED,
        "the series is used where it no longer holds",
    ),
    Mutant(
        _CUDA + "rows.cuh",
        "broken > 0.0 ? as_float(0x7fc00000u) : static_cast<float>(value)",
        "static_cast<float>(value)",
        _EMULATED,
        "malformed cu_seqlens give a number",
    ),
    Mutant(
        _CUDA + "rows.cuh",
        "const float factor = relation.student.scale * (call.weights ? call.weights[task.n] : 1.0f);",
        "const float factor = relation.student.scale;",
        _EMULATED,
        "gradients of cross relations are those of the sum",
    ),
    Mutant(
        _CUDA + "schedule.h",
        "  if (a >= moving) a -= moving;\n",
        "  if (a >= moving) a = 0;\n",
        "tests/relation/backends/test_cuda_emulated.py -k 'schedule or unordered_pairs'",
        "some pairs of tiles are never visited",
    ),
    Mutant(
        "csrc/cuda/host/plan.cpp",
        "token += planes.student_pieces == 3 ? 16 : 8;",
        "token += 8;",
        _EMULATED,
        "float32 students write beyond their shared memory",
    ),
]
