"""The stream of samples: shuffling, epochs, bad documents, and continuing from any position."""

from __future__ import annotations

import gzip
import io
import json
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load, save

from minilm_kernels.distill import sample_stream
from minilm_kernels.distill.packing import Samples
from minilm_kernels.distill.sample_stream import SampleStream
from minilm_kernels.distill.sources import Source, open_sources

from .streams import TOKENIZER, Documents, same, stream, words
from .tiny import make_texts


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
def test_a_stream_continues_exactly_after_any_sample(shuffle_buffer_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
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
        continued.take(5)  # restoring a state overwrites the previous one
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
    """Two files, of which the second contains the documents."""
    (folder / "A.txt").write_text("\n\n".join(make_texts(4, seed=6, longest=9)))
    (folder / name).write_bytes(FORMS[name](documents))
    return open_sources([str(folder / "A.txt"), str(folder / name)])


@pytest.mark.parametrize("shuffle_buffer_size", [1, 6])
@pytest.mark.parametrize("at", [0, 14, 30], ids=["first", "middle", "last"])
@pytest.mark.parametrize("name", FORMS)
def test_a_stream_is_that_of_the_good_documents(
    name: str, at: int, shuffle_buffer_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bad documents and nulls never change the samples, regardless of their position and of the resumed one."""
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
    assert len(said) == 1  # there are warnings in the first epoch only
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
def test_a_run_that_a_bad_document_stopped_continues_after_the_repair(
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
    with pytest.raises(ValueError, match=message):  # a second attempt gives the same error
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

    resume([*GOOD[:25], "w9 w9", *GOOD[26:]])  # a change after the cursor
    resume([*GOOD, "w9"])  # an appended document
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
    """Sources that were read, completely or in part, must be the same; others may change."""
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


def test_samples_are_put_back() -> None:
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
