"""The time of the exponentials alone, at the rate measured on the same device: the yardstick of all providers."""

from __future__ import annotations

import statistics
from functools import cache

import torch

from benchmarks.measure import records
from benchmarks.measure.correctness import relative
from benchmarks.measure.timing import time_ms
from benchmarks.measure.workload import Workload

NAME = "exponentials"
# Exponentials per visible ordered pair of a self relation: one of the teacher and one of the student for each
# unordered pair, in each of two phases (docs/mathematics.md). A kernel may be faster than the yardstick if it keeps the
# exponentials of the first phase, or if its exponential is faster than the one measured here.
PER_PAIR = 2


@cache
def rate(device: str) -> tuple[float, float]:
    """Nanoseconds per float32 exponential when the whole device computes exponentials, and their relative error."""
    if device == "cuda":
        from .triton_kernel import BLOCK, TURNS, launch

        # 24 blocks for each multiprocessor.
        out = torch.empty(24 * torch.cuda.get_device_properties(0).multi_processor_count * BLOCK, device="cuda")
        times = [time_ms(lambda: launch(out, TURNS), device) for _ in range(20)][3:]
        launch(out, 1)
        index = torch.arange(out.numel(), device="cuda") % 1024
        error = relative(out, -torch.exp2(-index.double() / 1024))
        return 1e6 * statistics.median(times) / (out.numel() * TURNS), error
    # PyTorch's vectorized exponential on operands that stay in the cache: 32 768 for each thread, its grain size.
    x = torch.linspace(-20, 0, 2**15 * torch.get_num_threads())
    out = torch.empty_like(x)
    times = [time_ms(lambda: torch.exp(x, out=out), device) for _ in range(300)]
    return 1e6 * statistics.median(times) / x.numel(), relative(out, x.double().exp())


def record(workload: Workload) -> records.Record:
    """The time of loss and gradient if they consisted of exponentials only."""
    each, error = rate(workload.device)
    count = PER_PAIR * workload.visible_pairs
    milliseconds = 1e-6 * each * count
    return records.new("loss", NAME, workload, pairs=workload.pairs, exponentials=count, error_value=error) | {
        **dict.fromkeys(("median_ms", "p20_ms", "p80_ms"), milliseconds),
        **{"status": "ok", "method": "rate", "clocks": records.clocks(workload.device)},
    }
