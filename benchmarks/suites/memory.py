"""Suite `memory`: peak and saved bytes of loss and gradient against S and B, and the largest batch that fits."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial

from benchmarks.measure import records
from benchmarks.measure.correctness import Limits, Oracle, admit, guarded
from benchmarks.measure.memory import OutOfMemory, isolated, largest, memory_limit, peak_bytes
from benchmarks.measure.timed_loss import TimedLoss
from benchmarks.measure.workload import Workload, parse_all
from benchmarks.providers import PROVIDERS

SHAPES = {
    "cpu": ["1x48x128x16x8", "1x48x256x16x8", "1x48x512x16x8", "2x48x256x16x8", "8x48x256x16x8"],
    "cuda": [f"v2-base:32x{S}" for S in (128, 256, 512, 1024, 2048, 4096)]
    + [f"v2-base:{B}x512" for B in (8, 64, 128, 256, 512, 1024)],
}
BATCHES = {"cpu": ["1x48x256x16x8"], "cuda": ["v2-base:1x512", "v2-large:1x512", "v1:1x512"]}
_MAX_BATCH = {"cpu": 1024, "cuda": 8192}
# Bytes that a trial's process may allocate beyond the budget, because the measured peak decides and not this limit. The
# profiler, which records each operator of a run, takes hundreds of megabytes for a backend of many small operators.
_SLACK = 2**30


def measure(options: argparse.Namespace) -> Iterator[records.Record]:
    combinations = (options.masks, options.dtypes, options.relations, options.device)
    if options.batches != ["none"]:
        for workload in parse_all(options.batches or BATCHES[options.device], *combinations):
            for name in options.providers:
                yield _largest_batch(workload, name, options)
    if options.shapes != ["none"]:
        for workload in parse_all(options.shapes or SHAPES[options.device], *combinations):
            yield from _peaks(workload, options)


def _peaks(workload: Workload, options: argparse.Namespace) -> Iterator[records.Record]:
    limits = Limits(options.memory, options.timeout)
    inputs = workload.inputs()
    oracle = Oracle(inputs, workload.pairs, workload.device)
    for name in options.providers:
        record = records.new("memory", name, workload, pairs=workload.pairs)
        if admit(record, workload, [inputs], oracle, limits) is not None:
            measured = guarded(record, partial(_trial, workload, name, limits))
            if measured is not None:
                record["detail"]["inputs_bytes"] = measured.pop("inputs_bytes")
                record |= measured | {"status": "ok"}
        yield record


def _largest_batch(workload: Workload, name: str, options: argparse.Namespace) -> records.Record:
    """A record whose B is the largest for which inputs, gradients and temporaries fit the budget."""
    record = records.new("memory", name, workload, pairs=workload.pairs, detail={"budget_bytes": options.budget})
    one = workload.with_batch(1)
    inputs = one.inputs()
    oracle = Oracle(inputs, one.pairs, one.device)
    if admit(record, one, [inputs], oracle, Limits(options.budget, options.timeout)) is None:
        if record["status"] == "oom":
            record |= {"shape": one.with_batch(0).shape(), "status": "ok", "pairs": 0}
        return record
    del inputs, oracle
    found = guarded(record, lambda: _search(workload, name, options))
    if found is not None:
        best, measured, detail = found
        record["detail"] |= detail
        record |= measured | {"shape": best.shape(), "pairs": best.pairs, "status": "ok"}
    return record


def _search(workload: Workload, name: str, options: argparse.Namespace) -> tuple[Workload, dict, dict]:
    """The workload with the largest batch, its measurement, and details of the search."""
    limits = Limits(options.budget, options.timeout)
    measured: dict[int, dict] = {}

    def total(B: int) -> int:
        return measured[B]["peak_bytes"] + measured[B]["inputs_bytes"]

    def fits(B: int) -> bool:
        try:
            measured[B] = _trial(workload.with_batch(B), name, limits, _SLACK)
        except OutOfMemory:
            return False
        return total(B) <= options.budget

    one, two = fits(1), fits(2)
    slope = total(2) - total(1) if two else 0
    guess = 2 + (options.budget - total(2)) // slope if slope > 0 else 1 + one
    most = min(options.max_batch or _MAX_BATCH[workload.device], _MAX_BATCH[workload.device])
    B = largest(fits, guess, most) if one else 0
    best = dict(measured.get(B, {"inputs_bytes": 0}))
    detail = {"inputs_bytes": best.pop("inputs_bytes"), "trials": len(measured)}
    return workload.with_batch(B), best, detail | ({"most": most} if most == B else {})  # most: larger was not tried


def _trial(workload: Workload, name: str, limits: Limits, slack: int = 0) -> dict:
    """Peak, saved and input bytes. On a CPU they are measured in a new process, whose heap has no freed blocks."""
    if workload.device == "cuda":
        return _run(workload, name, limits.bytes)
    limit = None if limits.bytes is None else limits.bytes + slack
    return isolated(_run, workload, name, limit, seconds=10 * limits.seconds)


def _run(workload: Workload, name: str, limit: int | None) -> dict:
    with memory_limit(limit, workload.device):
        inputs = workload.inputs()
        loss = TimedLoss(PROVIDERS[name].build(inputs), [inputs])
        if workload.device == "cuda":  # on a CPU, the measurement of the peak has its own warm-up run
            loss()
        peak, saved = peak_bytes(loss, workload.device), loss.saved_bytes()
        return {"peak_bytes": peak, "saved_bytes": saved, "inputs_bytes": inputs.bytes()}
