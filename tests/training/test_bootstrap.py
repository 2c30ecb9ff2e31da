"""Intervals against what is known of means."""

import numpy as np
import pytest

from training.evaluation.bootstrap import interval


def test_an_interval_of_right_and_wrong_is_the_binomials():
    values = np.repeat([1.0, 0.0], [300, 100])
    low, high = interval(values)
    error = 1.96 * np.sqrt(0.75 * 0.25 / 400)
    assert (low, high) == pytest.approx((0.75 - error, 0.75 + error), abs=0.004)


def test_the_same_seed_gives_the_same_interval_and_equal_values_none():
    values = np.random.default_rng(0).random(50)
    assert interval(values, 3) == interval(values, 3) != interval(values, 4)
    assert interval(np.full(9, 0.5)) == (0.5, 0.5)


def test_many_pictures_are_resampled_a_few_times_at_once(monkeypatch):
    values = np.random.default_rng(0).random(40)
    whole = interval(values)
    monkeypatch.setattr("training.evaluation.bootstrap.AT_ONCE", 90)
    assert interval(values) == pytest.approx(whole)


@pytest.mark.parametrize("values", [[], [1.0, float("nan")]])
def test_what_has_no_mean_has_no_interval(values):
    with pytest.raises(ValueError, match="finite values"):
        interval(np.array(values))
