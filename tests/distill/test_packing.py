"""Packing of documents into samples."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilm_kernels.distill import packing as packing_module
from minilm_kernels.distill.packing import PADDING, Packer, stack

from .streams import TOKENIZER, pieces


@given(lengths=st.lists(st.integers(0, 90), max_size=30), max_seq_length=st.integers(16, 40), packing=st.booleans())
def test_packing_keeps_every_token_in_order(lengths: list[int], max_seq_length: int, packing: bool) -> None:
    packer = Packer(TOKENIZER, max_seq_length, packing)
    documents = [[10 + i % 50] * length for i, length in enumerate(lengths)]
    for document in documents:
        packer.add(np.array(document, np.int32))
    packer.flush()
    samples = stack(packer.samples, max_seq_length)
    found = pieces(samples)
    assert [token for piece in found for token in piece] == [token for document in documents for token in document]
    shortest = min(packing_module.SHORTEST_CUT, max_seq_length // 4)
    assert all(
        len(piece) >= min(shortest, lengths[piece[0] - 10]) for piece in found
    )  # all tokens of a document are equal here
    if packing:
        room = (samples.positions == PADDING).sum(1)[:-1]
        assert (room < shortest * 2 + 2).all()  # all samples but the last are as full as the shortest piece allows
    else:
        assert ((samples.positions == 0).sum(1) == 1).all()


def test_a_document_that_fits_is_not_cut() -> None:
    packer = Packer(TOKENIZER, 16, packing=True)
    for length in (14, 6, 6, 3):
        packer.add(np.full(length, 9, np.int32))
    packer.flush()
    assert [len(piece) for piece in pieces(stack(packer.samples, 16))] == [14, 6, 6, 3]


def test_special_tokens_need_room() -> None:
    with pytest.raises(ValueError, match="--max-seq-length"):
        Packer(TOKENIZER, 3, packing=True)
