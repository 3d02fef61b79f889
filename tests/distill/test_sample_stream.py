"""The sequence of samples: epochs, global shuffling, shares of processes, and continuing from any place."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load, save

from minilm_kernels.distill import sample_stream
from minilm_kernels.distill.packing import PADDING, Samples
from minilm_kernels.distill.sample_stream import Place, SampleStream
from minilm_kernels.distill.sources import Source
from minilm_kernels.distill.token_shards import TokenShards

from .streams import TOKENIZER, Documents, pieces, same, shards_of, stream, words
from .tiny import make_texts


@pytest.fixture(scope="module")
def shards() -> TokenShards:
    """Shards of 60 documents from three sources."""
    texts = make_texts(60)
    sources: list[Source] = [Documents(texts[:20]), Documents(texts[20:30], "b"), Documents(texts[30:], "c")]
    return shards_of(sources)


EXPECTED = sorted(token for text in make_texts(60) for token in TOKENIZER(text).tolist())


def take_epoch(samples: SampleStream) -> Samples:
    taken, epoch = [], samples.epoch
    while samples.epoch == epoch:
        taken.append(samples.take(1))
    return Samples(*(np.concatenate(part) for part in zip(*taken, strict=True)))


@pytest.mark.parametrize("packing", [True, False])
def test_every_epoch_has_every_token_once_in_another_order(packing: bool, shards: TokenShards) -> None:
    samples = stream(shards, packing=packing)
    first = take_epoch(samples)
    assert words(first) == EXPECTED
    assert same(take_epoch(stream(shards, packing=packing)), first)
    assert not np.array_equal(take_epoch(stream(shards, packing=packing, seed=1)).ids[:10], first.ids[:10])
    second = take_epoch(samples)
    assert words(second) == EXPECTED
    assert not np.array_equal(second.ids[:10], first.ids[:10])
    assert samples.place == Place(2)


def test_the_order_is_one_permutation_of_all_documents() -> None:
    """Documents that were far apart come together: the mean distance of neighbours is that of random pairs, n / 3."""
    count = 3600
    shards = shards_of([Documents([f"w{i % 60} w{i // 60}" for i in range(count)])])
    samples = stream(shards, packing=False)
    places = {tuple(TOKENIZER(f"w{i % 60} w{i // 60}").tolist()): i for i in range(count)}
    order = [places[tuple(piece)] for piece in pieces(take_epoch(samples))]
    assert sorted(order) == sorted(places.values())
    distances = [abs(a - b) for a, b in pairwise(order)]
    # The distance of two random places has mean n / 3 and variance n² / 18; neighbouring distances correlate weakly.
    assert abs(np.mean(distances) / count - 1 / 3) < 6 * (1 / 18 / count) ** 0.5 * 2
    assert abs(np.corrcoef(order, range(count))[0, 1]) < 6 / count**0.5


def test_samples_of_any_planned_block_are_the_same(shards: TokenShards, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = stream(shards).take(90)
    for size in (1, 7, 60):
        monkeypatch.setattr(sample_stream, "PLANNED_DOCUMENTS", size)
        assert same(stream(shards).take(90), expected)


@pytest.mark.parametrize("packing", [True, False])
def test_a_stream_continues_exactly_after_any_sample(packing: bool, shards: TokenShards) -> None:
    whole = stream(shards, packing=packing)
    total = 280
    samples, states = [], []
    for _ in range(total):
        state, tensors = whole.state()
        states.append((json.dumps(state), save(tensors)))
        samples.append(whole.take(1))
    assert whole.epoch >= 2
    assert all(len(json.loads(state)["place"]) == 4 for state, _ in states)
    for number in range(0, total, 4):
        state, tensors = states[number]
        continued = stream(shards, packing=packing)
        continued.take(5)  # restoring a state overwrites the previous one
        continued.load_state(json.loads(state), load(tensors))
        later = continued.take(total - number)
        assert np.array_equal(later.ids, np.concatenate([sample.ids for sample in samples[number:]]))
        assert np.array_equal(later.positions, np.concatenate([sample.positions for sample in samples[number:]]))
        assert continued.place == whole.place


def test_processes_read_their_own_samples_only(shards: TokenShards) -> None:
    """One seed gives the same steps for 1, 2 and 4 processes, each of which reads its part of the tokens, once."""
    size, steps = 8, 12
    expected = [stream_of_one.take(size) for stream_of_one in [stream(shards)] for _ in range(steps)]
    tokens = [(part.positions != PADDING).sum(1) - 2 * (part.positions == 0).sum(1) for part in expected]
    for processes in (1, 2, 4):
        share = size // processes
        for rank in range(processes):
            own = slice(rank * share, (rank + 1) * share)
            shards_of_rank = TokenShards(shards.folder)
            samples = stream(shards_of_rank)
            for step in range(steps):
                before = shards_of_rank.tokens_read
                taken = samples.take(size, own)
                assert same(taken.part(own), expected[step].part(own))
                assert np.array_equal(taken.positions, expected[step].positions)
                others = np.delete(taken.ids, np.arange(size)[own], 0)
                assert not others.any()
                assert shards_of_rank.tokens_read - before == tokens[step][own].sum()
    # A change from two processes to one, and to four, continues at the same place.
    two = stream(shards)
    for _ in range(5):
        two.take(size, slice(4, 8))
    state, tensors = two.state()
    for own in (slice(0, 8), slice(2, 4)):
        other = stream(shards)
        other.load_state(state, tensors)
        assert same(other.take(size, own).part(own), expected[5].part(own))


def test_samples_are_taken_again_from_an_earlier_place(shards: TokenShards) -> None:
    samples = stream(shards)
    first = samples.take(4)
    place = samples.place
    second = samples.take(90)
    samples.place = place
    assert same(samples.take(90), second)
    samples.place = Place()
    assert same(samples.take(4), first)


def test_a_failed_step_leaves_the_place(shards: TokenShards, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = stream(shards).take(12)
    samples = stream(shards)
    samples.take(3)
    place = samples.place
    with monkeypatch.context() as patch:
        patch.setattr(TokenShards, "read", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            samples.take(5)
    assert samples.place == place
    assert same(samples.take(9), expected.part(slice(3, 12)))


def test_a_state_is_refused_if_the_tokens_are_others(shards: TokenShards) -> None:
    state, tensors = stream(shards).state()
    other = stream([Documents(make_texts(60, seed=1))])
    with pytest.raises(ValueError, match=r"--resume-from-checkpoint: .*has other tokens than at the checkpoint"):
        other.load_state(state, tensors)
    for place in ([0, 0, 0], [0, -1, 0, 0], [0, 0, "1", 0]):
        with pytest.raises(TypeError, match="place"):
            stream(shards).load_state({**state, "place": place}, tensors)


@pytest.mark.parametrize(
    ("texts", "message"),
    [([], "training text is empty"), (["", "  "], "empty"), ([None], r"empty.*\(2 without text \(null\)\)")],
)
def test_an_empty_corpus_is_refused(texts: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stream([Documents(texts), Documents(texts)])
