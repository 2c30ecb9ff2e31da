"""NT-Xent against Eq. 1 of arXiv:2002.05709 written as plain loops in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.loss import gather, nt_xent

EXAMPLES = settings(max_examples=25, deadline=None, derandomize=True)


def loops(z_a, z_b, temperature: float) -> float:
    """Eq. 1 for every anchor, then the mean. z_a, z_b (N, d) float64; returns nats."""
    rows = [list(row) for row in z_a] + [list(row) for row in z_b]
    n = len(z_a)

    def sim(u, v):
        return sum(x * y for x, y in zip(u, v, strict=True)) / (math.hypot(*u) * math.hypot(*v))

    total = 0.0
    for i in range(2 * n):
        j = i + n if i < n else i - n
        denominator = 0.0
        for k in range(2 * n):
            if k != i:
                denominator += math.exp(sim(rows[i], rows[k]) / temperature)
        total -= math.log(math.exp(sim(rows[i], rows[j]) / temperature) / denominator)
    return total / (2 * n)


def batch(seed: int, n: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    """Two views that resemble each other, (n, d) float64 each, values that float32 holds exactly."""
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(n, d))
    views = [(image + 0.5 * rng.normal(size=(n, d))).astype(np.float32).astype(np.float64) for _ in range(2)]
    return views[0], views[1]


def ours(z_a, z_b, temperature: float) -> float:
    return nt_xent(torch.as_tensor(z_a).float(), torch.as_tensor(z_b).float(), temperature).item()


@pytest.mark.parametrize("temperature", [0.05, 0.1, 0.5, 1.0, 10.0])
@pytest.mark.parametrize(("n", "d"), [(2, 3), (3, 1), (7, 16), (16, 128)])
def test_the_loss_is_equation_1(n, d, temperature):
    z_a, z_b = batch(n, n, d)
    assert ours(z_a, z_b, temperature) == pytest.approx(loops(z_a, z_b, temperature), rel=2e-6, abs=2e-6)


def test_the_gradient_is_that_of_equation_1():
    z_a, z_b = batch(0, 3, 4)
    leaves = [torch.as_tensor(z).float().requires_grad_() for z in (z_a, z_b)]
    nt_xent(*leaves, 0.5).backward()
    step = 1e-6
    for z, leaf in zip((z_a, z_b), leaves, strict=True):
        expected = np.zeros_like(z)
        for at in np.ndindex(z.shape):
            middle = z[at]
            z[at] = middle + step
            above = loops(z_a, z_b, 0.5)
            z[at] = middle - step
            below = loops(z_a, z_b, 0.5)
            z[at] = middle
            expected[at] = (above - below) / (2 * step)
        np.testing.assert_allclose(leaf.grad.numpy(), expected, rtol=1e-4, atol=1e-6)


@given(seed=st.integers(0, 1000), n=st.integers(2, 6), factors=st.data())
@EXAMPLES
def test_the_length_of_a_row_does_not_matter(seed, n, factors):
    z_a, z_b = batch(seed, n, 5)
    positive = st.lists(st.floats(1e-4, 1e4), min_size=n, max_size=n)
    scaled_a = z_a * np.array(factors.draw(positive))[:, None]
    scaled_b = z_b * np.array(factors.draw(positive))[:, None]
    assert ours(scaled_a, scaled_b, 0.2) == pytest.approx(ours(z_a, z_b, 0.2), rel=1e-5)


@given(seed=st.integers(0, 1000), swapped=st.lists(st.booleans(), min_size=2, max_size=8))
@EXAMPLES
def test_which_view_of_a_pair_comes_first_does_not_matter(seed, swapped):
    z_a, z_b = batch(seed, len(swapped), 5)
    mask = np.array(swapped)[:, None]
    other = ours(np.where(mask, z_b, z_a), np.where(mask, z_a, z_b), 0.2)
    assert other == pytest.approx(ours(z_a, z_b, 0.2), rel=1e-5)


@given(seed=st.integers(0, 1000), order=st.integers(2, 8).flatmap(lambda n: st.permutations(range(n))))
@EXAMPLES
def test_the_order_of_the_images_does_not_matter(seed, order):
    z_a, z_b = batch(seed, len(order), 5)
    order = list(order)
    assert ours(z_a[order], z_b[order], 0.2) == pytest.approx(ours(z_a, z_b, 0.2), rel=1e-5)


def test_the_order_of_one_view_alone_does_matter():
    z_a, z_b = batch(0, 6, 5)
    assert ours(z_a, np.roll(z_b, 1, axis=0), 0.2) > ours(z_a, z_b, 0.2) + 1


@pytest.mark.parametrize("n", [2, 3, 100])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_collapse_costs_log_2n_minus_1(n, temperature):
    same = torch.ones(n, 4)
    assert nt_xent(same, same, temperature).item() == pytest.approx(math.log(2 * n - 1), rel=1e-6)


def test_rows_of_zeros_give_a_number_and_a_finite_gradient():
    z_a = torch.zeros(3, 4, requires_grad=True)
    loss = nt_xent(z_a, torch.zeros(3, 4), 0.5)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(5), rel=1e-6)
    assert z_a.grad.isfinite().all()


def test_a_small_temperature_does_not_overflow():
    # Two images whose views are opposite: similarity -1 to the positive, 0 to both negatives.
    z = torch.eye(2)
    for temperature in (0.05, 0.005, 0.0005):
        expected = 1 / temperature + math.log(2 + math.exp(-1 / temperature))
        assert nt_xent(z, -z, temperature).item() == pytest.approx(expected, rel=1e-6)


def test_autocast_changes_nothing():
    z_a, z_b = (torch.as_tensor(z).float() for z in batch(0, 32, 64))
    alone = nt_xent(z_a, z_b, 0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (z_a @ z_b.T).dtype == torch.bfloat16  # or this test would show nothing
        inside = nt_xent(z_a, z_b, 0.1)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, alone)


def test_half_precision_inputs_are_computed_in_float32():
    z_a, z_b = (torch.as_tensor(z).bfloat16() for z in batch(0, 32, 64))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = nt_xent(z_a, z_b, 0.1)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(loops(z_a.double().numpy(), z_b.double().numpy(), 0.1), rel=2e-6)


def test_the_callers_tensors_stay_as_they_are():
    z_a, z_b = (torch.as_tensor(z).float() for z in batch(0, 4, 8))
    before = z_a.clone(), z_b.clone()
    nt_xent(z_a, z_b, 0.5)
    assert torch.equal(z_a, before[0])
    assert torch.equal(z_b, before[1])


@pytest.mark.parametrize("temperature", [0.0, -0.5, math.nan])
def test_a_temperature_that_is_not_above_0_is_rejected(temperature):
    with pytest.raises(ValueError, match=f"temperature must be above 0, not {temperature}"):
        nt_xent(torch.ones(2, 3), torch.ones(2, 3), temperature)


@pytest.mark.parametrize(("a", "b"), [((4, 3), (5, 3)), ((4, 3), (4, 2)), ((4,), (4,)), ((2, 4, 3), (2, 4, 3))])
def test_batches_that_are_not_two_of_one_shape_are_rejected(a, b):
    with pytest.raises(ValueError, match="of one shape"):
        nt_xent(torch.ones(a), torch.ones(b), 0.5)


@pytest.mark.parametrize("n", [0, 1])
def test_fewer_than_two_images_are_rejected(n):
    with pytest.raises(ValueError, match=f"at least 2 images for a negative, not {n}"):
        nt_xent(torch.ones(n, 3), torch.ones(n, 3), 0.5)


def test_gathering_alone_changes_nothing():
    z = torch.ones(2, 3)
    assert gather(z) is z
