"""The bound of every provider: the time that the exponentials alone take, at the rate measured on the same device."""

from __future__ import annotations

import statistics
import time
from functools import cache

import torch

from . import rows
from .oracle import relative
from .workloads import Workload

NAME = "exponentials"
# Of a visible ordered pair of a self relation: teacher and student, for each unordered pair in both phases
# (docs/mathematics.md). Who keeps those of the first phase needs fewer and may pass the bound.
PER_PAIR = 2


@cache
def nanoseconds(device: str) -> tuple[float, float]:
    """Of one float32 exponential with the whole device at work, and its relative error."""
    return _cuda_rate() if device == "cuda" else _cpu_rate()


def _cpu_rate() -> tuple[float, float]:
    """PyTorch's vectorised exponential on operands that stay in the cache, 32 768 for each thread (its grain)."""
    count = 2**15 * torch.get_num_threads()
    x = torch.linspace(-20, 0, count)
    out = torch.empty_like(x)
    times = []
    for _ in range(300):
        begin = time.perf_counter()
        torch.exp(x, out=out)
        times.append(1e9 * (time.perf_counter() - begin))
    return statistics.median(times) / count, relative(out, x.double().exp())


def _cuda_rate() -> tuple[float, float]:
    """Of a Triton kernel, with 24 blocks for each multiprocessor."""
    from .roofline_triton import BLOCK, TURNS, launch

    out = torch.empty(24 * torch.cuda.get_device_properties(0).multi_processor_count * BLOCK, device="cuda")
    times = []
    for _ in range(20):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        launch(out, TURNS)
        end.record()
        torch.cuda.synchronize()
        times.append(1e6 * begin.elapsed_time(end))
    launch(out, 1)
    place = torch.arange(out.numel(), device="cuda") % 1024
    return statistics.median(times[3:]) / (out.numel() * TURNS), relative(out, -torch.exp2(-place.double() / 1024))


def row(workload: Workload, mode: str) -> rows.Row:
    """The loss and gradient of `workload` if they were exponentials and nothing else."""
    each, error = nanoseconds(workload.device)
    count = PER_PAIR * workload.visible_pairs
    made = rows.new("loss", NAME, workload.device, workload.dtype, mode, workload.shape())
    milliseconds = 1e-6 * each * count
    return made | {
        "status": "ok",
        "method": "rate",
        **dict.fromkeys(("median_ms", "p20_ms", "p80_ms"), milliseconds),
        "error_value": error,
        "pairs": workload.pairs,
        "exponentials": count,
        "clocks": rows.clocks(workload.device),
    }
