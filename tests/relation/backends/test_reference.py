"""The reference backend against a definition in scalar loops, and against known values."""

import math
from itertools import pairwise

import pytest
import torch

from minilm_kernels import relation_kl
from tests.relation.cases import MASKS, Case, make


def _loops(case: Case) -> torch.Tensor:
    """Returns the rows by the definition, one score at a time."""
    kwargs = case.kwargs
    q_t, k_t, q_s, k_s = (None if x is None else x.double() for x in case.tensors)
    k_t, k_s = (q_t if k_t is None else k_t), (q_s if k_s is None else k_s)
    heads = q_t.shape[-2]
    counted = kwargs.get("query_mask", torch.ones(case.token_shape()))
    if "cu_seqlens" in kwargs:
        bounds = kwargs["cu_seqlens"].tolist()
        spans = [((), range(a, b)) for a, b in pairwise(bounds)]
    else:
        spans = [((b,), range(q_t.shape[1])) for b in range(q_t.shape[0])]
    rows = torch.zeros(case.row_shape(), dtype=torch.float64)
    mask, prefix = kwargs.get("attention_mask"), kwargs.get("prefix_lens")
    for n, (batch, tokens) in enumerate(spans):
        for a in range(heads):
            for i in tokens:
                if (mask is not None and not mask[n, i]) or not counted[(*batch, i)]:
                    continue
                keys = [j for j in tokens if mask is None or mask[n, j]]
                if prefix is not None:
                    keys = [j for j in keys if j - tokens[0] < prefix[n] or j <= i]
                elif kwargs.get("causal"):
                    keys = [j for j in keys if j <= i]
                log_probabilities = []
                for query, key in ((q_t, k_t), (q_s, k_s)):
                    head = a * key.shape[-2] // heads  # the key head of query head a
                    scores = [
                        float(query[(*batch, i, a)] @ key[(*batch, j, head)]) / math.sqrt(query.shape[-1]) for j in keys
                    ]
                    total = math.log(sum(map(math.exp, scores)))
                    log_probabilities.append([score - total for score in scores])
                rows[(*batch, a, i)] = sum(math.exp(p) * (p - q) for p, q in zip(*log_probabilities, strict=True))
    return rows


CASES = [
    {"heads": 2},
    {"heads": 2, "cross": True},
    {"heads": 2, "rows": 0.6},
    {"heads": 4, "cross": True, "rows": 0.6, "groups": (2, 4)},
]


@pytest.mark.parametrize("kind", CASES, ids=["self", "cross", "self-rows", "cross-rows-groups"])
@pytest.mark.parametrize("mask", MASKS)
def test_rows_follow_the_definition(mask, kind):
    case = make(mask, dtype=torch.float64, **kind)
    expected = _loops(case)
    rows, _ = case.oracle("none")
    assert expected.norm() > 1
    torch.testing.assert_close(rows, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("share", [None, 0.6], ids=["all", "rows"])
@pytest.mark.parametrize("mask", MASKS)
def test_reductions_follow_from_the_rows(mask, share):
    case = make(mask, dtype=torch.float64, rows=share)
    rows, _ = case.oracle("none")
    heads = rows.shape[-2]
    counted = case.kwargs.get("query_mask", torch.ones(case.token_shape()).bool())
    if "cu_seqlens" in case.kwargs:
        bounds = case.kwargs["cu_seqlens"].tolist()
        sums = [rows[:, a:b].sum() for a, b in pairwise(bounds)]
        counts = [counted[a:b].sum().item() for a, b in pairwise(bounds)]
    else:
        real = case.kwargs.get("attention_mask", torch.ones(rows.shape[0], rows.shape[-1]))
        sums, counts = list(rows.sum((1, 2))), ((real != 0) & counted).sum(1).tolist()
    per_sequence = [total / (heads * n) for total, n in zip(sums, counts, strict=True) if n]
    expected = {
        "sum": sum(sums),
        "token": sum(sums) / (heads * sum(counts)),
        "sequence": sum(per_sequence) / len(per_sequence),
    }
    for reduction, value in expected.items():
        torch.testing.assert_close(case.oracle(reduction)[0], value, rtol=1e-13, atol=0)


@pytest.mark.parametrize("mask", ["none", "prefix-holes", "packed-causal"])
def test_grouped_keys_are_repeated_keys(mask):
    """Value and gradients equal those of keys whose heads are repeated; the gradient of a key head is their sum."""
    case = make(mask, cross=True, heads=4, groups=(2, 4), dtype=torch.float64)
    q_t, k_t, q_s, k_s = case.tensors
    repeated = Case((q_t, k_t.repeat_interleave(2, -2), q_s, k_s.expand(*q_s.shape)), case.kwargs)
    for reduction in ("sequence", "none"):
        value, (query_grad, key_grad) = case.oracle(reduction)
        expected, (expected_query_grad, expected_key_grad) = repeated.oracle(reduction)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(query_grad, expected_query_grad)
        torch.testing.assert_close(key_grad, expected_key_grad.sum(-2, keepdim=True))


def test_two_keys_by_hand():
    x_t = torch.tensor([[0.0], [1.0]], dtype=torch.float64).view(1, 2, 1, 1)
    x_s = torch.tensor([[0.0], [2.0]], dtype=torch.float64).view(1, 2, 1, 1)
    # Row 0 has the scores 0, 0 in both models; row 1 has 0, 1 in the teacher and 0, 4 in the student.
    p, q = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-4))
    expected = [0.0, p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))]
    rows = relation_kl(x_t, None, x_s, None, reduction="none", backend="reference")
    torch.testing.assert_close(rows.flatten(), torch.tensor(expected, dtype=torch.float64))
    scaled = relation_kl(x_t, None, x_s, None, reduction="none", backend="reference", teacher_scale=4.0)
    assert scaled.abs().max() < 1e-15
