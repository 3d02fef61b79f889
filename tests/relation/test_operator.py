"""The operator among PyTorch's machinery: opcheck, gradcheck, torch.compile, autocast, GradScaler, autograd's rules."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from minilm_kernels import QKV, MiniLMv2Loss, available_backends, relation_kl
from minilm_kernels.relation import relations_kl

from .cases import MASKS, Case, error, make

PER_MASK = ["none", "holes", "causal", "prefix-left", "packed", "packed-prefix"]


def _arguments(mask: str, cross: bool) -> tuple:
    """Of the registered operators: tensors, pairs and everything up to the scales."""
    case = make(mask, cross=cross, heads=2)
    q_t, k_t, q_s, k_s = case.tensors
    kwargs = case.kwargs
    return (
        [q_t, k_t] if cross else [q_t],
        [q_s, k_s] if cross else [q_s],
        [0, 1] if cross else [0, 0],
        kwargs.get("attention_mask"),
        kwargs.get("cu_seqlens"),
        kwargs.get("prefix_lens"),
        kwargs.get("max_seqlen"),
        kwargs.get("causal", False),
        None,
        0.3,
    )


@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
@pytest.mark.parametrize("mask", PER_MASK)
def test_opcheck(backend, mask, cross):
    ops = torch.ops.minilm_kernels
    arguments = _arguments(mask, cross)
    for reduction, gradient in (("sequence", True), ("token", False), ("none", False)):
        torch.library.opcheck(ops.relation_kl.default, (*arguments, reduction, backend, gradient))
    rows = ops.relation_kl(*arguments, "none", backend, False)[0]
    torch.library.opcheck(ops.relation_kl_rows_backward.default, (torch.rand_like(rows), *arguments, backend))


@pytest.mark.parametrize("reduction", ["sequence", "token", "sum", "none"])
@pytest.mark.parametrize("mask", PER_MASK)
def test_gradcheck(mask, reduction):
    case = make(mask, cross=True, heads=1, widths=(3, 2), dtype=torch.float64)
    q_t, k_t, q_s, k_s = case.tensors

    def loss(query, key):
        return relation_kl(q_t, k_t, query, key, reduction=reduction, backend="torch", **case.kwargs)

    assert torch.autograd.gradcheck(loss, (q_s.requires_grad_(), k_s.requires_grad_()), fast_mode=True)


@pytest.mark.parametrize("mask", ["none", "holes", "packed-prefix"])
def test_compiles_to_one_graph_with_dynamic_shapes(backend, mask):
    """One compilation serves every length; value and gradients equal those of eager mode."""
    loss = MiniLMv2Loss(3, relations={"qq": 1.0, "qk": 0.5, "vv": 2.0}, backend=backend)

    def step(teacher, projections, *weights, **kwargs):
        student = QKV(*(projections @ weight for weight in weights))
        return 3 * loss(teacher, student, **kwargs)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    weights = [torch.randn(9, 12, requires_grad=True) for _ in range(3)]
    for length in (23, 16, 11):
        kwargs = dict(MASKS[mask])
        if "cu_seqlens" in kwargs:
            leading = (int(kwargs["cu_seqlens"][-1]),)
        else:
            leading = (6, length)
            kwargs = {name: x[:, :length].clone() for name, x in kwargs.items()}
        teacher = QKV(*(torch.randn(*leading, 15) for _ in range(3)))
        projections = torch.randn(*leading, 9)
        results = []
        for function in (step, compiled):
            value = function(teacher, projections, *weights, **kwargs)
            results.append((value.detach(), *torch.autograd.grad(value, weights)))
        for eager, fused in zip(*results, strict=True):
            torch.testing.assert_close(fused, eager)
    assert counter.frame_count == 1


def test_compiles_rows_with_inductor(backend):
    case = make("causal-holes", heads=2)
    q_t, _, q_s, _ = case.tensors

    def loss(student):
        return relation_kl(q_t, None, student, None, reduction="none", backend=backend, **case.kwargs).square().sum()

    torch._dynamo.reset()
    results = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        student = q_s.clone().requires_grad_()
        value = function(student)
        value.backward()
        results.append((value.detach(), student.grad))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_does_not_reach_the_scores(backend, dtype):
    case = make("right", cross=True)
    for reduction in ("sequence", "none"):
        expected = case.run(reduction, backend)
        with torch.autocast("cpu", dtype=dtype):
            value, grads = case.run(reduction, backend)
        assert torch.equal(value, expected[0])
        assert all(torch.equal(g, e) for g, e in zip(grads, expected[1], strict=True))


def test_backward_under_amp_and_grad_scaler(backend):
    """A projection under fp16 autocast with GradScaler learns as in float32; nothing underflows on the way."""
    torch.manual_seed(1)
    hidden, mask = torch.randn(4, 16, 24), torch.rand(4, 16) < 0.8
    teacher = QKV(*(torch.randn(4, 16, 48) for _ in range(3)))
    loss = MiniLMv2Loss(12, backend=backend)
    grads = []
    for amp in (False, True):
        torch.manual_seed(2)
        projection = torch.nn.Linear(24, 72)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14, enabled=amp)
        optimizer = torch.optim.SGD(projection.parameters(), lr=0.1)
        with torch.autocast("cpu", dtype=torch.float16, enabled=amp):
            student = QKV(*projection(hidden).chunk(3, -1))
            assert student.query.dtype == (torch.float16 if amp else torch.float32)
            value = loss(teacher, student, mask)
        assert value.dtype == torch.float32
        scaler.scale(value).backward()
        scaler.unscale_(optimizer)
        grads.append(projection.weight.grad.clone())
        before = projection.weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        assert not torch.equal(projection.weight, before)
    assert (grads[1] - grads[0]).norm() < 4 * torch.finfo(torch.float16).eps * grads[0].norm()


def test_tiny_float16_gradients_survive_the_loss_scale(backend):
    """Gradients below float16's range before the loss scale is applied must not be rounded before it."""
    x = make(batch=64, length=32, heads=4, widths=(8, 8)).tensors[0]
    case = Case((x, None, x + 0.02 * torch.randn_like(x), None), {}).to(torch.float16)
    scale = torch.tensor(2.0**16)
    _, (grad,) = case.run("sequence", backend, scale)
    _, (expected,) = case.oracle("sequence", scale)
    assert (expected.abs() / 2**16).max() < torch.finfo(torch.float16).tiny  # unscaled, these are subnormal
    assert (grad.double() - expected).norm() < 2e-3 * expected.norm()


def test_upstream_gradients_weigh_each_relation(backend):
    case = make("holes", cross=True)
    q_t, k_t, q_s, k_s = case.tensors
    pairs = [("query", "query"), ("query", "key"), ("key", "query"), ("key", "key")]
    upstream = torch.tensor([1.0, -0.5, 2.0, 0.0])
    results = []
    for together in (True, False):
        student = {"query": q_s.clone().requires_grad_(), "key": k_s.clone().requires_grad_()}
        teacher = {"query": q_t, "key": k_t}

        def values(some):
            return relations_kl(teacher, student, some, backend=backend, **case.kwargs)  # noqa: B023

        value = values(pairs) if together else torch.cat([values([pair]) for pair in pairs])
        value.backward(upstream)
        results.append((value.detach(), student["query"].grad, student["key"].grad))
    torch.testing.assert_close(results[0], results[1])


def test_graph_is_kept_only_as_autograd_promises(backend):
    case = make(cross=True)
    student = [x.clone().requires_grad_() for x in case.tensors[2:]]
    for reduction in ("sequence", "none"):
        value = relation_kl(*case.tensors[:2], *student, reduction=reduction, backend=backend).sum()
        first = torch.autograd.grad(value, student, retain_graph=True)
        second = torch.autograd.grad(value, student)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        with pytest.raises(RuntimeError, match=r"second time|already been freed"):
            torch.autograd.grad(value, student)
        value = relation_kl(*case.tensors[:2], *student, reduction=reduction, backend=backend).sum()
        (grad, _) = torch.autograd.grad(value, student, create_graph=True)
        with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
            grad.sum().backward()


def test_only_what_needs_a_gradient_gets_one(backend):
    case = make(cross=True)
    q_t, k_t, q_s, k_s = case.tensors
    query = q_s.clone().requires_grad_()
    relation_kl(q_t, k_t, query, k_s, backend=backend).backward()
    assert torch.equal(query.grad, case.run("sequence", backend)[1][0])
    with torch.no_grad():
        assert not relation_kl(q_t, k_t, query, k_s, backend=backend).requires_grad
    expected, _ = case.run("sequence", backend)
    with torch.inference_mode():
        torch.testing.assert_close(relation_kl(q_t, k_t, query, k_s, backend=backend), expected)


def test_available_backends():
    backends = available_backends()
    assert list(backends) == ["cuda", "triton", "cpu", "torch", "reference"]
    assert backends["torch"] is None
    assert backends["reference"] is None
    for name, reason in backends.items():
        if reason is not None:
            case = make()
            with pytest.raises(RuntimeError, match=f"'{name}' cannot serve.*Usable here: .*torch"):
                case.run("sequence", name)


@pytest.mark.parametrize("wide", ["teacher", "student"])
def test_one_float64_input_makes_the_result_float64(wide):
    q_t, _, q_s, _ = make("holes", dtype=torch.float64).tensors
    q_t, q_s = (q_t, q_s.float()) if wide == "teacher" else (q_t.float(), q_s)
    case = Case((q_t, None, q_s, None), MASKS["holes"])
    value, (grad,) = case.run("sequence", "torch")
    expected, (expected_grad,) = case.oracle("sequence")
    assert value.dtype == torch.float64
    assert grad.dtype == q_s.dtype
    assert error(value, expected) < 1e-13
    assert error(grad, expected_grad) < torch.finfo(grad.dtype).eps + 1e-13


def test_auto_takes_the_first_backend_that_can():
    case = make("holes")
    first = next(name for name, reason in available_backends().items() if reason is None)
    assert torch.equal(case.run("sequence", "auto")[0], case.run("sequence", first)[0])
    value, _ = Case(tuple(x if x is None else x.double() for x in case.tensors), case.kwargs).run("sequence", "auto")
    assert value.dtype == torch.float64


def test_why_a_backend_is_passed_over_is_in_the_log(caplog):
    with caplog.at_level("DEBUG", logger="minilm_kernels"):
        make().to(torch.float64).run("sequence", "auto")
    for name, missing in available_backends().items():
        if name == "torch":
            break
        assert f"backend {name} does not serve: {missing or ''}" in caplog.text
    assert "float64" in caplog.text or available_backends()["cpu"]
