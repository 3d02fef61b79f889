"""Ratios between providers that only a regression breaks, each of one run: `make ratios`.

Margins are wide, a half or less of what was measured (docs/benchmarks.md): a busy machine must not break them. No
absolute time is judged. pytest-benchmark records the provider that a ratio is about.
"""

from __future__ import annotations

import statistics

import pytest

from minilm_kernels import backend_status

from .allocation import peak_bytes
from .providers import PROVIDERS
from .steps import Step
from .timing import interleaved
from .workloads import Workload

_BASE = Workload(1, 24, 512, 16, 8)
_CPU = pytest.mark.skipif(backend_status()["cpu"] != "ready", reason="installed without the CPU library")


def _step(provider: str, workload: Workload, mode: str = "full") -> Step:
    inputs = workload.inputs()
    return Step(PROVIDERS[provider].build(inputs), [inputs], mode)


# Provider and workload, at most so many times the time of the other. Measured: 0.03, 0.1, 0.34, 2.0, 1.05, 0.25.
@pytest.mark.parametrize(
    ("one", "other", "most"),
    [
        pytest.param(("cpu", {}), ("eager", {}), 0.1, marks=_CPU, id="cpu-eager"),
        pytest.param(("cpu", {}), ("torch", {}), 0.25, marks=_CPU, id="cpu-torch"),
        pytest.param(("cpu", {"mask": "half"}), ("cpu", {}), 0.6, marks=_CPU, id="half-full"),
        pytest.param(("cpu", {"relations": "qk"}), ("cpu", {}), 4.0, marks=_CPU, id="cross-self"),
        pytest.param(("cpu", {"dtype": "bfloat16"}), ("cpu", {}), 2.0, marks=_CPU, id="bfloat16-float32"),
        pytest.param(("torch", {}), ("eager", {}), 0.7, id="torch-eager"),
    ],
)
def test_time(benchmark, one, other, most):
    steps = {
        name: _step(provider, Workload(**(vars(_BASE) | changed)))
        for name, (provider, changed) in (("one", one), ("other", other))
    }
    benchmark.pedantic(steps["one"], warmup_rounds=1, rounds=3)
    times = interleaved(steps, "cpu", seconds=1.0)
    ratio = statistics.median(times["one"]) / statistics.median(times["other"])
    benchmark.extra_info["ratio"] = ratio
    assert ratio <= most


@pytest.mark.parametrize(("provider", "most"), [pytest.param("cpu", 0.2, marks=_CPU), ("torch", 0.5)])
def test_memory_beside_eager(provider, most):
    peaks = {}
    for name in (provider, "eager"):
        step = _step(name, _BASE)
        step()
        peaks[name] = peak_bytes(step, "cpu")
    assert peaks[provider] <= most * peaks["eager"]
