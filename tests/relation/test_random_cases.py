"""The random cases of `make random`: a sample of them, and wrong results that they must find."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minilm_kernels._choices import REDUCTIONS
from minilm_kernels.relation import dispatch
from tests.relation import random_cases
from tests.relation.backends import cuda
from tests.relation.cases import Case


def seeds_of(backend: str, count: int) -> range:
    return range(0, count * random_cases.EVERY[backend], random_cases.EVERY[backend])


def test_a_sample():
    both = random_cases.EVERY["cpu"] * random_cases.EVERY["torch"]
    counts, wrong = random_cases.check(["cpu", "torch"], range(0, 100 * both, both))
    assert (counts, wrong) == ({"cpu": 100, "torch": 100}, [])


@pytest.mark.slow
def test_a_sample_of_the_emulated_kernels(made_once):
    folder = made_once("emulated", cuda.build)  # a process can load one copy of the library
    counts, wrong = random_cases.check(["cuda", "cpu", "torch"], range(100), {90: folder})
    assert (counts, wrong) == ({"cuda": 100, "cpu": 25, "torch": 15}, [])


@pytest.mark.slow
@pytest.mark.parametrize("seed", [7885, 12106])
def test_the_error_of_ex2_in_short_rows(seed, made_once):
    """In rows of 3 keys, the error of a gradient is that of the exponentials."""
    _, wrong = random_cases.check(["cuda"], range(seed, seed + 1), {90: made_once("emulated", cuda.build)})
    assert wrong == []


def test_a_seed_gives_one_case():
    first, again, other = (random_cases.draw(seed) for seed in (7, 7, 8))
    assert first.about == again.about != other.about
    assert torch.equal(first.case.tensors[0], again.case.tensors[0])
    assert torch.equal(first.upstream, again.upstream)


def test_cases_are_of_every_kind():
    drawn = [random_cases.draw(seed) for seed in range(300)]
    assert {case.reduction for case in drawn} == set(REDUCTIONS)
    words = " ".join(case.about for case in drawn)
    for word in ("self", "cross", "right", "left", "holes", "packed", "causal", "prefix", "query_mask", "bfloat16"):
        assert word in words
    assert any(case.poisoned.tensors[0].isnan().any() for case in drawn)
    assert {case.distribution.widths for case in drawn} == set(random_cases._WIDTHS)
    assert {case.distribution.scales for case in drawn} == set(random_cases._SCALES)
    assert {size.shape[-2] for case in drawn for size in case.case.tensors if size is not None} == {1, 2, 3, 4}
    longest = sorted(case.case.token_shape()[-1] for case in drawn if not case.mask.packed)
    assert longest[len(longest) // 2] <= 33
    assert longest[-1] > 128
    interpreted = [random_cases.draw(seed) for seed in seeds_of("triton", 50)]
    assert max(case.case.token_shape()[-1] for case in interpreted if not case.mask.packed) <= random_cases._SHORT
    assert not any(x.dtype == torch.bfloat16 for case in interpreted for x in case.case.tensors if x is not None)


@pytest.mark.parametrize("mistake", ["a key too few", "weight of rows", "gradient of padding", "large gradient"])
def test_mistakes_are_found(monkeypatch, mistake):
    """Each mistake is made in the backend `torch` and must show in some of 40 cases."""
    run = Case.run

    def wrong(self, reduction, backend, upstream=None):
        if backend == "torch" and mistake == "a key too few" and "attention_mask" in self.kwargs:
            mask = self.kwargs["attention_mask"].clone()
            mask[:, -1] = 0
            self = Case(self.tensors, self.kwargs | {"attention_mask": mask})
        value, grads = run(self, reduction, backend, upstream)
        if backend == "torch" and mistake == "weight of rows" and reduction == "token":
            value, grads = value * 1.01, [grad * 1.01 for grad in grads]
        if backend == "torch" and mistake == "gradient of padding" and "attention_mask" in self.kwargs:
            grads = [grad + 1e-30 for grad in grads]
        if backend == "torch" and mistake == "large gradient":
            grads = [grad * 1.01 for grad in grads]
        return value, grads

    monkeypatch.setattr(Case, "run", wrong)
    _, found = random_cases.check(["torch"], seeds_of("torch", 40))
    assert found
    assert all("--seed" in line for line in found)


def test_an_exception_is_a_wrong_case(monkeypatch):
    def fail(*args):
        raise RuntimeError("no result")

    monkeypatch.setattr(dispatch.MODULES["torch"], "forward_reduced", fail)
    monkeypatch.setattr(dispatch.MODULES["torch"], "forward_none", fail)
    _, found = random_cases.check(["torch"], seeds_of("torch", 2))
    assert len(found) == 2
    assert "RuntimeError: no result" in found[0]


def test_the_error_of_dense_pytorch_depends_on_the_order_of_features():
    """A float32 case with scores of 96, in which one order allowed too little."""
    drawn = random_cases.draw(2380)
    orders = [random_cases._reordered(drawn.case, seed) for seed in range(random_cases._ORDERS)]
    value, _ = drawn.case.oracle("none")
    torch.testing.assert_close(orders[0].oracle("none")[0], value, rtol=1e-12, atol=1e-12)
    errors = [random_cases._errors(case, drawn.mask.dense()[:, None])[1] for case in orders]
    assert max(errors) > 2 * min(errors)
    assert random_cases.check(["cpu"], range(2380, 2381)) == ({"cpu": 1}, [])


class _Process:
    """A process of a run, in this one. Those whose first seed is in `crashing` end with a signal at once."""

    crashing: frozenset[int] = frozenset()

    def __init__(self, command, **_):
        of = {name: command[command.index(name) + 1] for name in ("--first", "--end", "--stride", "--journal")}
        seeds = range(*(int(of[name]) for name in ("--first", "--end", "--stride")))
        journal = random_cases.Journal(Path(of["--journal"]))
        self.returncode = -signal.SIGABRT if seeds.start in self.crashing else 0
        for seed in seeds:
            if seed in self.crashing:
                self.returncode = -signal.SIGABRT
                break
            journal.add(seed, ["cpu"], [])

    def poll(self):
        return self.returncode


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.setattr(subprocess, "Popen", _Process)

    def call(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["random_cases", "--backends", "cpu", "--folder", str(tmp_path), *arguments])
        return random_cases.main()

    return call


def test_a_crash_is_a_wrong_case_and_the_run_goes_on(run, monkeypatch, capsys):
    monkeypatch.setattr(_Process, "crashing", frozenset({4, 5}))
    assert run("--cases", "3", "--jobs", "2") == 1
    shown = capsys.readouterr().out
    assert "12 of 12 seeds; cases: cpu 10; 2 wrong" in shown
    assert "WRONG --seed 4: the process ended with signal 6" in shown
    assert "WRONG --seed 5: " in shown


def test_a_run_goes_on_where_it_stopped(run, monkeypatch, capsys, tmp_path):
    begun = []

    class Stopped(_Process):
        def __init__(self, command, **more):
            begun.append(int(command[command.index("--first") + 1]))
            super().__init__(command, **more)
            self.returncode = -signal.SIGTERM

    monkeypatch.setattr(Stopped, "crashing", frozenset({6}))  # stops before this seed
    monkeypatch.setattr(subprocess, "Popen", Stopped)
    assert run("--cases", "3", "--jobs", "1") == 1
    journal = next(tmp_path.glob("*/0.txt"))
    assert "6 of 12 seeds" in capsys.readouterr().out
    journal.write_text(journal.read_text() + "WRONG --seed")  # killed while it wrote
    monkeypatch.setattr(Stopped, "crashing", frozenset())
    run("--cases", "3", "--jobs", "1")
    assert begun == [0, 6]
    assert "12 of 12 seeds; cases: cpu 12; 0 wrong" in capsys.readouterr().out
    assert random_cases.Journal(journal).seeds == {seed: ["cpu"] for seed in range(12)}
