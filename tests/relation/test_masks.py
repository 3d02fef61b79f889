"""Mask: well-formed and malformed packings, and row weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from minilm_kernels.relation.masks import Mask

from .cases import MALFORMED

CPU = torch.device("cpu")


def _mask(bounds: list[int], max_seqlen: int | None, total: int = 40) -> Mask:
    return Mask((total,), CPU, cu_seqlens=torch.tensor(bounds, dtype=torch.int32), max_seqlen=max_seqlen)


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_packings(kind):
    with pytest.raises(ValueError, match="max_seqlen: " if "max_seqlen" in kind else "cu_seqlens: "):
        _mask(*MALFORMED[kind]).check_packing()


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
def test_well_formed_packings(bounds, max_seqlen, total):
    mask = _mask(bounds, max_seqlen, total)
    mask.check_packing()
    assert mask.unpad()[1].tolist() == bounds


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
    """Counting rows reads nothing out of bounds, because it runs before the bounds are checked."""
    mask = replace(_mask(*MALFORMED[kind]), query_mask=torch.ones(40, dtype=torch.bool))
    assert mask.row_counts.abs().max() <= 40
