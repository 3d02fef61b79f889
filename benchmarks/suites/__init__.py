"""The suites. `measure(options)` of each module yields records, with the most valuable first."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from importlib import import_module

from benchmarks.measure.records import Record

SUITES = {
    "loss": "time, memory and error of the loss and its gradient",
    "memory": "peak and saved bytes, and the largest batch that fits",
    "train_step": "a whole training step by stages, for each layout of its samples",
    "data": "what the input pipeline costs, and the speeds of its parts",
    "inference": "speed of the published students relative to the 12 x 768 base model",
    "accuracy": "errors of every backend, mask and dtype relative to dense float64, and at small divergences",
    "variants": "variants of the kernels' schedules, timed in turns, and the bits of repeated runs",
    "first_call": "seconds of a process's first call, with an empty and with a filled cache of kernels",
    "launches": "each loss once, for profilers and compute-sanitizer",
}


def measure(options: argparse.Namespace) -> Iterator[Record]:
    """The records of the chosen suite; only its module is imported, because importing transformers takes seconds."""
    return import_module(f"{__name__}.{options.suite}").measure(options)
