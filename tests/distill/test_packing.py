"""Packing of documents into samples."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilm_kernels.distill import packing as packing_module
from minilm_kernels.distill.packing import PADDING, Packer

from .streams import TOKENIZER, pieces


@given(
    lengths=st.lists(st.integers(0, 90), max_size=30),
    max_seq_length=st.integers(16, 40),
    packing=st.booleans(),
    max_document_length=st.none() | st.integers(8, 50),
)
def test_packing_keeps_every_token_in_order(
    lengths: list[int], max_seq_length: int, packing: bool, max_document_length: int | None
) -> None:
    packer = Packer(TOKENIZER, max_seq_length, packing, max_document_length)
    longest = min(max_seq_length, max_document_length or max_seq_length)
    documents = [[10 + i % 50] * length for i, length in enumerate(lengths)]
    for document in documents:
        packer.add(np.array(document, np.int32))
    packer.flush()
    samples = packer.samples
    found = pieces(samples)
    assert [token for piece in found for token in piece] == [token for document in documents for token in document]
    assert all(len(piece) + 2 <= longest for piece in found)
    shortest = min(packing_module.SHORTEST_CUT, longest // 4)
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
    assert [len(piece) for piece in pieces(packer.samples)] == [14, 6, 6, 3]


def test_borders_are_known_without_tokens() -> None:
    lengths = [3, 40, 0, 9, 17, 1, 90, 30]
    packer, planner = (Packer(TOKENIZER, 24, packing=True, max_document_length=20) for _ in range(2))
    for length in lengths:
        packer.add(np.full(length, 9, np.int32))
    packer.flush()
    planned = [placed for length in lengths for placed in planner.place(length)]
    planner.flush()
    samples = packer.samples
    assert planner.complete == len(samples.ids)
    for number in range(planner.complete):
        sizes = [stop - start for sample, start, stop in planned if sample == number]
        assert sizes == [len(piece) for piece in pieces(samples.part(slice(number, number + 1)))]


def test_special_tokens_need_room() -> None:
    with pytest.raises(ValueError, match="--max-seq-length"):
        Packer(TOKENIZER, 3, packing=True)
    with pytest.raises(ValueError, match=r"--max-document-length \(3\) leaves no room"):
        Packer(TOKENIZER, 30, True, max_document_length=3)
