"""Steps that a thread prepares ahead: their data, the position that is saved, errors, and the end of the thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from minilm_kernels.distill import DistillConfig, prefetch
from minilm_kernels.distill.batch import Batch, LossWeights
from minilm_kernels.distill.distributed import DistContext
from minilm_kernels.distill.packing import Samples
from minilm_kernels.distill.prefetch import STEPS_AHEAD, Prefetcher, PreparedStep
from minilm_kernels.distill.sample_stream import SampleStream
from minilm_kernels.distill.step import make_batch

from .streams import Documents, same, stream
from .test_config import NEEDED
from .tiny import make_texts

CPU = torch.device("cpu")
TEXTS = make_texts(60)


def settings(**changes: Any) -> DistillConfig:
    return DistillConfig(**{**NEEDED, "total_batch_size": 6, "max_seq_length": 24, "max_steps": 12, **changes})


@contextmanager
def prefetcher(samples: SampleStream, config: DistillConfig | None = None, **options: Any) -> Iterator[Prefetcher]:
    dist = DistContext("cpu")
    vars(dist).update({"world_size": options.pop("processes", 1), "rank": options.pop("rank", 0)})
    with closing(Prefetcher(config or settings(), samples, options.pop("mask", "bidirectional"), dist)) as steps:
        yield steps


def steps_of(steps: Prefetcher, count: int, size: int = 6, first: int = 0) -> list[PreparedStep]:
    found = []
    for number in range(first, first + count):
        steps.wait(number, size)
        found.append(steps.pop())
    return found


def tensors(batch: Batch) -> dict[str, torch.Tensor]:
    return {name: x for name, x in vars(batch).items() if isinstance(x, torch.Tensor)}


@pytest.mark.parametrize("options", [{"mask": "prefix"}, {"mask": "causal", "packing": False}])
@pytest.mark.parametrize(("processes", "rank", "size"), [(1, 0, 6), (1, 0, 4), (2, 0, 3), (2, 1, 2), (3, 2, 1)])
def test_micro_batches_are_those_of_the_stream_in_its_order(
    options: dict[str, Any], processes: int, rank: int, size: int
) -> None:
    config = settings(**options)
    plain = stream([Documents(TEXTS)], packing=config.packing)
    share = 6 // processes
    samples_of_rank = stream([Documents(TEXTS)], packing=config.packing)
    with prefetcher(samples_of_rank, config, mask=config.mask, processes=processes, rank=rank) as steps:
        for number, prepared in enumerate(steps_of(steps, 12, size)):
            samples = plain.take(6)
            mine = slice(rank * share, (rank + 1) * share)
            assert same(prepared.samples.part(mine), samples.part(mine))
            assert np.array_equal(prepared.samples.positions, samples.positions)
            assert not np.delete(prepared.samples.ids, np.arange(6)[mine], 0).any()
            assert (prepared.step, prepared.total) == (number, LossWeights.of(samples))
            starts = range(rank * share, (rank + 1) * share, size)
            assert [part.start for part in prepared.micro_batches] == list(starts)
            for part in prepared.micro_batches:
                own = slice(part.start, min(part.start + size, (rank + 1) * share))
                expected = make_batch(config, config.mask, samples, CPU, (config.seed, 3, number), own)
                found = tensors(part.batch)
                assert found.keys() == tensors(expected).keys()
                assert all(torch.equal(x, found[name]) for name, x in tensors(expected).items())
                assert part.weight == LossWeights.of(samples.part(own)).weight("sequence", prepared.total)


def test_a_smaller_micro_batch_is_built_again_from_the_same_samples() -> None:
    with prefetcher(stream([Documents(TEXTS)])) as steps:
        (prepared,) = steps_of(steps, 1, size=6)
        assert steps.micro_batches(prepared, 6) is prepared.micro_batches
        smaller = steps.micro_batches(prepared, 2)
        assert [part.start for part in smaller] == [0, 2, 4]
        assert torch.equal(torch.cat([part.batch.ids for part in smaller]), prepared.micro_batches[0].batch.ids)
        assert sum(part.weight for part in smaller) == pytest.approx(1.0)
        for later in steps_of(steps, 4, size=2, first=1):  # the first of them were prepared for 6
            assert [part.start for part in steps.micro_batches(later, 2)] == [0, 2, 4]


def wait_until(condition: Any) -> None:
    end = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.mark.parametrize("done", [0, 1, 5, 9])
def test_the_saved_position_is_that_before_the_prepared_steps(done: int) -> None:
    """60 documents are several epochs of 9 steps, so that prepared steps may be of a later epoch."""
    with prefetcher(stream([Documents(TEXTS)])) as steps:
        initial = steps.state()
        found = steps_of(steps, done)
        steps.wait(done, 6)
        wait_until(lambda: all(future.done() for future in steps._ahead))
        assert len(steps._ahead) == 1 + min(STEPS_AHEAD, 11 - done)
        state = steps.state()
        rest = steps_of(steps, 12 - done, first=done)
    if not done:
        assert state[0] == initial[0]
    else:
        assert state[0]["place"][0] == found[-1].epoch
    with prefetcher(stream([Documents(TEXTS)])) as steps:
        steps.load_state(*state)
        for one, other in zip(rest, steps_of(steps, 12 - done, first=done), strict=True):
            assert same(one.samples, other.samples)
            assert one.epoch == other.epoch


def test_no_sample_is_taken_for_steps_after_the_last() -> None:
    samples = stream([Documents(TEXTS)])
    taken = []
    real = samples.take

    def take(count: int, own: slice) -> Samples:
        taken.append(threading.current_thread().name)
        return real(count, own)

    samples.take = take  # type: ignore[method-assign, assignment]
    with prefetcher(samples, settings(max_steps=4)) as steps:
        steps_of(steps, 4)
    assert len(taken) == 4
    assert set(taken) == {"minilm-batches_0"}


@pytest.mark.parametrize("failing", [0, 1, 4])
def test_an_error_arrives_at_its_step_with_the_position_before_it(failing: int) -> None:
    """The thread meets the error while earlier steps run. They stay usable, and so does the position."""
    samples = stream([Documents(TEXTS)])
    real, calls = samples.take, iter(range(100))

    def broken(count: int, own: slice) -> Samples:
        if next(calls) == failing:
            raise OSError("the text cannot be read")
        return real(count, own)

    samples.take = broken  # type: ignore[method-assign, assignment]
    with prefetcher(samples) as steps:
        steps_of(steps, failing)
        for _ in range(2):
            with pytest.raises(OSError, match="the text cannot be read"):
                steps.wait(failing, 6)
        state = steps.state()
    plain = stream([Documents(TEXTS)])
    with prefetcher(stream([Documents(TEXTS)])) as again:
        again.load_state(*state)
        for _ in range(failing):
            plain.take(6)
        for prepared in steps_of(again, 3, first=failing):
            assert same(prepared.samples, plain.take(6))


def test_the_thread_ends_with_the_run() -> None:
    before = set(threading.enumerate())
    with prefetcher(stream([Documents(TEXTS)])) as steps:
        steps_of(steps, 1)
        begun = [thread for thread in set(threading.enumerate()) - before if thread.name == "minilm-batches_0"]
    assert len(begun) == 1
    assert not begun[0].is_alive()
    with pytest.raises(RuntimeError, match="shutdown"):
        steps.wait(4, 6)


def test_tensors_for_cuda_are_pinned_on_the_thread_for_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 1)
    calls: list[tuple[str, Any]] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        calls.append((threading.current_thread().name, tensor.data_ptr()))
        return tensor.clone()

    monkeypatch.setattr(prefetch.torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(prefetch.torch.cuda, "set_device", lambda x: calls.append((threading.current_thread().name, x)))
    with prefetcher(stream([Documents(TEXTS)]), settings(max_steps=1)) as steps:
        steps._dist.device = device
        (prepared,) = steps_of(steps, 1)
    assert calls[0][1] == device
    assert len(calls) == 1 + len(tensors(prepared.micro_batches[0].batch))
    assert {name for name, _ in calls} == {"minilm-batches_0"}
