"""The learning-rate schedule."""

from __future__ import annotations

import itertools

import pytest

from minilm_kernels.distill import DistillConfig
from minilm_kernels.distill.optimizer import learning_rate_at

from .test_config import NEEDED


def test_schedule_rises_to_the_peak_and_ends_at_zero() -> None:
    config = DistillConfig(**NEEDED, max_steps=100, warmup_steps=10, learning_rate=2.0)
    rates = [learning_rate_at(config, step) for step in range(101)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == rates[9] == rates[10] == 2.0
    assert rates[100] == 0
    rises = [b - a for a, b in itertools.pairwise(rates)]
    assert rises[:9] == pytest.approx([0.2] * 9)
    assert rises[10:] == pytest.approx([-2 / 90] * 90)
    assert DistillConfig(**NEEDED).warmup == 4000
    assert DistillConfig(**NEEDED, max_steps=300).warmup == 30
    assert learning_rate_at(DistillConfig(**NEEDED, max_steps=3, warmup_steps=3), 2) == 6e-4
