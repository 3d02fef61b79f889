"""A score with the interval that its test set allows."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy
from numpy.typing import ArrayLike
from scipy.stats import bootstrap

_RESAMPLES = 1000
_LEVEL = 0.95


class Score(NamedTuple):
    """A score and its 95% interval. The interval is NaN if the test set is too small or too uniform for one."""

    value: float
    low: float
    high: float


def bootstrapped(statistic: Callable[..., float], *items: ArrayLike) -> Score:
    """Scores test items, with a percentile bootstrap over them.

    Args:
        statistic: gets arrays of items and returns the score.
        items: one or more arrays of (items,), whose elements belong together.

    Raises:
        ValueError: there is no item.
    """
    arrays = [numpy.asarray(array) for array in items]
    if not len(arrays[0]):
        raise ValueError("expected one or more test items, got none")
    value = float(statistic(*arrays))
    if len(arrays[0]) < 2:
        return Score(value, float("nan"), float("nan"))
    rng = numpy.random.default_rng(0)
    index = numpy.arange(len(arrays[0]))

    def resampled(chosen: numpy.ndarray) -> float:
        return statistic(*(array[chosen] for array in arrays))

    found = bootstrap(
        (index,), resampled, n_resamples=_RESAMPLES, confidence_level=_LEVEL, method="percentile",
        vectorized=False, rng=rng,
    )  # fmt: skip
    return Score(value, float(found.confidence_interval.low), float(found.confidence_interval.high))


def over_seeds(values: ArrayLike) -> Score:
    """The mean of a run per seed, and a percentile bootstrap over the seeds. One seed has no interval."""
    return bootstrapped(numpy.mean, values)
