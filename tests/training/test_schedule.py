"""The learning rate against the published formula and figures (arXiv:2002.05709, App. B.6-B.9)."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.schedule import scaled_lr, warmup_cosine

EXAMPLES = settings(max_examples=50, deadline=None, derandomize=True)


def published(step: int, warmup_steps: int, total_steps: int) -> float:
    """Linear from 0, then half a cosine; (1 + cos x) / 2 = cos^2(x / 2)."""
    if step < warmup_steps:
        return step / warmup_steps
    quarter_turn = math.pi / 2
    return math.cos(quarter_turn * (step - warmup_steps) / (total_steps - warmup_steps)) ** 2


@pytest.mark.parametrize(("warmup_steps", "total_steps"), [(0, 1), (0, 100), (10, 100), (1, 2), (99, 100), (977, 9766)])
def test_every_step_has_the_published_rate(warmup_steps, total_steps):
    for step in range(total_steps + 1):
        ours = warmup_cosine(step, warmup_steps, total_steps)
        assert ours == pytest.approx(published(step, warmup_steps, total_steps), abs=1e-12)


def test_known_points_of_a_schedule():
    rates = [warmup_cosine(step, 10, 110) for step in (0, 1, 5, 9, 10, 35, 60, 85, 110)]
    root = math.sqrt(0.5)
    assert rates == pytest.approx([0, 0.1, 0.5, 0.9, 1, (1 + root) / 2, 0.5, (1 - root) / 2, 0], abs=1e-12)


steps = st.integers(0, 300).flatmap(lambda warmup: st.tuples(st.just(warmup), st.integers(warmup + 1, 2000)))


@given(steps)
@EXAMPLES
def test_the_rate_rises_to_1_and_falls_to_0(steps):
    warmup, total = steps
    rates = [warmup_cosine(step, warmup, total) for step in range(total + 1)]
    assert all(0 <= rate <= 1 for rate in rates)
    assert all(a < b for a, b in itertools.pairwise(rates[: warmup + 1]))
    assert all(a > b for a, b in itertools.pairwise(rates[warmup:]))
    assert rates[warmup] == 1
    assert rates[-1] == pytest.approx(0, abs=1e-12)


@given(steps, st.integers(0, 1000))
@EXAMPLES
def test_the_rate_stays_0_after_the_end(steps, extra):
    warmup, total = steps
    assert warmup_cosine(total + extra, warmup, total) == pytest.approx(0, abs=1e-12)


def test_a_run_that_is_all_warm_up_is_linear():
    assert [warmup_cosine(step, 4, 4) for step in range(5)] == [0, 0.25, 0.5, 0.75, 1]


@pytest.mark.parametrize(
    ("lr", "batch_size", "scaling", "expected"),
    [
        (0.3, 256, "linear", 0.3),
        (0.3, 4096, "linear", 4.8),
        (1.0, 512, "linear", 2.0),
        (0.075, 4096, "sqrt", 4.8),
        (0.2, 1024, "sqrt", 6.4),
        (0.3, 4096, "none", 0.3),
    ],
)
def test_the_peak_rate_is_scaled_as_published(lr, batch_size, scaling, expected):
    assert scaled_lr(lr, batch_size, scaling) == pytest.approx(expected, rel=1e-12)


def test_another_scaling_is_rejected_by_name():
    with pytest.raises(ValueError, match="scaling must be one of linear, sqrt, none, not 'cubic'"):
        scaled_lr(0.3, 256, "cubic")
