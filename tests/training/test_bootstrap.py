"""Bootstrap intervals against known intervals of means."""

import numpy as np
import pytest

from training.evaluation.bootstrap import interval


def test_the_interval_of_right_and_wrong_is_that_of_the_binomial():
    values = np.repeat([1.0, 0.0], [300, 100])
    low, high = interval(values)
    error = 1.96 * np.sqrt(0.75 * 0.25 / 400)
    assert (low, high) == pytest.approx((0.75 - error, 0.75 + error), abs=0.004)


def test_equal_seeds_give_equal_intervals_and_equal_values_an_empty_one():
    values = np.random.default_rng(0).random(50)
    assert interval(values, 3) == interval(values, 3) != interval(values, 4)
    assert interval(np.full(9, 0.5)) == (0.5, 0.5)


def test_resampling_in_chunks_gives_the_same_interval(monkeypatch):
    values = np.random.default_rng(0).random(40)
    whole = interval(values)
    monkeypatch.setattr("training.evaluation.bootstrap.AT_ONCE", 90)
    assert interval(values) == pytest.approx(whole)


@pytest.mark.parametrize("values", [[], [1.0, float("nan")]])
def test_no_values_and_nan_are_refused(values):
    with pytest.raises(ValueError, match="finite values"):
        interval(np.array(values))
