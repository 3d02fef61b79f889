"""Time: providers take turns within one run, so that disturbances affect all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import torch

from .memory import freed_memory_returned
from .timed_loss import TimedLoss

Key = TypeVar("Key", bound=Hashable)
# Duration of a provider's turn, which has at least one run and at most _TURN_RUNS.
_TURN_MS = 100.0
_TURN_RUNS = 10
_MIN_RUNS = 5


def stamp(device: str) -> Any:
    """The current time: a recorded CUDA event, or the wall clock in milliseconds."""
    if device != "cuda":
        return 1e3 * time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def intervals(stamps: Sequence[Any]) -> list[float]:
    """Milliseconds between successive stamps."""
    if isinstance(stamps[-1], float):
        return [b - a for a, b in pairwise(stamps)]
    stamps[-1].synchronize()
    return [a.elapsed_time(b) for a, b in pairwise(stamps)]


def time_ms(work: Callable[[], Any], device: str) -> float:
    """Milliseconds of one call."""
    begin = stamp(device)
    work()
    return intervals([begin, stamp(device)])[0]


def first_run(work: Callable[[], Any], device: str) -> tuple[Any, float]:
    """The result of a call, and its duration in seconds on the host's clock, including compilation."""
    begin = time.perf_counter()
    result = work()
    if device == "cuda":
        torch.cuda.synchronize()
    return result, time.perf_counter() - begin


def copies_beyond_cache(size: int, device: str) -> int:
    """The number of copies of `size` bytes that fill a GPU's L2 cache three times; 1 on a CPU.

    On a CPU, one copy is enough, although its inputs may stay in the caches: the work that models do between two losses
    is not simulated.
    """
    if device != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return min(16, max(1, -(-3 * cache // size)))


def turn(loss: TimedLoss, device: str, runs: int) -> list[float]:
    """Milliseconds of each run of one turn."""
    if device == "cpu":
        with freed_memory_returned():  # memory that the previous provider freed
            pass
        loss()
    stamps = []
    for _ in range(runs):
        run = loss.prepare()
        begin = stamp(device)
        run()
        stamps.append((begin, stamp(device)))
    return [intervals(pair)[0] for pair in stamps]


def interleaved(
    losses: Mapping[Key, Any], device: str, seconds: float, turn: Callable[[Any, str, int], list[float]] = turn
) -> dict[Key, list[float]]:
    """Milliseconds of every run. The losses take turns for `seconds`; each runs at least five times."""
    times: dict[Key, list[float]] = {key: [] for key in losses}
    for loss in losses.values():
        turn(loss, device, 1)  # warm-up
    start = time.perf_counter()
    while losses and (time.perf_counter() - start < seconds or min(map(len, times.values())) < _MIN_RUNS):
        for key, loss in losses.items():
            expected = statistics.median(times[key]) if times[key] else _TURN_MS
            times[key] += turn(loss, device, min(_TURN_RUNS, max(1, int(_TURN_MS / expected))))
    return times


class TimedGraph(TimedLoss):
    """A loss captured as CUDA graphs, one for each copy of the inputs: the GPU's time without the host's."""

    def __init__(self, loss: TimedLoss, copies: int) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                loss()
        torch.cuda.current_stream().wait_stream(stream)
        self._graphs = []
        for _ in range(copies):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                loss()
            self._graphs.append(graph)

    def prepare(self) -> Callable[[], Any]:
        self._graphs.append(self._graphs.pop(0))
        return self._graphs[-1].replay


def summary(times: list[float], device: str) -> dict[str, Any]:
    """The keys of a record that describe time."""
    quantiles = statistics.quantiles(times, n=10)
    measured = {"median_ms": statistics.median(times), "p20_ms": quantiles[1], "p80_ms": quantiles[7]}
    return measured | {"runs": len(times), "method": "events" if device == "cuda" else "wall"}
