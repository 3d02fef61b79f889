"""Checks ratios between providers within one run (`make ratios`). Only a regression exceeds the limits.

The limits are at least twice the measured ratios (docs/benchmarks.md), so that a busy machine does not break them. No
absolute time is asserted. pytest-benchmark records the provider that is compared.
"""

from __future__ import annotations

import statistics

import pytest

from minilm_kernels import backend_status

from .measure.memory import peak_bytes
from .measure.timed_loss import TimedLoss
from .measure.timing import interleaved
from .measure.workload import Workload
from .providers import PROVIDERS

_BASE = Workload(1, 24, 512, 16, 8)
_CPU = pytest.mark.skipif(backend_status()["cpu"] != "ready", reason="installed without the CPU library")


def _timed_loss(provider: str, workload: Workload) -> TimedLoss:
    inputs = workload.inputs()
    return TimedLoss(PROVIDERS[provider].build(inputs), [inputs])


# The first provider and workload take at most `most` times as long as the second. Measured: 0.03, 0.1, 0.34, 2.0, 1.05,
# 0.25.
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
    losses = {
        name: _timed_loss(provider, Workload(**(vars(_BASE) | changed)))
        for name, (provider, changed) in (("one", one), ("other", other))
    }
    benchmark.pedantic(losses["one"], warmup_rounds=1, rounds=3)
    times = interleaved(losses, "cpu", seconds=1.0)
    ratio = statistics.median(times["one"]) / statistics.median(times["other"])
    benchmark.extra_info["ratio"] = ratio
    assert ratio <= most


@pytest.mark.parametrize(("provider", "most"), [pytest.param("cpu", 0.2, marks=_CPU), ("torch", 0.5)])
def test_memory_beside_eager(provider, most):
    peaks = {}
    for name in (provider, "eager"):
        loss = _timed_loss(name, _BASE)
        loss()
        peaks[name] = peak_bytes(loss, "cpu")
    assert peaks[provider] <= most * peaks["eager"]
