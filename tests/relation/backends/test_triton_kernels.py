"""Cases that only the Triton kernels distinguish, on a GPU or in the interpreter (see test_triton.py)."""

import math

import pytest
import torch

from minilm_kernels import MiniLMv2Loss, backend_status, relation_kl
from minilm_kernels.losses import QKV
from minilm_kernels.relation.api import relation_kl_multi
from minilm_kernels.relation.backends.triton import launch as triton_backend
from minilm_kernels.relation.inputs import RelationInputs
from minilm_kernels.relation.masks import Mask
from tests.relation.cases import MALFORMED, MASKS, Case, all_nan, error, make, malformed

pytestmark = pytest.mark.skipif(
    backend_status()["triton"] != "ready", reason="test_triton.py runs these in the interpreter"
)


@pytest.fixture
def on() -> str:
    """The device type on which the kernels run."""
    return "cpu" if triton_backend.interpreted() else "cuda"


@pytest.fixture
def unordered(monkeypatch):
    """Lets the kernel of unordered pairs serve float32, too, whose errors are small enough to see mistakes."""
    monkeypatch.setattr(triton_backend, "_MAX_UNORDERED_ITEMSIZE", 4 if triton_backend.interpreted() else 2)


def _allowed(error: float) -> float:
    """Returns an error that the interpreter stays below, or what a GPU may have instead.

    The exponential of a GPU has a relative error of up to 2^-22, that of the interpreter up to 2^-24.
    """
    return error if triton_backend.interpreted() else 4 * error


@pytest.mark.parametrize("mask", ["holes", "causal", "prefix-left", "packed"])
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
def test_scores_beyond_one_pivot(on, mask, cross, unordered):
    """Scores of hundreds of bits make sums overflow, so the running maximum and the pivots of single rows are used."""
    case = make(mask, cross=cross, spread=14.0, heads=2).on(on)
    value, grads = case.run("sequence", "triton")
    expected, expected_grads = case.oracle("sequence")
    assert error(value, expected) < _allowed(1e-5)
    assert all(error(g, e) < _allowed(3e-4) for g, e in zip(grads, expected_grads, strict=True))
    rows, row_grads = case.run("none", "triton")
    expected, expected_grads = case.oracle("none")
    assert error(rows, expected) < _allowed(1e-5)
    assert all(error(g, e) < _allowed(3e-4) for g, e in zip(row_grads, expected_grads, strict=True))


@pytest.mark.parametrize("wide", ["teacher", "student"])
def test_one_model_beyond_one_pivot(on, wide):
    """One model's self scores range from almost 0 to 300 bits: a shared pivot would make the sums of small rows 0."""
    case = make("right", heads=2)
    tensors = [None if x is None else torch.nn.functional.normalize(x, dim=-1) for x in case.tensors]
    x = tensors[0 if wide == "teacher" else 2]
    x[:, ::2] *= (300 * math.log(2) * x.shape[-1] ** 0.5) ** 0.5
    case = Case(tuple(tensors), case.kwargs).on(on)
    rows, (grad,) = case.run("none", "triton")
    expected, (expected_grad,) = case.oracle("none")
    assert error(rows, expected) < _allowed(2e-6)
    assert error(grad, expected_grad) < _allowed(2e-6)


def test_a_wide_head_does_not_disturb_others(on):
    """One head with a wide range changes no bit of the other heads."""
    case = make("right", heads=3).on(on)
    value, (grad,) = case.run("none", "triton")
    wide = [None if x is None else x.clone() for x in case.tensors]
    for x in (wide[0], wide[2]):
        x[2, :, 1] *= 60
    rows, (wide_grad,) = Case(tuple(wide), case.kwargs).run("none", "triton")
    rows[2, 1] = value[2, 1]
    wide_grad[2, :, 1] = grad[2, :, 1]
    assert torch.equal(rows, value)
    assert torch.equal(wide_grad, grad)


def test_a_wide_head_beside_unordered_ones(on, unordered):
    """In the kernel of unordered pairs, too, a head with a wide range changes no bit of the other heads."""
    case = make("holes", heads=3).on(on)
    _, (grad,) = case.run("sum", "triton")
    wide = [None if x is None else x.clone() for x in case.tensors]
    for x in (wide[0], wide[2]):
        x[2, :, 1] *= 60
    wide_case = Case(tuple(wide), case.kwargs)
    value, (wide_grad,) = wide_case.run("sum", "triton")
    expected, (expected_grad,) = wide_case.oracle("sum")
    assert error(value, expected) < _allowed(2e-6)
    assert error(wide_grad, expected_grad) < _allowed(3e-4)
    wide_grad[2, :, 1] = grad[2, :, 1]
    assert torch.equal(wide_grad, grad)


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_small_divergences_of_many_rows(on, shift, unordered):
    """At a KL of 1e-5, terms of the size of `shift` cancel in every row.

    With a constant feature, the student's scores are greater by half a bit, as are its sums, which changes no relation.
    """
    x = make({}, batch=2, heads=2, length=130, widths=(8, 8)).tensors[0]
    student = torch.cat([x + 3e-3 * torch.randn_like(x), torch.full_like(x[..., :1], shift)], -1)
    teacher = torch.cat([x, torch.zeros_like(x[..., :1])], -1)
    case = Case((teacher, None, student, None), {"teacher_scale": 0.35, "student_scale": 0.35}).on(on)
    value, _ = case.run("token", "triton")
    expected, _ = case.oracle("token")
    assert 1e-6 < expected < 1e-4
    assert error(value, expected) < _allowed(3e-4)


def test_negative_scales(on):
    """With negative scales, self scores are the smallest scores, so no pivot is shared."""
    base = make("holes").on(on)
    case = Case(base.tensors, base.kwargs | {"teacher_scale": -0.5, "student_scale": -2.0})
    value, (grad,) = case.run("sum", "triton")
    expected, (expected_grad,) = case.oracle("sum")
    assert error(value, expected) < _allowed(2e-6)
    assert error(grad, expected_grad) < _allowed(5e-6)


@pytest.mark.parametrize("few", [False, True], ids=["many heads", "few heads"])
@pytest.mark.parametrize("mask", ["prefix-holes", "packed-prefix", "causal"])
def test_tiles_of_every_kind(on, mask, few, monkeypatch, unordered):
    """Prefixes and ends of long sequences lie inside tiles and at their bounds.

    If there are few heads, several programs share a self relation's heads.
    """
    monkeypatch.setattr(triton_backend, "_gpu", lambda _device: (10**9 if few else 0, 90))
    lengths = {"prefix-holes": 150, "causal": 97}.get(mask)
    if mask == "packed-prefix":
        kwargs = {
            "cu_seqlens": torch.tensor([0, 130, 130, 194, 226], dtype=torch.int32),
            "prefix_lens": torch.tensor([64, 3, 64, 50]),
        }
    elif mask == "causal":
        kwargs = {"causal": True}
    else:
        holes = torch.rand(2, lengths, generator=torch.Generator().manual_seed(4)) < 0.9
        kwargs = {"attention_mask": holes, "prefix_lens": torch.tensor([70, 20])}
    for cross in (False, True):
        case = make(kwargs, batch=2, length=lengths or 1, heads=1, cross=cross).on(on)
        for reduction in ("sequence", "none"):
            value, grads = case.run(reduction, "triton")
            expected, expected_grads = case.oracle(reduction)
            assert error(value, expected) < _allowed(1e-6)
            assert all(error(g, e) < _allowed(2e-6) for g, e in zip(grads, expected_grads, strict=True))


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize(
    ("kind", "cross", "reduction"),
    [
        *((kind, False, "sequence") for kind in MALFORMED),
        *(("overlapping", cross, reduction) for cross in (False, True) for reduction in ("token", "sum", "none")),
    ],
)
def test_malformed_packings_give_nan(on, monkeypatch, kind, cross, reduction):
    """As on a GPU, cu_seqlens is not checked before the launch."""
    monkeypatch.setattr(Mask, "check_packing", lambda self: None)
    assert all_nan(malformed(kind, cross).on(on), reduction, "triton")


@pytest.mark.parametrize("kind", ["overlapping", "negative", "beyond T in the middle", "extreme", "decreasing"])
def test_kernels_check_the_bounds_themselves(on, monkeypatch, kind, unordered):
    """Even without sanitized bounds, the kernels read nothing outside the tensors."""
    monkeypatch.setattr(Mask, "sanitize_bounds", lambda self: (self, None))
    total, room = 40, 256
    sides = []
    for width in (16, 8):
        whole = torch.full((total + 2 * room, 2, width), torch.nan, device=on)
        whole[room:-room] = torch.randn(total, 2, width)
        sides.append([whole[room:-room]])
    cu_seqlens = torch.tensor(MALFORMED[kind][0], dtype=torch.int32, device=on)
    problem = RelationInputs(*sides, [(0, 0)], Mask((total,), torch.device(on), cu_seqlens=cu_seqlens))
    weights = torch.ones(cu_seqlens.numel() - 1, device=on)
    for gradient in (True, False):
        values, _ = triton_backend.forward_reduced(problem, weights, gradient)
        assert values.isfinite().all()
    triton_backend.backward_none(problem, torch.ones(1, 2, total, device=on))


def test_a_scalar_is_the_sum_of_its_relations(on):
    """Self and cross relations share launches; their tensors have different strides."""
    student = QKV(*(torch.randn(2, 21, 24, device=on, requires_grad=True) for _ in range(3)))
    teacher = QKV(torch.randn(2, 21, 48, device=on), *torch.randn(2, 21, 96, device=on).chunk(2, -1))
    relations = {"qq": 1.0, "vv": 0.5, "qk": 2.0, "vq": 1.0, "kk": 1.0}
    grads = []
    for backend in ("triton", "torch"):
        loss = MiniLMv2Loss(3, relations=relations, backend=backend)
        parts = loss.components(teacher, student)
        assert list(parts) == list(relations)
        value = loss(teacher, student)
        torch.testing.assert_close(value, sum(relations[name] * parts[name] for name in relations))
        grads.append([value.detach(), *torch.autograd.grad(value, student)])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-8)


def test_more_tensors_than_a_hexadecimal_digit(on):
    """A launch names its tensors by numbers of a few bits each: nine cross relations have 18 tensors."""
    relations = [(f"q{r}", f"k{r}") for r in range(9)]
    names = [name for pair in relations for name in pair]
    teacher, student = ({name: torch.randn(1, 5, 1, width, device=on) for name in names} for width in (16, 8))
    values = relation_kl_multi(teacher, student, relations, backend="triton")
    torch.testing.assert_close(values, relation_kl_multi(teacher, student, relations, backend="reference"))


def test_features_that_are_not_side_by_side(on):
    case = make("none").on(on)
    turned = Case(
        tuple(None if x is None else x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in case.tensors), {}
    )
    assert turned.tensors[0].stride(-1) != 1
    value, (grad,) = turned.run("sequence", "triton")
    expected, (expected_grad,) = case.run("sequence", "triton")
    assert torch.equal(value, expected)
    assert torch.equal(grad, expected_grad)


@pytest.mark.parametrize("upstream", [1e-6, 1e4])
def test_float16_row_gradients_of_any_size(on, upstream):
    """Row weights far from 1 neither underflow nor overflow in float16 products."""
    case = make("holes", dtype=torch.float16).on(on)
    weights = upstream * torch.rand(case.row_shape(), device=on)
    weights[0] = 0
    student = case.tensors[2].detach().requires_grad_()
    rows = relation_kl(case.tensors[0], None, student, None, reduction="none", backend="triton", **case.kwargs)
    (grad,) = torch.autograd.grad(rows, student, weights)
    _, (expected,) = case.oracle("none", weights)
    assert (grad.double() - expected).norm() <= 1e-3 * expected.norm() + 3e-8 * expected.numel() ** 0.5


def _step(case: Case, reduction: str):
    student = [x.detach().requires_grad_() for x in case.tensors[2:] if x is not None]
    both = student if len(student) == 2 else [*student, None]
    value = relation_kl(*case.tensors[:2], *both, reduction=reduction, backend="triton", **case.kwargs)
    return value.detach(), torch.autograd.grad(value.sum(), student)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_captured_in_a_graph_without_synchronization(mask, dtype):
    """A CUDA graph replayed on other values gives the bits of eager mode; the host does not wait for the device."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    for reduction in ("sequence", "none"):
        case = make(mask, cross=True, dtype=dtype).on("cuda")
        _step(case, reduction)  # compiles the kernels
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            _step(case, reduction)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                value, grads = _step(case, reduction)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for x in case.tensors:
            x.copy_(torch.randn_like(x))
        graph.replay()
        expected, expected_grads = _step(case, reduction)
        assert torch.equal(value, expected)
        assert all(torch.equal(g, e) for g, e in zip(grads, expected_grads, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
def test_repeated_runs_at_size(cross):
    """Many concurrent programs give the same bits in every run."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    case = make("none", cross=cross, batch=16, heads=48, length=512, widths=(16, 8), dtype=torch.bfloat16).on("cuda")
    value, grads = _step(case, "sequence")
    for _ in range(5):
        again, again_grads = _step(case, "sequence")
        assert torch.equal(again, value)
        assert all(torch.equal(a, g) for a, g in zip(again_grads, grads, strict=True))
