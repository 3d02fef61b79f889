"""The random cases of `make random`: a sample of them, and wrong results that they must find."""

import pytest
import torch

from minilm_kernels._choices import REDUCTIONS
from minilm_kernels.relation import dispatch
from tests.relation import random_cases
from tests.relation.backends import cuda
from tests.relation.cases import Case


def seeds_of(backend: str, count: int) -> range:
    return range(0, count * random_cases.EVERY[backend], random_cases.EVERY[backend])


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_a_sample(backend):
    counts, wrong = random_cases.check([backend], seeds_of(backend, 100))
    assert (counts, wrong) == ({backend: 100}, [])


@pytest.mark.slow
def test_a_sample_of_the_emulated_kernels(made_once):
    folder = made_once("emulated", cuda.build)  # a process can load one copy of the library
    counts, wrong = random_cases.check(["cuda", "cpu", "torch"], range(100), folder)
    assert (counts, wrong) == ({"cuda": 100, "cpu": 25, "torch": 15}, [])


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
