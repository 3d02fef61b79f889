"""The losses compared with the formulas of the papers, and their arguments."""

import math

import pytest
import torch

from minilm_kernels import QKV, MiniLMLoss, MiniLMv2Loss, SelfRelationLoss, relation_kl, relation_kl_multi
from minilm_kernels.losses import hidden_mse, logit_kl

B, S, HIDDEN_T, HIDDEN_S = 3, 10, 24, 12
LENGTHS = torch.tensor([10, 4, 7])
MASK = torch.arange(S) < LENGTHS[:, None]
NAMES = {"q": 0, "k": 1, "v": 2}


def _qkv(hidden: int, *leading: int, dtype=torch.float64) -> QKV:
    return QKV(*(torch.randn(*(leading or (B, S)), hidden, dtype=dtype) for _ in range(3)))


def _paper(
    teacher: QKV,
    student: QKV,
    pair: str,
    heads: int,
    mask: torch.Tensor,
    cosine: bool = False,
    temperature: float = 1.0,
) -> torch.Tensor:
    """A relation as in the papers: heads from the last axis, softmax(X Yᵀ/√d), mean KL over heads and rows."""
    losses = []
    for b in range(mask.shape[0]):
        logs = []
        for qkv in (teacher, student):
            x, y = (qkv[NAMES[letter]][b][mask[b]].unflatten(-1, (heads, -1)).transpose(0, 1) for letter in pair)
            norms = x.square().sum(-1).sqrt()[..., None] * y.square().sum(-1).sqrt()[..., None, :]
            scores = x @ y.mT / (norms if cosine else math.sqrt(x.shape[-1]))
            logs.append((scores / temperature).log_softmax(-1))
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
    (call,) = MiniLMv2Loss(6)._calls(_qkv(HIDDEN_T), student, None, {}).values()
    assert call.student["key"].data_ptr() == student.key.data_ptr()
    assert call.student["key"].shape == (B, S, 6, 2)


TEACHER, STUDENT = _qkv(HIDDEN_T), _qkv(HIDDEN_S)
TWO = torch.randn(3, 10, 12), torch.randn(3, 10, 24)
GROUPED = QKV(torch.randn(2, 5, 24), torch.randn(2, 5, 8), torch.randn(2, 5, 8))
LAYERS = MiniLMLoss(4, layers={12: 6})
QK = MiniLMv2Loss(4, relations={"qk": 1.0})


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


# Layers


def test_layers_and_their_weights():
    teacher, student = (
        {n: _qkv(hidden) for n in layers} for hidden, layers in ((HIDDEN_T, (9, 12)), (HIDDEN_S, (3, 6)))
    )
    loss = MiniLMv2Loss(6, layers={12: 6, 9: 3}, layer_weights={9: 0.5}, relations={"qq": 1.0, "vv": 2.0})
    plain = MiniLMv2Loss(6, relations={"qq": 1.0, "vv": 2.0})
    first, second = plain.components(teacher[12], student[6], MASK), plain.components(teacher[9], student[3], MASK)
    expected = {f"12/{name}": x for name, x in first.items()} | {f"9/{name}": x for name, x in second.items()}
    components = loss.components(teacher, student, MASK)
    assert list(components) == ["12/qq", "12/vv", "9/qq", "9/vv"]
    torch.testing.assert_close(components, expected, rtol=0, atol=0)
    total = first["qq"] + 2 * first["vv"] + 0.5 * second["qq"] + second["vv"]
    torch.testing.assert_close(loss(teacher, student, MASK), total)
    assert "layers={12: 6, 9: 3}" in repr(loss)
    other = plain.with_layers({-1: -1})
    assert torch.equal(other({-1: teacher[12]}, {-1: student[6]}, MASK), plain(teacher[12], student[6], MASK))
    assert plain.layers is None


@pytest.mark.parametrize(
    ("call", "exception", "message"),
    [
        (
            lambda: MiniLMv2Loss(6, layers={12: "6"}),
            ValueError,
            "layers: expected a mapping from teacher's to student's",
        ),
        (lambda: MiniLMv2Loss(6, layers=[12]), ValueError, "layers: expected a mapping"),
        (lambda: MiniLMLoss(6, layers={}), ValueError, "layers: expected a mapping"),
        (
            lambda: MiniLMLoss(6, layers={12: 6}, layer_weights={6: 1.0}),
            ValueError,
            r"layer_weights: .*\{12: 6\}, got 6",
        ),
        (
            lambda: MiniLMLoss(6, layers={12: 6}, layer_weights={12: -1}),
            ValueError,
            "layer_weights: .*0 or more for 12",
        ),
        (lambda: MiniLMLoss(6)({12: TEACHER}, STUDENT), TypeError, r"teacher: expected QKV\(.*, got dict"),
        (
            lambda: LAYERS({12: TEACHER}, STUDENT),
            TypeError,
            "student: expected a dict of QKV, because of layers, got QKV",
        ),
        (lambda: LAYERS({12: TEACHER}, {5: STUDENT}), ValueError, r"student: layers=\{12: 6\} needs layer 6, got 5"),
    ],
)
def test_wrong_layers(call, exception, message):
    with pytest.raises(exception, match=message):
        call()


# Cosines and temperature


@pytest.mark.parametrize("temperature", [1.0, 0.3, 5.0])
@pytest.mark.parametrize("normalize", [None, "cosine"])
def test_cosines_and_temperature(backend, normalize, temperature):
    """Keys and values are narrower here, so that the scales of the relations differ."""
    teacher, student = (
        QKV(query, key[..., : n // 2], value[..., : n // 2])
        for query, key, value, n in ((*_qkv(HIDDEN_T), HIDDEN_T), (*_qkv(HIDDEN_S), HIDDEN_S))
    )
    student = QKV(*(x.requires_grad_() for x in student))
    options = {"normalize": normalize, "temperature": temperature}
    pairs = ("qq", "kk", "kv")
    loss = MiniLMv2Loss(3, relations=dict.fromkeys(pairs, 1.0), **options, backend="auto")
    expected = {pair: _paper(teacher, student, pair, 3, MASK, normalize == "cosine", temperature) for pair in pairs}
    components = loss.components(teacher, student, MASK)
    torch.testing.assert_close(components, expected)
    found, wanted = (torch.autograd.grad(sum(x.values()), student) for x in (components, expected))
    torch.testing.assert_close(found, wanted)
    rounded = [QKV(*(x.detach().float() for x in qkv)) for qkv in (teacher, student)]
    values = MiniLMv2Loss(3, relations=loss.relations, **options, backend=backend).components(*rounded, MASK)
    torch.testing.assert_close(values, {pair: x.detach().float() for pair, x in expected.items()}, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cosines_of_a_zero_vector_are_zero(dtype):
    teacher, student = torch.randn(B, S, HIDDEN_T).to(dtype), torch.randn(B, S, HIDDEN_S).to(dtype)
    teacher[0, 2] = student[0, 2] = 0.0
    loss = SelfRelationLoss(3, normalize="cosine")
    expected = loss(student.double(), teacher.double(), MASK)
    value = loss(student.requires_grad_(), teacher, MASK)
    torch.testing.assert_close(value.double(), expected, rtol=2e-2, atol=0)
    assert torch.autograd.grad(value, student)[0].isfinite().all()


def test_without_normalization_nothing_changes():
    teacher, student = _qkv(HIDDEN_T, dtype=torch.bfloat16), _qkv(HIDDEN_S, dtype=torch.bfloat16)
    pairs = [("query", "query"), ("key", "key"), ("value", "value")]
    heads = [{n: x.unflatten(-1, (6, -1)) for n, x in qkv._asdict().items()} for qkv in (teacher, student)]
    expected = relation_kl_multi(*heads, pairs, attention_mask=MASK)
    loss = MiniLMv2Loss(6, normalize=None, temperature=1.0)
    assert torch.equal(torch.stack([*loss.components(teacher, student, MASK).values()]), expected)


def test_the_loss_of_bitdistill():
    """Algorithm 1 of arXiv 2510.13998 without its clamps: softmax(cosine / temperature), batchmean over rows."""
    teacher, student, expected = _qkv(HIDDEN_T), _qkv(HIDDEN_S), 0.0
    for t, s in zip(teacher, student, strict=True):
        logs = []
        for x in (s, t):
            heads = torch.nn.functional.normalize(x.unflatten(-1, (6, -1)).transpose(1, 2), dim=-1)
            logs.append((heads @ heads.mT / 0.7).flatten(0, 2).log_softmax(-1))
        expected += torch.nn.functional.kl_div(*logs, reduction="batchmean", log_target=True)
    loss = MiniLMv2Loss(6, normalize="cosine", temperature=0.7, reduction="token")
    torch.testing.assert_close(loss(teacher, student), expected)


def test_cosines_of_padding_do_not_matter():
    teacher, student = _qkv(HIDDEN_T), _qkv(HIDDEN_S)
    loss, found = MiniLMv2Loss(6, normalize="cosine"), []
    for fill in (0.0, float("nan"), float("inf")):
        filled = [QKV(*(x.masked_fill(~MASK[..., None], fill) for x in qkv)) for qkv in (teacher, student)]
        inputs = [x.requires_grad_() for x in filled[1]]
        value = loss(filled[0], QKV(*inputs), MASK)
        found.append((value, *torch.autograd.grad(value, inputs)))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    torch.testing.assert_close(found[2], found[0], rtol=0, atol=0)
    assert all(torch.isfinite(x).all() for x in found[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalize": "l2"}, 'normalize: expected "cosine" or None'),
        ({"temperature": 0}, "temperature: expected a finite number above 0, got 0"),
        ({"temperature": math.inf}, "temperature: .*got inf"),
        ({"temperature": "1"}, "temperature: .*got '1'"),
    ],
)
def test_wrong_normalization(options, message):
    for loss in (MiniLMLoss, MiniLMv2Loss, SelfRelationLoss):
        with pytest.raises(ValueError, match=message):
            loss(2, **options)


# Grouped-query attention


def _grouped(heads: int, key_heads: int, width: int) -> QKV:
    query, key, value = (torch.randn(B, S, n * width, dtype=torch.float64) for n in (heads, key_heads, key_heads))
    return QKV(query, key, value)


def _repeated(qkv: QKV, heads: int, width: int) -> QKV:
    """Keys and values as the attention repeats them."""
    wide = [x.unflatten(-1, (-1, width)).repeat_interleave(heads * width // x.shape[-1], -2).flatten(-2) for x in qkv]
    return QKV(*wide)


@pytest.mark.parametrize("reduction", ["sequence", "token", "sum", "none"])
@pytest.mark.parametrize(("key_heads_t", "key_heads_s"), [(4, 4), (4, 2), (2, 4), (6, 4), (1, 12), (12, 3), (6, 1)])
def test_minilm_of_grouped_models_is_that_of_repeated_heads(key_heads_t, key_heads_s, reduction):
    teacher, student = _grouped(12, key_heads_t, 4), QKV(*(x.requires_grad_() for x in _grouped(12, key_heads_s, 3)))
    loss = MiniLMLoss(12, reduction=reduction)
    found = loss.components(teacher, student, MASK, causal=True)
    repeated = _repeated(teacher, 12, 4), _repeated(student, 12, 3)
    expected = loss.components(*repeated, MASK, causal=True)
    torch.testing.assert_close(found, expected)
    found, expected = (
        torch.autograd.grad(sum(x.sum() for x in values.values()), student) for values in (found, expected)
    )
    torch.testing.assert_close(found, expected)
    if reduction == "sequence" and key_heads_t == 12:
        torch.testing.assert_close(
            loss(*repeated, MASK), sum(_paper(*repeated, pair, 12, MASK) for pair in ("qk", "vv"))
        )


@pytest.mark.parametrize("num_heads", [2, 3, 4, 6, 12])
def test_cross_relations_of_grouped_models(num_heads):
    """Keys are repeated as in the attention, then all are cut into relation heads: smaller, equal or larger ones."""
    teacher, student = _grouped(6, 2, 4), QKV(*(x.requires_grad_() for x in _grouped(4, 4, 6)))
    student = QKV(student.query, student.key[..., :12], student.value[..., :12])  # 4 and 2 heads of width 6
    narrow = ("kv",) if num_heads in (2, 4) else ()  # both are narrow, and split as they are
    pairs = ("qk", "kq", "qv", *narrow)
    loss = MiniLMv2Loss(num_heads, relations=dict.fromkeys(pairs, 1.0), attention_heads=(6, 4))
    found = loss.components(teacher, student, MASK)
    wide = _repeated(teacher, 6, 4), _repeated(student, 4, 6)
    expected = {pair: _paper(*wide, pair, num_heads, MASK) for pair in ("qk", "kq", "qv")}
    expected |= {pair: _paper(teacher, student, pair, num_heads, MASK) for pair in narrow}
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(sum(x.values()), student) for x in (found, expected)]
    torch.testing.assert_close(*grads)


def test_the_operator_repeats_heads_where_it_can():
    teacher, student = _grouped(6, 2, 4), _grouped(6, 3, 4)
    (call,) = MiniLMv2Loss(6, relations={"qk": 1.0}, attention_heads=6)._calls(teacher, student, None, {}).values()
    assert [x["key of qk"].shape[-2:] for x in (call.teacher, call.student)] == [(2, 4), (3, 4)]
    assert call.student["key of qk"].data_ptr() == student.key.data_ptr()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: QK(GROUPED, GROUPED),
            r"relations: 'qk' of teacher.key of width 8 and teacher.query of width 24 needs att",
        ),
        (lambda: MiniLMv2Loss(2, relations={"kq": 1.0})(GROUPED, GROUPED), "teacher.key of width 8 .* leave out 'kq'"),
        (
            lambda: MiniLMLoss(4)(GROUPED, GROUPED),
            "num_heads: teacher.key of width 8 .* do not belong to 4 attention heads",
        ),
        (
            lambda: MiniLMv2Loss(2, relations={"qk": 1}, attention_heads=(6, 5))(GROUPED, GROUPED),
            "attention_heads: student",
        ),
        (lambda: MiniLMv2Loss(2, attention_heads=(6, 0)), "attention_heads: expected a positive int, got 0"),
        (lambda: MiniLMv2Loss(2, attention_heads=True), "attention_heads: expected a positive int, got True"),
    ],
)
def test_wrong_attention_heads(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Rows that count


@pytest.mark.parametrize("reduction", ["sequence", "token", "sum", "none"])
def test_rows_that_count(reduction):
    teacher, student = _qkv(HIDDEN_T), _qkv(HIDDEN_S)
    rows = torch.rand(B, S) < 0.5
    rows[1] = False
    counted = rows & MASK
    pairs = [
        (lambda r: MiniLMLoss(3, reduction=r), (teacher, student)),
        (lambda r: MiniLMv2Loss(3, reduction=r), (teacher, student)),
        (lambda r: SelfRelationLoss(3, reduction=r), (student.query, teacher.query)),
    ]
    for make, inputs in pairs:
        each = make("none")(*inputs, MASK) * counted[:, None]
        sums = each.sum((1, 2))
        expected = {
            "sequence": (sums / (3 * counted.sum(1).clamp(min=1)))[counted.any(1)].mean(),
            "token": sums.sum() / (3 * counted.sum()),
            "sum": sums.sum(),
            "none": each,
        }[reduction]
        torch.testing.assert_close(make(reduction)(*inputs, MASK, query_mask=rows), expected)
    layers = MiniLMv2Loss(3, layers={2: 1}, reduction=reduction)
    plain = MiniLMv2Loss(3, reduction=reduction)(teacher, student, MASK, query_mask=rows)
    torch.testing.assert_close(layers({2: teacher}, {1: student}, MASK, query_mask=rows), plain)


# Two tensors


def test_the_self_relation_of_hidden_states(backend):
    teacher, student = torch.randn(B, S, HIDDEN_T), torch.randn(B, S, HIDDEN_S, requires_grad=True)
    expected = _paper(QKV(*[teacher.double()] * 3), QKV(*[student.double()] * 3), "qq", 4, MASK)
    value = SelfRelationLoss(4, backend=backend)(student, teacher, MASK)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(x, student)[0] for x in (value, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    packed = SelfRelationLoss(4, backend=backend)(
        student[MASK], teacher[MASK], cu_seqlens=torch.tensor([0, *LENGTHS.cumsum(0)], dtype=torch.int32)
    )
    torch.testing.assert_close(packed, value)
    cosine = SelfRelationLoss(4, normalize="cosine", temperature=0.5)(student * 3, teacher, MASK)
    expected = _paper(QKV(*[teacher.double()] * 3), QKV(*[student.double()] * 3), "qq", 4, MASK, True, 0.5)
    torch.testing.assert_close(cosine.double(), expected, rtol=1e-5, atol=1e-6)
    assert "num_heads=4" in repr(SelfRelationLoss(4))


@pytest.mark.parametrize(
    ("call", "exception", "message"),
    [
        (lambda: SelfRelationLoss(0), ValueError, "num_heads: expected a positive int, got 0"),
        (lambda: SelfRelationLoss(5)(*TWO), ValueError, r"teacher: .*multiple of num_heads=5, got \(3, 10, 24\)"),
        (lambda: SelfRelationLoss(2)(TWO[0][0, 0], TWO[1]), ValueError, r"student: .*got \(12,\)"),
        (lambda: SelfRelationLoss(2)(TWO[0], None), TypeError, "teacher: expected a tensor"),
        (lambda: SelfRelationLoss(2)(TWO[0], TWO[1].requires_grad_()), ValueError, "teacher_query: .*not require grad"),
    ],
)
def test_wrong_hidden_states(call, exception, message):
    with pytest.raises(exception, match=message):
        call()


# Logits and hidden states


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_logit_kl(temperature):
    teacher, student = (torch.randn(B, S, 7, dtype=torch.float64) for _ in range(2))
    student.requires_grad_()
    expected = 0.0
    for b, i in MASK.nonzero().tolist():
        p, q = ((x[b, i] / temperature).exp() / (x[b, i] / temperature).exp().sum() for x in (teacher, student))
        expected = expected + (p * (p / q).log()).sum() * temperature**2
    expected = expected / MASK.sum()
    teacher[~MASK] = math.nan
    value = logit_kl(teacher, student, MASK.int(), temperature=temperature)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (value, expected)))
    assert logit_kl(student.detach(), student) == 0
    assert logit_kl(teacher, student, torch.zeros_like(MASK)) == 0
    half = logit_kl(student.detach().bfloat16() + 1, student.bfloat16())
    assert half.dtype == torch.float32
    assert half.abs() < 1e-2  # a constant changes nothing


@pytest.mark.parametrize("both", [False, True], ids=["teacher", "both"])
def test_logits_of_forbidden_tokens(both):
    teacher, student = (torch.randn(B, S, 7, dtype=torch.float64) for _ in range(2))
    teacher[..., [1, 4]] = -math.inf
    if both:
        student[..., [1, 4]] = -math.inf
    student.requires_grad_()
    p, q = (x.softmax(-1) for x in (teacher, student))
    seen = torch.tensor([0, 2, 3, 5, 6])
    expected = (p * (p / q).log())[..., seen].sum(-1).mean()
    value = logit_kl(teacher, student)
    torch.testing.assert_close(value, expected)
    (grad,) = torch.autograd.grad(value, student)
    torch.testing.assert_close(grad, (q - p).detach() / (B * S))

    student.data[0, 0, 0] = -math.inf  # the teacher allows this token
    assert logit_kl(teacher, student) == math.inf


def test_hidden_mse():
    teacher, student = torch.randn(B, S, 5), torch.randn(B, S, 5)
    torch.testing.assert_close(hidden_mse(teacher, student), torch.nn.functional.mse_loss(student, teacher))
    expected = (teacher - student)[MASK].square().mean()
    student[~MASK] = math.nan
    torch.testing.assert_close(hidden_mse(teacher, student, MASK), expected)
    assert hidden_mse(teacher, student, torch.zeros(B, S)) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: logit_kl(torch.ones(2, 5), torch.ones(2, 4)),
            r"student_logits: .*\(2, 5\), got \(2, 4\); .* same vocabulary",
        ),
        (lambda: hidden_mse(torch.ones(2, 5), torch.ones(2, 4)), r"student_hidden: .*; project .* torch.nn.Linear"),
        (
            lambda: hidden_mse(torch.ones(2, 5, requires_grad=True), torch.ones(2, 5)),
            "teacher_hidden: it requires grad",
        ),
        (
            lambda: logit_kl(torch.ones(2, 5), torch.ones(2, 5), torch.ones(3)),
            r"mask: expected shape \(2,\), got \(3,\)",
        ),
        (lambda: logit_kl(torch.ones(2, 5), torch.ones(2, 5), temperature=-1), "temperature: .*got -1"),
    ],
)
def test_wrong_logits_and_hidden_states(call, message):
    with pytest.raises(ValueError, match=message):
        call()
