"""Time: interleaved medians within one run, so that the machine's moods meet everyone; CUDA by events or graphs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import torch

from .allocation import nothing_left_behind
from .steps import Step

Key = TypeVar("Key", bound=Hashable)
_TURN_MS = 100.0  # a provider's turn: so much of its runs, at least one, at most _TURN_RUNS
_TURN_RUNS = 10
_LEAST_RUNS = 5


def first_run(step: Callable[[], Any], device: str) -> tuple[Any, float]:
    """A step's result and its seconds, warm-up included."""
    begin = time.perf_counter()
    result = step()
    if device == "cuda":
        torch.cuda.synchronize()
    return result, time.perf_counter() - begin


def copies_beyond_cache(size: int, device: str) -> int:
    """How many copies of inputs of `size` bytes make three times the L2 cache of a GPU; on CPUs 1.

    On a CPU the models' work between two losses is not imitated: the inputs may stay in its caches.
    """
    if device != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return min(16, max(1, -(-3 * cache // size)))


def interleaved(steps: Mapping[Key, Step], device: str, seconds: float) -> dict[Key, list[float]]:
    """Milliseconds of every run of each step; they take turns until `seconds` are over, at least five runs each."""
    times: dict[Key, list[float]] = {name: [] for name in steps}
    turn = _cuda_turn if device == "cuda" else _cpu_turn
    for step in steps.values():
        turn(step, 1)  # warm-up
    start = time.perf_counter()
    while steps and (time.perf_counter() - start < seconds or min(map(len, times.values())) < _LEAST_RUNS):
        for name, step in steps.items():
            usual = statistics.median(times[name]) if times[name] else _TURN_MS
            times[name] += turn(step, min(_TURN_RUNS, max(1, int(_TURN_MS / usual))))
    return times


def _cpu_turn(step: Step, runs: int) -> list[float]:
    with nothing_left_behind():  # by the one whose turn was before
        pass
    step()
    times = []
    for _ in range(runs):
        run = step.prepare()
        begin = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - begin))
    return times


def _cuda_turn(step: Step, runs: int) -> list[float]:
    events = []
    for _ in range(runs):
        run = step.prepare()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        events.append((begin, end))
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in events]


class GraphStep(Step):
    """A step recorded as CUDA graphs, one for each copy of the inputs, and replayed: what the GPU alone takes."""

    def __init__(self, step: Step, copies: int) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        self._graphs = []
        for _ in range(copies):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            self._graphs.append(graph)

    def prepare(self) -> Callable[[], Any]:
        self._graphs.append(self._graphs.pop(0))
        return self._graphs[-1].replay


def summary(times: list[float]) -> dict[str, Any]:
    """The keys of a row."""
    quantiles = statistics.quantiles(times, n=10)
    return {"median_ms": statistics.median(times), "p20_ms": quantiles[1], "p80_ms": quantiles[7], "runs": len(times)}
