"""Suite `launches`: each loss with its gradient once, for profilers and compute-sanitizer, which make it slow.

On a GPU, a first call compiles the kernels, and the profiler's range has the second call only: ncu takes the option
--profile-from-start no.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial

import torch

from benchmarks.measure import records
from benchmarks.measure.correctness import guarded
from benchmarks.measure.timed_loss import TimedLoss
from benchmarks.measure.workload import Workload, parse_all
from benchmarks.providers import PROVIDERS

SHAPES = {"cpu": ["2x2x100x16x8"], "cuda": ["2x2x100x16x8", "1x1x200x64x32"]}


def measure(options: argparse.Namespace) -> Iterator[records.Record]:
    shapes = options.shapes or SHAPES[options.device]
    for workload in parse_all(shapes, options.masks, options.dtypes, options.relations, options.device):
        for name in options.providers:
            for mode in options.modes:
                record = records.new("launches", name, workload, mode, pairs=workload.pairs)
                guarded(record, partial(_launch, record, workload, name, mode))
                yield record


def _launch(record: records.Record, workload: Workload, name: str, mode: str) -> None:
    inputs = workload.inputs()
    loss = TimedLoss(PROVIDERS[name].build(inputs), [inputs], mode)
    loss()
    cuda = workload.device == "cuda"
    if cuda:
        torch.cuda.synchronize()
    with torch.cuda.profiler.profile() if cuda else nullcontext():
        value, grads = loss()
        if cuda:
            torch.cuda.synchronize()
    finite = all(bool(x.isfinite().all()) for x in (value, *grads))
    record |= {"status": "ok"} if finite else {"status": "wrong", "reason": "the loss or its gradient is not finite"}
