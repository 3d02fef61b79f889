"""The losses compared with the formulas of the papers, and their arguments."""

import math

import pytest
import torch

from minilm_kernels import QKV, MiniLMLoss, MiniLMv2Loss, relation_kl

B, S, HIDDEN_T, HIDDEN_S = 3, 10, 24, 12
LENGTHS = torch.tensor([10, 4, 7])
MASK = torch.arange(S) < LENGTHS[:, None]
NAMES = {"q": 0, "k": 1, "v": 2}


def _qkv(hidden: int, *leading: int, dtype=torch.float64) -> QKV:
    return QKV(*(torch.randn(*(leading or (B, S)), hidden, dtype=dtype) for _ in range(3)))


def _paper(teacher: QKV, student: QKV, pair: str, heads: int, mask: torch.Tensor) -> torch.Tensor:
    """A relation as in the papers: heads from the last axis, softmax(X Yᵀ/√d), mean KL over heads and rows."""
    losses = []
    for b in range(mask.shape[0]):
        logs = []
        for qkv in (teacher, student):
            x, y = (qkv[NAMES[letter]][b][mask[b]].unflatten(-1, (heads, -1)).transpose(0, 1) for letter in pair)
            logs.append((x @ y.mT / math.sqrt(x.shape[-1])).log_softmax(-1))
        losses.append((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean())
    return torch.stack(losses).mean()


def test_minilm(backend):
    """MiniLM has as many relation heads as the teacher has attention heads, and Q-K and V-V have weight 1."""
    teacher, student = _qkv(HIDDEN_T), _qkv(HIDDEN_S)
    loss = MiniLMLoss(4)
    expected = {pair: _paper(teacher, student, pair, 4, MASK) for pair in ("qk", "vv")}
    torch.testing.assert_close(loss.components(teacher, student, MASK), expected)
    torch.testing.assert_close(loss(teacher, student, MASK), sum(expected.values()))


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 12])
def test_minilmv2_default_relations(heads):
    teacher, student = _qkv(HIDDEN_T), _qkv(HIDDEN_S)
    expected = {pair: _paper(teacher, student, pair, heads, MASK) for pair in ("qq", "kk", "vv")}
    loss = MiniLMv2Loss(heads)
    torch.testing.assert_close(loss.components(teacher, student, MASK), expected)
    torch.testing.assert_close(loss(teacher, student, MASK), sum(expected.values()))


def test_minilmv2_any_weighted_relations():
    teacher, student = _qkv(HIDDEN_T), QKV(*(x.requires_grad_() for x in _qkv(HIDDEN_S)))
    weights = {first + second: 0.1 * n for n, (first, second) in enumerate((f, s) for f in "qkv" for s in "qkv")}
    loss = MiniLMv2Loss(3, relations=weights)
    expected = {pair: _paper(teacher, student, pair, 3, MASK) for pair in weights}
    total = sum(weights[pair] * value for pair, value in expected.items())
    torch.testing.assert_close(loss.components(teacher, student, MASK), expected)
    torch.testing.assert_close(loss(teacher, student, MASK), total)
    torch.testing.assert_close(
        torch.autograd.grad(loss(teacher, student, MASK), student), torch.autograd.grad(total, student)
    )


@pytest.mark.parametrize("kind", ["bidirectional", "causal", "prefix"])
def test_packed_inputs_and_masks_pass_through(backend, kind):
    teacher, student = _qkv(HIDDEN_T, dtype=torch.float32), _qkv(HIDDEN_S, dtype=torch.float32)
    kwargs = {"bidirectional": {}, "causal": {"causal": True}, "prefix": {"prefix_lens": torch.tensor([2, 0, 9])}}[kind]
    cu_seqlens = torch.cat((torch.zeros(1), LENGTHS.cumsum(0))).int()
    packed = [QKV(*(x[MASK] for x in qkv)) for qkv in (teacher, student)]
    for reduction in ("sequence", "token", "sum"):
        for loss in (MiniLMLoss(3, reduction=reduction, backend=backend), MiniLMv2Loss(6, reduction=reduction)):
            dense = loss(teacher, student, MASK, **kwargs)
            torch.testing.assert_close(loss(*packed, cu_seqlens=cu_seqlens, max_seqlen=10, **kwargs), dense)
    rows = MiniLMv2Loss(6, reduction="none", backend=backend)(teacher, student, MASK, **kwargs)
    assert rows.shape == (B, 6, S)
    torch.testing.assert_close(rows.sum(), MiniLMv2Loss(6, reduction="sum")(teacher, student, MASK, **kwargs))


def test_the_two_averages_differ_on_ragged_batches():
    teacher, student = _qkv(HIDDEN_T), _qkv(HIDDEN_S)
    rows = MiniLMv2Loss(6, reduction="none")(teacher, student, MASK)
    token, sequence = (MiniLMv2Loss(6, reduction=name)(teacher, student, MASK) for name in ("token", "sequence"))
    torch.testing.assert_close(token, rows.sum() / (6 * LENGTHS.sum()))
    torch.testing.assert_close(sequence, (rows.sum((1, 2)) / (6 * LENGTHS)).mean())
    assert abs(token - sequence) > 0.01 * token


def test_components_are_differentiable_one_by_one():
    teacher, student = _qkv(HIDDEN_T), QKV(*(x.requires_grad_() for x in _qkv(HIDDEN_S)))
    components = MiniLMv2Loss(6).components(teacher, student, MASK)
    grads = torch.autograd.grad(components["kk"], student, allow_unused=True, materialize_grads=True)
    assert grads[1].any()
    assert not grads[0].any()
    assert not grads[2].any()


def test_one_operator_call_for_all_relations(backend):
    calls = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "minilm_kernels":
                calls.append(function)
            return function(*args, **(kwargs or {}))

    teacher, student = _qkv(HIDDEN_T, dtype=torch.float32), _qkv(HIDDEN_S, dtype=torch.float32)
    student = QKV(*(x.requires_grad_() for x in student))
    with Count():
        MiniLMv2Loss(6, backend=backend)(teacher, student, MASK).backward()
        MiniLMLoss(6, backend=backend).components(teacher, student, MASK)
    assert calls == [torch.ops.minilm_kernels.relation_kl.default] * 2


def test_losses_are_modules_without_state():
    for loss in (MiniLMLoss(4), MiniLMv2Loss(4)):
        assert not list(loss.parameters())
        assert not loss.state_dict()
        assert "heads=4" in repr(loss)


def test_heads_are_views():
    """The inputs reach the operator without a copy."""
    student = _qkv(HIDDEN_S)
    _, heads = MiniLMv2Loss(6)._split_heads(_qkv(HIDDEN_T), student, packed=False)
    assert heads["key"].data_ptr() == student.key.data_ptr()
    assert heads["key"].shape == (B, S, 6, 2)


TEACHER, STUDENT = _qkv(HIDDEN_T), _qkv(HIDDEN_S)


@pytest.mark.parametrize(
    ("call", "exception", "message"),
    [
        (lambda: MiniLMv2Loss(0), ValueError, "num_relation_heads: expected a positive int, got 0"),
        (lambda: MiniLMLoss(2.0), ValueError, "num_heads: expected a positive int, got 2.0"),
        (lambda: MiniLMv2Loss(4, relations={"qx": 1.0}), ValueError, "relations: .*two letters.*'qx'"),
        (lambda: MiniLMv2Loss(4, relations={}), ValueError, "relations: expected a mapping"),
        (lambda: MiniLMv2Loss(4, relations=["qq"]), ValueError, "relations: expected a mapping"),
        (lambda: MiniLMv2Loss(4, relations={"qq": -1.0}), ValueError, "relations: .*'qq', got -1.0"),
        (lambda: MiniLMv2Loss(4, relations={"qq": float("nan")}), ValueError, "relations: .*'qq', got nan"),
        (
            lambda: MiniLMv2Loss(5)(TEACHER, STUDENT),
            ValueError,
            "num_relation_heads: .*one of 1, 2, 3, 4, 6, 12; got 5",
        ),
        (lambda: MiniLMLoss(24)(TEACHER, STUDENT), ValueError, "num_heads: .*student.query 12.*got 24"),
        (lambda: MiniLMLoss(4)(TEACHER.query, STUDENT), TypeError, "teacher: expected QKV"),
        (lambda: MiniLMLoss(4)(TEACHER, QKV(None, None, None)), TypeError, "student.query: expected a tensor"),
        (lambda: MiniLMLoss(4)(_qkv(24, 30), STUDENT), ValueError, r"teacher.query: .*\(B, S, hidden\).*\(30, 24\)"),
        (
            lambda: MiniLMLoss(4)(TEACHER, STUDENT, cu_seqlens=torch.tensor([0, 30])),
            ValueError,
            r"teacher.query: .*packed \(T, hidden\)",
        ),
        (lambda: MiniLMLoss(4, reduction="mean")(TEACHER, STUDENT), ValueError, "reduction: .*'mean'"),
        (lambda: MiniLMLoss(4, backend="x")(TEACHER, STUDENT), ValueError, "backend: .*'x'"),
        (lambda: MiniLMLoss(4)(TEACHER, _qkv(12, 2, 10)), ValueError, "student_query: .*batch and sequence"),
    ],
)
def test_errors(call, exception, message):
    with pytest.raises(exception, match=message):
        call()


def test_lists_are_taken_as_tuples_are():
    expected = MiniLMv2Loss(6)(TEACHER, STUDENT, MASK)
    assert torch.equal(MiniLMv2Loss(6)(list(TEACHER), list(STUDENT), MASK), expected)
    with pytest.raises(TypeError, match="teacher: expected QKV"):
        MiniLMv2Loss(6)(list(TEACHER[:2]), list(STUDENT), MASK)
    with pytest.raises(TypeError, match=r"student: expected QKV.*got Tensor"):
        MiniLMv2Loss(6)(TEACHER, torch.stack(STUDENT), MASK)


def test_float_masks():
    expected = MiniLMv2Loss(6)(TEACHER, STUDENT, MASK)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert torch.equal(MiniLMv2Loss(6)(TEACHER, STUDENT, MASK.to(dtype)), expected)


def test_only_the_named_projections_must_fit():
    """Narrower keys and values of a grouped-query teacher have no effect on Q-Q."""
    teacher = QKV(torch.randn(2, 5, 24), torch.randn(2, 5, 7), torch.randn(2, 5, 7))
    student = _qkv(HIDDEN_S, 2, 5, dtype=torch.float32)
    value = MiniLMv2Loss(6, relations={"qq": 1.0})(teacher, student)
    heads = [x.query.unflatten(-1, (6, -1)) for x in (teacher, student)]
    torch.testing.assert_close(value, relation_kl(heads[0], None, heads[1], None))
