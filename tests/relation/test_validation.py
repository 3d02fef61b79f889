"""Wrong arguments raise one clear error that names the argument, before any computation."""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from minilm_kernels import MiniLMv2Loss, relation_kl
from minilm_kernels.relation import relation_kl_multi


def _call(**changes):
    arguments = {
        "teacher_query": torch.randn(2, 5, 3, 8),
        "teacher_key": None,
        "student_query": torch.randn(2, 5, 3, 4, requires_grad=True),
        "student_key": None,
    } | changes
    names = ("teacher_query", "teacher_key", "student_query", "student_key")
    return relation_kl(*[arguments.pop(name) for name in names], **arguments)


def _packed(**changes):
    return _call(
        **{
            "teacher_query": torch.randn(10, 3, 8),
            "student_query": torch.randn(10, 3, 4),
            "cu_seqlens": torch.tensor([0, 4, 10], dtype=torch.int32),
        }
        | changes
    )


DENSE_ERRORS = [
    ({"teacher_query": [1.0]}, TypeError, "teacher_query: expected a tensor, got list"),
    ({"student_query": torch.ones(2, 5, 3, 4, dtype=torch.int64)}, TypeError, "student_query: .*float32.*int64"),
    ({"student_query": torch.ones(2, 5, 3, 4, dtype=torch.complex64)}, TypeError, "student_query: .*complex64"),
    (
        {"teacher_query": torch.randn(10, 3, 8)},
        ValueError,
        r"teacher_query: .*\(B, S, A, D\).*cu_seqlens.*\(10, 3, 8\)",
    ),
    ({"student_query": torch.randn(2, 6, 3, 4)}, ValueError, r"student_query: .*\(2, 5\).*\(2, 6, 3, 4\)"),
    ({"student_query": torch.randn(2, 5, 4, 4)}, ValueError, r"student_query: .*the 3 heads.*\(2, 5, 4, 4\)"),
    (
        {"teacher_key": torch.randn(2, 5, 2, 8), "student_key": torch.randn(2, 5, 3, 4)},
        ValueError,
        r"teacher_key: expected the 3 heads of teacher_query, or a number that divides them, got 2, .*\(2, 5, 2, 8\)",
    ),
    (
        {"teacher_key": torch.randn(2, 5, 1, 8), "student_key": torch.randn(2, 5, 6, 4)},
        ValueError,
        "student_key: .* divides them, got 6",
    ),
    ({"query_mask": torch.ones(2, 5, dtype=torch.complex64)}, TypeError, "query_mask: .*floats of 0 and 1, got .*comp"),
    ({"query_mask": torch.ones(2, 4).bool()}, ValueError, r"query_mask: .*\(B, S\) = \(2, 5\), got \(2, 4\)"),
    ({"query_mask": [[1] * 5] * 2}, TypeError, "query_mask: expected a tensor, got list"),
    ({"query_mask": torch.ones(2, 5, device="meta").bool()}, ValueError, "query_mask: .*cpu, got meta"),
    ({"student_query": torch.randn(2, 5, 3, 0)}, ValueError, r"student_query: .*width 1 or more.*\(2, 5, 3, 0\)"),
    (
        {"teacher_key": torch.randn(2, 5, 3, 8), "student_key": torch.randn(2, 5, 3, 6)},
        ValueError,
        "student_key: expected the head width .*4, got 6",
    ),
    (
        {"teacher_key": torch.randn(2, 5, 3, 6), "student_key": torch.randn(2, 5, 3, 4)},
        ValueError,
        "teacher_key: .*8, got 6",
    ),
    (
        {"teacher_key": torch.randn(2, 5, 3, 8)},
        ValueError,
        "^student_key: .*teacher_key is given, got None; pass both keys, or None for both .* pass student_query as",
    ),
    (
        {"student_key": torch.randn(2, 5, 3, 4)},
        ValueError,
        "^teacher_key: .*student_key is given, got None; pass both keys, or None for both .* pass teacher_query as",
    ),
    ({"student_query": torch.randn(2, 5, 3, 4, device="meta")}, ValueError, "student_query: .*device.*cpu, got meta"),
    ({"teacher_query": torch.randn(2, 5, 3, 8).requires_grad_()}, ValueError, "teacher_query: .*detach"),
    # The output of a teacher that runs without no_grad is not a leaf.
    ({"teacher_query": torch.randn(2, 5, 3, 8).requires_grad_() * 2}, ValueError, "teacher_query: .*detach"),
    (
        {"attention_mask": torch.ones(2, 5, dtype=torch.complex64)},
        TypeError,
        "attention_mask: .*bool, integers, or floats of 0 and 1, got .*comp",
    ),
    ({"attention_mask": torch.ones(2, 4).bool()}, ValueError, r"attention_mask: .*\(2, 5\), got \(2, 4\)"),
    ({"attention_mask": torch.ones(2, 1, 1, 5).bool()}, ValueError, r"attention_mask: .*\(2, 5\), got \(2, 1, 1, 5\)"),
    ({"attention_mask": [[1] * 5] * 2}, TypeError, "attention_mask: expected a tensor, got list"),
    ({"attention_mask": torch.ones(2, 5, device="meta").bool()}, ValueError, "attention_mask: .*cpu, got meta"),
    ({"max_seqlen": 5}, ValueError, "max_seqlen: .*cu_seqlens.*5"),
    ({"causal": 1}, TypeError, "causal: expected a bool, got int"),
    ({"prefix_lens": torch.tensor([1.0, 2.0])}, TypeError, "prefix_lens: .*float32"),
    ({"prefix_lens": torch.tensor([True, False])}, TypeError, "prefix_lens: .*bool"),
    ({"prefix_lens": torch.tensor([1, 2, 3])}, ValueError, r"prefix_lens: .*\(2,\), got \(3,\)"),
    ({"teacher_scale": "1"}, TypeError, "teacher_scale: .*str"),
    (
        {"student_scale": torch.ones((), requires_grad=True)},
        TypeError,
        r"student_scale: .*got Tensor: .*item\(\); to train it, multiply student_query by it and pass both keys",
    ),
    ({"student_scale": float("nan")}, ValueError, "student_scale: .*finite.*nan"),
    ({"reduction": "mean"}, ValueError, "reduction: .*sequence, token, sum, none, got 'mean'"),
    ({"backend": "fast"}, ValueError, "backend: .*auto.*torch.*got 'fast'"),
]
_VALID = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
_SEGMENTS = torch.tensor([[1, 1, 2, 2, 0], [1, 1, 1, 2, 2]])
MASK_ERRORS = [
    ((1 - _VALID) * -10000, "-10000 to 0, like an additive mask: pass mask == 0"),
    ((1 - _VALID) * -10000.0, "-10000.0 to .*additive"),
    (torch.where(_VALID > 0, 0.0, -torch.inf), "-inf to 0.0, like an additive"),
    (torch.where(_VALID > 0, 0.0, torch.finfo(torch.float16).min).half(), "additive"),
    (torch.full((2, 5), -torch.inf), "additive"),
    (_SEGMENTS, "0 to 2, like segment numbers: .*cu_seqlens"),
    (_SEGMENTS.to(torch.uint8), "segment numbers"),
    (_SEGMENTS.float(), "segment numbers"),
    (torch.tensor([[1, -1, 0, 0, 0]] * 2), "-1 to 1"),
    (_VALID * 0.5, "floats of 0 and 1, .* 0.0 to 0.5$"),
    (_VALID * torch.nan, "nan"),
]
QUERY_MASK_ERRORS = [
    (torch.where(_VALID > 0, 17, -100), "rows that count, .* -100 to 17, like labels: pass labels != -100"),
    ((1 - _VALID) * -10000.0, "additive.* True on rows that count"),
    (_VALID * 0.5, "floats of 0 and 1, .* 0.0 to 0.5$"),
    (_SEGMENTS, "0 to 2$"),
]
PACKED_ERRORS = [
    ({"attention_mask": torch.ones(2, 5).bool()}, ValueError, "attention_mask: .*packed"),
    ({"cu_seqlens": torch.tensor([0, 4, 10])}, TypeError, r"cu_seqlens: .*int32, got torch.int64: .*\.int\(\)"),
    ({"cu_seqlens": torch.zeros(0, dtype=torch.int32)}, ValueError, r"cu_seqlens: .*\(N \+ 1,\), got \(0,\)"),
    ({"cu_seqlens": torch.zeros(2, 2, dtype=torch.int32)}, ValueError, r"cu_seqlens: .*got \(2, 2\)"),
    ({"cu_seqlens": torch.tensor([0, 4, 9], dtype=torch.int32)}, ValueError, r"cu_seqlens: .*10 .*\[0, 4, 9\]"),
    ({"cu_seqlens": torch.tensor([0, 7, 4, 10], dtype=torch.int32)}, ValueError, r"cu_seqlens: .*\[0, 7, 4, 10\]"),
    ({"cu_seqlens": torch.tensor([2, 4, 10], dtype=torch.int32)}, ValueError, "cu_seqlens: .*rise from 0"),
    ({"query_mask": torch.ones(2, 5).bool()}, ValueError, r"query_mask: expected shape \(T,\) = \(10,\), got \(2, 5\)"),
    ({"max_seqlen": 5}, ValueError, "max_seqlen: .*6 tokens, got 5"),
    ({"max_seqlen": -1}, ValueError, "max_seqlen: .*got -1"),
    ({"max_seqlen": 6.0}, TypeError, "max_seqlen: .*float"),
    ({"prefix_lens": torch.tensor([1, 2, 3])}, ValueError, r"prefix_lens: .*\(2,\), got \(3,\)"),
    ({"teacher_query": torch.randn(2, 5, 3, 8)}, ValueError, r"teacher_query: .*packed \(T, A, D\)"),
]


@pytest.mark.parametrize(("changes", "exception", "message"), DENSE_ERRORS, ids=lambda x: "")
def test_dense(changes, exception, message):
    _call()
    with pytest.raises(exception, match=message):
        _call(**changes)


@pytest.mark.parametrize(("changes", "exception", "message"), PACKED_ERRORS, ids=lambda x: "")
def test_packed(changes, exception, message):
    _packed()
    with pytest.raises(exception, match=message):
        _packed(**changes)


@pytest.mark.parametrize(("mask", "message"), MASK_ERRORS, ids=lambda x: "")
def test_masks_that_say_something_else(mask, message):
    with pytest.raises(ValueError, match=f"^attention_mask: .*{message}"):
        _call(attention_mask=mask)


@pytest.mark.parametrize(("mask", "message"), QUERY_MASK_ERRORS, ids=lambda x: "")
def test_query_masks_that_say_something_else(mask, message):
    with pytest.raises(ValueError, match=f"^query_mask: .*{message}"):
        _call(query_mask=mask)


def test_a_float_mask_that_cannot_be_read_makes_nan():
    """A compiled call, like a call on an accelerator, reads no values: floats other than 0 and 1 give NaN."""
    teacher, student = torch.randn(2, 5, 3, 8), torch.randn(2, 5, 3, 4)

    def call(mask, rows):
        return relation_kl(teacher, None, student, None, attention_mask=mask, query_mask=rows, backend="reference")

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    good, bad = _VALID.float(), (1 - _VALID) * -10000.0
    torch.testing.assert_close(compiled(good, good), call(_VALID, _VALID))
    for masks in ((bad, good), (good, bad), (bad, bad)):
        assert compiled(*masks).isnan()


def _kinds(x):
    """Yields tensors that are not dense, each with the conversion that the message names."""
    yield torch.nested.nested_tensor(list(x), layout=torch.jagged), r"nested.*values\(\) with .*offsets\(\).int\(\)"
    yield torch.nested.nested_tensor(list(x)), r"nested.*values\(\)"
    yield x.to_sparse(), r"sparse_coo.*to_dense\(\)"
    yield x.flatten(1).to_sparse_csr(), r"sparse_csr.*to_dense\(\)"
    if x.is_floating_point():
        yield x.to_mkldnn(), r"mkldnn.*to_dense\(\)"
        yield torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), r"quantized.*dequantize\(\)"
        yield torch.masked.masked_tensor(x, x > 0), r"MaskedTensor.*get_data\(\)"


@pytest.mark.filterwarnings("ignore")  # prototypes of PyTorch
def test_tensors_of_other_kinds():
    """The error names the argument. It does not come from PyTorch's own code."""
    arguments = {"teacher_query": torch.randn(2, 5, 3, 8), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    for name, x in arguments.items():
        for kind, message in _kinds(x):
            with pytest.raises(TypeError, match=f"^{name}: expected a dense tensor, got .*{message}"):
                _call(**{name: kind})
    with pytest.raises(TypeError, match="cu_seqlens: expected a dense tensor"):
        _packed(cu_seqlens=torch.tensor([0, 4, 10], dtype=torch.int32).to_sparse())
    for kind, message in _kinds(torch.randn(2, 5, 24)):
        with pytest.raises(TypeError, match=f"^teacher.value: expected a dense tensor, got .*{message}"):
            MiniLMv2Loss(4)([torch.randn(2, 5, 24)] * 2 + [kind], [torch.randn(2, 5, 12)] * 3)


def test_distributed_tensors():
    class DTensor(torch.Tensor):  # recognised by its name; importing the real class takes seconds
        pass

    with pytest.raises(TypeError, match=r"^teacher_query: .*DTensor: pass its to_local\(\).*full_tensor\(\)"):
        _call(teacher_query=torch.randn(2, 5, 3, 8).as_subclass(DTensor))


def test_relations_of_a_grouped_query_model():
    """Mixed relations need heads of one width, and self relations need the heads of all queries of the call."""
    sides = [{"query": torch.randn(2, 5, 4, width), "key": torch.randn(2, 5, 4, width // 4)} for width in (16, 8)]
    assert relation_kl_multi(*sides, [("query", "query"), ("key", "key")]).shape == (2,)
    with pytest.raises(ValueError, match=r"teacher_key: .*16, got 4.*grouped-query.*cut the key .* width 16"):
        relation_kl_multi(*sides, [("query", "key")])
    for side, width in zip(sides, (16, 8), strict=True):
        side["key"] = side["key"].flatten(2).unflatten(-1, (-1, width))
    assert relation_kl_multi(*sides, [("query", "key")], backend="reference").shape == (1,)
    with pytest.raises(ValueError, match=r"teacher_key: expected the 4 heads .*, got 1.*a call with them"):
        relation_kl_multi(*sides, [("query", "query"), ("key", "key")])
    assert relation_kl_multi(*sides, [("key", "key")]).shape == (1,)


def test_validation_reads_no_tensor_values():
    """No call waits for a device: it works with fake tensors, which have no values."""
    with FakeTensorMode():
        value = _call(
            attention_mask=torch.ones(2, 5).long(),
            prefix_lens=torch.tensor([1, 2]),
            query_mask=torch.ones(2, 5),
            student_query=torch.randn(2, 5, 3, 4, requires_grad=True),
            teacher_query=torch.randn(2, 5, 3, 8),
        )
        value.backward()
        assert value.shape == ()
        packed = _packed(
            teacher_query=torch.randn(10, 3, 8),
            student_query=torch.randn(10, 3, 4),
            cu_seqlens=torch.tensor([0, 4, 10], dtype=torch.int32),
            query_mask=torch.ones(10).bool(),
        )
        assert packed.shape == ()
        with pytest.raises(DataDependentOutputException):  # shows that reading a value raises an error here
            _call(teacher_query=torch.randn(2, 5, 3, 8), student_query=torch.randn(2, 5, 3, 4)).item()


@pytest.mark.parametrize(
    ("weights", "reduction", "error", "message"),
    [
        ([1.0], "sum", ValueError, r"weights: expected one number per relation, 2, got \[1.0\]"),
        ([1.0, 2.0], "none", ValueError, 'weights: expected None with reduction "none"'),
        ([1.0, float("nan")], "sum", ValueError, "weights: expected finite numbers, got nan"),
        ([1.0, "2"], "sum", TypeError, "weights: expected numbers, got str"),
    ],
)
def test_weights_of_relations(weights, reduction, error, message):
    x = {"q": torch.zeros(1, 2, 1, 4)}
    with pytest.raises(error, match=message):
        relation_kl_multi(x, x, [("q", "q")] * 2, weights=weights, reduction=reduction)
