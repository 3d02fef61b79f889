"""The operator within PyTorch: opcheck, gradcheck, torch.compile, autocast, GradScaler, autograd, torch.func."""

import gc

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from minilm_kernels import QKV, MiniLMLoss, MiniLMv2Loss, backend_status, relation_kl
from minilm_kernels.relation import api, ops, relation_kl_multi

from .cases import MASKS, Case, error, make

PER_MASK = ["none", "holes", "causal", "prefix-left", "packed", "packed-prefix"]


def _arguments(case: Case) -> tuple:
    """Returns the first arguments of the registered operators, from the tensors to the scales."""
    cross = case.tensors[1] is not None
    q_t, k_t, q_s, k_s = case.tensors
    kwargs = case.kwargs
    return (
        [q_t, k_t] if cross else [q_t],
        [q_s, k_s] if cross else [q_s],
        [0, 1] if cross else [0, 0],
        kwargs.get("attention_mask"),
        kwargs.get("cu_seqlens"),
        kwargs.get("prefix_lens"),
        kwargs.get("query_mask"),
        kwargs.get("max_seqlen"),
        kwargs.get("causal", False),
        None,
        0.3,
    )


def _opcheck(case: Case, backend: str) -> None:
    ops = torch.ops.minilm_kernels
    arguments = _arguments(case)
    for reduction, gradient in (("sequence", True), ("token", False), ("none", False)):
        torch.library.opcheck(ops.relation_kl.default, (*arguments, reduction, backend, gradient, None))
    rows = ops.relation_kl(*arguments, "none", backend, False, None)[0]
    torch.library.opcheck(ops.relation_kl_rows_backward.default, (torch.rand_like(rows), *arguments, backend))


@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
@pytest.mark.parametrize("mask", PER_MASK)
def test_opcheck(backend, mask, cross):
    _opcheck(make(mask, cross=cross, heads=2), backend)


@pytest.mark.parametrize("mask", ["holes", "packed-prefix"])
def test_opcheck_with_rows_and_groups(backend, mask):
    case = make(mask, cross=True, heads=4, rows=0.6, groups=(2, 4))
    _opcheck(case, backend)


@pytest.mark.parametrize("reduction", ["sequence", "token", "sum", "none"])
@pytest.mark.parametrize("mask", PER_MASK)
def test_gradcheck(mask, reduction):
    _gradcheck(make(mask, cross=True, heads=1, widths=(3, 2), dtype=torch.float64), reduction)


@pytest.mark.parametrize("reduction", ["sequence", "none"])
def test_gradcheck_with_rows_and_groups(reduction):
    shape = {"cross": True, "heads": 2, "widths": (3, 2), "dtype": torch.float64}
    _gradcheck(make("causal-holes", rows=0.6, groups=(1, 2), **shape), reduction)


def _gradcheck(case, reduction):
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
    compilations = set()
    for length in (23, 16, 11):
        kwargs = dict(MASKS[mask])
        if "cu_seqlens" in kwargs:
            token_shape = (int(kwargs["cu_seqlens"][-1]),)
        else:
            token_shape = (6, length)
            kwargs = {name: x[:, :length].clone() for name, x in kwargs.items()}
        teacher = QKV(*(torch.randn(*token_shape, 15) for _ in range(3)))
        projections = torch.randn(*token_shape, 9)
        results = []
        for function in (step, compiled):
            value = function(teacher, projections, *weights, **kwargs)
            results.append((value.detach(), *torch.autograd.grad(value, weights)))
        for eager, fused in zip(*results, strict=True):
            torch.testing.assert_close(fused, eager)
        compilations.add(counter.frame_count)  # torch 2.11 counts twice: it begins again during the first call
    assert len(compilations) == 1


@pytest.mark.parametrize("reduction", ["sequence", "none"])
def test_rows_and_groups_compile_to_one_graph(backend, reduction):
    """Batch, length and mask change without a recompilation; float masks are checked inside the graph."""

    def step(query_t, key_t, query_s, key_s, rows):
        options = {"query_mask": rows, "causal": True, "reduction": reduction, "backend": backend}
        return relation_kl(query_t, key_t, 2 * query_s, key_s, **options).sum()

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for batch, length in ((3, 23), (5, 16), (2, 11)):
        case = make({}, batch=batch, length=length, cross=True, heads=4, rows=0.6, groups=(2, 4))
        results = []
        for function in (step, compiled):
            student = [x.clone().requires_grad_() for x in case.tensors[2:]]
            value = function(*case.tensors[:2], *student, case.kwargs["query_mask"].float())
            results.append((value.detach(), *torch.autograd.grad(value, student)))
        torch.testing.assert_close(results[1], results[0])
    assert counter.frame_count == 1


@pytest.mark.slow
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
    for case in (make("right", cross=True), make("right", cross=True, heads=4, rows=0.6, groups=(2, 4))):
        for reduction in ("sequence", "none"):
            expected = case.run(reduction, backend)
            with torch.autocast("cpu", dtype=dtype):
                value, grads = case.run(reduction, backend)
            assert torch.equal(value, expected[0])
            assert all(torch.equal(g, e) for g, e in zip(grads, expected[1], strict=True))


def test_backward_under_amp_and_grad_scaler(backend):
    """A projection under fp16 autocast with GradScaler gets the gradients of float32; nothing underflows."""
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
    """The loss scale is applied before gradients that float16 cannot represent are rounded."""
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
            return relation_kl_multi(teacher, student, some, backend=backend, **case.kwargs)  # noqa: B023

        value = values(pairs) if together else torch.cat([values([pair]) for pair in pairs])
        value.backward(upstream)
        results.append((value.detach(), student["query"].grad, student["key"].grad))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("upstream", [1.0, -0.3])
def test_weighted_sum_of_relations(backend, upstream):
    """Value and gradients have the bits of the sum by PyTorch's operators on a CPU."""
    case = make("holes", cross=True)
    q_t, k_t, q_s, k_s = case.tensors
    pairs, weights = [("query", "query"), ("query", "key"), ("key", "key")], [1.0, 0.5, 2.0]
    results = []
    for given in (weights, None):
        student = {"query": q_s.clone().requires_grad_(), "key": k_s.clone().requires_grad_()}
        value = relation_kl_multi(
            {"query": q_t, "key": k_t}, student, pairs, weights=given, backend=backend, **case.kwargs
        )
        if given is None:
            first, *others = (weight * x for weight, x in zip(weights, value.unbind(), strict=True))
            value = sum(others, first)
        value.backward(torch.tensor(upstream))
        results.append((value.detach(), student["query"].grad, student["key"].grad))
    for together, apart in zip(*results, strict=True):
        torch.testing.assert_close(together, apart, rtol=0 if backend in ("cpu", "torch") else 1e-6, atol=0)


def test_graph_is_kept_only_as_autograd_promises(backend):
    case = make(cross=True)
    student = [x.clone().requires_grad_() for x in case.tensors[2:]]
    for reduction in ("sequence", "none"):
        value = relation_kl(*case.tensors[:2], *student, reduction=reduction, backend=backend).sum()
        first = torch.autograd.grad(value, student, retain_graph=True)
        second = torch.autograd.grad(value, student)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert not any(x.requires_grad for x in (*first, *second))
        with pytest.raises(RuntimeError, match=r"second time|already been freed"):
            torch.autograd.grad(value, student)
        value = relation_kl(*case.tensors[:2], *student, reduction=reduction, backend=backend).sum()
        value.backward(retain_graph=True)
        value.backward(retain_graph=True)
        value.backward()
        for x, once in zip(student, first, strict=True):
            torch.testing.assert_close(x.grad, 3 * once)
            assert not x.grad.requires_grad
            x.grad = None


def test_the_graph_frees_what_it_keeps():
    """Saved gradients are outputs of the node that saves them. This must not create a reference cycle."""
    gc.collect()
    gc.disable()
    try:
        value = relation_kl(torch.randn(2, 9, 4, 8), None, torch.randn(2, 9, 4, 6, requires_grad=True), None)
        (kept,) = (StorageWeakRef(x.untyped_storage()) for x in value.grad_fn.next_functions[0][0].saved_tensors)
        assert not kept.expired()
        del value
        assert kept.expired()
    finally:
        gc.enable()


def _loss(reduction: str):
    """Returns the loss of a student, with a fixed teacher and mask."""
    generator = torch.Generator().manual_seed(0)
    teacher, mask = torch.randn(2, 9, 4, 8, generator=generator), torch.rand(2, 9, generator=generator) < 0.8

    def loss(student):
        return relation_kl(teacher, None, student, None, attention_mask=mask, reduction=reduction).sum()

    return loss


def _hessian_product(loss, student):
    torch.autograd.functional.hvp(loss, student, torch.ones_like(student))


def _penalty_backward(loss, student):
    (gradient,) = torch.autograd.grad(loss(student), student, create_graph=True)
    (student.square().sum() + gradient.square().sum()).backward()


def _penalty_for_one_input(loss, student):
    """torch.autograd.grad runs only the nodes between the result and the student."""
    (gradient,) = torch.autograd.grad(loss(student), student, create_graph=True)
    torch.autograd.grad(student.square().sum() + gradient.square().sum(), student)


def _gradient_of_the_gradient(loss, student):
    (gradient,) = torch.autograd.grad(loss(student), student, create_graph=True)
    torch.autograd.grad(gradient.sum(), student, allow_unused=True)


def _accumulated_gradient(loss, student):
    inner = student * 2
    inner.retain_grad()
    loss(inner).backward(create_graph=True)
    inner.grad.square().sum().backward()


def _nested_transforms(loss, student):
    torch.func.grad(lambda x: torch.func.grad(loss)(x).square().sum() + x.square().sum())(student.detach())


def _through_a_transform(loss, student):
    (torch.func.grad(loss)(student).square().sum() + student.square().sum()).backward()


def _within_a_checkpoint(loss, student):
    value = checkpoint(lambda x: loss(x * 1), student, use_reentrant=False)
    (gradient,) = torch.autograd.grad(value, student, create_graph=True)
    (student.square().sum() + gradient.square().sum()).backward()


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize("reduction", ["sequence", "none"])
@pytest.mark.parametrize(
    "second",
    [
        _hessian_product,
        _penalty_backward,
        _penalty_for_one_input,
        _gradient_of_the_gradient,
        _accumulated_gradient,
        _nested_transforms,
        _through_a_transform,
        _within_a_checkpoint,
    ],
)
def test_a_second_derivative_is_refused(second, reduction):
    with pytest.raises(RuntimeError, match="relation_kl: differentiable once"):
        second(_loss(reduction), torch.randn(2, 9, 4, 6, requires_grad=True))


@pytest.mark.parametrize("reduction", ["sequence", "none"])
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_second_derivative_is_refused(compiler, reduction):
    """PyTorch refuses it; before torch 2.13, only if the gradient needs a tensor that requires a gradient itself."""
    torch._dynamo.reset()
    eager = _loss(reduction)
    loss = torch.compile(lambda x: eager(x * x), fullgraph=True, backend=compiler)
    student = torch.randn(2, 9, 4, 6, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"double backward|create_graph=False"):
        _penalty_backward(loss, student)


@pytest.mark.parametrize("reduction", ["sequence", "none"])
def test_a_graph_of_the_gradient_that_is_not_differentiated(reduction):
    """create_graph=True alone changes no gradient, and penalties on other parts of a graph work."""
    loss, student = _loss(reduction), torch.randn(2, 9, 4, 6, requires_grad=True)
    (expected,) = torch.autograd.grad(loss(student), student)
    total = loss(student) + student.pow(3).sum()
    (gradient,) = torch.autograd.grad(total, student, create_graph=True)
    torch.testing.assert_close(gradient.detach(), expected + 3 * student.detach().square())
    (other,) = torch.autograd.grad(student.pow(3).sum(), student, create_graph=True)
    (loss(student) + other.sum()).backward()
    torch.testing.assert_close(student.grad, expected + 6 * student.detach())


def test_the_gradient_in_what_weighs_the_loss():
    """The gradient can be differentiated by a learned loss weight. The derivative is the unweighted gradient."""
    loss, student = _loss("sequence"), torch.randn(2, 9, 4, 6, requires_grad=True)
    (expected,) = torch.autograd.grad(loss(student), student)
    weight = torch.ones((), requires_grad=True)
    (gradient,) = torch.autograd.grad(weight * loss(student), student, create_graph=True)
    (derivative,) = torch.autograd.grad((gradient * expected).sum(), weight)
    torch.testing.assert_close(derivative, expected.square().sum())
    (gradient,) = torch.autograd.grad(weight * loss(student), student, create_graph=True, retain_graph=False)
    assert gradient.requires_grad


@pytest.mark.parametrize("reduction", ["sequence", "none"])
def test_torch_func(reduction):
    loss, student = _loss(reduction), torch.randn(2, 9, 4, 6, requires_grad=True)
    value = loss(student)
    (expected,) = torch.autograd.grad(value, student)
    gradient, value_too = torch.func.grad_and_value(loss)(student.detach())
    assert torch.equal(gradient, expected)
    assert torch.equal(value_too, value)
    assert torch.equal(torch.func.vjp(loss, student.detach())[1](torch.ones(()))[0], expected)
    weights = {"weight": torch.randn(6, 6)}
    module = torch.nn.Linear(6, 6, bias=False)

    def functional(weights):
        return loss(torch.func.functional_call(module, weights, student.detach()))

    leaf = weights["weight"].clone().requires_grad_()
    (expected,) = torch.autograd.grad(functional({"weight": leaf}), leaf)
    assert torch.equal(torch.func.grad(functional)(weights)["weight"], expected)


@pytest.mark.parametrize("reduction", ["sequence", "none"])
def test_torch_func_with_rows_and_groups(backend, reduction):
    case = make("holes", cross=True, heads=4, rows=0.6, groups=(2, 4))

    def loss(query, key):
        return relation_kl(*case.tensors[:2], query, key, reduction=reduction, backend=backend, **case.kwargs).sum()

    _, expected = case.run(reduction, backend)
    for got, wanted in zip(torch.func.grad(loss, argnums=(0, 1))(*case.tensors[2:]), expected, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("reduction", ["sequence", "none"])
def test_transforms_without_a_rule_say_so(reduction):
    loss, student = _loss(reduction), torch.randn(2, 9, 4, 6)
    with pytest.raises(RuntimeError, match=r"relation_kl: no rule for torch\.func\.vmap"):
        torch.func.vmap(loss)(student.expand(3, -1, -1, -1, -1))
    forward_mode = "relation_kl: no forward-mode derivative"
    with pytest.raises(RuntimeError, match=forward_mode):
        torch.func.jvp(loss, (student,), (student,))
    with pytest.raises(RuntimeError, match=forward_mode), torch.autograd.forward_ad.dual_level():
        loss(torch.autograd.forward_ad.make_dual(student, student))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("reduction", ["sequence", "none"])
def test_activation_checkpointing(backend, reduction, reentrant):
    q_t, k_t, q_s, k_s = make("holes", cross=True).tensors

    def loss(query, key):
        return relation_kl(q_t, k_t, 2 * query, key, reduction=reduction, backend=backend, **MASKS["holes"]).sum()

    student = [x.requires_grad_() for x in (q_s, k_s)]
    expected = torch.autograd.grad(loss(*student), student)
    checkpoint(loss, *student, use_reentrant=reentrant).backward()
    assert all(torch.equal(x.grad, e) for x, e in zip(student, expected, strict=True))


@pytest.mark.parametrize("rows", [None, 0.6], ids=["all", "rows"])
@pytest.mark.parametrize("mask", ["none", "prefix-holes", "packed-prefix"])
@pytest.mark.parametrize("reduction", ["sequence", "none"])
def test_inference_tensors(backend, reduction, mask, rows):
    """Teacher, masks, and student tensors without gradient may be inference tensors."""
    case = make(mask, cross=True, rows=rows)
    expected, (expected_grad, _) = case.run(reduction, backend)
    with torch.inference_mode():
        q_t, k_t, _, k_s = (x.clone() for x in case.tensors)
        kwargs = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in case.kwargs.items()}
    query = case.tensors[2].clone().requires_grad_()

    def loss(query):
        return relation_kl(q_t, k_t, query, k_s, reduction=reduction, backend=backend, **kwargs)

    value = loss(query)
    (grad,) = torch.autograd.grad(value.sum(), query)
    assert torch.equal(value, expected)
    assert torch.equal(grad, expected_grad)
    checkpoint(lambda x: loss(x * 1).sum(), query, use_reentrant=False).backward()
    assert torch.equal(query.grad, expected_grad)


class _Negated(torch.autograd.Function):
    """A view with a different gradient, as in adversarial training."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return -grad


def _heads(x):
    return x.unflatten(-1, (4, -1))


def _relations_taken(monkeypatch, call) -> tuple[list[int], torch.Tensor]:
    """Returns the pairs of tensor indices that the operator receives, and the result."""
    taken = []

    def spy(pairs, *arguments):
        taken.extend(pairs)
        return ops.relation_values(pairs, *arguments)

    monkeypatch.setattr(api, "relation_values", spy)
    return taken, call()


def _hooked(x):
    x.register_hook(lambda grad: 3 * grad)
    return x


@pytest.mark.parametrize(
    ("key", "one"),
    [
        (lambda x: _heads(x), True),
        (lambda x: x.view(2, 9, 4, 6), True),
        (lambda x: x.view(2, 9, 4, 6).transpose(1, 2).transpose(1, 2), False),  # a different path through autograd
        (lambda x: _heads(x * 1), False),
        (lambda x: _heads(x.detach()), False),
        (lambda x: _Negated.apply(_heads(x)), False),
        (lambda x: _heads(_Negated.apply(x)), False),
        (lambda x: _hooked(_heads(x)), False),
        (lambda x: torch._neg_view(_heads(x)), False),
    ],
)
@pytest.mark.parametrize("reduction", ["sequence", "none"])
def test_two_views_of_one_tensor_are_a_self_relation(monkeypatch, reduction, key, one):
    """Views count as one tensor if their gradients take the same path. Value and gradient do not depend on this."""
    teacher, leaf = torch.randn(2, 9, 32), torch.randn(2, 9, 24, requires_grad=True)
    student = leaf * 2
    taken, value = _relations_taken(
        monkeypatch,
        lambda: relation_kl(_heads(teacher), _heads(teacher), _heads(student), key(student), reduction=reduction),
    )
    assert taken == ([0, 0] if one else [0, 1])
    apart = relation_kl(
        *(_heads(teacher).clone(), _heads(teacher), _heads(student).clone()), key(student), reduction=reduction
    )
    torch.testing.assert_close(value, apart)
    grads = [torch.autograd.grad(v.sum(), leaf, retain_graph=True)[0] for v in (value, apart)]
    torch.testing.assert_close(*grads)


def test_views_of_a_leaf_of_overlapping_memory(monkeypatch):
    """The views share memory, but their gradients go to different rows."""
    leaf = torch.randn(1, 2, 9, 4, 6).expand(2, -1, -1, -1, -1).requires_grad_()
    teacher = torch.randn(2, 9, 4, 8)
    taken, value = _relations_taken(monkeypatch, lambda: relation_kl(teacher, teacher, leaf[0], leaf[1]))
    assert taken == [0, 1]
    value.backward()
    assert leaf.grad[1].any()


class _Normalised(torch.autograd.Function):
    """A view whose backward is not linear: gradients must not be added before it."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad / grad.norm()


def test_views_by_functions_of_others(monkeypatch):
    teacher, leaf = torch.randn(2, 9, 32), torch.randn(2, 9, 24, requires_grad=True)
    taken, value = _relations_taken(
        monkeypatch,
        lambda: relation_kl(*[_heads(teacher)] * 2, *(_Normalised.apply(_heads(leaf)) for _ in range(2))),
    )
    assert taken == [0, 1]
    query, key = (_heads(leaf.detach()).clone().requires_grad_() for _ in range(2))
    grads = torch.autograd.grad(relation_kl(_heads(teacher), _heads(teacher), query, key), (query, key))
    value.backward()
    torch.testing.assert_close(_heads(leaf.grad), sum(g / g.norm() for g in grads))


def test_views_that_read_memory_otherwise(monkeypatch):
    x, y = _heads(torch.randn(2, 9, 32)), _heads(torch.randn(2, 9, 24))
    for key_t, key_s in (
        (torch._neg_view(x), torch._neg_view(y)),
        (x.transpose(0, 1).transpose(0, 1).flip(0), y.flip(0)),
        (x.view(2, 9, 4, 8)[:, :1].expand(-1, 9, -1, -1), y[:, :1].expand(-1, 9, -1, -1)),
    ):
        taken, value = _relations_taken(monkeypatch, lambda: relation_kl(x, key_t, y, key_s))  # noqa: B023
        assert taken == [0, 1]
        torch.testing.assert_close(value, relation_kl(x, key_t.clone(), y, key_s.clone()))


def test_views_on_one_side_alone_are_a_cross_relation(monkeypatch):
    x, y = torch.randn(2, 9, 32), torch.randn(2, 9, 24)
    for teacher, student in (((x, x), (y, y * 1)), ((x, x * 1), (y, y))):
        tensors = [_heads(z) for z in (*teacher, *student)]
        taken, value = _relations_taken(monkeypatch, lambda: relation_kl(*tensors))  # noqa: B023
        assert taken == [0, 1]
        torch.testing.assert_close(value, relation_kl(*(z.clone() for z in tensors)))


def test_views_of_one_tensor_without_autograd_and_traced(monkeypatch):
    x, y = torch.randn(2, 9, 32), torch.randn(2, 9, 24, requires_grad=True)

    def call(y):
        return relation_kl(_heads(x), _heads(x), _heads(y), _heads(y))

    expected = relation_kl(_heads(x), None, _heads(y), None)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert _relations_taken(monkeypatch, lambda: call(y))[0] == [0, 0]
    for other in (torch.compile(call, fullgraph=True, backend="aot_eager"), torch.func.grad_and_value(call)):
        value = other(y)[1] if isinstance(other(y), tuple) else other(y)
        torch.testing.assert_close(value, expected)


def test_two_views_of_one_tensor_keep_one_gradient():
    x, y = torch.randn(2, 9, 32), torch.randn(2, 9, 24, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()), lambda t: t):
        MiniLMLoss(4)(QKV(x, x, x), QKV(y, y, torch.randn(2, 9, 24)))
    assert sum(saved) == y.numel() + y.numel()  # one gradient each for Q-K and V-V


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


def test_backend_status():
    backends = backend_status()
    assert list(backends) == ["cuda", "triton", "cpu", "torch", "reference"]
    assert backends["torch"] == "ready"
    assert backends["reference"] == "ready"
    for name, reason in backends.items():
        if reason != "ready":
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
    first = next(name for name, reason in backend_status().items() if reason == "ready")
    assert torch.equal(case.run("sequence", "auto")[0], case.run("sequence", first)[0])
    value, _ = Case(tuple(x if x is None else x.double() for x in case.tensors), case.kwargs).run("sequence", "auto")
    assert value.dtype == torch.float64


def test_why_a_backend_is_passed_over_is_in_the_log(caplog):
    with caplog.at_level("DEBUG", logger="minilm_kernels"):
        make().to(torch.float64).run("sequence", "auto")
    for name, status in backend_status().items():
        if name == "torch":
            break
        assert f"backend {name} does not serve: {'' if status == 'ready' else status}" in caplog.text
    assert "float64" in caplog.text or backend_status()["cpu"] != "ready"
