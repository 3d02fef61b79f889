"""From documents to rows: packing, shuffling, the held-out split, and streams that continue exactly."""

from __future__ import annotations

import gzip
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from minilm_kernels.distill import data
from minilm_kernels.distill.bad_documents import BadDocuments
from minilm_kernels.distill.data import (
    PADDING,
    HeldOut,
    Packer,
    Rows,
    RowStream,
    Tokenizer,
    collect_heldout,
    digest,
    limit_of,
    stack,
)
from minilm_kernels.distill.sources import Document, Place, Prefix, Source, open_sources

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
    """A source of given texts (`None`: a null, `...`: a bad document) that notes where reading began."""

    def __init__(self, texts: list[Any], name: str = "given") -> None:
        self.texts, self.name, self.began = texts, name, list[Any]()

    def read(self, place: Place | None = None, prefix: Prefix | None = None) -> Iterator[Document]:
        self.began.append(place)
        for number in range(place or 0, len(self.texts)):
            text = self.texts[number]
            if prefix is not None:
                prefix.add_row(text)
            where = f"{self.name}, row {number + 1}"
            yield Document(None if text is ... else text, where, number + 1, "is bad" if text is ... else "")

    def prefix(self, size: int) -> Prefix:
        prefix = Prefix()
        for text in self.texts[:size]:
            prefix.add_row(text)
        return prefix


def stream(sources: list[Source], policy: str = "skip", **changes: Any) -> RowStream:
    arguments = {"held_out": None, "shuffle_rows": 10, "seed": 0, "packing": True, **changes}
    packer = Packer(TOKENIZER, 24, arguments.pop("packing"))
    said = arguments.pop("said", [])
    return RowStream(sources, TOKENIZER, packer, bad_documents=BadDocuments(policy, said.append), **arguments)


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


@pytest.mark.parametrize(
    ("texts", "message"),
    [([], "training text is empty"), (["", "  "], "empty"), ([None], r"empty.*\(2 without text \(null\)\)")],
)
def test_an_empty_corpus_is_refused(texts: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stream([Documents(texts), Documents(texts)]).take(1)


def text_lines(documents: list[Any]) -> bytes:
    return b"\n\n".join(b"w1 \xff w2" if text is ... else (text or "").encode() for text in documents)


def json_lines(documents: list[Any]) -> bytes:
    bad = '{"text": "w1 w2'
    return "\n".join(bad if text is ... else json.dumps({"text": text}) for text in documents).encode()


def json_array(documents: list[Any]) -> bytes:
    bad = '{"text": "w1 w2'
    return ("[" + ",\n".join(bad if text is ... else json.dumps({"text": text}) for text in documents) + "]").encode()


def csv_lines(documents: list[Any]) -> bytes:
    rows = [{None: '1,""', ...: '1,"w1 w2'}.get(text) or f'1,"{text}"' for text in documents]
    return "\n".join(["n,text", *rows, ""]).encode()


def parquet(documents: list[Any]) -> bytes:
    cells = [b"w1 \xff w2" if text is ... else text and text.encode() for text in documents]
    column = pa.array(cells)
    column = pa.Array.from_buffers(pa.string(), len(cells), column.buffers(), column.null_count)
    content = io.BytesIO()
    pq.write_table(pa.table({"text": column}), content, row_group_size=9)
    return content.getvalue()


FORMS: dict[str, Callable[[list[Any]], bytes]] = {
    "a.txt": text_lines,
    "a.jsonl": json_lines,
    "a.jsonl.gz": lambda documents: gzip.compress(json_lines(documents), mtime=0),
    "a.json": json_array,
    "a.csv": csv_lines,
    "a.parquet": parquet,
}
GOOD = make_texts(30, seed=5, longest=12)


def corpus(folder: Path, name: str, documents: list[Any]) -> list[Source]:
    """Two files, of which the second holds the documents."""
    (folder / "A.txt").write_text("\n\n".join(make_texts(4, seed=6, longest=9)))
    (folder / name).write_bytes(FORMS[name](documents))
    return open_sources([str(folder / "A.txt"), str(folder / name)])


def same(one: Rows, other: Rows) -> bool:
    return np.array_equal(one.ids, other.ids) and np.array_equal(one.positions, other.positions)


@pytest.mark.parametrize("shuffle_rows", [1, 6])
@pytest.mark.parametrize("at", [0, 14, 30], ids=["first", "middle", "last"])
@pytest.mark.parametrize("name", FORMS)
def test_a_stream_is_that_of_the_good_documents(
    name: str, at: int, shuffle_rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bad documents and nulls change nothing, whatever they are read together with, and wherever a run is resumed."""
    monkeypatch.setattr(data, "READ_DOCUMENTS", 4)
    count = 60
    cleaned = stream(corpus(tmp_path, name, GOOD), shuffle_rows=shuffle_rows)
    expected = cleaned.take(count)
    assert cleaned.epoch >= 2
    documents = [*GOOD[:at], ..., None, *GOOD[at:]]

    said: list[str] = []
    whole = stream(corpus(tmp_path, name, documents), shuffle_rows=shuffle_rows, said=said)
    states = []
    for number in range(count):
        numbers, tensors = whole.state()
        states.append((json.dumps(numbers), save(tensors)))
        assert same(whole.take(1), expected.part(slice(number, number + 1)))
    assert whole.epoch == cleaned.epoch
    assert len(said) == 1  # in the first epoch only
    line = {"a.txt": 2 * at + 1, "a.json": at + 1, "a.csv": at + 2}.get(name, at + 1)
    row = f"row {line}: not UTF-8" if name == "a.parquet" else f"line {line}"
    assert f"skipped a document: {tmp_path / name}, {row}" in said[0]
    nulls = 0 if name in ("a.txt", "a.csv") else 1
    bad = whole.bad_documents
    assert whole.epoch <= bad.bad <= whole.epoch + 1
    assert bad.nulls in (nulls * bad.bad, nulls * (bad.bad - 1))

    for number in range(0, count, 7):
        continued = stream(corpus(tmp_path, name, documents), shuffle_rows=shuffle_rows)
        continued.load_state(json.loads(states[number][0]), load(states[number][1]))
        assert same(continued.take(count - number), expected.part(slice(number, count)))
        assert (continued.bad_documents.bad, continued.bad_documents.nulls) == (bad.bad, bad.nulls)


@pytest.mark.parametrize("shuffle_rows", [1, 6])
@pytest.mark.parametrize("at", [0, 14, 30], ids=["first", "middle", "last"])
@pytest.mark.parametrize("name", FORMS)
def test_a_bad_document_may_end_a_run_that_continues_once_it_is_repaired(
    name: str, at: int, shuffle_rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "READ_DOCUMENTS", 4)
    count = 60
    repaired = [*GOOD[:at], "w1 w2", *GOOD[at:]]
    expected = stream(corpus(tmp_path, name, repaired), shuffle_rows=shuffle_rows).take(count)

    ended = stream(corpus(tmp_path, name, [*GOOD[:at], ..., *GOOD[at:]]), "error", shuffle_rows=shuffle_rows)
    message = rf"{re.escape(str(tmp_path / name))}, (line|row) \d+.*--bad-documents skip.*--resume"
    done = 0
    with suppress(ValueError):
        while True:
            assert same(ended.take(3), expected.part(slice(done, done + 3)))
            done += 3
    with pytest.raises(ValueError, match=message):  # another try changes nothing
        ended.take(5)
    numbers, tensors = ended.state()
    numbers, kept = json.loads(json.dumps(numbers)), save(tensors)
    ended.close()

    for policy in ("error", "skip"):
        continued = stream(corpus(tmp_path, name, repaired), policy, shuffle_rows=shuffle_rows)
        continued.load_state(numbers, load(kept))
        assert same(continued.take(count - done), expected.part(slice(done, count)))
    skipped = stream(corpus(tmp_path, name, [*GOOD[:at], ..., *GOOD[at:]]), shuffle_rows=shuffle_rows)
    skipped.load_state(numbers, load(kept))
    without = stream(corpus(tmp_path, name, GOOD), shuffle_rows=shuffle_rows).take(count)
    assert same(skipped.take(count - done), without.part(slice(done, count)))


@pytest.mark.parametrize("name", FORMS)
def test_text_that_was_read_must_be_the_same(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "READ_DOCUMENTS", 4)
    first = stream(corpus(tmp_path, name, GOOD), shuffle_rows=1)
    while first.state()[0]["place"][0] != 1 or first.state()[0]["place"][1] is None:
        first.take(1)
    numbers, tensors = first.state()
    assert [source for source, *_ in numbers["read"]] == [0, 1]

    def resume(documents: list[Any], other: str = name) -> RowStream:
        again = stream(corpus(tmp_path, other, documents), shuffle_rows=1)
        again.load_state(numbers, tensors)
        return again

    resume([*GOOD[:25], "w9 w9", *GOOD[26:]])  # behind the place
    resume([*GOOD, "w9"])  # appended
    resume(GOOD[:20])
    other = GOOD[1].replace(GOOD[1][:2], "w9" if GOOD[1][:2] != "w9" else "w8", 1)
    assert len(other) == len(GOOD[1])
    with pytest.raises(ValueError, match=rf"--resume: .*text has changed.*{name} differs within its first \d+"):
        resume([GOOD[0], other, *GOOD[2:]])
    with pytest.raises(ValueError, match="text has changed"):
        resume(GOOD[:1])
    with pytest.raises(ValueError, match="text has changed"):
        resume(["w1", *GOOD])
    with monkeypatch.context() as patch:
        patch.setitem(FORMS, "b" + name, FORMS[name])
        with pytest.raises(ValueError, match=rf"text has changed.*without {name} and now with b{name}"):
            resume(GOOD, "b" + name)
    again = stream([*corpus(tmp_path, name, GOOD), Documents(["w1"], "more")], shuffle_rows=1)
    with pytest.raises(ValueError, match=r"text has changed.*now with more"):
        again.load_state(numbers, tensors)


@pytest.mark.parametrize("shuffle_rows", [1, 5])
def test_every_source_that_was_read_counts(shuffle_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those read to their end and the present one must be the same, those not begun may be others."""
    monkeypatch.setattr(data, "READ_DOCUMENTS", 3)
    texts = [make_texts(12, seed=seed) for seed in range(5)]

    def make(changed: int | None = None) -> RowStream:
        return stream(
            [Documents(text if i != changed else ["w1", *text[1:]], f"s{i}") for i, text in enumerate(texts)],
            shuffle_rows=shuffle_rows,
        )

    first = make()
    seen = set()
    while not first.epoch or first.state()[0]["place"] == [0, None]:
        numbers, tensors = first.state()
        read = {source for source, *_ in numbers["read"]}
        seen.add(len(read))
        for changed in range(5):
            again = make(changed)
            if changed in read:
                with pytest.raises(ValueError, match=f"text has changed.*s{changed} differs"):
                    again.load_state(numbers, tensors)
            else:
                again.load_state(numbers, tensors)
        first.take(1)
    assert seen >= {0, 3, 5}


def test_nearly_all_bad_documents_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"3 of the first 3 documents cannot be read"):
        stream([Documents([..., ..., ...])]).take(1)
    with pytest.raises(ValueError, match=r"10 of the first 11 documents cannot be read"):
        stream([Documents(["w1", *[...] * 10])]).take(5)
    stream([Documents(["w1 w2", *[...] * 9])]).take(5)
    stream([Documents(["w1 w2", *[None] * 99, ...])]).take(5)
    endless = Documents(["w1 w2", *[...] * 100_000])
    said: list[str] = []
    with pytest.raises(ValueError, match=r"cannot be read; is it the right text.*The latest: given, row \d+: is bad"):
        stream([endless], said=said).take(1)
    assert len(said) < 30
    # A first file that is bad is no reason.
    stream([Documents([...] * 900), Documents(make_texts(300))], shuffle_rows=1).take(300)


def test_warnings_are_limited_and_counts_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    said: list[str] = []
    found = BadDocuments("skip", said.append)
    for number in range(1000):
        found.note(1, [Document(None, f"row {number}", None, "bad")], 2)
    assert (found.bad, found.nulls) == (1000, 2000)
    assert len(said) == 20
    clock[0] += 31
    found.note(1, [Document(None, "row 1000", None, "bad", documents=5)], 0)
    assert said[20:] == ["skipped a document: row 1000: bad (and 980 others since the last such line)"]
    assert found.summary().startswith("skipped bad documents: 1005 ")


def test_what_the_tokenizer_refuses_is_a_bad_document() -> None:
    class Panic(BaseException):
        """As tokenizers' own panics, no `Exception`."""

    class Picky(Tokenizer):
        def batch(self, texts: Sequence[str]) -> list[np.ndarray]:
            for text in texts:
                if "w13" in text:
                    raise Panic("w13")
                if "w17" in text:
                    raise TypeError("TextEncodeInput must be Union")
            return super().batch(texts)

    texts = ["w1 w2", "w3 w13", "w17", "w4"]
    said: list[str] = []
    tokenizer = Picky(make_tokenizer())
    rows = RowStream(
        [Documents(texts)],
        tokenizer,
        Packer(tokenizer, 24, True),
        held_out=None,
        shuffle_rows=1,
        seed=0,
        bad_documents=BadDocuments("skip", said.append),
    )
    expected = stream([Documents(["w1 w2", "w4"])], shuffle_rows=1).take(3)
    assert same(rows.take(3), expected)
    assert said == [
        "skipped a document: given, row 2: the tokenizer refuses it (Panic: w13)",
        "skipped a document: given, row 3: the tokenizer refuses it (TypeError: TextEncodeInput must be Union)",
    ]


def test_a_long_record_is_cut_into_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "LARGEST_DOCUMENT", 10)
    text = "w1 w2 w3 w4 w5 w6 " + "w7w8w9" * 4
    rows = stream([Documents([text])], shuffle_rows=1).take(1)
    assert data._pieces(text) == ["w1 w2 w3 ", "w4 w5 w6 ", "w7w8w9w7w8", "w9w7w8w9w7", "w8w9"]
    assert len(pieces(rows)) == 5


def test_rows_are_put_back() -> None:
    rows = stream([Documents(make_texts(20))])
    first = rows.take(4)
    rows.put_back(first)
    assert same(rows.take(2), first.part(slice(0, 2)))
    again = stream([Documents(make_texts(20))])
    again.put_back(again.take(3))
    numbers, tensors = again.state()
    continued = stream([Documents(make_texts(20))])
    continued.load_state(json.loads(json.dumps(numbers)), load(save(tensors)))
    assert same(continued.take(4), first)


def heldout(
    texts: list[Any], separate: bool = False, fraction: float = 0.2, most: int = 1000, policy: str = "skip"
) -> HeldOut:
    packer = Packer(TOKENIZER, 24, packing=True)
    bad_documents = BadDocuments(policy)
    return collect_heldout([Documents(texts)], separate, fraction, packer, TOKENIZER, most, bad_documents)


def numbered(count: int) -> list[str]:
    """Documents that their token tells apart, in an order of their own."""
    return [f"w{i}" for i in range(count)]


@pytest.mark.parametrize("separate", [True, False])
def test_heldout_documents_never_train(separate: bool) -> None:
    texts = numbered(60) * 2  # repeated: a copy must not train either
    chosen = heldout(texts[:7] if separate else texts, separate)
    held = set(words(chosen.rows))
    rows = stream([Documents(texts)], held_out=chosen)
    trained = set(words(rows.take(100)))
    assert held
    assert held.isdisjoint(trained)
    assert len(held | trained) == 60


def test_the_split_is_of_the_size_asked_for_and_ignores_order() -> None:
    texts = [f"document {i}" for i in range(20_000)]
    rows = Rows(np.empty((0, 24)), np.empty((0, 24)))

    def chosen(fraction: float, texts: Iterable[str] = texts) -> list[str]:
        return [text for text in texts if HeldOut(rows, limit_of(fraction)).contains(text)]

    assert 1800 < len(chosen(0.1)) < 2200
    assert set(chosen(0.1)) == set(chosen(0.1, reversed(texts)))
    assert not chosen(0.0)


def test_heldout_rows_are_limited_and_needed() -> None:
    assert len(heldout(make_texts(200), most=5).rows.ids) == 5
    with pytest.raises(ValueError, match="--heldout-text holds no text"):
        heldout([" "], separate=True)
    with pytest.raises(ValueError, match=r"training text is empty.*\(2 without text \(null\)\)"):
        heldout(["  ", None, None])
    with pytest.raises(ValueError, match=r"2 of the first 2 documents cannot be read"):
        heldout([..., ...])
    with pytest.raises(ValueError, match=r"given, row 2: is bad.*--bad-documents"):
        heldout(["w1", ..., "w2"], policy="error")


@given(
    count=st.integers(2, 40),
    fraction=st.sampled_from([1e-9, 0.01, 0.999999]),
    shuffle=st.randoms(use_true_random=False),
)
@settings(max_examples=40)
def test_a_small_corpus_holds_one_document_out(count: int, fraction: float, shuffle: Any) -> None:
    texts = numbered(count)
    if 0 < sum(int.from_bytes(digest(text), "big") < limit_of(fraction) for text in texts) < count:
        return  # some are held out anyway, and some train
    smallest = min(texts, key=digest)
    shuffle.shuffle(texts)
    chosen = heldout([*texts, "", None, *texts], fraction=fraction)
    assert [text for text in texts if chosen.contains(text)] == [smallest]
    assert words(chosen.rows) == TOKENIZER(smallest).tolist()
    rows = stream([Documents([*texts, ...])], held_out=chosen).take(3 * count)
    assert set(words(rows)) == {TOKENIZER(text)[0] for text in texts if text != smallest}


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (
            ["w1 w2"],
            "holds 1 document, which cannot.*; give more text; a separate --heldout-text; or --heldout-fraction 0",
        ),
        (["w1 w2"] * 3, "holds 3 documents, all the same, which cannot.*; give more text"),
        (["w1\nw2\nw3", ""], "holds 1 document, .*give --documents line, if each of its 3 lines is a document; more"),
        (["w1\rw2", ...], r"holds 1 document \(1 bad\), .*each of its 2 lines"),
    ],
)
def test_one_document_cannot_be_held_out(texts: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"--heldout-fraction 0.01: the training text {message}"):
        heldout(texts, fraction=0.01)


def test_a_stream_says_if_all_is_held_out() -> None:
    texts = ["w1", "w2"]
    with pytest.raises(ValueError, match=r"training text is empty.*; 2 are held out"):
        stream([Documents(texts)], held_out=heldout(texts, separate=True)).take(1)


def test_the_held_out_part_of_a_run_stays(tmp_path: Path) -> None:
    """Rows and choice come from the checkpoint, though a repair makes other documents the first or the smallest."""
    texts = [f"w{i} w{i + 1}" for i in range(9)]
    first = stream([Documents(texts)], held_out=heldout(texts, fraction=1e-9))
    numbers, tensors = first.state()
    more = [*texts, *[f"w{i}" for i in range(20, 50)]]
    again = stream([Documents(more)])
    again.load_state(json.loads(json.dumps(numbers)), load(save(tensors)))
    assert first.held_out is not None
    assert again.held_out is not None
    assert same(again.held_out.rows, first.held_out.rows)
    [chosen] = [text for text in texts if first.held_out.contains(text)]
    assert again.held_out.contains(chosen)
    assert not heldout(more, fraction=1e-9).contains(chosen)  # what collecting again would do

    separate = stream([Documents(texts)], held_out=heldout(texts[:2], separate=True))
    again.load_state(*separate.state())
    assert [text for text in texts if again.held_out.contains(text)] == texts[:2]


@pytest.mark.parametrize("form", ["[CLS] $A [SEP]", "$A [SEP]", "$A"])
def test_special_tokens_are_found(form: str) -> None:
    from tokenizers import processors

    inner: Callable[..., Any] = make_tokenizer()
    inner.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=form, special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    found = Tokenizer(inner)
    assert [*found.prefix, *found("w0 w1"), *found.suffix] == inner("w0 w1")["input_ids"]
