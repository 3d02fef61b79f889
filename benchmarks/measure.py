"""How it is measured: interleaved medians within one run, and the error of every step against float64."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler, which reads memory here, reports every start and stop

import torch

import minilm_kernels

from .providers import PROVIDERS, Step, Unsupported, ours
from .workloads import Workload

# A step further from float64 than this computes another loss: it gets no speed row. Half precision rounds harder.
_WRONG = {"float32": 1e-3, "float16": 5e-2, "bfloat16": 2e-1}


def loss_rows(workload: Workload, providers: list[str], seconds: float) -> list[dict]:
    """One row a provider: time of loss and gradient together, peak memory, errors."""
    steps: dict[str, Step] = {}
    rows = {name: _row(workload, name) for name in providers}
    expected, expected_grads = _oracle(workload)
    for name in providers:
        try:
            step = PROVIDERS[name](*workload.tensors())
            value, grads = step()
        except (Unsupported, RuntimeError) as failure:
            status = "oom" if "memory" in str(failure) else "unsupported"
            rows[name] |= {"status": status, "reason": str(failure).splitlines()[0]}
            continue
        error_grad = max(_error(g, e) for g, e in zip(grads, expected_grads, strict=True))
        rows[name] |= {"error_value": _error(value, expected), "error_grad": error_grad}
        if max(rows[name]["error_value"], error_grad) < _WRONG[workload.dtype]:
            steps[name] = step
        else:
            rows[name]["status"] = "wrong"
    times = _interleaved(steps, seconds)
    for name, step in steps.items():
        quantiles = statistics.quantiles(times[name], n=10)
        rows[name] |= {
            "status": "ok",
            "median_ms": statistics.median(times[name]),
            "p20_ms": quantiles[1],
            "p80_ms": quantiles[7],
            "runs": len(times[name]),
            "peak_bytes": _peak_bytes(step),
        }
    return list(rows.values())


def _oracle(workload: Workload):
    teacher, student, mask = workload.tensors()
    return ours("torch", [x.double() for x in teacher], [x.double() for x in student], mask)()


def _error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.double() - expected).norm() / expected.norm()).item()


def _interleaved(steps: dict[str, Step], seconds: float) -> dict[str, list[float]]:
    """Milliseconds of every run; the providers take turns, so that the machine's moods meet them all."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    start = time.perf_counter()
    while steps and (time.perf_counter() - start < seconds or min(map(len, times.values())) < 5):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            times[name].append(1e3 * (time.perf_counter() - begin))
    return times


def _peak_bytes(step: Step) -> int:
    """Most memory that PyTorch's allocator held at once during a step, beyond what was held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _row(workload: Workload, provider: str) -> dict:
    return {
        "suite": "loss",
        "provider": provider,
        "device": f"{platform.machine()}, {_processor()}, {torch.get_num_threads()} threads",
        "dtype": workload.dtype,
        "mode": "full",
        "shape": workload.shape(),
        "pairs": workload.pairs,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "minilm_kernels": minilm_kernels.__version__,
        },
        "revision": _revision(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _revision() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"
