"""From documents to samples: packing, shuffling, the evaluation set, and streams that continue exactly."""

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

from minilm_kernels.distill import packing as packing_module
from minilm_kernels.distill import sample_stream, tokenization
from minilm_kernels.distill.bad_documents import BadDocuments
from minilm_kernels.distill.eval_set import EvalSet, collect_eval_set, digest, limit_of
from minilm_kernels.distill.packing import PADDING, Packer, Samples, stack
from minilm_kernels.distill.sample_stream import SampleStream
from minilm_kernels.distill.sources import Cursor, Document, ReadPrefix, Source, open_sources
from minilm_kernels.distill.tokenization import DocumentTokenizer

from .tiny import make_texts, make_tokenizer

TOKENIZER = DocumentTokenizer(make_tokenizer())


def pieces(samples: Samples) -> list[list[int]]:
    """The token ids of every piece, special tokens removed, after checking how each row is laid out."""
    found = []
    for ids, positions in zip(*samples, strict=True):
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
    )  # documents here are one token each
    if packing:
        room = (samples.positions == PADDING).sum(1)[:-1]
        assert (room < shortest * 2 + 2).all()  # every row but the last is full, as far as cuts may go
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


class Documents:
    """A source of given texts (`None`: a null, `...`: a bad document) that notes where reading began."""

    def __init__(self, texts: list[Any], name: str = "given") -> None:
        self.texts, self.name, self.began = texts, name, list[Any]()

    def read(self, cursor: Cursor | None = None, prefix: ReadPrefix | None = None) -> Iterator[Document]:
        self.began.append(cursor)
        for number in range(cursor or 0, len(self.texts)):
            text = self.texts[number]
            if prefix is not None:
                prefix.add_row(text)
            where = f"{self.name}, row {number + 1}"
            yield Document(None if text is ... else text, where, number + 1, "is bad" if text is ... else "")

    def prefix(self, size: int) -> ReadPrefix:
        prefix = ReadPrefix()
        for text in self.texts[:size]:
            prefix.add_row(text)
        return prefix


def stream(sources: list[Source], policy: str = "skip", **changes: Any) -> SampleStream:
    arguments = {"eval_set": None, "shuffle_buffer_size": 10, "seed": 0, "packing": True, **changes}
    packer = Packer(TOKENIZER, 24, arguments.pop("packing"))
    said = arguments.pop("said", [])
    return SampleStream(sources, TOKENIZER, packer, bad_documents=BadDocuments(policy, said.append), **arguments)


def words(samples: Samples) -> list[int]:
    return sorted(token for piece in pieces(samples) for token in piece)


def take_epoch(samples: SampleStream) -> Samples:
    taken, epoch = [samples.take(1)], samples.epoch
    while True:
        sample = samples.take(1)
        if samples.epoch > epoch:
            samples.first_of_next = sample
            break
        taken.append(sample)
    return Samples(*(np.concatenate(part) for part in zip(*taken, strict=True)))


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("shuffle_buffer_size", [1, 7, 10_000])
def test_every_epoch_has_every_token_once_in_another_order(
    packing: bool, shuffle_buffer_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample_stream, "READ_DOCUMENTS", 4)
    texts = make_texts(60)
    halves: list[Source] = [Documents(texts[:20]), Documents(texts[20:30]), Documents(texts[30:])]
    samples = stream(halves, packing=packing, shuffle_buffer_size=shuffle_buffer_size)
    expected = sorted(token for text in texts for token in TOKENIZER(text).tolist())
    first = take_epoch(samples)
    assert words(first) == expected
    if shuffle_buffer_size > 1:
        again = take_epoch(stream(halves, packing=packing, shuffle_buffer_size=shuffle_buffer_size))
        other = take_epoch(stream(halves, packing=packing, shuffle_buffer_size=shuffle_buffer_size, seed=1))
        assert np.array_equal(again.ids, first.ids)
        assert not np.array_equal(other.ids[:10], first.ids[:10])
    second = Samples(*(np.concatenate([a, b]) for a, b in zip(samples.first_of_next, take_epoch(samples), strict=True)))
    assert words(second) == expected
    assert np.array_equal(second.ids[:10], first.ids[:10]) == (shuffle_buffer_size == 1)


@pytest.mark.parametrize("shuffle_buffer_size", [1, 12])
def test_a_stream_continues_exactly_after_any_row(shuffle_buffer_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_stream, "READ_DOCUMENTS", 3)

    def make() -> SampleStream:
        return stream(
            [Documents(make_texts(9, seed=seed)) for seed in range(3)], shuffle_buffer_size=shuffle_buffer_size
        )

    whole = make()
    total = 120
    samples, states = [], []
    for _ in range(total):
        state, tensors = whole.state()
        states.append((json.dumps(state), save(tensors)))
        samples.append(whole.take(1))
    assert whole.epoch >= 2
    for number in range(0, total, 4):
        state, tensors = states[number]
        continued = make()
        continued.take(5)  # what it did before does not matter
        continued.load_state(json.loads(state), load(tensors))
        later = continued.take(total - number)
        assert np.array_equal(later.ids, np.concatenate([sample.ids for sample in samples[number:]]))
        assert np.array_equal(later.positions, np.concatenate([sample.positions for sample in samples[number:]]))
        assert continued.epoch == whole.epoch


def test_continuing_reads_from_the_saved_cursor_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_stream, "READ_DOCUMENTS", 5)
    sources = [Documents(make_texts(100))]
    first = stream(list(sources), shuffle_buffer_size=4)
    first.take(40)
    state, tensors = first.state()
    sources[0].began.clear()
    again = stream(list(sources), shuffle_buffer_size=4)
    again.load_state(state, tensors)
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


def same(one: Samples, other: Samples) -> bool:
    return np.array_equal(one.ids, other.ids) and np.array_equal(one.positions, other.positions)


@pytest.mark.parametrize("shuffle_buffer_size", [1, 6])
@pytest.mark.parametrize("at", [0, 14, 30], ids=["first", "middle", "last"])
@pytest.mark.parametrize("name", FORMS)
def test_a_stream_is_that_of_the_good_documents(
    name: str, at: int, shuffle_buffer_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bad documents and nulls change nothing, whatever they are read together with, and wherever a run is resumed."""
    monkeypatch.setattr(sample_stream, "READ_DOCUMENTS", 4)
    count = 60
    cleaned = stream(corpus(tmp_path, name, GOOD), shuffle_buffer_size=shuffle_buffer_size)
    expected = cleaned.take(count)
    assert cleaned.epoch >= 2
    documents = [*GOOD[:at], ..., None, *GOOD[at:]]

    said: list[str] = []
    whole = stream(corpus(tmp_path, name, documents), shuffle_buffer_size=shuffle_buffer_size, said=said)
    states = []
    for number in range(count):
        state, tensors = whole.state()
        states.append((json.dumps(state), save(tensors)))
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
        continued = stream(corpus(tmp_path, name, documents), shuffle_buffer_size=shuffle_buffer_size)
        continued.load_state(json.loads(states[number][0]), load(states[number][1]))
        assert same(continued.take(count - number), expected.part(slice(number, count)))
        assert (continued.bad_documents.bad, continued.bad_documents.nulls) == (bad.bad, bad.nulls)


@pytest.mark.parametrize("shuffle_buffer_size", [1, 6])
@pytest.mark.parametrize("at", [0, 14, 30], ids=["first", "middle", "last"])
@pytest.mark.parametrize("name", FORMS)
def test_a_bad_document_may_end_a_run_that_continues_once_it_is_repaired(
    name: str, at: int, shuffle_buffer_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample_stream, "READ_DOCUMENTS", 4)
    count = 60
    repaired = [*GOOD[:at], "w1 w2", *GOOD[at:]]
    expected = stream(corpus(tmp_path, name, repaired), shuffle_buffer_size=shuffle_buffer_size).take(count)

    ended = stream(
        corpus(tmp_path, name, [*GOOD[:at], ..., *GOOD[at:]]), "error", shuffle_buffer_size=shuffle_buffer_size
    )
    message = rf"{re.escape(str(tmp_path / name))}, (line|row) \d+.*--bad-documents skip.*--resume-from-checkpoint"
    done = 0
    with suppress(ValueError):
        while True:
            assert same(ended.take(3), expected.part(slice(done, done + 3)))
            done += 3
    with pytest.raises(ValueError, match=message):  # another try changes nothing
        ended.take(5)
    state, tensors = ended.state()
    state, kept = json.loads(json.dumps(state)), save(tensors)
    ended.close()

    for policy in ("error", "skip"):
        continued = stream(corpus(tmp_path, name, repaired), policy, shuffle_buffer_size=shuffle_buffer_size)
        continued.load_state(state, load(kept))
        assert same(continued.take(count - done), expected.part(slice(done, count)))
    skipped = stream(corpus(tmp_path, name, [*GOOD[:at], ..., *GOOD[at:]]), shuffle_buffer_size=shuffle_buffer_size)
    skipped.load_state(state, load(kept))
    without = stream(corpus(tmp_path, name, GOOD), shuffle_buffer_size=shuffle_buffer_size).take(count)
    assert same(skipped.take(count - done), without.part(slice(done, count)))


@pytest.mark.parametrize("name", FORMS)
def test_text_that_was_read_must_be_the_same(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_stream, "READ_DOCUMENTS", 4)
    first = stream(corpus(tmp_path, name, GOOD), shuffle_buffer_size=1)
    while first.state()[0]["cursor"][0] != 1 or first.state()[0]["cursor"][1] is None:
        first.take(1)
    state, tensors = first.state()
    assert [source for source, *_ in state["read"]] == [0, 1]

    def resume(documents: list[Any], other: str = name) -> SampleStream:
        again = stream(corpus(tmp_path, other, documents), shuffle_buffer_size=1)
        again.load_state(state, tensors)
        return again

    resume([*GOOD[:25], "w9 w9", *GOOD[26:]])  # after the cursor
    resume([*GOOD, "w9"])  # appended
    resume(GOOD[:20])
    other = GOOD[1].replace(GOOD[1][:2], "w9" if GOOD[1][:2] != "w9" else "w8", 1)
    assert len(other) == len(GOOD[1])
    with pytest.raises(
        ValueError, match=rf"--resume-from-checkpoint: .*text has changed.*{name} differs within its first \d+"
    ):
        resume([GOOD[0], other, *GOOD[2:]])
    with pytest.raises(ValueError, match="text has changed"):
        resume(GOOD[:1])
    with pytest.raises(ValueError, match="text has changed"):
        resume(["w1", *GOOD])
    with monkeypatch.context() as patch:
        patch.setitem(FORMS, "b" + name, FORMS[name])
        with pytest.raises(ValueError, match=rf"text has changed.*missing: {name}, new: b{name}"):
            resume(GOOD, "b" + name)
    again = stream([*corpus(tmp_path, name, GOOD), Documents(["w1"], "more")], shuffle_buffer_size=1)
    with pytest.raises(ValueError, match=r"text has changed.*new: more"):
        again.load_state(state, tensors)


@pytest.mark.parametrize("shuffle_buffer_size", [1, 5])
def test_every_source_that_was_read_counts(shuffle_buffer_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those read to their end and the present one must be the same, those not begun may be others."""
    monkeypatch.setattr(sample_stream, "READ_DOCUMENTS", 3)
    texts = [make_texts(12, seed=seed) for seed in range(5)]

    def make(changed: int | None = None) -> SampleStream:
        return stream(
            [Documents(text if i != changed else ["w1", *text[1:]], f"s{i}") for i, text in enumerate(texts)],
            shuffle_buffer_size=shuffle_buffer_size,
        )

    first = make()
    seen = set()
    while not first.epoch or first.state()[0]["cursor"] == [0, None]:
        state, tensors = first.state()
        read = {source for source, *_ in state["read"]}
        seen.add(len(read))
        for changed in range(5):
            again = make(changed)
            if changed in read:
                with pytest.raises(ValueError, match=f"text has changed.*s{changed} differs"):
                    again.load_state(state, tensors)
            else:
                again.load_state(state, tensors)
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
    with pytest.raises(
        ValueError, match=r"cannot be read; check the text and --text-column\. The latest: given, row \d+: is bad"
    ):
        stream([endless], said=said).take(1)
    assert len(said) < 30
    # A first file that is bad is no reason.
    stream([Documents([...] * 900), Documents(make_texts(300))], shuffle_buffer_size=1).take(300)


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
    assert said[20:] == ["skipped a document: row 1000: bad (and 980 others since the last warning)"]
    assert found.summary().startswith("skipped bad documents: 1005 ")


def test_what_the_tokenizer_refuses_is_a_bad_document() -> None:
    class Panic(BaseException):
        """As tokenizers' own panics, no `Exception`."""

    class Picky(DocumentTokenizer):
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
    samples = SampleStream(
        [Documents(texts)],
        tokenizer,
        Packer(tokenizer, 24, True),
        eval_set=None,
        shuffle_buffer_size=1,
        seed=0,
        bad_documents=BadDocuments("skip", said.append),
    )
    expected = stream([Documents(["w1 w2", "w4"])], shuffle_buffer_size=1).take(3)
    assert same(samples.take(3), expected)
    assert said == [
        "skipped a document: given, row 2: the tokenizer refuses it (Panic: w13)",
        "skipped a document: given, row 3: the tokenizer refuses it (TypeError: TextEncodeInput must be Union)",
    ]


def test_a_long_record_is_cut_into_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenization, "LARGEST_DOCUMENT", 10)
    text = "w1 w2 w3 w4 w5 w6 " + "w7w8w9" * 4
    samples = stream([Documents([text])], shuffle_buffer_size=1).take(1)
    assert tokenization._pieces(text) == ["w1 w2 w3 ", "w4 w5 w6 ", "w7w8w9w7w8", "w9w7w8w9w7", "w8w9"]
    assert len(pieces(samples)) == 5


def test_rows_are_put_back() -> None:
    samples = stream([Documents(make_texts(20))])
    first = samples.take(4)
    samples.put_back(first)
    assert same(samples.take(2), first.part(slice(0, 2)))
    again = stream([Documents(make_texts(20))])
    again.put_back(again.take(3))
    state, tensors = again.state()
    continued = stream([Documents(make_texts(20))])
    continued.load_state(json.loads(json.dumps(state)), load(save(tensors)))
    assert same(continued.take(4), first)


def eval_set_of(
    texts: list[Any], separate: bool = False, fraction: float = 0.2, max_samples: int = 1000, policy: str = "skip"
) -> EvalSet:
    packer = Packer(TOKENIZER, 24, packing=True)
    bad_documents = BadDocuments(policy)
    return collect_eval_set([Documents(texts)], separate, fraction, packer, TOKENIZER, max_samples, bad_documents)


def numbered(count: int) -> list[str]:
    """Documents that their token tells apart, in an order of their own."""
    return [f"w{i}" for i in range(count)]


@pytest.mark.parametrize("separate", [True, False])
def test_heldout_documents_never_train(separate: bool) -> None:
    texts = numbered(60) * 2  # repeated: a copy must not train either
    chosen = eval_set_of(texts[:7] if separate else texts, separate)
    held = set(words(chosen.samples))
    samples = stream([Documents(texts)], eval_set=chosen)
    trained = set(words(samples.take(100)))
    assert held
    assert held.isdisjoint(trained)
    assert len(held | trained) == 60


def test_the_split_is_of_the_size_asked_for_and_ignores_order() -> None:
    texts = [f"document {i}" for i in range(20_000)]
    samples = Samples(np.empty((0, 24)), np.empty((0, 24)))

    def chosen(fraction: float, texts: Iterable[str] = texts) -> list[str]:
        return [text for text in texts if EvalSet(samples, limit_of(fraction)).contains(text)]

    assert 1800 < len(chosen(0.1)) < 2200
    assert set(chosen(0.1)) == set(chosen(0.1, reversed(texts)))
    assert not chosen(0.0)


def test_heldout_rows_are_limited_and_needed() -> None:
    assert len(eval_set_of(make_texts(200), max_samples=5).samples.ids) == 5
    with pytest.raises(ValueError, match="--eval-text has no text"):
        eval_set_of([" "], separate=True)
    with pytest.raises(ValueError, match=r"training text is empty.*\(2 without text \(null\)\)"):
        eval_set_of(["  ", None, None])
    with pytest.raises(ValueError, match=r"2 of the first 2 documents cannot be read"):
        eval_set_of([..., ...])
    with pytest.raises(ValueError, match=r"given, row 2: is bad.*--bad-documents"):
        eval_set_of(["w1", ..., "w2"], policy="error")


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
    chosen = eval_set_of([*texts, "", None, *texts], fraction=fraction)
    assert [text for text in texts if chosen.contains(text)] == [smallest]
    assert words(chosen.samples) == TOKENIZER(smallest).tolist()
    samples = stream([Documents([*texts, ...])], eval_set=chosen).take(3 * count)
    assert set(words(samples)) == {TOKENIZER(text)[0] for text in texts if text != smallest}


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (
            ["w1 w2"],
            "has 1 document, which cannot.*; give more text; a separate --eval-text; or --eval-fraction 0",
        ),
        (["w1 w2"] * 3, "has 3 identical documents, which cannot.*; give more text"),
        (["w1\nw2\nw3", ""], "has 1 document, .*give --documents line, if each of its 3 lines is a document; more"),
        (["w1\rw2", ...], r"has 1 document \(1 bad\), .*each of its 2 lines"),
    ],
)
def test_one_document_cannot_be_held_out(texts: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"--eval-fraction 0.01: the training text {message}"):
        eval_set_of(texts, fraction=0.01)


def test_a_stream_says_if_all_is_held_out() -> None:
    texts = ["w1", "w2"]
    with pytest.raises(ValueError, match=r"training text is empty.*; 2 are in the evaluation set"):
        stream([Documents(texts)], eval_set=eval_set_of(texts, separate=True)).take(1)


def test_the_held_out_part_of_a_run_stays(tmp_path: Path) -> None:
    """Samples and choice come from the checkpoint, though a repair makes other documents the first or the smallest."""
    texts = [f"w{i} w{i + 1}" for i in range(9)]
    first = stream([Documents(texts)], eval_set=eval_set_of(texts, fraction=1e-9))
    state, tensors = first.state()
    more = [*texts, *[f"w{i}" for i in range(20, 50)]]
    again = stream([Documents(more)])
    again.load_state(json.loads(json.dumps(state)), load(save(tensors)))
    assert first.eval_set is not None
    assert again.eval_set is not None
    assert same(again.eval_set.samples, first.eval_set.samples)
    [chosen] = [text for text in texts if first.eval_set.contains(text)]
    assert again.eval_set.contains(chosen)
    assert not eval_set_of(more, fraction=1e-9).contains(chosen)  # what collecting again would do

    separate = stream([Documents(texts)], eval_set=eval_set_of(texts[:2], separate=True))
    again.load_state(*separate.state())
    assert [text for text in texts if again.eval_set.contains(text)] == texts[:2]


@pytest.mark.parametrize("form", ["[CLS] $A [SEP]", "$A [SEP]", "$A"])
def test_special_tokens_are_found(form: str) -> None:
    from tokenizers import processors

    inner: Callable[..., Any] = make_tokenizer()
    inner.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=form, special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    found = DocumentTokenizer(inner)
    assert [*found.prefix, *found("w0 w1"), *found.suffix] == inner("w0 w1")["input_ids"]
