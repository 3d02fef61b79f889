"""Suite `loss`: time of the loss and its gradient, provider beside provider, with memory and error."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from benchmarks import roofline, rows
from benchmarks.allocation import at_most, nothing_left_behind, peak_bytes
from benchmarks.candidates import Limits, admit, guarded
from benchmarks.oracle import Oracle
from benchmarks.providers import PROVIDERS
from benchmarks.steps import Step
from benchmarks.timing import GraphStep, copies_beyond_cache, interleaved, summary
from benchmarks.workloads import Workload, parse_all

SHAPES = {"cpu": ["2x48x512x16x8", "4x12x512x64x32"], "cuda": ["v2-base:32x512", "v2-base:256x512", "v1:32x512"]}


@dataclass
class _Prepared:
    """One workload in one mode: its rows, and the steps that may be timed."""

    workload: Workload
    mode: str
    copies: int  # of the inputs
    made: list[rows.Row]
    timed: dict[str, tuple[rows.Row, Step]]


def measure(options: argparse.Namespace) -> Iterator[rows.Row]:
    shapes = options.shapes or SHAPES[options.device]
    workloads = parse_all(shapes, options.masks, options.dtypes, options.relations, options.device)
    for group in [list(workloads)] if options.together else [[workload] for workload in workloads]:
        for mode in options.modes:
            prepared = [_prepare(workload, mode, options) for workload in group]
            _time(prepared, options)
            for one in prepared:
                if mode == "full":
                    yield roofline.row(one.workload, mode)
                yield from one.made


def _prepare(workload: Workload, mode: str, options: argparse.Namespace) -> _Prepared:
    limits = Limits(options.memory, options.cap)
    inputs = workload.inputs()
    count = copies_beyond_cache(inputs.bytes(), workload.device)
    copies = [inputs, *(workload.inputs(seed) for seed in range(1, count))]
    with nothing_left_behind():
        oracle = Oracle(inputs, workload.pairs, workload.device)
        admitted: dict[str, tuple[rows.Row, Step]] = {}
        made: list[rows.Row] = []
        for name in options.providers:
            row = _row(workload, name, mode)
            made.append(row)
            step = admit(row, workload, copies, oracle, mode, limits)
            if step is not None:
                admitted[name] = (row, step)
    for row, step in admitted.values():
        guarded(row, partial(_memory, row, step, workload, limits))
    timed = {name: (row, step) for name, (row, step) in admitted.items() if row["status"] == "ok"}
    return _Prepared(workload, mode, count, made, timed)


def _time(prepared: list[_Prepared], options: argparse.Namespace) -> None:
    """Times all steps of all workloads in turns; a method more than the first is a row more."""
    device = options.device
    for method in options.methods if device == "cuda" else ["wall"]:
        steps: dict[tuple[int, str], tuple[rows.Row, Step]] = {}
        for i, one in enumerate(prepared):
            for name, (row, step) in one.timed.items():
                if method == "graph":
                    row = row | {"method": method}
                    one.made.append(row)
                    recorded = guarded(row, partial(GraphStep, step, one.copies))
                    if recorded is None:
                        continue
                    step = recorded
                steps[i, name] = (row, step)
        seconds = options.seconds * len(prepared)
        with at_most(Limits(options.memory, options.cap).bytes, device):
            times = interleaved({key: step for key, (_, step) in steps.items()}, device, seconds)
        now = rows.clocks(device)
        for key, (row, _) in steps.items():
            row |= summary(times[key]) | {"method": method, "clocks": now}


def _row(workload: Workload, name: str, mode: str) -> rows.Row:
    counted = mode == "full" and all(pair[0] == pair[1] for pair in workload.relations.split(","))
    each = PROVIDERS[name].exponentials if counted else None
    exponentials = None if each is None else each * workload.visible_pairs
    row = rows.new("loss", name, workload.device, workload.dtype, mode, workload.shape())
    return row | {"pairs": workload.pairs, "exponentials": exponentials}


def _memory(row: rows.Row, step: Step, workload: Workload, limits: Limits) -> None:
    with at_most(limits.bytes, workload.device):
        row["peak_bytes"] = peak_bytes(step, workload.device)
        with nothing_left_behind():
            row["saved_bytes"] = step.saved_bytes()
    row["status"] = "ok"
