"""The step that is measured is the training loop's, and every layout computes the same loss and gradient."""

from argparse import Namespace

import numpy as np
import pytest
import torch

from benchmarks.measure import corpus, training
from benchmarks.measure.correctness import TOLERANCE
from benchmarks.measure.layouts import LAYOUTS
from benchmarks.measure.training import Laps, Parts, Setting, TrainStep
from benchmarks.measure.workload import Workload
from benchmarks.suites import train_step
from minilm_kernels.distill.batch import Batch
from minilm_kernels.distill.distributed import DistContext
from minilm_kernels.distill.packing import PADDING
from minilm_kernels.distill.step import loss_vector
from tests.benchmarks.test_report import made
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
    assert len(packed.ids) == 3 < len(padded.ids)
    assert np.array_equal(packed.ids, found["packed"].ids)
    tokens = {name: samples.ids[samples.ids >= len(corpus.SPECIAL)] for name, samples in found.items()}
    # A packed sample ends within a document, of which padded samples have nothing.
    assert np.array_equal(tokens["dense"][: len(tokens["padded"])], tokens["padded"])
    assert len(tokens["dense"]) - len(tokens["padded"]) < 512
    lengths = (ordered.positions != PADDING).sum(1)
    assert (np.diff(lengths) >= 0).all()
    assert sorted((padded.positions != PADDING).sum(1)) == lengths.tolist()
    assert (packed.positions != PADDING).mean() > 0.8


@pytest.mark.parametrize(("layout", "provider"), [*((layout, "torch") for layout in LAYOUTS), ("packed", "eager")])
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


@pytest.mark.slow
def test_records(tmp_path):
    shapes = ("--shapes", "tiny:2x64", "tiny:1x520:packed", "--rounds", "2", "--no-peaks")
    found = run(tmp_path, "--suite", "train_step", *shapes, "--providers", "torch", "cuda")
    by_status = {(r["provider"], r["detail"]["layout"], r["shape"]["S"]): r["status"] for r in found}
    assert by_status == {
        (provider, layout, S): {"torch": "ok", "cuda": "unsupported"}[provider]
        for provider in ("torch", "cuda")
        for S in (64, 520)
        for layout in (LAYOUTS if S == 64 else ["packed"])
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


def row(suite, provider, layout="", S=512, B=2, **detail):
    detail = {"model": "small", "layout": layout, **detail}
    return made(suite, provider, Workload(B, 3, S, 8, 4), detail=detail, peak_bytes=450 * 10**6)


def test_acceptance():
    steps = {
        ("dense", 512): (1000, 110, 200),
        ("packed", 512): (1000, 100, 210),
        ("padded", 512): (1000, 160, 310),
        ("packed", 4096): (2000, 220, 440),
        ("packed", 8192): (2000, 240, 470),
    }
    found = [
        row("train_step", "cpu", layout, S, tokens=tokens, best_ms=wall, processor_ms=processor)
        for (layout, S), (tokens, wall, processor) in steps.items()
    ]
    found.append(row("train_step", "cpu", "packed", 512, B=1, tokens=1000, best_ms=999, processor_ms=999))
    found.append(row("data", "loop", overhead=0.02, processor_overhead=0.04))
    speeds = {"tokenizer": (1e6, 5e5), "prepare": (0.75e6, 4.5e5)}
    found += [
        row("data", name, tokens_per_s=wall, tokens_per_processor_s=processor)
        for name, (wall, processor) in speeds.items()
    ]
    assert list(map(str, train_step.acceptance(found))) == [
        "S = 512, packed / dense: 0.909 by wall clock (met), 1.050 by processor (missed); at most 1",
        "S = 512, padded / packed: 1.600 by wall clock (met), 1.476 by processor (missed); at least 1.5",
        "S = 512, padded and sorted by length / packed: not measured; at least 1",
        "packed, S = 4096 / 512: 1.100 by wall clock (met), 1.048 by processor (met); at most 1.15",
        "packed, S = 8192 / 512: 1.200 by wall clock (missed), 1.119 by processor (met); at most 1.15",
        "step with the pipeline / on prepared data: "
        "1.020 by wall clock (met), 1.040 by processor (missed); at most 1.03",
        "preparation of shards / tokenizer alone: 0.750 by wall clock (missed), 0.900 by processor (met); at least 0.8",
        "memory of the preparation, MB: 450.000 by wall clock (met); at most 500",
    ]
    assert all(line.wall is None for line in train_step.acceptance([]))


def test_a_shape_may_name_its_layouts():
    options = Namespace(shapes=["tiny:4x64", "tiny:2x64:packed+dense", "tiny:1x1024"], layouts=["padded"])
    vars(options).update(dtypes=["float32"], device="cpu")
    found = [(s.workload.B, s.workload.S, s.layout) for s in train_step._settings(options)]
    assert found == [(4, 64, "padded"), (2, 64, "packed"), (2, 64, "dense")]
    options.shapes = ["tiny:4x64:upside-down"]
    with pytest.raises(ValueError, match="--shapes: expected layouts"):
        train_step._settings(options)
