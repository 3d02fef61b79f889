"""Suite `first_call`: seconds of the first call in a new process, whose kernels are compiled or read from the cache."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.measure import records
from benchmarks.measure.correctness import guarded
from benchmarks.measure.memory import isolated
from benchmarks.measure.timed_loss import TimedLoss
from benchmarks.measure.timing import first_run
from benchmarks.measure.workload import Workload, parse_all
from benchmarks.providers import PROVIDERS

SHAPES = {"cpu": ["1x4x64x16x8"], "cuda": ["v2-base:2x512"]}


def measure(options: argparse.Namespace) -> Iterator[records.Record]:
    shapes = options.shapes or SHAPES[options.device]
    for workload in parse_all(shapes, options.masks, options.dtypes, options.relations, options.device):
        for name in options.providers:
            with tempfile.TemporaryDirectory() as folder:
                for cache in ("empty", "filled"):
                    record = records.new("first_call", name, workload, pairs=workload.pairs, detail={"cache": cache})
                    work = partial(isolated, _first_call, workload, name, folder, seconds=4 * options.timeout)
                    seconds = guarded(record, work)
                    if seconds is not None:
                        record["detail"]["first_call_s"] = seconds
                        record["status"] = "ok"
                    yield record


def _first_call(workload: Workload, name: str, folder: str) -> float:
    os.environ |= {"MINILM_KERNELS_CACHE": f"{folder}/cuda", "TRITON_CACHE_DIR": f"{folder}/triton"}
    inputs = workload.inputs()  # creates the CUDA context
    if workload.device == "cuda":
        torch.cuda.synchronize()
    return first_run(TimedLoss(PROVIDERS[name].build(inputs), [inputs]), workload.device)[1]
