"""The CUDA kernels without a GPU: their sources are compiled for the host and run in an emulated thread block.

Runs the contract tests (the longest ones shortened), and tests of these kernels: partial tiles, the range of the
symmetric path, sequences beyond shared memory, the order of warps, and malformed input.
"""

import math
from dataclasses import replace
from functools import partial
from types import FunctionType

import pytest
import torch

from minilm_kernels import relation_kl
from minilm_kernels._choices import REDUCTIONS
from minilm_kernels.relation.api import relation_kl_multi
from minilm_kernels.relation.backends import native
from minilm_kernels.relation.masks import Mask
from tests.relation import test_contract
from tests.relation.cases import MALFORMED, Case, all_nan, check_beside_dense, dense, error, make, malformed
from tests.relation.scaling import check_scaling

from . import cuda

pytestmark = pytest.mark.skipif(cuda.COMPILER is None, reason="no C++ compiler")

_SHORTENED = {"test_4097_tokens", "test_small_divergences", "test_many_short_sequences_among_long_ones"}
_SLOW = {
    "test_dtypes_and_widths",
    "test_equal_models_have_zero_divergence",
    "test_packed_equals_padded",
    "test_padding_never_matters",
    "test_prefix_of_zero_is_causal_and_of_everything_is_bidirectional",
    "test_queries_that_do_not_count_never_matter",
    "test_repeated_runs_are_bitwise_equal",
    "test_rows_and_groups_in_half_precision",
    "test_rows_and_groups_of_any_length",
    "test_self_path_equals_cross_path",
    "test_any_dtype_of_a_query_mask",
}


def _slow(test: FunctionType) -> FunctionType:
    """A copy of a contract test, marked as slow. The original is unchanged."""
    copied = FunctionType(test.__code__, test.__globals__, test.__name__, test.__defaults__, test.__closure__)
    copied.__dict__ |= test.__dict__ | {"pytestmark": list(getattr(test, "pytestmark", []))}
    return pytest.mark.slow(copied)


for _name in dir(test_contract):
    if _name.startswith("test_") and _name not in _SHORTENED:
        _test = getattr(test_contract, _name)
        globals()[_name] = _slow(_test) if _name in _SLOW else _test

_BF16 = torch.bfloat16
_SM_90 = (232448, 233472)  # bytes of shared memory per block and per SM
_CROWDED = (232448, 30000)  # less shared memory per SM: fewer blocks with more warps


@pytest.fixture(scope="module")
def library(made_once):
    return cuda.load(made_once("emulated", cuda.build))


@pytest.fixture
def backend(library, monkeypatch):
    return _use(library, monkeypatch)


def _use(library, monkeypatch) -> str:
    monkeypatch.setattr(native.cuda, "operators", library.operators)
    monkeypatch.setattr(native.cuda, "device_type", "cpu")
    monkeypatch.setattr(native.cuda, "device", lambda _device: (0, 0))
    monkeypatch.setattr(native.cuda, "load_error", None)
    monkeypatch.setattr(native.cuda, "reasons", {})
    library.emulated_set_props(*_CROWDED, 132)
    library.emulated_set_seed(0)
    return "cuda"


@pytest.fixture
def device():
    return "cpu"


def _check(case: Case, reduction: str = "sequence", dtype=torch.float32) -> None:
    """The limit is twice the error of dense PyTorch on an unmasked batch of this distribution, plus one rounding."""
    cross, widths = case.tensors[1] is not None, (case.tensors[0].shape[-1], case.tensors[2].shape[-1])
    spread = case.tensors[0].float().std().item()
    length = min(131, max(23, case.tensors[0].shape[-3]))
    full = make(cross=cross, widths=widths, length=length, spread=spread, dtype=dtype, seed=7)
    rows, grads = dense(full)
    expected_rows, expected_grads = full.oracle("none")
    allowed = 2 * error(rows, expected_rows) + 1.2e-7
    allowed_grad = 2 * max(error(g, e) for g, e in zip(grads, expected_grads, strict=True)) + torch.finfo(dtype).eps
    value, grads = case.run(reduction, "cuda")
    expected, expected_grads = case.oracle(reduction)
    assert error(value, expected) <= allowed
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert error(grad, expected_grad) <= allowed_grad


_LONG = {  # for the symmetric path: sequences and prefixes that end inside and between tiles
    "none": {},
    "causal": {"causal": True},
    "prefix": {"prefix_lens": torch.tensor([77, 131, 8])},
    "prefix-tiles": {"prefix_lens": torch.tensor([64, 96, 32])},
    "holes": {"attention_mask": torch.rand(3, 131, generator=torch.Generator().manual_seed(1)) < 0.8},
    "rows": {"query_mask": torch.arange(131) % 5 < torch.tensor([[2], [0], [5]])},
    "prefix-rows": {"prefix_lens": torch.tensor([77, 131, 8]), "query_mask": torch.arange(131).repeat(3, 1) > 60},
}


@pytest.mark.parametrize("mask", _LONG)
@pytest.mark.parametrize(
    ("widths", "dtype"),
    [
        ((16, 8), torch.bfloat16),
        ((12, 6), torch.bfloat16),
        ((16, 8), torch.float16),
        ((24, 20), torch.float16),
        ((16, 8), torch.float32),
    ],
    ids=str,
)
def test_unordered_pairs(backend, widths, dtype, mask):
    _check(make(_LONG[mask], batch=3, length=131, heads=1, widths=widths, dtype=dtype), dtype=dtype)


@pytest.mark.parametrize(
    ("widths", "dtype"),
    [
        ((1, 1), torch.float32),
        ((64, 32), torch.bfloat16),
        ((8, 128), torch.bfloat16),
        ((8, 8), torch.bfloat16),
        ((16, 16), torch.bfloat16),
        ((64, 32), torch.float16),
    ],
    ids=str,
)
def test_widths_of_unordered_pairs(backend, widths, dtype):
    for mask in ("prefix", "rows"):
        _check(make(_LONG[mask], batch=3, length=131, heads=1, widths=widths, dtype=dtype), dtype=dtype)


@pytest.mark.parametrize("teacher", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("student", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dtypes_of_unordered_pairs(backend, teacher, student):
    """Teachers and students of any dtype. Operands are the same numbers for the kernel and for the oracle."""
    q_t, _, q_s, _ = make(batch=3, length=131, heads=1, widths=(16, 8)).tensors
    case = Case((q_t.to(teacher), None, q_s.to(student), None), dict(_LONG["prefix"]))
    value, (grad,) = case.run("sequence", backend)
    expected, (expected_grad,) = case.oracle("sequence")
    assert error(value, expected) < 1e-6
    # M and the result are rounded once each; in float32, rounding errors of scores are about as large.
    assert error(grad, expected_grad) < torch.finfo(student).eps * (1 if student != torch.float32 else 6)


@pytest.mark.parametrize("spread", [0.02, 0.3, 3.0])
def test_float16_gradients_of_any_size(backend, spread):
    """Gradients far below float16's smallest normal number, 6e-5, keep their bits: the loss is a sum over rows."""
    case = make(batch=2, length=200, heads=1, widths=(16, 8), spread=spread, dtype=torch.float16)
    case.kwargs["student_scale"] = 2.0**10 * 8**-0.5 if spread < 0.1 else 8**-0.5
    _, (grad,) = case.run("sum", backend)
    _, (expected_grad,) = case.oracle("sum")
    assert error(grad, expected_grad) < torch.finfo(torch.float16).eps


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_length_to_600(backend, dtype):
    """All lengths, with prefixes of every kind. Shared memory ends at an inaccessible page."""
    lengths = torch.arange(1, 601)
    case = make(
        {
            "cu_seqlens": torch.cat((torch.zeros(1), lengths.cumsum(0))).int(),
            "max_seqlen": 600,
            "prefix_lens": torch.where(lengths % 3 == 0, lengths // 2, torch.where(lengths % 3 == 1, 0, lengths)),
        },
        widths=(16, 8),
        heads=1,
        dtype=dtype,
    )
    _check_sequences(case, lengths.tolist())


@pytest.mark.slow
@pytest.mark.parametrize("target", [1e-3, 1e-5])
def test_small_divergences(backend, device, target):
    test_contract.test_small_divergences(backend, device, target)


@pytest.mark.parametrize("target", [1e-3, 1e-5])
def test_small_divergences_of_unordered_pairs(backend, target):
    """Scores of teacher and student also differ by a constant, which does not change the softmax."""
    x = make(batch=4, length=96, heads=16, widths=(8, 8)).tensors[0]
    ones = torch.full((4, 96, 16, 1), 3.0)
    student = torch.cat((x + target**0.5 / 2 * torch.randn_like(x), ones), -1)
    case = Case((x, None, student, None), {"student_scale": 8**-0.5})
    value, (grad,) = case.run("token", backend)
    expected, (expected_grad,) = case.oracle("token")
    assert 0.1 * target < expected < 2 * target
    assert abs(value / expected - 1) < 1e-3
    assert error(grad, expected_grad) < 2e-3


def test_errors_of_blocks_cancel_near_zero(backend):
    """The errors of 128 blocks are about 8e-9 each, of either sign. Setting negative blocks to 0 would leave 3e-9."""
    x = make(batch=8, length=64, heads=16, widths=(8, 8)).tensors[0]
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    case = Case((x, None, x + 1e-5 * noise, None), {})
    value, _ = case.run("token", backend)
    assert value >= 0
    assert abs(value - case.oracle("token")[0]) < 2e-9


@pytest.mark.slow
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_many_short_sequences_among_long_ones(backend, reduction):
    lengths = torch.tensor([150, *[3, 1, 0, 17] * 10, 149, 64])
    case = make({"cu_seqlens": torch.cat((torch.zeros(1), lengths.cumsum(0))).int()})
    test_contract._check(case, reduction, backend)


@pytest.mark.parametrize("spread", [0.05, 2.5, 3.5, 5.0, 8.0, 30.0])
def test_any_range_of_norms(backend, spread):
    """Ranges of s_ii from 0 to tens of thousands, on both sides of the limit for one reference score."""
    case = make(batch=2, length=90, heads=2, widths=(8, 8), spread=spread)
    norms = case.tensors[0].square().sum(-1) * 8**-0.5
    ranges = (norms.amax(1) - norms.amin(1)).flatten()
    assert (ranges.max() < 138) == (spread < 5)  # on both sides of the limit
    _check(case)
    _check(make(batch=2, length=90, heads=2, widths=(8, 8), spread=spread, rows=0.3))


@pytest.mark.parametrize("scales", [(-0.3, 0.4), (0.3, -0.4), (0.0, 0.3), (0.3, 0.0)])
def test_scales_of_any_sign(backend, scales):
    for cross in (False, True):
        case = make({"teacher_scale": scales[0], "student_scale": scales[1]}, batch=1, length=80, cross=cross)
        value, grads = case.run("sequence", backend)
        expected, expected_grads = case.oracle("sequence")
        assert error(value, expected) < 1e-6
        for grad, expected_grad in zip(grads, expected_grads, strict=True):
            assert error(grad, expected_grad) < 2e-6


@pytest.mark.parametrize("mask", ["none", "holes", "prefix"])
@pytest.mark.parametrize("reduction", ["sequence", "none"])
def test_sequences_beyond_shared_memory(library, backend, mask, reduction):
    """Blocks hold 64 tokens. Longer sequences take the row-wise path; shorter ones in the same batch do not."""
    library.emulated_set_props(20480, 20480, 132)
    tokens, *_ = cuda.plan(library, "symmetric", (20480, 20480), _PLANES["fp32 (16, 8)"], 131)
    assert tokens == 64
    _check(make(_LONG[mask], batch=3, length=131, heads=1, widths=(16, 8)), reduction)
    if reduction == "sequence":
        lengths = torch.tensor([0, 60, 190, 254, 255])
        _check(make({"cu_seqlens": lengths.int()}, heads=2, widths=(16, 8)))


def _with_feature(x: torch.Tensor, size: float) -> torch.Tensor:
    return torch.cat([x[..., :-1], size + x[..., -1:]], -1)


@pytest.mark.parametrize("groups", [(1, 1), (2, 1), (1, 2)], ids=str)
@pytest.mark.parametrize("size", [0.0, 100.0])
def test_common_component_of_keys(backend, size, groups):
    """A feature of all keys that is 100 times as large as the others, with queries that do or do not share one."""
    q_t, k_t, q_s, k_s = make(batch=1, length=150, heads=2, widths=(16, 8), cross=True, groups=groups).tensors
    queries, keys = ([_with_feature(x, large) for x in pair] for pair, large in (((q_t, q_s), size), ((k_t, k_s), 100)))
    case = Case((queries[0], keys[0], queries[1], keys[1]), {})
    repeated = [key.repeat_interleave(group, 2) for key, group in zip(keys, groups, strict=True)]
    full = Case((queries[0], repeated[0], queries[1], repeated[1]), {})
    eps = torch.finfo(torch.float32).eps
    for reduction in ("sequence", "none"):
        value, grads = case.run(reduction, backend)
        expected, expected_grads = case.oracle(reduction)
        rows, (query_grad, key_grad) = dense(
            full, torch.full_like(full.oracle("none")[0], 1 if reduction == "none" else 1 / 300)
        )
        key_grad = key_grad.unflatten(2, (-1, groups[1])).sum(3)
        plain = rows if reduction == "none" else rows.double().mean()
        assert error(value, expected) <= 2 * error(plain, expected) + eps
        for grad, plain_grad, expected_grad in zip(grads, (query_grad, key_grad), expected_grads, strict=True):
            assert error(grad, expected_grad) <= 2 * error(plain_grad, expected_grad) + eps
    evaluated = relation_kl(*(x.detach() for x in case.tensors), backend=backend)
    assert error(evaluated, case.oracle("sequence")[0]) <= 2 * error(rows.double().mean(), expected.mean()) + eps


@pytest.mark.parametrize("size", [10.0, 100.0])
def test_common_component_without_gradient(backend, size):
    """Rows of a self relation and its evaluation see tokens as keys whose mean is subtracted."""
    q_t, _, q_s, _ = (x if x is None else _with_feature(x, size) for x in make(batch=1, length=150, heads=2).tensors)
    rows = relation_kl(q_t, None, q_s, None, reduction="none", backend=backend)
    expected = relation_kl(q_t.double(), None, q_s.double(), None, reduction="none", backend="reference")
    plain, _ = dense(Case((q_t, None, q_s, None), {}))
    assert error(rows, expected) <= 2 * error(plain, expected) + torch.finfo(torch.float32).eps


_COMMON = {
    "feature of 100": lambda x: _with_feature(x, 100.0),
    "mean of 3": test_contract._large_mean,
    "mean of -40": lambda x: x - 40,
}


@pytest.mark.parametrize("change", _COMMON)
@pytest.mark.parametrize("kind", ["rows", "wide rows", "negative scales", "beyond shared memory"])
def test_common_component_of_both_orders(library, backend, kind, change):
    """One pass computes both orders of a self relation's pairs. Rows have weights of either sign."""
    widths = (64, 32) if kind == "wide rows" else (16, 8)
    scales = {"teacher_scale": -0.25, "student_scale": -0.35} if kind == "negative scales" else {}
    if kind == "beyond shared memory":
        library.emulated_set_props(20480, 20480, 132)
    q_t, _, q_s, _ = (x if x is None else _COMMON[change](x) for x in make(batch=1, length=150, widths=widths).tensors)
    check_beside_dense(Case((q_t, None, q_s, None), scales), "none" if "rows" in kind else "sum", backend)


@pytest.mark.parametrize("mask", [*_LONG, "packed"])
def test_masks_of_tokens_with_a_common_component(backend, mask):
    """Padding, and rows that do not count. The limit is that of `_check`, for tokens with the same feature."""
    packed = {"cu_seqlens": torch.tensor([0, 1, 70, 131]).int(), "causal": True}
    case = make(packed if mask == "packed" else _LONG[mask], batch=3, length=131, heads=1, widths=(16, 8))
    full = make(batch=3, length=131, heads=1, widths=(16, 8), seed=7)
    case, full = (
        replace(one, tensors=tuple(None if x is None else _with_feature(x, 100.0) for x in one.tensors))
        for one in (case, full)
    )
    (rows, (dense_grad,)), (full_rows, (full_grad,)) = dense(full), full.oracle("none")
    value, (grad,) = case.run("none", backend)
    expected, (expected_grad,) = case.oracle("none")
    assert error(value, expected) <= 2 * error(rows, full_rows) + 1.2e-7
    assert error(grad, expected_grad) <= 2 * error(dense_grad, full_grad) + 1.2e-7


@pytest.mark.parametrize(("teacher", "student"), [(torch.float32, _BF16), (_BF16, torch.float32)], ids=str)
def test_common_component_of_one_model(backend, teacher, student):
    """Operands are the same numbers for the kernel and for the oracle. Half-precision scores are truncated sums."""
    q_t, _, q_s, _ = (x if x is None else _with_feature(x, 100.0) for x in make(batch=1, length=150).tensors)
    case = Case((q_t.to(teacher), None, q_s.to(student), None), {})
    value, (grad,) = case.run("none", backend)
    expected, (expected_grad,) = case.oracle("none")
    rows, (dense_grad,) = dense(case.to(torch.float32))
    factor = 2 if teacher == torch.float32 else 4
    assert error(value, expected) <= factor * error(rows, expected)
    assert error(grad, expected_grad) <= factor * error(dense_grad, expected_grad) + torch.finfo(student).eps


def _use_windows(
    library, warps: int, processors: int, widths: tuple[int, int] = (16, 8), dtypes=(_BF16, _BF16)
) -> None:
    """Gives blocks memory for two windows of `warps` strips. More processors get more parts of a head."""
    chunks_t, chunks_s = (-(-width // 8) for width in widths)
    window = warps * (64 if 2 * chunks_t + 6 * chunks_s <= 10 else 32)
    single_t, single_s = (dtype == torch.float32 for dtype in dtypes)
    planes = (3 * chunks_t + 1 if single_t else chunks_t) + (5 * chunks_s + 3 if single_s else chunks_s + 1)
    size = 256 + window * (32 * planes + 32 * chunks_s)
    library.emulated_set_props(size, size + 1024, processors)
    library.emulated_take_segments()


def _check_windows(library, case: Case, reduction: str = "sequence") -> None:
    _check(case, reduction, dtype=case.tensors[2].dtype)
    assert library.emulated_take_segments() == 2


@pytest.mark.parametrize("dtype", [_BF16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("mask", _LONG)
def test_heads_in_windows(library, backend, mask, dtype):
    """Three windows of 64 tokens, each of which is a part."""
    _use_windows(library, 1, 132, dtypes=(dtype, dtype))
    _check_windows(library, make(_LONG[mask], batch=3, length=131, heads=1, widths=(16, 8), dtype=dtype))


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"causal": True}, {"prefix_lens": torch.tensor([10, 200, 128, 0])}], ids=str)
@pytest.mark.parametrize(("warps", "processors"), [(1, 1), (1, 3), (1, 132), (2, 132)])
@pytest.mark.parametrize("dtype", [_BF16, torch.float32], ids=str)
def test_packed_heads_in_windows(library, backend, more, warps, processors, dtype):
    """Sequences that fit into one block are in the same batch."""
    _use_windows(library, warps, processors, dtypes=(dtype, dtype))
    packed = {"cu_seqlens": torch.tensor([0, 60, 430, 558, 559]).int()}
    _check_windows(library, make(packed | more, heads=2, widths=(16, 8), dtype=dtype, rows=0.8), "token")


@pytest.mark.parametrize(
    ("widths", "dtype"),
    [
        ((64, 32), _BF16),
        ((12, 6), _BF16),
        ((16, 16), _BF16),
        ((16, 3), _BF16),
        ((12, 6), torch.float32),
        ((16, 3), torch.float32),
        ((32, 16), torch.float32),
    ],
    ids=str,
)
def test_widths_of_heads_in_windows(library, backend, widths, dtype):
    _use_windows(library, 1 if widths in ((12, 6), (16, 3)) else 2, 132, widths, (dtype, dtype))
    for mask in ("prefix", "rows"):
        _check_windows(library, make(_LONG[mask], batch=3, length=131, heads=2, widths=widths, dtype=dtype))


_MEANS = {
    "large feature": test_contract._large_feature,
    "large mean": test_contract._large_mean,
    "far": lambda x: x - 40,
}


@pytest.mark.parametrize(
    ("teacher", "student"), [(torch.float32, torch.float32), (torch.float32, _BF16), (_BF16, torch.float32)], ids=str
)
@pytest.mark.parametrize("change", _MEANS)
def test_means_of_heads_in_windows(library, backend, change, teacher, student):
    """Tokens with a large common component. They are the same numbers for the kernel, the oracle and dense PyTorch."""
    _use_windows(library, 1, 132, dtypes=(teacher, student))
    q_t, _, q_s, _ = (x if x is None else _MEANS[change](x) for x in make(batch=2, length=201, widths=(16, 8)).tensors)
    case = Case((q_t.to(teacher), None, q_s.to(student), None), {})
    rows, (dense_grad,) = dense(case.to(torch.float32), torch.full(case.row_shape(), 1 / (2 * 201 * q_t.shape[2])))
    value, (grad,) = case.run("sequence", backend)
    expected, (expected_grad,) = case.oracle("sequence")
    # The mean of half-precision tokens is not subtracted.
    eps = torch.finfo(torch.float32).eps * (1 if teacher == student == torch.float32 else 8)
    assert error(value, expected) <= 2 * error(rows.double().mean(), expected) + eps
    assert error(grad, expected_grad) <= 2 * error(dense_grad, expected_grad) + max(eps, torch.finfo(student).eps)
    assert library.emulated_take_segments() == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("warps", "processors", "dtype"),
    [(1, 60, _BF16), (2, 400, _BF16), pytest.param(1, 400, torch.float32, marks=pytest.mark.nightly)],
)
def test_every_length_in_windows(library, backend, warps, processors, dtype):
    """The longest sequences have 3 or 5 parts, and shorter ones down to 1."""
    _use_windows(library, warps, processors, dtypes=(dtype, dtype))
    lengths = torch.arange(65, 400)
    mask = {
        "cu_seqlens": torch.cat((torch.zeros(1), lengths.cumsum(0))).int(),
        "max_seqlen": 400,
        "prefix_lens": torch.where(lengths % 3 == 0, lengths // 2, torch.where(lengths % 3 == 1, 0, lengths)),
    }
    _check_sequences(make(mask, widths=(16, 8), heads=1, dtype=dtype), lengths.tolist())


def _check_sequences(case: Case, lengths: list[int]) -> None:
    """Compares the gradient of every packed sequence with float64, as the contract does, beside `torch` in float32."""
    value, (grad,) = case.run("sum", "cuda")  # a mean over all sequences would underflow in float16
    expected, (expected_grad,) = case.to(torch.float64).run("sum", "torch")
    _, (float_grad,) = case.to(torch.float32).run("sum", "torch")
    assert abs(value / expected - 1) < 1e-5
    pieces = (x.split(lengths) for x in (grad, expected_grad, float_grad))
    for length, piece, expected_piece, float_piece in zip(lengths, *pieces, strict=True):
        # That of 3 tokens cancels most.
        allowed = 2 * error(float_piece, expected_piece) + torch.finfo(case.tensors[0].dtype).eps
        assert length == 1 or error(piece, expected_piece) < allowed, f"length {length}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mask", "dtype"),
    [
        ({}, _BF16),
        ({"prefix_lens": torch.tensor([2500])}, _BF16),
        pytest.param({"prefix_lens": torch.tensor([2500])}, torch.float32, marks=pytest.mark.nightly),
    ],
    ids=["none", "prefix", "float32 prefix"],
)
def test_4097_tokens_in_windows(library, backend, mask, dtype):
    """Nine windows of 512 tokens, or 22 of 192, in five parts, with the shared memory of sm_90."""
    library.emulated_set_props(*_SM_90, 1)
    holes = torch.ones(1, 4200, dtype=torch.bool)
    holes[0, 1000:1103] = False
    library.emulated_take_segments()
    _check_windows(
        library, make(mask | {"attention_mask": holes}, batch=1, length=4200, heads=1, widths=(16, 8), dtype=dtype)
    )


@pytest.mark.parametrize("dtype", [_BF16, torch.float32], ids=str)
def test_windows_of_heads_with_any_range(library, backend, dtype):
    """Heads whose s_ii range too widely for one reference take the row-wise path, others of the call do not."""
    _use_windows(library, 1, 132, dtypes=(dtype, dtype))
    case = make(batch=1, length=150, heads=3, widths=(16, 8), dtype=dtype)
    wide = torch.tensor([1.0, 8.0, 1.0])[:, None]
    for teacher, student in ((wide, 1), (1, wide), (wide, wide)):
        x, _, y, _ = case.tensors
        mixed = Case(((x * teacher).to(dtype), None, (y * student).to(dtype), None), {})
        value, (grad,) = mixed.run("sequence", backend)
        expected, (expected_grad,) = mixed.oracle("sequence")
        assert error(value, expected) < 1e-5
        for head in range(3):
            assert error(grad[:, :, head], expected_grad[:, :, head]) < (6e-3 if dtype == _BF16 else 2e-5)


@pytest.mark.parametrize("dtype", [_BF16, torch.float32], ids=str)
@pytest.mark.parametrize("payload", [math.nan, math.inf])
def test_nan_in_a_window_propagates(library, backend, payload, dtype):
    _use_windows(library, 1, 132, dtypes=(dtype, dtype))
    case = make(batch=2, length=140, heads=1, widths=(16, 8), dtype=dtype)
    case.tensors[2].data[0, 100, 0, 3] = payload
    value, (grad,) = case.run("sum", backend)
    assert value.isnan()
    assert grad[0].isnan().any()
    assert grad[1].isfinite().all()


@pytest.mark.parametrize("target", [1e-3, 1e-5])
def test_small_divergences_of_windows(library, backend, target):
    _use_windows(library, 2, 132, (16, 16))
    x = make(batch=2, length=200, heads=8, widths=(16, 16), dtype=_BF16).tensors[0]
    changed = torch.rand(x.shape, generator=torch.Generator().manual_seed(3)) < 1000 * target
    case = Case((x, None, torch.where(changed, x * (1 + 2**-6), x), None), {})
    value, _ = case.run("token", backend)
    expected, _ = case.oracle("token")
    assert 0.1 * target < expected < 10 * target
    assert abs(value / expected - 1) < 1e-3


@pytest.mark.parametrize("mask", [{}, {"prefix_lens": torch.tensor([100])}], ids=["none", "prefix"])
def test_windows_in_any_order_of_warps(library, backend, mask):
    _use_windows(library, 2, 132)
    case = make(mask, batch=1, length=270, heads=1, widths=(16, 8), dtype=_BF16)
    results = []
    for seed in range(4):
        library.emulated_set_seed(seed * 0x9E3779B97F4A7C15)
        results.append(case.run("sequence", backend))
    assert library.emulated_take_segments() == 8
    for value, (grad,) in results[1:]:
        assert torch.equal(value, results[0][0])
        assert torch.equal(grad, results[0][1][0])


@pytest.fixture(scope="module")
def watched_library(made_once):
    return cuda.load(made_once("races", partial(cuda.build, races=True)), races=True)


@pytest.fixture
def watched(watched_library, monkeypatch):
    """The library with the race check."""
    _use(watched_library, monkeypatch)
    assert cuda.take_races(watched_library) == []
    yield watched_library
    watched_library.emulated_ignore_barrier(b"", 0)
    cuda.take_races(watched_library)


@pytest.mark.slow
@pytest.mark.parametrize(("widths", "dtype"), [
    ((16, 8), _BF16), ((8, 8), _BF16), ((16, 16), _BF16), ((64, 32), _BF16), ((8, 56), _BF16),
    ((16, 8), torch.float16), ((7, 5), torch.float32),
], ids=str)  # fmt: skip
def test_no_instance_has_a_race(watched, widths, dtype):
    """No two warps touch one address between two barriers, and no two blocks, if one of them writes."""
    for mask in ("none", "prefix-rows", "holes"):
        for reduction in ("sequence", "none"):
            for cross in (False, True):
                case = make(_LONG[mask], batch=3, length=131, heads=1, widths=widths, dtype=dtype, cross=cross)
                case.run(reduction, "cuda")
                assert cuda.take_races(watched) == []
    with torch.no_grad():
        relation_kl_multi({"q": case.tensors[0]}, {"q": case.tensors[2]}, [("q", "q")], backend="cuda")
    make(batch=1, length=100, heads=1, widths=widths, dtype=dtype, spread=9.0).run("sequence", "cuda")
    assert cuda.take_races(watched) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("widths", "dtype"), [((16, 8), _BF16), ((16, 16), _BF16), ((64, 32), _BF16), ((16, 8), torch.float32)], ids=str
)
def test_windows_have_no_race(watched, widths, dtype):
    for warps, processors in ((2, 132), (2, 1), (3, 132)):
        _use_windows(watched, warps, processors, widths, (dtype, dtype))
        for mask in ({}, {"prefix_lens": torch.tensor([300])}):
            make(mask, batch=1, length=450, heads=1, widths=widths, dtype=dtype, rows=0.7).run("sequence", "cuda")
            assert cuda.take_races(watched) == []
            assert watched.emulated_take_segments() == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "dtype", "harmless"),
    [("symmetric", _BF16, {3, 7, 17, 18}), ("segments", _BF16, {16}), ("segments", torch.float32, {24})],
    ids=str,
)
def test_a_missing_barrier_is_a_race(watched, kernel, dtype, harmless):
    """The harmless barriers have nothing to order: another one follows or precedes them."""
    if kernel == "segments":
        _use_windows(watched, 2, 132, dtypes=(dtype, dtype))
    case = make({"prefix_lens": torch.tensor([150])}, batch=1, length=260, heads=1, widths=(16, 8), dtype=dtype)
    name = f"{kernel}_{'5_2_5_1_1' if dtype == torch.float32 else '1_2_1_1_1'}".encode()
    watched.emulated_ignore_barrier(name, 0)
    case.run("sequence", "cuda")
    barriers = watched.emulated_ignore_barrier(name, 0)
    missed = set()
    for barrier in range(1, barriers + 1):
        watched.emulated_ignore_barrier(name, barrier)
        case.run("sequence", "cuda")
        if not cuda.take_races(watched):
            missed.add(barrier)
    assert barriers > 15
    assert missed <= harmless


def test_too_little_shared_memory_is_refused(library, backend):
    library.emulated_set_props(8192, 8192, 132)
    with pytest.raises(RuntimeError, match="bytes of shared memory, but a block of this GPU has 8192"):
        make(widths=(128, 128)).run("sum", backend)


@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
def test_the_order_of_warps_does_not_matter(library, backend, cross):
    """Results are bitwise equal; a missing barrier would change them."""
    assert cuda.plan(library, "symmetric", _CROWDED, _PLANES["bf16 (16, 8)"], 131)[1] == 3
    mask, groups = (_LONG["prefix-rows"], (1, 2)) if cross else (_LONG["prefix"], (1, 1))
    case = make(mask, batch=3, length=131, heads=2, widths=(16, 8), dtype=torch.bfloat16, cross=cross, groups=groups)
    wide = make(batch=1, length=100, heads=1, spread=6.0, cross=cross)
    for some in (case, wide):
        library.emulated_set_seed(0)
        value, grads = some.run("sequence", backend)
        for seed in (1, 2, 3, 4, 5):
            library.emulated_set_seed(seed * 0x9E3779B97F4A7C15)
            again, again_grads = some.run("sequence", backend)
            assert torch.equal(again, value)
            assert all(torch.equal(a, g) for a, g in zip(again_grads, grads, strict=True))


def test_all_relations_in_one_call(backend):
    """Self relations and cross relations of several widths and dtypes, more than one launch can process."""
    draw = torch.Generator().manual_seed(2)
    names = (("q", 8, torch.bfloat16), ("k", 8, torch.float32), ("v", 12, torch.float16))
    teacher = {name: torch.randn(2, 70, 2, width, generator=draw).to(dtype) for name, width, dtype in names}
    student = {name: torch.randn(2, 70, 2, width // 2, generator=draw) for name, width, _ in names}
    leaves = {name: x.requires_grad_() for name, x in student.items()}
    pairs = [("q", "k"), ("v", "v"), ("q", "q"), ("k", "k")] * 5
    together = relation_kl_multi(teacher, leaves, pairs, backend=backend)
    doubles = {n: x.double() for n, x in teacher.items()}
    expected = relation_kl_multi(doubles, {n: x.double() for n, x in leaves.items()}, pairs, backend="reference")
    torch.testing.assert_close(together.double(), expected, rtol=1e-6, atol=0)
    weights = torch.arange(1.0, 21.0)
    grads = torch.autograd.grad(together @ weights, list(leaves.values()))
    expected_grads = torch.autograd.grad(expected @ weights.double(), list(leaves.values()))
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert error(grad, expected_grad) < 2e-6


@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
def test_nan_in_a_valid_token_propagates(backend, cross):
    for length in (20, 100):
        for payload in (math.nan, math.inf):
            case = make(batch=2, length=length, heads=1, cross=cross)
            case.tensors[2].data[0, length // 2, 0, 3] = payload
            value, grads = case.run("sum", backend)
            assert value.isnan()
            for grad in grads:
                assert grad[0].isnan().any()
                assert grad[1].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 4), (1,), (7,), (3, 680), (5, 3, 137)], ids=str)
def test_scaling_of_gradients(backend, shape):
    """The bits of PyTorch's operators, for sizes around a block's, float16 overflow and subnormal numbers."""
    for upstream in (torch.tensor(0.7), torch.tensor([1.0, -2.0, 0.3]), torch.tensor(3.0).expand(3)):
        check_scaling(native.cuda, shape, upstream)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_packings_give_nan(backend, monkeypatch, kind, cross, reduction):
    """The host does not validate cu_seqlens on a GPU."""
    monkeypatch.setattr(Mask, "check_packing", lambda self: None)
    assert all_nan(malformed(kind, cross), reduction, backend)
    assert all_nan(malformed(kind, cross, dtype=torch.bfloat16), reduction, backend)


@pytest.mark.slow
def test_half_precision_is_read_exactly(backend):
    """Numbers of all magnitudes, also subnormal ones: students of width 1, whose second token makes the product 1."""
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.arange(-(2**15), 2**15, 151).to(torch.int16).view(dtype)
        x = x[x.isfinite() & (x != 0) & (x.abs() < 1e5)]
        other = torch.exp2(-x.double().abs().log2().floor()).clamp(2**-14, 2**15).to(dtype)
        pairs = torch.stack((x, other))[None, :, :, None]  # (1, 2, n, 1)
        teacher = torch.zeros_like(pairs)
        rows, expected = (
            relation_kl(teacher.to(to), None, pairs.to(to), None, reduction="none", backend=name, student_scale=1.0)
            for to, name in ((dtype, backend), (torch.float64, "reference"))
        )
        torch.testing.assert_close(rows[..., 0].double(), expected[..., 0], rtol=1e-5, atol=1e-9)


def test_strips_meet_once(library):
    """Any two strips meet once, and no strip lends its columns twice in a round."""
    for strips in (*range(1, 20), 41):
        met = set()
        for round_ in range(strips // 2 + 1):
            others = [library.emulated_partner(strips, strip, round_) for strip in range(strips + 3)]
            assert set(others[strips:]) == {-1}
            lent = [other for other in others if other >= 0]
            assert len(lent) == len(set(lent))
            met |= {frozenset((strip, other)) for strip, other in enumerate(others) if other >= 0}
            assert round_ or met == {frozenset((strip,)) for strip in range(strips)}
        assert len(met) == strips * (strips + 1) // 2


def test_the_schedule_visits_each_pair_once(library):
    """Any two tiles are combined once, and no tile occurs twice in a round, for up to 600 tokens and some more."""
    import ctypes

    out = (ctypes.c_int * 2)()
    for tiles in (*range(1, 20), 31, 32, 64, 73):
        visited = set()
        for round_ in range(-1, library.emulated_rounds(tiles)):
            busy = set()
            for pair in range(library.emulated_pairs(tiles, round_)):
                library.emulated_tile_pair(tiles, round_, pair, out)
                row, column = out
                if row < 0:
                    continue
                assert 0 <= column <= row < tiles
                assert (row == column) == (round_ < 0)
                assert not busy & {row, column}
                busy |= {row, column}
                assert (row, column) not in visited
                visited.add((row, column))
        assert len(visited) == tiles * (tiles + 1) // 2


_DEVICES = {"sm_80": (166912, 167936), "sm_90": _SM_90, "sm_120": (101376, 102400)}
_PLANES = {  # teacher, student, chunks and splits of the student, rows of a strip, most warps
    "bf16 (16, 8)": (2, 1, 1, 1, 64, 16),
    "bf16 (64, 32)": (8, 4, 4, 1, 32, 8),
    "fp32 (16, 8)": (7, 6, 1, 3, 64, 8),
}


@pytest.mark.parametrize(
    ("device", "planes", "longest", "expected"),
    [
        ("sm_80", "bf16 (16, 8)", 128, (128, 2, 8, 12544)),
        ("sm_80", "bf16 (16, 8)", 512, (512, 8, 2, 49408)),
        ("sm_80", "bf16 (16, 8)", 1024, (1024, 16, 1, 98560)),
        ("sm_80", "bf16 (16, 8)", 4096, (1728, 14, 1, 166144)),
        ("sm_80", "fp32 (16, 8)", 1024, (576, 5, 1, 156928)),
        ("sm_90", "bf16 (16, 8)", 20, (64, 1, 16, 6400)),
        ("sm_90", "bf16 (16, 8)", 128, (128, 1, 16, 12544)),
        ("sm_90", "bf16 (16, 8)", 512, (512, 4, 4, 49408)),
        ("sm_90", "bf16 (16, 8)", 1024, (1024, 8, 2, 98560)),
        ("sm_90", "bf16 (16, 8)", 2048, (2048, 16, 1, 196864)),
        ("sm_90", "bf16 (64, 32)", 512, (512, 8, 1, 172288)),
        ("sm_90", "fp32 (16, 8)", 512, (512, 8, 1, 139520)),
        ("sm_120", "bf16 (16, 8)", 128, (128, 2, 6, 12544)),
        ("sm_120", "bf16 (16, 8)", 512, (512, 4, 2, 49408)),
        ("sm_120", "bf16 (16, 8)", 4096, (1024, 8, 1, 98560)),
        ("sm_120", "bf16 (64, 32)", 512, (288, 5, 1, 97024)),
    ],
)
def test_plan_of_symmetric_blocks(library, device, planes, longest, expected):
    """expected: (tokens, warps, blocks per SM, bytes)."""
    given = _PLANES[planes]
    given = (*given[:5], min(given[5], 12)) if device == "sm_120" else given  # its kernels take more registers
    assert tuple(cuda.plan(library, "symmetric", _DEVICES[device], given, longest)) == expected


@pytest.mark.parametrize(
    ("device", "planes", "warps_of_a_kernel", "expected"),
    [
        ("sm_80", "bf16 (16, 8)", 16, (512, 8, 2, 82176)),
        ("sm_90", "bf16 (16, 8)", 16, (512, 8, 2, 82176)),
        ("sm_90", "bf16 (16, 8)", 12, (384, 6, 2, 61696)),  # float16
        ("sm_120", "bf16 (16, 8)", 12, (192, 3, 3, 30976)),
        ("sm_90", "bf16 (64, 32)", 8, (128, 4, 2, 69888)),
        ("sm_120", "bf16 (64, 32)", 8, (128, 4, 1, 69888)),
        ("sm_80", "fp32 (16, 8)", 8, (256, 4, 1, 131328)),
        ("sm_90", "fp32 (16, 8)", 8, (192, 3, 2, 98560)),
        ("sm_120", "fp32 (16, 8)", 8, (192, 3, 1, 98560)),
    ],
)
def test_plan_of_windows(library, device, planes, warps_of_a_kernel, expected):
    """expected: (tokens of a window, warps, blocks per SM, bytes)."""
    given = (*_PLANES[planes][:5], warps_of_a_kernel)
    assert tuple(cuda.plan(library, "segments", _DEVICES[device], given, 0)) == expected


def test_parts_of_long_heads(library):
    """Two waves of two blocks per SM, with an odd number of parts, of which each has a window."""
    assert [library.emulated_plan_parts(132, heads, 32) for heads in (1, 12, 36, 48, 144, 176, 527, 528, 4608)] == [
        15, 15, 15, 11, 5, 3, 3, 1, 1,
    ]  # fmt: skip
    assert [library.emulated_plan_parts(132, 1, windows) for windows in (1, 2, 3, 4, 5, 6)] == [1, 1, 3, 3, 5, 5]


@pytest.mark.parametrize("device", _DEVICES)
def test_plans_fit_their_device(library, device):
    block, processor = _DEVICES[device]
    for splits_t in (1, 2, 3):
        for splits_s in (1, 2, 3):
            for chunks_t in (1, 2, 4, 8, 16):
                for chunks_s in (1, 2, 4, 8, 16):
                    strips = 2 * chunks_t + 6 * chunks_s <= 10 and splits_t == splits_s == 1
                    schedule = (64, 16) if strips else (0, {1: 12, 2: 12, 3: 8}[splits_s])
                    planes = (chunks_t * splits_t, chunks_s * splits_s, chunks_s, splits_s, *schedule)
                    for longest in (1, 33, 512, 5000):
                        tokens, warps, blocks, size = cuda.plan(
                            library, "symmetric", (block, processor), planes, longest
                        )
                        if tokens == 0:
                            assert device == "sm_120"
                            continue
                        unit = max(32, schedule[0])
                        assert tokens % unit == 0
                        assert tokens <= (longest + unit - 1) // unit * unit
                        assert size <= block
                        assert blocks * (size + 1024) <= processor
                        assert 1 <= warps * blocks <= schedule[1]
                    offsets = (planes[0] + (splits_t == 3), planes[1] + (splits_s == 3), *planes[2:])
                    warps, others, size, _ = cuda.plan(library, "row_wise", (block, processor), offsets, 1)
                    assert size <= block
                    # Only width 128 in both models does not fit, in float32 and another dtype than bfloat16.
                    large = max(offsets[:2]) == 49 and min(offsets[:2]) >= 32
                    assert (warps == 0) == (device == "sm_120" and large)
                    assert warps == 0 or others % 32 == 0
