"""Intervals of scores."""

import math

import numpy
import pytest

from minilm_kernels.evaluate.score import bootstrapped, over_seeds


def test_interval_of_a_mean_is_that_of_the_normal_distribution() -> None:
    right = numpy.arange(400) % 4 > 0  # a share of .75, standard error sqrt(.75 · .25 / 400) = .0217
    score = bootstrapped(numpy.mean, right)
    assert score.value == 0.75
    # The ends of 1000 resamples have a standard error of about .002.
    assert score.low == pytest.approx(0.75 - 1.96 * 0.0217, abs=0.01)
    assert score.high == pytest.approx(0.75 + 1.96 * 0.0217, abs=0.01)
    assert score == bootstrapped(numpy.mean, right), "the resamples are not fixed"


def test_items_of_several_arrays_stay_together() -> None:
    x = numpy.arange(30.0)
    score = bootstrapped(lambda a, b: float(numpy.corrcoef(a, b)[0, 1]), x, 2 * x)
    assert score == pytest.approx((1, 1, 1))


def test_one_item_has_no_interval() -> None:
    score = over_seeds([0.5])
    assert score.value == 0.5
    assert math.isnan(score.low)
    assert math.isnan(score.high)


def test_no_item_is_an_error() -> None:
    with pytest.raises(ValueError, match="got none"):
        bootstrapped(numpy.mean, [])
