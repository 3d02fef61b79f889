"""Backend `torch`: its results have the same bits for any number of threads."""

import random

import pytest
import torch

from minilm_kernels._choices import REDUCTIONS
from minilm_kernels.relation.backends import blocked
from tests.relation.cases import Case, make

THREADS = (2, 3, 8, 64)


@pytest.fixture(autouse=True)
def threads():
    found = torch.get_num_threads()
    yield
    torch.set_num_threads(found)


def _draw(seed: int, pairs: int) -> tuple[Case, str]:
    """Returns a random case of at most `pairs` pairs, often with fewer heads than threads, and a reduction."""
    choose = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    heads = choose.choice([1, 1, 2, 3, 4, 12])
    sizes = {"widths": choose.choice([(16, 8), (12, 6), (64, 32), (8, 8), (5, 3), (31, 17), (1, 1)])}
    sizes["dtype"] = choose.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16])
    if choose.random() < 0.5:
        lengths = [choose.choice([0, 1, 3, 17, 40, 100, 150, 300]) for _ in range(choose.randint(1, 6))]
        kwargs = {"cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).int()}
    else:
        lengths = [choose.choice([1, 5, 16, 17, 33, 64, 100, 129, 257, 512, 700])] * choose.choice([1, 1, 2, 5])
        kwargs = {"attention_mask": torch.rand(len(lengths), lengths[0], generator=generator) < choose.choice([0.8, 1])}
        sizes |= {"batch": len(lengths), "length": lengths[0]}
    while heads > 1 and heads * sum(n * n for n in lengths) > pairs:
        heads //= 2
    order = choose.choice(["bidirectional", "causal", "prefix"])
    if order == "causal":
        kwargs["causal"] = True
    if order == "prefix":
        kwargs["prefix_lens"] = torch.randint(0, max(lengths) + 1, (len(lengths),), generator=generator)
    case = make(kwargs, heads=heads, cross=choose.random() < 0.5, seed=seed, **sizes)
    return case, choose.choice(["sequence", "token", "sum", "none"])


def _check(case: Case, reduction: str, counts: tuple[int, ...] = THREADS) -> None:
    torch.set_num_threads(1)
    value, grads = case.run(reduction, "torch")
    for threads in counts:
        torch.set_num_threads(threads)
        again, again_grads = case.run(reduction, "torch")
        assert torch.equal(again, value), f"{threads} threads"
        assert all(torch.equal(a, g) for a, g in zip(again_grads, grads, strict=True)), f"{threads} threads"
        assert torch.get_num_threads() == threads


@pytest.mark.parametrize("seed", range(10))
def test_bits_do_not_depend_on_threads(seed):
    _check(*_draw(seed, pairs=2**15), counts=(2, 3, 8))


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(6))
def test_bits_of_many_calls_do_not_depend_on_threads(shard):
    for seed in range(100 + 25 * shard, 125 + 25 * shard):
        _check(*_draw(seed, pairs=2**20))


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "heads", "length"), [(1, 1, 2500), (1, 5, 2100), (3, 12, 700), (5000, 3, 5)])
def test_bits_of_large_calls_do_not_depend_on_threads(batch, heads, length):
    """Blocks of few matrices, uneven blocks, and a sum of more rows than one thread adds up."""
    for reduction in REDUCTIONS if length < 10 else ("sequence", "none"):
        _check(make(batch=batch, heads=heads, length=length), reduction)


def test_a_sum_over_any_number_of_rows():
    for count in (0, 1, 2**14, 2**14 + 1, 3 * 2**14 + 5, 2**18 + 3):
        x = torch.randint(-8, 8, (count,)).float()
        assert blocked._deterministic_sum(x) == x.sum()
    x = torch.rand(7, 2**14 + 3)
    expected = blocked._deterministic_sum(x)
    for threads in THREADS:
        torch.set_num_threads(threads)
        assert torch.equal(blocked._deterministic_sum(x), expected)


def test_threads_come_back_after_an_error(monkeypatch):
    def fail(*_):
        raise MemoryError

    torch.set_num_threads(8)
    monkeypatch.setattr(blocked, "_block_kl", fail)
    with pytest.raises(MemoryError):
        make(batch=1, heads=2).run("sequence", "torch")
    assert torch.get_num_threads() == 8
