"""Suite `loss`: time, memory and error of the loss and its gradient, for all providers side by side."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

from benchmarks import roofline
from benchmarks.measure import records
from benchmarks.measure.correctness import Limits, Oracle, admit, guarded
from benchmarks.measure.memory import freed_memory_returned, memory_limit, peak_bytes
from benchmarks.measure.timed_loss import TimedLoss
from benchmarks.measure.timing import TimedGraph, copies_beyond_cache, interleaved, summary
from benchmarks.measure.workload import Workload, parse_all
from benchmarks.providers import PROVIDERS

SHAPES = {"cpu": ["2x48x512x16x8", "4x12x512x64x32"], "cuda": ["v2-base:32x512", "v2-base:256x512", "v1:32x512"]}


class _Prepared(NamedTuple):
    record: records.Record
    loss: TimedLoss | None  # None if it must not be timed
    copies: int  # number of copies of the inputs


def measure(options: argparse.Namespace) -> Iterator[records.Record]:
    shapes = options.shapes or SHAPES[options.device]
    workloads = parse_all(shapes, options.masks, options.dtypes, options.relations, options.device)
    for group in [workloads] if options.interleave else [[workload] for workload in workloads]:
        for mode in options.modes:
            prepared = {workload: _prepare(workload, mode, options) for workload in group}
            graphs = _time(prepared, options)
            for workload, found in prepared.items():
                if mode == "full":
                    yield roofline.record(workload)
                yield from (one.record for one in found)
                yield from graphs.get(workload, ())


def _prepare(workload: Workload, mode: str, options: argparse.Namespace) -> list[_Prepared]:
    limits = Limits(options.memory, options.timeout)
    inputs = workload.inputs()
    count = copies_beyond_cache(inputs.bytes(), workload.device)
    copies = [inputs, *(workload.inputs(seed) for seed in range(1, count))]
    made = []
    with freed_memory_returned():
        oracle = Oracle(inputs, workload.pairs, workload.device)
        for name in options.providers:
            record = _record(workload, name, mode)
            made.append(_Prepared(record, admit(record, workload, copies, oracle, limits), count))
    for record, loss, _ in made:
        if loss is not None:
            guarded(record, partial(_measure_memory, record, loss, workload.device, limits))
    return [c if c.record["status"] == "ok" else c._replace(loss=None) for c in made]


def _time(
    prepared: dict[Workload, list[_Prepared]], options: argparse.Namespace
) -> dict[Workload, list[records.Record]]:
    """Time all losses of all workloads in turns. Return the additional records of all methods but the first."""
    device = options.device
    graphs: dict[Workload, list[records.Record]] = {}
    for method in options.methods if device == "cuda" else ["wall"]:
        timed: dict[tuple[Workload, str], tuple[records.Record, TimedLoss]] = {}
        for workload, found in prepared.items():
            for record, loss, copies in found:
                if loss is not None and method == "graph":
                    record = record | {"method": method}
                    graphs.setdefault(workload, []).append(record)
                    loss = guarded(record, partial(TimedGraph, loss, copies))
                if loss is not None:
                    timed[workload, record["provider"]] = (record, loss)
        with memory_limit(options.memory, device):
            losses = {key: loss for key, (_, loss) in timed.items()}
            times = interleaved(losses, device, options.seconds * len(prepared))
        clocks = records.clocks(device)
        for key, (record, _) in timed.items():
            record |= (
                summary(times[key], device) | {"clocks": clocks} | ({"method": method} if method == "graph" else {})
            )
    return graphs


def _record(workload: Workload, name: str, mode: str) -> records.Record:
    self_relations = all(pair[0] == pair[1] for pair in workload.relations.split(","))
    each = PROVIDERS[name].exponentials if mode == "full" and self_relations else None
    count = None if each is None else each * workload.visible_pairs
    return records.new("loss", name, workload, mode, pairs=workload.pairs, exponentials=count)


def _measure_memory(record: records.Record, loss: TimedLoss, device: str, limits: Limits) -> None:
    with memory_limit(limits.bytes, device):
        record["peak_bytes"] = peak_bytes(loss, device)
        with freed_memory_returned():
            record["saved_bytes"] = loss.saved_bytes()
    record["status"] = "ok"
