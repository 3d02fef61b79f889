"""The emulated CUDA kernels of compute capability 10.0: packed float32 arithmetic, and exponentials by polynomials."""

import ctypes
from functools import partial

import numpy as np
import pytest
import torch

from tests.relation import test_contract
from tests.relation.cases import Case, error, make

from . import cuda, test_cuda_emulated
from .test_cuda_emulated import _LONG, _check, _check_sequences, _check_windows, _use, _use_windows, device  # noqa: F401

pytestmark = [pytest.mark.skipif(cuda.COMPILER is None, reason="no C++ compiler"), pytest.mark.slow]

# The same tests with the kernels of this capability.
for _module, _names in (
    (test_contract, ("test_masks_and_reductions", "test_strided_views", "test_nothing_to_compare", "test_scales")),
    (test_cuda_emulated, ("test_widths_of_unordered_pairs", "test_any_range_of_norms", "test_heads_in_windows")),
    (test_cuda_emulated, ("test_dtypes_of_unordered_pairs", "test_windows_in_any_order_of_warps")),
):
    for _name in _names:
        globals()[_name] = getattr(_module, _name)


@pytest.fixture(scope="module")
def library(made_once):
    return cuda.load(made_once("emulated-100", partial(cuda.build, capability=100)), capability=100)


@pytest.fixture
def backend(library, monkeypatch):
    return _use(library, monkeypatch)


def _exp2(library, u: np.ndarray) -> np.ndarray:
    result = np.ascontiguousarray(u, np.float32).copy()
    assert result.size % 2 == 0
    function = library.emulated_exp2_polynomial
    function.argtypes = (ctypes.c_void_p, ctypes.c_int64)
    function(result.ctypes.data, result.size)
    return result


def test_polynomial_is_as_exact_as_ex2(library):
    """Relative to p, the last rounding errs by 2^-24 at most, the one before it by 2^-26, the polynomial by 3e-9."""
    generator = np.random.default_rng(0)
    u = generator.uniform(-125.5, 127.0, 1 << 20).astype(np.float32)
    u[: 1 << 19] = generator.uniform(-2.0, 2.0, 1 << 19)
    relative = _exp2(library, u) / np.exp2(u.astype(np.float64)) - 1
    assert np.abs(relative).max() < 1.4 * 2.0**-24
    # Models whose scores have other fractions see other errors: the mean of an interval is an error of the loss.
    fractions = np.linspace(-0.5, 0.5, 1 << 20).astype(np.float32)
    relative = _exp2(library, fractions) / np.exp2(fractions.astype(np.float64)) - 1
    for part in np.split(relative, 64):
        assert abs(part.mean()) < 6e-9


def test_polynomial_at_its_ends(library):
    integers = np.arange(-126, 128)
    assert np.array_equal(_exp2(library, integers), np.ldexp(1.0, integers))
    below = np.array([-127.0, -127.5, -200.0, -1e10, -3e38, -np.inf], np.float32)
    assert np.array_equal(_exp2(library, below), np.zeros_like(below))
    between = np.linspace(-127.0, -126.0, 1000).astype(np.float32)
    assert (_exp2(library, between) >= 0).all()
    assert (_exp2(library, between) <= 2.0**-126).all()


@pytest.mark.parametrize("mask", _LONG)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_unordered_pairs(backend, dtype, mask):
    _check(make(_LONG[mask], batch=3, length=131, heads=1, widths=(16, 8), dtype=dtype), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_lengths(backend, dtype):
    """Every end of a strip and of a tile, with prefixes of every kind."""
    lengths = torch.arange(60, 200, 3)
    mask = {
        "cu_seqlens": torch.cat((torch.zeros(1), lengths.cumsum(0))).int(),
        "max_seqlen": 200,
        "prefix_lens": torch.where(lengths % 2 == 0, lengths // 2, torch.where(lengths % 3 == 1, 0, lengths)),
    }
    _check_sequences(make(mask, widths=(16, 8), heads=1, dtype=dtype), lengths.tolist())


def test_causal_windows(library, backend):
    _use_windows(library, 2, 132)
    _check_windows(library, make({"causal": True}, batch=1, length=300, heads=1, widths=(16, 8), dtype=torch.bfloat16))


@pytest.mark.parametrize("kwargs", [{}, {"causal": True}], ids=["none", "causal"])
def test_equal_models(backend, kwargs):
    """Both models round alike."""
    case = make(kwargs, batch=2, length=200, heads=2, widths=(16, 8), dtype=torch.bfloat16)
    x = case.tensors[2].detach()
    value, _ = Case((x, None, x.clone(), None), kwargs).run("token", backend)
    assert 0 <= value < 1e-9


@pytest.mark.parametrize("kwargs", [{}, {"prefix_lens": torch.tensor([100, 131])}], ids=["none", "prefix"])
def test_tokens_of_one_direction(backend, kwargs):
    """Scores between -2 s_ii and s_ii, on both sides of 2^-126 of the largest exponential."""
    case = make(kwargs, batch=2, length=131, heads=1, widths=(16, 8), dtype=torch.float16)
    x, _, y, _ = case.tensors
    sign = torch.where(torch.arange(131) % 2 == 0, 1.0, -1.0)[:, None, None]
    wide = Case(tuple(z if z is None else (10 * sign + 0.1 * z).half() for z in (x, None, y, None)), kwargs)
    value, (grad,) = wide.run("token", backend)
    expected, (expected_grad,) = wide.oracle("token")
    assert error(value, expected) < 1e-4
    assert error(grad, expected_grad) < 2e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("target", "changed", "step"), [(1e-5, 0.17, 2**-6), (5e-4, 0.2, 2**-4)])
def test_small_divergences(backend, dtype, target, changed, step):
    """6 144 rows, some of whose features differ."""
    for seed in range(2):
        x = make(batch=4, length=96, heads=16, widths=(8, 8), dtype=dtype, seed=seed).tensors[0]
        where = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) < changed
        case = Case((x, None, torch.where(where, x * (1 + step), x), None), {})
        value, _ = case.run("token", backend)
        expected, _ = case.oracle("token")
        assert 0.5 * target < expected < 2 * target
        assert abs(value / expected - 1) < 1e-3 / 3
