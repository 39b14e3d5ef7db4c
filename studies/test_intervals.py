"""The interval of a difference over pairs."""

import statistics

import numpy as np
import pytest
import scipy.stats

from studies.intervals import paired_difference


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.999])
@pytest.mark.parametrize("pairs", [2, 5, 40])
def test_the_interval_of_a_difference_equals_that_of_scipys_test(pairs, confidence):
    first, second = np.random.default_rng(pairs).normal([[0.7], [0.6]], 0.05, size=(2, pairs))
    expected = scipy.stats.ttest_rel(first, second).confidence_interval(confidence)
    mean = statistics.mean(first) - statistics.mean(second)
    assert paired_difference(first, second, confidence) == pytest.approx((mean, expected.low, expected.high))


def test_intervals_of_three_seeds_hold_the_true_difference_as_often_as_their_confidence():
    # With the normal distribution in place of Student's it would be 81 %.
    runs = np.random.default_rng(0).normal(size=(2000, 2, 3))
    intervals = [paired_difference(first, second)[1:] for first, second in runs]
    assert np.mean([low < 0 < high for low, high in intervals]) == pytest.approx(0.95, abs=0.015)


def test_a_difference_that_never_varies_is_certain_and_one_pair_is_not():
    assert paired_difference([0.75, 0.5, 1.0], [0.5, 0.25, 0.75]) == (0.25, 0.25, 0.25)
    assert paired_difference([0.25], [0.75]) == pytest.approx((-0.5, np.nan, np.nan), nan_ok=True)
