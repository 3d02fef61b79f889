"""Mask: well-formed and malformed packings, and row weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from minilm_kernels.relation.masks import Mask

from .cases import MALFORMED

CPU = torch.device("cpu")


def _mask(bounds: list[int], max_seqlen: int | None, total: int = 40) -> Mask:
    return Mask((total,), CPU, cu_seqlens=torch.tensor(bounds, dtype=torch.int32), max_seqlen=max_seqlen)


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_packings(kind):
    """check_packing raises an error. sanitize_bounds returns safe bounds that cover every token, and a fault of NaN."""
    mask = _mask(*MALFORMED[kind])
    with pytest.raises(ValueError, match="max_seqlen: " if "max_seqlen" in kind else "cu_seqlens: "):
        mask.check_packing()
    sanitized, fault = mask.sanitize_bounds()
    assert fault.isnan()
    assert sanitized.cu_seqlens.dtype == torch.int32
    assert sanitized.num_sequences == mask.num_sequences
    sanitized.check_bounds()
    assert sanitized.unpad()[1].tolist() == sanitized.cu_seqlens.tolist()


@pytest.mark.parametrize(
    ("bounds", "max_seqlen", "total"),
    [
        ([0, 40], None, 40),
        ([0, 40], 40, 40),
        ([0, 0, 13, 13, 40], 27, 40),
        ([0, 0], None, 0),
        ([0], None, 0),
        ([0], 5, 0),
    ],
)
def test_well_formed_packings_stay_as_they_are(bounds, max_seqlen, total):
    mask = _mask(bounds, max_seqlen, total)
    mask.check_packing()
    sanitized, fault = mask.sanitize_bounds()
    assert fault is None or fault == 0
    assert sanitized.cu_seqlens.tolist() == bounds
    assert sanitized.max_seqlen == max_seqlen


def test_sanitizing_does_not_wait_for_the_device():
    """Fake tensors have no values: reading one raises an error."""
    with FakeTensorMode():
        mask = Mask((40,), CPU, cu_seqlens=torch.empty(5, dtype=torch.int32), max_seqlen=12)
        sanitized, fault = mask.sanitize_bounds()
        assert sanitized.unpad()[1].shape == (5,)
        with pytest.raises(Exception, match=r"_local_scalar_dense|[Dd]ata.?[Dd]ependent"):
            fault.item()


def test_tokens_without_a_sequence_are_refused_on_every_device():
    """The shape of cu_seqlens alone shows this error, so its values are not read."""
    mask = Mask((40,), torch.device("meta"), cu_seqlens=torch.zeros(1, dtype=torch.int32, device="meta"))
    with pytest.raises(
        ValueError, match=r"cu_seqlens: expected the bounds of one sequence or more for 40 packed tokens"
    ):
        mask.check_packing()


@pytest.mark.parametrize("packed", [False, True])
def test_sequences_without_tokens_do_not_count_in_the_mean(packed):
    """Weights by hand: two of four sequences have tokens, 1 and 3, so each row of a head has 1/(2·H·1) or 1/(2·H·3)."""
    if packed:
        mask = Mask((4,), CPU, cu_seqlens=torch.tensor([0, 0, 1, 1, 4], dtype=torch.int32))
    else:
        tokens = torch.tensor([[0, 0, 0], [0, 1, 0], [0, 0, 0], [1, 1, 1]])
        mask = Mask((4, 3), CPU, attention_mask=tokens)
    weights = mask.sequence_weights("sequence", 5, torch.float64)
    assert weights[[1, 3]].tolist() == [1 / 10, 1 / 30]
    assert mask.sequence_weights("token", 5, torch.float64).tolist() == [1 / 20] * 4


@pytest.mark.parametrize("packed", [False, True])
def test_only_rows_that_count_weigh(packed):
    """Weights by hand: of sequences with 2, 0 and 3 valid tokens, 1, 0 and 2 rows count; padding never does."""
    if packed:
        query_mask = torch.tensor([0, 1, 7, 0, -1])
        mask = Mask((5,), CPU, cu_seqlens=torch.tensor([0, 2, 2, 5], dtype=torch.int32), query_mask=query_mask)
    else:
        query_mask = torch.tensor([[0, 1, 1], [1, 1, 1], [1, 0, 1]])
        mask = Mask((3, 3), CPU, torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 1]]), query_mask=query_mask)
    assert mask.row_counts.tolist() == [1, 0, 2]
    assert mask.lengths.tolist() == [2, 0, 3]
    assert mask.counted.sum() == 3
    weights = mask.sequence_weights("sequence", 5, torch.float64)
    assert weights[[0, 2]].tolist() == [1 / 10, 1 / 20]
    assert mask.sequence_weights("token", 5, torch.float64).tolist() == [1 / 15] * 3


@pytest.mark.parametrize("kind", MALFORMED)
def test_rows_of_malformed_packings(kind):
    """Counting rows reads nothing out of bounds, because it runs before the bounds are sanitized."""
    mask = replace(_mask(*MALFORMED[kind]), query_mask=torch.ones(40, dtype=torch.bool))
    assert mask.row_counts.abs().max() <= 40
    sanitized, _ = replace(mask, query_mask=torch.zeros(40)).sanitize_bounds()
    assert sanitized.counted.all()  # every row becomes NaN
