"""Suite `loss`: time of the loss and its gradient, provider beside provider, with memory and error."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial

from benchmarks import roofline, rows
from benchmarks.allocation import at_most, peak_bytes
from benchmarks.candidates import Limits, admit, guarded
from benchmarks.oracle import Oracle
from benchmarks.providers import PROVIDERS
from benchmarks.steps import Step
from benchmarks.timing import GraphStep, copies_beyond_cache, interleaved, summary
from benchmarks.workloads import Workload, parse_all

SHAPES = {"cpu": ["2x48x512x16x8", "4x12x512x64x32"], "cuda": ["v2-base:32x512", "v2-base:256x512", "v1:32x512"]}


def measure(options: argparse.Namespace) -> Iterator[rows.Row]:
    shapes = options.shapes or SHAPES[options.device]
    for workload in parse_all(shapes, options.masks, options.dtypes, options.relations, options.device):
        for mode in options.modes:
            yield from workload_rows(workload, mode, options)


def workload_rows(workload: Workload, mode: str, options: argparse.Namespace) -> list[rows.Row]:
    """One row a provider and method."""
    limits = Limits(options.memory, options.cap)
    inputs = workload.inputs()
    count = copies_beyond_cache(inputs.bytes(), workload.device)
    copies = [inputs, *(workload.inputs(seed) for seed in range(1, count))]
    oracle = Oracle(inputs, workload.pairs, workload.device)
    admitted: dict[str, tuple[rows.Row, Step]] = {}
    made: list[rows.Row] = []
    for name in options.providers:
        row = _row(workload, name, mode)
        made.append(row)
        step = admit(row, workload, copies, oracle, mode, limits)
        if step is not None:
            admitted[name] = (row, step)
    del oracle
    for row, step in admitted.values():
        guarded(row, partial(_memory, row, step, workload, limits))
    timed = {name: (row, step) for name, (row, step) in admitted.items() if row["status"] == "ok"}
    for method in options.methods if workload.device == "cuda" else ["wall"]:
        steps = {}
        for name, (row, step) in timed.items():
            if method == "graph":
                row = row | {"method": method}
                made.append(row)
                recorded = guarded(row, partial(GraphStep, step, count))
                if recorded is None:
                    continue
                step = recorded
            steps[name] = (row, step)
        with at_most(limits.bytes, workload.device):
            times = interleaved({name: step for name, (_, step) in steps.items()}, workload.device, options.seconds)
        now = rows.clocks(workload.device)
        for name, (row, _) in steps.items():
            row |= summary(times[name]) | {"method": method, "clocks": now}
    return [roofline.row(workload, mode), *made] if mode == "full" else made


def _row(workload: Workload, name: str, mode: str) -> rows.Row:
    counted = mode == "full" and all(pair[0] == pair[1] for pair in workload.relations.split(","))
    each = PROVIDERS[name].exponentials if counted else None
    exponentials = None if each is None else each * workload.visible_pairs
    row = rows.new("loss", name, workload.device, workload.dtype, mode, workload.shape())
    return row | {"pairs": workload.pairs, "exponentials": exponentials}


def _memory(row: rows.Row, step: Step, workload: Workload, limits: Limits) -> None:
    with at_most(limits.bytes, workload.device):
        row |= {"peak_bytes": peak_bytes(step, workload.device), "saved_bytes": step.saved_bytes(), "status": "ok"}
