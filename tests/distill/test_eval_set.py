"""The evaluation set: its size, its documents, and its state in a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from minilm_kernels.distill.bad_documents import BadDocuments
from minilm_kernels.distill.eval_set import EvalSet, collect_eval_set, digest, limit_of, split_eval_set
from minilm_kernels.distill.packing import Packer, Samples

from .streams import TOKENIZER, Documents, same, shards_of, stream, words
from .tiny import make_texts


def eval_set_of(
    texts: list[Any], separate: bool = False, fraction: float = 0.2, max_samples: int = 1000, policy: str = "skip"
) -> EvalSet:
    packer = Packer(TOKENIZER, 24, packing=True)
    if separate:
        return collect_eval_set([Documents(texts)], packer, TOKENIZER, max_samples, BadDocuments(policy))
    return split_eval_set(shards_of([Documents(texts)], policy), fraction, packer, max_samples)


def numbered(count: int) -> list[str]:
    """Documents with one distinct token each."""
    return [f"w{i}" for i in range(count)]


@pytest.mark.parametrize("separate", [True, False])
def test_evaluation_documents_never_train(separate: bool) -> None:
    texts = numbered(60) * 2  # twice, because copies must not be used for training either
    chosen = eval_set_of(texts[:7] if separate else texts, separate)
    evaluated = set(words(chosen.samples))
    samples = stream([Documents(texts)], eval_set=chosen)
    trained = set(words(samples.take(100)))
    assert evaluated
    assert evaluated.isdisjoint(trained)
    assert len(evaluated | trained) == 60


def test_the_split_is_of_the_size_asked_for_and_ignores_order() -> None:
    texts = [f"document {i}" for i in range(20_000)]
    samples = Samples(np.empty((0, 24)), np.empty((0, 24)))

    def chosen(fraction: float, texts: Iterable[str] = texts) -> list[str]:
        return [text for text in texts if EvalSet(samples, limit_of(fraction)).contains(text)]

    assert 1800 < len(chosen(0.1)) < 2200
    assert set(chosen(0.1)) == set(chosen(0.1, reversed(texts)))
    assert not chosen(0.0)


def test_evaluation_samples_are_limited_and_needed() -> None:
    assert len(eval_set_of(make_texts(200), max_samples=5).samples.ids) == 5
    with pytest.raises(ValueError, match="--eval-text has no text"):
        eval_set_of([" "], separate=True)
    with pytest.raises(ValueError, match=r"training text is empty.*\(2 without text \(null\)\)"):
        eval_set_of(["  ", None, None])
    with pytest.raises(ValueError, match=r"2 of the first 2 documents cannot be read"):
        eval_set_of([..., ...])
    with pytest.raises(ValueError, match=r"2 of the first 2 documents cannot be read"):
        eval_set_of([..., ...], separate=True)
    with pytest.raises(ValueError, match=r"given, row 2: is bad.*--bad-documents"):
        eval_set_of(["w1", ..., "w2"], policy="error")


@given(
    count=st.integers(2, 40),
    fraction=st.sampled_from([1e-9, 0.01, 0.999999]),
    shuffle=st.randoms(use_true_random=False),
)
@settings(max_examples=15)
def test_a_small_corpus_evaluates_on_one_document(count: int, fraction: float, shuffle: Any) -> None:
    texts = numbered(count)
    if 0 < sum(int.from_bytes(digest(text), "big") < limit_of(fraction) for text in texts) < count:
        return  # the fraction gives some documents to both sets
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
def test_one_document_cannot_be_split(texts: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"--eval-fraction 0.01: the training text {message}"):
        eval_set_of(texts, fraction=0.01)


def test_a_stream_reports_that_all_is_in_the_evaluation_set() -> None:
    texts = ["w1", "w2"]
    with pytest.raises(ValueError, match=r"training text is empty.*; 2 are in the evaluation set"):
        stream([Documents(texts)], eval_set=eval_set_of(texts, separate=True)).take(1)


def test_the_evaluation_set_of_a_run_stays(tmp_path: Path) -> None:
    """A resumed run takes samples and rule from the checkpoint, even if a new run would choose other documents."""
    texts = [f"w{i} w{i + 1}" for i in range(9)]
    shards = shards_of([Documents(texts)])
    first = stream(shards, eval_set=eval_set_of(texts, fraction=1e-9))
    state, tensors = first.state()
    again = stream(shards)
    again.load_state(json.loads(json.dumps(state)), load(save(tensors)))
    assert first.eval_set is not None
    assert again.eval_set is not None
    assert same(again.eval_set.samples, first.eval_set.samples)
    [chosen] = [text for text in texts if first.eval_set.contains(text)]
    assert again.eval_set.contains(chosen)
    assert same(again.take(20), first.take(20))

    separate = stream(shards, eval_set=eval_set_of(texts[:2], separate=True))
    again.load_state(*separate.state())
    assert [text for text in texts if again.eval_set.contains(text)] == texts[:2]


def test_the_rule_for_digests_is_that_for_texts() -> None:
    texts = make_texts(300)
    samples = Samples(np.empty((0, 24)), np.empty((0, 24)))
    for limit, others in ((0, texts[:5]), (limit_of(0.3), ()), (limit_of(0.3), texts[:5])):
        chosen = EvalSet(samples, limit, frozenset(map(digest, others)))
        digests = shards_of([Documents(texts)]).digests
        assert chosen.contains_digests(digests).tolist() == [chosen.contains(text) for text in texts]
