"""From documents to rows: packing, shuffling, the held-out split, and streams that continue exactly."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from minilm_kernels.distill import data
from minilm_kernels.distill.data import (
    PADDING,
    Packer,
    Rows,
    RowStream,
    Tokenizer,
    collect_heldout,
    fraction_split,
    stack,
)
from minilm_kernels.distill.sources import Place, Source, TextFile

from .tiny import make_texts, make_tokenizer

TOKENIZER = Tokenizer(make_tokenizer())


def pieces(rows: Rows) -> list[list[int]]:
    """The token ids of every piece, special tokens removed, after checking how each row is laid out."""
    found = []
    for ids, positions in zip(*rows, strict=True):
        used = int((positions != PADDING).sum())
        assert (positions[used:] == PADDING).all()
        assert (ids[used:] == 0).all()
        for piece, order in zip(
            np.split(ids[:used], np.flatnonzero(positions[:used] == 0)[1:]),
            np.split(positions[:used], np.flatnonzero(positions[:used] == 0)[1:]),
            strict=True,
        ):
            assert order.tolist() == list(range(len(piece)))
            assert (piece[0], piece[-1]) == (2, 3)
            found.append(piece[1:-1].tolist())
    return found


@given(lengths=st.lists(st.integers(0, 90), max_size=30), seq_len=st.integers(16, 40), packing=st.booleans())
def test_packing_keeps_every_token_in_order(lengths: list[int], seq_len: int, packing: bool) -> None:
    packer = Packer(TOKENIZER, seq_len, packing)
    documents = [[10 + i % 50] * length for i, length in enumerate(lengths)]
    for document in documents:
        packer.add(np.array(document, np.int32))
    packer.flush()
    rows = stack(packer.rows, seq_len)
    found = pieces(rows)
    assert [token for piece in found for token in piece] == [token for document in documents for token in document]
    shortest = min(data.SHORTEST_CUT, seq_len // 4)
    assert all(
        len(piece) >= min(shortest, lengths[piece[0] - 10]) for piece in found
    )  # documents here are one token each
    if packing:
        room = (rows.positions == PADDING).sum(1)[:-1]
        assert (room < shortest * 2 + 2).all()  # every row but the last is full, as far as cuts may go
    else:
        assert ((rows.positions == 0).sum(1) == 1).all()


def test_a_document_that_fits_is_not_cut() -> None:
    packer = Packer(TOKENIZER, 16, packing=True)
    for length in (14, 6, 6, 3):
        packer.add(np.full(length, 9, np.int32))
    packer.flush()
    assert [len(piece) for piece in pieces(stack(packer.rows, 16))] == [14, 6, 6, 3]


def test_special_tokens_need_room() -> None:
    with pytest.raises(ValueError, match="--seq-len"):
        Packer(TOKENIZER, 3, packing=True)


class Documents:
    """A source of given texts that notes where reading began."""

    def __init__(self, texts: list[str]) -> None:
        self.texts, self.began = texts, list[Any]()

    def identity(self) -> list[Any]:
        return [len(self.texts)]

    def read(self, place: Place | None = None) -> Iterator[tuple[str, Place]]:
        self.began.append(place)
        for number in range(place or 0, len(self.texts)):
            yield self.texts[number], number + 1


def stream(sources: list[Source], **changes: Any) -> RowStream:
    arguments = {"held_out": lambda text: False, "shuffle_rows": 10, "seed": 0, "packing": True, **changes}
    return RowStream(sources, TOKENIZER, Packer(TOKENIZER, 24, arguments.pop("packing")), **arguments)


def words(rows: Rows) -> list[int]:
    return sorted(token for piece in pieces(rows) for token in piece)


def take_epoch(rows: RowStream) -> Rows:
    taken, epoch = [rows.take(1)], rows.epoch
    while True:
        row = rows.take(1)
        if rows.epoch > epoch:
            rows.first_of_next = row
            break
        taken.append(row)
    return Rows(*(np.concatenate(part) for part in zip(*taken, strict=True)))


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("shuffle_rows", [1, 7, 10_000])
def test_every_epoch_has_every_token_once_in_another_order(
    packing: bool, shuffle_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "READ_DOCUMENTS", 4)
    texts = make_texts(60)
    halves: list[Source] = [Documents(texts[:20]), Documents(texts[20:30]), Documents(texts[30:])]
    rows = stream(halves, packing=packing, shuffle_rows=shuffle_rows)
    expected = sorted(token for text in texts for token in TOKENIZER(text).tolist())
    first = take_epoch(rows)
    assert words(first) == expected
    if shuffle_rows > 1:
        again = take_epoch(stream(halves, packing=packing, shuffle_rows=shuffle_rows))
        other = take_epoch(stream(halves, packing=packing, shuffle_rows=shuffle_rows, seed=1))
        assert np.array_equal(again.ids, first.ids)
        assert not np.array_equal(other.ids[:10], first.ids[:10])
    second = Rows(*(np.concatenate([a, b]) for a, b in zip(rows.first_of_next, take_epoch(rows), strict=True)))
    assert words(second) == expected
    assert np.array_equal(second.ids[:10], first.ids[:10]) == (shuffle_rows == 1)


@pytest.mark.parametrize("shuffle_rows", [1, 12])
def test_a_stream_continues_exactly_after_any_row(shuffle_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "READ_DOCUMENTS", 3)

    def make() -> RowStream:
        return stream([Documents(make_texts(9, seed=seed)) for seed in range(3)], shuffle_rows=shuffle_rows)

    whole = make()
    total = 120
    rows, states = [], []
    for _ in range(total):
        numbers, tensors = whole.state()
        states.append((json.dumps(numbers), save(tensors)))
        rows.append(whole.take(1))
    assert whole.epoch >= 2
    for number in range(0, total, 4):
        numbers, tensors = states[number]
        continued = make()
        continued.take(5)  # what it did before does not matter
        continued.load_state(json.loads(numbers), load(tensors))
        later = continued.take(total - number)
        assert np.array_equal(later.ids, np.concatenate([row.ids for row in rows[number:]]))
        assert np.array_equal(later.positions, np.concatenate([row.positions for row in rows[number:]]))
        assert continued.epoch == whole.epoch


def test_continuing_reads_from_the_saved_place_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "READ_DOCUMENTS", 5)
    sources = [Documents(make_texts(100))]
    first = stream(list(sources), shuffle_rows=4)
    first.take(40)
    numbers, tensors = first.state()
    sources[0].began.clear()
    again = stream(list(sources), shuffle_rows=4)
    again.load_state(numbers, tensors)
    again.take(10)
    assert len(sources[0].began) == 1
    assert sources[0].began[0] >= 30


def test_changed_text_is_refused() -> None:
    numbers, tensors = stream([Documents(["a b"])]).state()
    with pytest.raises(ValueError, match="text has changed"):
        stream([Documents(["a b", "c"])]).load_state(numbers, tensors)


@pytest.mark.parametrize("texts", [[], ["", "  "]])
def test_an_empty_corpus_is_refused(texts: list[str]) -> None:
    with pytest.raises(ValueError, match="training text is empty"):
        stream([Documents(texts), Documents(texts)]).take(1)


def test_an_unreadable_line_is_named_when_it_is_reached(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"\n\n".join([b"w1 w2"] * 50 + [b"\xff"]))
    with pytest.raises(ValueError, match=r"a\.txt, line 101: not UTF-8"):
        stream([TextFile(file, False)]).take(1)


def heldout(texts: list[str], separate: bool = False, fraction: float = 0.2, most: int = 1000) -> data.HeldOut:
    packer = Packer(TOKENIZER, 24, packing=True)
    return collect_heldout([Documents(texts)], separate, fraction, packer, TOKENIZER, most)


def numbered(count: int) -> list[str]:
    """Documents that their token tells apart, in an order of their own."""
    return [f"w{i}" for i in range(count)]


@pytest.mark.parametrize("separate", [True, False])
def test_heldout_documents_never_train(separate: bool) -> None:
    texts = numbered(60) * 2  # repeated: a copy must not train either
    chosen = heldout(texts[:7] if separate else texts, separate)
    held = set(words(chosen.rows))
    rows = stream([Documents(texts)], held_out=chosen.contains)
    trained = set(words(rows.take(100)))
    assert held
    assert held.isdisjoint(trained)
    assert len(held | trained) == 60


def test_the_split_is_of_the_size_asked_for_and_ignores_order() -> None:
    texts = [f"document {i}" for i in range(20_000)]
    chosen = [text for text in texts if fraction_split(0.1)(text)]
    assert 1800 < len(chosen) < 2200
    assert set(chosen) == {text for text in reversed(texts) if fraction_split(0.1)(text)}
    assert not any(map(fraction_split(0.0), texts))


def test_heldout_rows_are_limited_and_needed() -> None:
    assert len(heldout(make_texts(200), most=5).rows.ids) == 5
    with pytest.raises(ValueError, match=r"--heldout-fraction 0\.01 holds out none"):
        heldout(["one", "two"], fraction=0.01)
    with pytest.raises(ValueError, match="--heldout-text holds no text"):
        heldout([" "], separate=True)


@pytest.mark.parametrize("form", ["[CLS] $A [SEP]", "$A [SEP]", "$A"])
def test_special_tokens_are_found(form: str) -> None:
    from tokenizers import processors

    inner: Callable[..., Any] = make_tokenizer()
    inner.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=form, special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    found = Tokenizer(inner)
    assert [*found.prefix, *found("w0 w1"), *found.suffix] == inner("w0 w1")["input_ids"]
