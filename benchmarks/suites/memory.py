"""Suite `memory`: peak and saved bytes of loss and gradient against S and B, and the largest batch that fits."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial

import torch

from benchmarks import rows
from benchmarks.allocation import OutOfMemory, at_most, isolated, largest, peak_bytes
from benchmarks.candidates import Limits, admit, guarded
from benchmarks.oracle import Oracle
from benchmarks.providers import PROVIDERS
from benchmarks.steps import Step
from benchmarks.workloads import Workload, parse_all

SHAPES = {
    "cpu": ["1x48x128x16x8", "1x48x256x16x8", "1x48x512x16x8", "2x48x256x16x8", "8x48x256x16x8"],
    "cuda": [f"v2-base:{B}x{S}" for B, S in [(32, 128), (32, 256), (32, 512), (32, 1024), (32, 2048), (32, 4096)]]
    + [f"v2-base:{B}x512" for B in (8, 64, 128, 256, 512, 1024)],
}
BATCHES = {"cpu": ["1x48x256x16x8"], "cuda": ["v2-base:1x512", "v2-large:1x512", "v1:1x512"]}
_MOST = {"cpu": 1024, "cuda": 8192}  # a batch beyond is not sought
# What a trial's process may hold beside the budget before allocations fail: the measured peak decides, not the limit.
_SLACK = 2**28


def measure(options: argparse.Namespace) -> Iterator[rows.Row]:
    combinations = (options.masks, options.dtypes, options.relations, options.device)
    if options.batches != ["none"]:
        for workload in parse_all(options.batches or BATCHES[options.device], *combinations):
            for name in options.providers:
                yield batch_row(workload, name, options)
    if options.shapes != ["none"]:
        for workload in parse_all(options.shapes or SHAPES[options.device], *combinations):
            yield from peak_rows(workload, options)


def peak_rows(workload: Workload, options: argparse.Namespace) -> Iterator[rows.Row]:
    limits = Limits(options.memory, options.cap)
    inputs = workload.inputs()
    oracle = Oracle(inputs, workload.pairs, workload.device)
    for name in options.providers:
        row = _row(workload, name)
        step = admit(row, workload, [inputs], oracle, "full", limits)
        if step is not None:
            guarded(row, partial(_fill, row, workload, step, limits))
        yield row


def _fill(row: rows.Row, workload: Workload, step: Step, limits: Limits) -> None:
    if workload.device == "cuda":
        measured = _peak(step, workload.device, limits.bytes)
    else:  # here the free blocks that other work left in the heap would be filled, and counted
        measured = isolated(_trial, workload, row["provider"], limits.bytes, seconds=10 * limits.seconds)
        row["detail"]["inputs_bytes"] = measured.pop("inputs_bytes")
    row |= measured | {"status": "ok"}


def batch_row(workload: Workload, name: str, options: argparse.Namespace) -> rows.Row:
    """The largest B of this shape whose inputs, gradients and whatever else fit the budget; shape["B"] is it."""
    row = _row(workload, name)
    row["detail"] = {"budget_bytes": options.budget}
    small = workload.with_batch(1)
    inputs = small.inputs()
    if (
        admit(
            row, small, [inputs], Oracle(inputs, small.pairs, small.device), "full", Limits(options.budget, options.cap)
        )
        is None
    ):
        if row["status"] == "oom":
            row |= {"shape": small.with_batch(0).shape(), "status": "ok", "pairs": 0}
        return row
    del inputs
    found = guarded(row, lambda: _largest_batch(row, workload, name, options))
    if found is not None:
        B, measured = found
        best = workload.with_batch(B)
        row |= measured | {"shape": best.shape(), "pairs": best.pairs, "status": "ok"}
    return row


def _largest_batch(row: rows.Row, workload: Workload, name: str, options: argparse.Namespace) -> tuple[int, dict]:
    trial = _cuda_trial if workload.device == "cuda" else _cpu_trial
    measured: dict[int, dict] = {}

    def total(B: int) -> int:
        return measured[B]["peak_bytes"] + measured[B]["inputs_bytes"]

    def fits(B: int) -> bool:
        try:
            measured[B] = trial(workload.with_batch(B), name, options.budget, options.cap)
        except OutOfMemory:
            return False
        return total(B) <= options.budget

    one, two = fits(1), fits(2)
    slope = total(2) - total(1) if two else 0
    guess = 2 + (options.budget - total(2)) // slope if slope > 0 else 1 + one
    most = min(options.most or _MOST[workload.device], _MOST[workload.device])
    B = largest(fits, guess, most) if one else 0
    if most == B:
        row["detail"]["most"] = most  # more may fit: it was not tried
    best = dict(measured.get(B, {"inputs_bytes": 0}))
    row["detail"] |= {"inputs_bytes": best.pop("inputs_bytes"), "trials": len(measured)}
    return B, best


def _cpu_trial(workload: Workload, name: str, budget: int, cap: float) -> dict:
    return isolated(_trial, workload, name, budget + _SLACK, seconds=10 * cap)


def _cuda_trial(workload: Workload, name: str, budget: int, cap: float) -> dict:
    torch.cuda.empty_cache()
    whole = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, budget / whole))
    try:
        return _trial(workload, name, None)
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(str(error).splitlines()[0]) from error
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def _trial(workload: Workload, name: str, limit: int | None) -> dict:
    with at_most(limit, workload.device):
        inputs = workload.inputs()
        step = Step(PROVIDERS[name].build(inputs), [inputs], "full")
        if workload.device == "cuda":  # on a CPU the peak's own first run is the warm-up
            step()
        return _peak(step, workload.device, limit) | {"inputs_bytes": inputs.bytes()}


def _peak(step: Step, device: str, limit: int | None) -> dict:
    with at_most(limit, device):
        return {"peak_bytes": peak_bytes(step, device), "saved_bytes": step.saved_bytes()}


def _row(workload: Workload, name: str) -> rows.Row:
    row = rows.new("memory", name, workload.device, workload.dtype, "full", workload.shape())
    return row | {"pairs": workload.pairs}
