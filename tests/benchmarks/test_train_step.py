"""The step that is measured is the training loop's, and every layout computes the same loss and gradient."""

import numpy as np
import pytest
import torch

from benchmarks.measure import corpus, training
from benchmarks.measure.correctness import TOLERANCE
from benchmarks.measure.layouts import LAYOUTS
from benchmarks.measure.training import Laps, Parts, Setting, TrainStep
from minilm_kernels.distill.batch import Batch
from minilm_kernels.distill.distributed import DistContext
from minilm_kernels.distill.packing import PADDING
from minilm_kernels.distill.step import loss_vector
from tests.benchmarks.test_run import run


@pytest.fixture(scope="module")
def parts():
    return Parts("tiny", 0.0, DistContext("cpu"))


def step_of(parts, layout, shape="4x64", provider="torch"):
    return TrainStep(parts, Setting.parse(f"tiny:{shape}", layout, "float32", "cpu"), provider)


def test_lengths_of_documents():
    lengths = corpus.document_lengths(100_000)
    uncut = np.exp(corpus.SIGMA * np.random.default_rng(1).standard_normal(100_000) - corpus.SIGMA**2 / 2)
    assert corpus.MEAN * uncut.mean() == pytest.approx(300, rel=0.01)
    assert lengths.max() == corpus.LONGEST
    assert lengths.mean() == pytest.approx((corpus.MEAN * uncut).clip(8, 510).mean(), rel=0.01)


@pytest.mark.parametrize("vocabulary", [200, 30522])
def test_documents_have_the_lengths_that_were_asked_for(vocabulary):
    lengths = corpus.document_lengths(8)
    encoded = corpus.tokenizer(vocabulary)(list(corpus.documents(lengths, vocabulary)), add_special_tokens=False)
    assert [len(ids) for ids in encoded["input_ids"]] == lengths.tolist()
    assert 1 not in set().union(*encoded["input_ids"])  # [UNK]
    assert len(set().union(*encoded["input_ids"])) > 100


def test_layouts_have_the_same_documents(parts):
    found = {}
    for layout in LAYOUTS:
        samples = step_of(parts, layout, "3x512").samples
        assert samples.ids.shape[1] == 512
        found[layout] = samples
    packed, padded, ordered = found["dense"], found["padded"], found["sorted"]
    assert len(packed.ids) <= 3 < len(padded.ids)
    tokens = {layout: np.sort(samples.ids[samples.positions != PADDING]) for layout, samples in found.items()}
    body = {layout: ids[ids >= len(corpus.SPECIAL)] for layout, ids in tokens.items()}
    assert all(np.array_equal(body["dense"], ids) for ids in body.values())
    lengths = (ordered.positions != PADDING).sum(1)
    assert (np.diff(lengths) >= 0).all()
    assert sorted((padded.positions != PADDING).sum(1)) == lengths.tolist()
    assert (packed.positions != PADDING).mean() > 0.8


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("provider", ["torch", "eager"])
def test_the_gradient_is_the_training_loops(parts, layout, provider):
    """The stages together compute what the loop computes with one backward from the loss."""
    step = step_of(parts, layout, provider=provider)
    value = torch.zeros(())
    parts.buffer.zero_()
    for part, weight in step._parts_of(step.samples):
        values = weight * loss_vector(step.config, step._models, step.batch(step.samples, part), requires_grad=True)
        value += values.sum().detach()
        values.sum().backward()
    expected = parts.buffer.gradients.clone()
    parts.buffer.zero_()
    pieces = [
        step._accumulate(step.batch(step.samples, part), weight, Laps("cpu"))
        for part, weight in step._parts_of(step.samples)
    ]
    torch.testing.assert_close(torch.stack(pieces).sum(), value, rtol=1e-5, atol=0)
    torch.testing.assert_close(parts.buffer.gradients, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_agrees_with_single_documents_in_float64(parts, layout):
    value, grad = step_of(parts, layout).check()
    assert 0 < value < 1e-5
    assert 0 < grad < 1e-5


def test_a_layout_that_mixes_documents_is_noticed(parts, monkeypatch):
    step = step_of(parts, "dense", "1x300")
    full = Batch._attention_mask
    monkeypatch.setattr(Batch, "_attention_mask", lambda self: torch.ones_like(full(self)))
    assert max(step.check()) > max(TOLERANCE.values())


def test_steps_train():
    parts = Parts("tiny", 0.0, DistContext("cpu"))
    parts.config = training.replace(parts.config, learning_rate=1e-2, warmup_steps=0)
    step = step_of(parts, "dense")

    def loss():
        (part, weight), *_ = step._parts_of(step.samples)
        return float(step._accumulate(step.batch(step.samples, part), weight, Laps("cpu")))

    before = loss()
    for _ in range(20):
        step()
    assert loss() < 0.7 * before


def test_laps_add_up(monkeypatch):
    times = iter([0.0, 1.0, 3.0, 6.0])
    monkeypatch.setattr(training, "stamp", lambda device: 1e3 * next(times))
    laps = Laps("cpu")
    for stage in ("data", "teacher", "data"):
        laps.lap(stage)
    found, processor = laps.stages()
    assert found == dict.fromkeys(training.STAGES, 0.0) | {"data": 4e3, "teacher": 2e3}
    assert processor >= 0


def test_records(tmp_path):
    shapes = ("--shapes", "tiny:2x64", "tiny:1x520", "--rounds", "2", "--no-peaks")
    found = run(tmp_path, "--suite", "train_step", *shapes, "--providers", "torch", "cuda")
    by_status = {(r["provider"], r["detail"]["layout"], r["shape"]["S"]): r["status"] for r in found}
    assert by_status == {
        (provider, layout, S): {"torch": "ok", "cuda": "unsupported"}[provider]
        for provider in ("torch", "cuda")
        for S in (64, 520)
        for layout in (LAYOUTS if S == 64 else ["dense", "packed"])
    }
    for record in (r for r in found if r["status"] == "ok"):
        detail = record["detail"]
        assert record["runs"] == 2
        assert list(detail["stages_ms"]) == list(training.STAGES)
        assert sum(detail["stages_ms"].values()) == pytest.approx(detail["best_ms"])
        assert detail["best_ms"] <= record["median_ms"]
        assert detail["tokens_per_s"] == pytest.approx(1e3 * detail["tokens"] / detail["best_ms"])
        assert detail["recipe_hours"] == pytest.approx(400_000 * 256 * 512 / detail["tokens_per_s"] / 3600)
        assert detail["tokens"] <= record["shape"]["B"] * record["shape"]["S"] or detail["layout"] != "dense"
