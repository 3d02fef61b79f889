"""Every wrong argument is one clear error that names it, before any work."""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from minilm_kernels import relation_kl
from minilm_kernels.relation import relations_kl


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
    ({"student_query": torch.randn(2, 6, 3, 4)}, ValueError, r"student_query: .*\(2, 5, 3\).*\(2, 6, 3, 4\)"),
    ({"student_query": torch.randn(2, 5, 4, 4)}, ValueError, r"student_query: .*\(2, 5, 3\).*\(2, 5, 4, 4\)"),
    ({"student_query": torch.randn(2, 5, 3, 0)}, ValueError, r"student_query: .*width 1 or more.*\(2, 5, 3, 0\)"),
    ({"student_key": torch.randn(2, 5, 3, 6)}, ValueError, "student_key: expected the head width .*4, got 6"),
    ({"teacher_key": torch.randn(2, 5, 3, 6)}, ValueError, "teacher_key: .*8, got 6"),
    ({"student_query": torch.randn(2, 5, 3, 4, device="meta")}, ValueError, "student_query: .*device.*cpu, got meta"),
    ({"teacher_query": torch.randn(2, 5, 3, 8).requires_grad_()}, ValueError, "teacher_query: .*detach"),
    ({"attention_mask": torch.ones(2, 5, dtype=torch.complex64)}, TypeError, "attention_mask: .*integer or bool.*comp"),
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
    ({"student_scale": float("nan")}, ValueError, "student_scale: .*finite.*nan"),
    ({"reduction": "mean"}, ValueError, "reduction: .*sequence, token, sum, none, got 'mean'"),
    ({"backend": "fast"}, ValueError, "backend: .*auto.*torch.*got 'fast'"),
]
PACKED_ERRORS = [
    ({"attention_mask": torch.ones(2, 5).bool()}, ValueError, "attention_mask: .*packed"),
    ({"cu_seqlens": torch.tensor([0, 4, 10])}, TypeError, "cu_seqlens: expected int32, got torch.int64"),
    ({"cu_seqlens": torch.zeros(0, dtype=torch.int32)}, ValueError, r"cu_seqlens: .*\(N \+ 1,\), got \(0,\)"),
    ({"cu_seqlens": torch.zeros(2, 2, dtype=torch.int32)}, ValueError, r"cu_seqlens: .*got \(2, 2\)"),
    ({"cu_seqlens": torch.tensor([0, 4, 9], dtype=torch.int32)}, ValueError, r"cu_seqlens: .*10 .*\[0, 4, 9\]"),
    ({"cu_seqlens": torch.tensor([0, 7, 4, 10], dtype=torch.int32)}, ValueError, r"cu_seqlens: .*\[0, 7, 4, 10\]"),
    ({"cu_seqlens": torch.tensor([2, 4, 10], dtype=torch.int32)}, ValueError, "cu_seqlens: .*rise from 0"),
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


def test_mixed_relations_of_a_grouped_query_model():
    """Keys narrower than queries: equal-width relations are computed, mixed ones refused."""
    sides = [{"query": torch.randn(2, 5, 3, width), "key": torch.randn(2, 5, 3, width // 4)} for width in (16, 8)]
    assert relations_kl(*sides, [("query", "query"), ("key", "key")]).shape == (2,)
    with pytest.raises(ValueError, match=r"teacher_key: .*16, got 4.*grouped-query"):
        relations_kl(*sides, [("query", "key")])


def test_validation_reads_no_tensor_values():
    """Nothing synchronises with a device: under fake tensors, which have no values, a whole call goes through."""
    with FakeTensorMode():
        value = _call(
            attention_mask=torch.ones(2, 5).long(),
            prefix_lens=torch.tensor([1, 2]),
            student_query=torch.randn(2, 5, 3, 4, requires_grad=True),
            teacher_query=torch.randn(2, 5, 3, 8),
        )
        value.backward()
        assert value.shape == ()
        packed = _packed(
            teacher_query=torch.randn(10, 3, 8),
            student_query=torch.randn(10, 3, 4),
            cu_seqlens=torch.tensor([0, 4, 10], dtype=torch.int32),
        )
        assert packed.shape == ()
        with pytest.raises(DataDependentOutputException):  # the yardstick: reading a value does fail here
            _call(teacher_query=torch.randn(2, 5, 3, 8), student_query=torch.randn(2, 5, 3, 4)).item()
