"""NT-Xent against Eq. 1 of arXiv:2002.05709 and DCL against Eq. 6 of arXiv:2110.06848, as plain loops in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.loss import LOSSES, dcl, gather, nt_xent

EXAMPLES = settings(max_examples=25, deadline=None, derandomize=True)


def cosine(u, v) -> float:
    return sum(x * y for x, y in zip(u, v, strict=True)) / (math.hypot(*u) * math.hypot(*v))


def nt_xent_loops(z_a, z_b, temperature: float) -> float:
    """Eq. 1 for every anchor, then the mean. z_a, z_b (N, d) float64; returns nats."""
    rows = [list(row) for row in z_a] + [list(row) for row in z_b]
    n = len(z_a)
    total = 0.0
    for i in range(2 * n):
        j = i + n if i < n else i - n
        denominator = 0.0
        for k in range(2 * n):
            if k != i:
                denominator += math.exp(cosine(rows[i], rows[k]) / temperature)
        total -= math.log(math.exp(cosine(rows[i], rows[j]) / temperature) / denominator)
    return total / (2 * n)


def dcl_loops(z_a, z_b, temperature: float) -> float:
    """Eq. 6 for every image i and view k: minus the positive's similarity, plus log U_{i,k} over the other images."""
    views = (z_a, z_b)
    n = len(z_a)
    anchors = []
    for k in (0, 1):
        for i in range(n):
            positive = cosine(z_a[i], z_b[i]) / temperature
            u = sum(
                math.exp(cosine(views[k][i], views[view][j]) / temperature)
                for view in (0, 1)
                for j in range(n)
                if j != i
            )
            anchors.append(-positive + math.log(u))
    return sum(anchors) / len(anchors)


ORACLES = {nt_xent: nt_xent_loops, dcl: dcl_loops}


@pytest.fixture(params=ORACLES, ids=lambda function: function.__name__)
def loss(request):
    return request.param


def batch(seed: int, n: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    """Two views that resemble each other, (n, d) float64 each, values that float32 holds exactly."""
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(n, d))
    views = [(image + 0.5 * rng.normal(size=(n, d))).astype(np.float32).astype(np.float64) for _ in range(2)]
    return views[0], views[1]


def value(loss, z_a, z_b, temperature: float) -> float:
    return loss(torch.as_tensor(z_a).float(), torch.as_tensor(z_b).float(), temperature).item()


def slopes(oracle, z_a, z_b, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """The oracle's gradient by central differences, (n, d) float64 each."""
    step, gradients = 1e-6, (np.zeros_like(z_a), np.zeros_like(z_b))
    for z, gradient in zip((z_a, z_b), gradients, strict=True):
        for at in np.ndindex(z.shape):
            middle = z[at]
            z[at] = middle + step
            above = oracle(z_a, z_b, temperature)
            z[at] = middle - step
            below = oracle(z_a, z_b, temperature)
            z[at] = middle
            gradient[at] = (above - below) / (2 * step)
    return gradients


def expected(loss, z_a, z_b, temperature: float):
    """The oracle's value and gradient."""
    oracle = ORACLES[loss]
    return oracle(z_a, z_b, temperature), slopes(oracle, z_a, z_b, temperature)


def with_gradients(loss, z_a, z_b, temperature: float, scale: float = 1.0):
    """scale * loss in float32, and its gradient in each view."""
    leaves = [torch.as_tensor(z).float().requires_grad_() for z in (z_a, z_b)]
    scaled = scale * loss(*leaves, temperature)
    scaled.backward()
    return scaled.detach(), [leaf.grad for leaf in leaves]


def assert_close(ours, theirs) -> None:
    """Value and gradients, to 1e-5 of the length of each."""
    assert float(ours[0]) == pytest.approx(float(theirs[0]), rel=1e-5, abs=1e-6)
    for gradient, reference in zip(ours[1], theirs[1], strict=True):
        reference = torch.as_tensor(reference)
        assert reference.norm() > 1e-4  # or this would show nothing
        assert (gradient - reference).norm() < 1e-5 * reference.norm()


@pytest.fixture
def chunks(monkeypatch):
    """Computes the loss for this many of the 2n anchors at a time, for any n."""

    def of(anchors: int, n: int) -> None:
        monkeypatch.setattr("training.loss.DENSE_ROWS", 0)
        monkeypatch.setattr("training.loss.CHUNK_BYTES", anchors * 2 * n * 4)

    return of


@pytest.fixture(params=["dense", "chunks"])
def either_way(request, monkeypatch):
    """All similarities at once, then 4 anchors at a time for 3 images, 1 for many."""
    if request.param == "chunks":
        monkeypatch.setattr("training.loss.DENSE_ROWS", 0)
        monkeypatch.setattr("training.loss.CHUNK_BYTES", 100)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("temperature", [0.05, 0.1, 0.5, 1.0, 10.0])
@pytest.mark.parametrize(("n", "d"), [(2, 3), (3, 1), (7, 16), (16, 128)])
def test_the_loss_is_its_papers_equation(loss, n, d, temperature):
    z_a, z_b = batch(n, n, d)
    assert value(loss, z_a, z_b, temperature) == pytest.approx(ORACLES[loss](z_a, z_b, temperature), rel=2e-6, abs=2e-6)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("n", [2, 3])
def test_the_gradient_is_that_of_its_papers_equation(loss, n):
    z_a, z_b = batch(0, n, 4)
    assert_close(with_gradients(loss, z_a, z_b, 0.5), expected(loss, z_a, z_b, 0.5))


@pytest.mark.parametrize("temperature", [0.05, 0.2, 1.0])
@pytest.mark.parametrize("anchors", [1, 7, 32, 37, 73, 74, 1000])
def test_chunks_of_any_size_give_what_all_at_once_gives(loss, chunks, anchors, temperature):
    views = batch(1, 37, 16)
    dense = with_gradients(loss, *views, temperature)
    chunks(anchors, 37)
    assert_close(with_gradients(loss, *views, temperature), dense)


@pytest.mark.parametrize("anchors", [1, 3, 4])
def test_chunks_of_two_images_give_its_papers_equation(loss, chunks, anchors):
    z_a, z_b = batch(2, 2, 3)
    chunks(anchors, 2)
    assert_close(with_gradients(loss, z_a, z_b, 0.5), expected(loss, z_a, z_b, 0.5))


def test_chunks_of_images_that_occur_twice_give_its_papers_equation(loss, chunks):
    z_a, z_b = (np.concatenate([z, z[:2]]) for z in batch(3, 3, 4))
    z_b[1] = z_a[1]  # and a pair of one view twice
    chunks(4, 5)
    assert_close(with_gradients(loss, z_a, z_b, 0.2), expected(loss, z_a, z_b, 0.2))


def test_the_gradient_of_chunks_scales_with_the_loss(loss, chunks):
    views = batch(0, 6, 8)
    chunks(5, 6)
    once, gradients = with_gradients(loss, *views, 0.2)
    assert_close(with_gradients(loss, *views, 0.2, scale=3.0), (3 * once, [3 * gradient for gradient in gradients]))


def test_a_second_derivative_exists_up_to_dense_rows_only(loss, monkeypatch):
    monkeypatch.setattr("training.loss.DENSE_ROWS", 8)
    z_a, z_b = (torch.as_tensor(z).float().requires_grad_() for z in batch(0, 4, 3))
    (slope,) = torch.autograd.grad(loss(z_a, z_b, 0.5), z_a, create_graph=True)
    slope.square().sum().backward()
    assert z_b.grad.norm() > 1e-4
    z_a, z_b = (torch.as_tensor(z).float().requires_grad_() for z in batch(0, 5, 3))
    with pytest.raises(RuntimeError, match="more than 8 rows has no second derivative"):
        torch.autograd.grad(loss(z_a, z_b, 0.5), z_a, create_graph=True)


def test_dcl_is_nt_xent_without_the_positive_in_the_denominator():
    """For one anchor, exp(dcl) = exp(nt_xent) - 1; equal rows make all anchors equal."""
    z = np.ones((5, 3))
    assert math.exp(value(dcl, z, z, 0.5)) == pytest.approx(math.exp(value(nt_xent, z, z, 0.5)) - 1, rel=1e-6)


def test_dcl_falls_below_0_where_positives_are_much_nearer_than_negatives():
    z = torch.eye(4)
    assert dcl(z, z, 0.1).item() == pytest.approx(math.log(6) - 10, rel=1e-6)


@given(seed=st.integers(0, 1000), n=st.integers(2, 6), factors=st.data(), loss=st.sampled_from(list(ORACLES)))
@EXAMPLES
def test_the_length_of_a_row_does_not_matter(seed, n, factors, loss):
    z_a, z_b = batch(seed, n, 5)
    positive = st.lists(st.floats(1e-4, 1e4), min_size=n, max_size=n)
    scaled_a = z_a * np.array(factors.draw(positive))[:, None]
    scaled_b = z_b * np.array(factors.draw(positive))[:, None]
    assert value(loss, scaled_a, scaled_b, 0.2) == pytest.approx(value(loss, z_a, z_b, 0.2), rel=1e-5, abs=1e-5)


@given(
    seed=st.integers(0, 1000),
    swapped=st.lists(st.booleans(), min_size=2, max_size=8),
    loss=st.sampled_from(list(ORACLES)),
)
@EXAMPLES
def test_which_view_of_a_pair_comes_first_does_not_matter(seed, swapped, loss):
    z_a, z_b = batch(seed, len(swapped), 5)
    mask = np.array(swapped)[:, None]
    other = value(loss, np.where(mask, z_b, z_a), np.where(mask, z_a, z_b), 0.2)
    assert other == pytest.approx(value(loss, z_a, z_b, 0.2), rel=1e-5, abs=1e-5)


@given(
    seed=st.integers(0, 1000),
    order=st.integers(2, 8).flatmap(lambda n: st.permutations(range(n))),
    loss=st.sampled_from(list(ORACLES)),
)
@EXAMPLES
def test_the_order_of_the_images_does_not_matter(seed, order, loss):
    z_a, z_b = batch(seed, len(order), 5)
    order = list(order)
    assert value(loss, z_a[order], z_b[order], 0.2) == pytest.approx(value(loss, z_a, z_b, 0.2), rel=1e-5, abs=1e-5)


def test_the_order_of_one_view_alone_does_matter(loss):
    z_a, z_b = batch(0, 6, 5)
    assert value(loss, z_a, np.roll(z_b, 1, axis=0), 0.2) > value(loss, z_a, z_b, 0.2) + 1


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("n", [2, 3, 100])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
@pytest.mark.parametrize(("name", "negatives_counted"), [("nt_xent", 1), ("dcl", 2)])
def test_collapse_costs_the_chance_level(name, negatives_counted, n, temperature):
    _, function, chance = LOSSES[name]
    cost, gradients = with_gradients(function, np.ones((n, 4)), np.ones((n, 4)), temperature)
    assert cost == pytest.approx(math.log(2 * n - negatives_counted), rel=1e-6)
    assert chance(n) == pytest.approx(math.log(2 * n - negatives_counted), rel=1e-12)
    assert all(gradient.abs().max() < 1e-6 for gradient in gradients)


def test_every_loss_of_the_table_has_an_oracle():
    assert [row.function for row in LOSSES.values()] == list(ORACLES)


@pytest.mark.usefixtures("either_way")
def test_rows_of_zeros_give_a_number_and_a_finite_gradient(loss):
    z_a = torch.zeros(3, 4, requires_grad=True)
    cost = loss(z_a, torch.zeros(3, 4), 0.5)
    cost.backward()
    assert cost.item() == pytest.approx(math.log(5 if loss is nt_xent else 4), rel=1e-6)
    assert z_a.grad.isfinite().all()


@pytest.mark.usefixtures("either_way")
def test_a_small_temperature_does_not_overflow(loss):
    # Two images whose views are opposite: similarity -1 to the positive, 0 to both negatives.
    z = torch.eye(2)
    for temperature in (0.05, 0.005, 0.0005):
        positive = math.exp(-1 / temperature) if loss is nt_xent else 0.0
        assert loss(z, -z, temperature).item() == pytest.approx(1 / temperature + math.log(2 + positive), rel=1e-6)


@pytest.mark.usefixtures("either_way")
def test_autocast_changes_nothing(loss):
    z_a, z_b = (torch.as_tensor(z).float() for z in batch(0, 32, 64))
    alone = loss(z_a, z_b, 0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (z_a @ z_b.T).dtype == torch.bfloat16  # or this test would show nothing
        inside = loss(z_a, z_b, 0.1)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, alone)


def test_a_backward_under_autocast_does_not_change_the_gradient_of_chunks(loss, chunks):
    views = batch(0, 32, 64)
    chunks(7, 32)
    alone = with_gradients(loss, *views, 0.1)[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = with_gradients(loss, *views, 0.1)[1]
    assert all(map(torch.equal, inside, alone))


@pytest.mark.usefixtures("either_way")
def test_half_precision_inputs_are_computed_in_float32(loss):
    z_a, z_b = (torch.as_tensor(z).bfloat16().requires_grad_() for z in batch(0, 32, 64))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cost = loss(z_a, z_b, 0.1)
    cost.backward()
    assert cost.dtype == torch.float32
    z_a64, z_b64 = (z.detach().double().numpy() for z in (z_a, z_b))
    assert cost.item() == pytest.approx(ORACLES[loss](z_a64, z_b64, 0.1), rel=2e-6, abs=2e-6)
    for z, gradient in zip((z_a, z_b), with_gradients(loss, z_a64, z_b64, 0.1)[1], strict=True):
        assert torch.equal(z.grad, gradient.bfloat16())


@pytest.mark.usefixtures("either_way")
def test_the_callers_tensors_stay_as_they_are(loss):
    z_a, z_b = (torch.as_tensor(z).float() for z in batch(0, 4, 8))
    before = z_a.clone(), z_b.clone()
    loss(z_a, z_b, 0.5)
    assert torch.equal(z_a, before[0])
    assert torch.equal(z_b, before[1])


@pytest.mark.parametrize("temperature", [0.0, -0.5, math.nan])
def test_a_temperature_that_is_not_above_0_is_rejected(loss, temperature):
    with pytest.raises(ValueError, match=f"temperature must be above 0, not {temperature}"):
        loss(torch.ones(2, 3), torch.ones(2, 3), temperature)


@pytest.mark.parametrize(("a", "b"), [((4, 3), (5, 3)), ((4, 3), (4, 2)), ((4,), (4,)), ((2, 4, 3), (2, 4, 3))])
def test_batches_that_are_not_two_of_one_shape_are_rejected(loss, a, b):
    with pytest.raises(ValueError, match="of one shape"):
        loss(torch.ones(a), torch.ones(b), 0.5)


@pytest.mark.parametrize("n", [0, 1])
def test_fewer_than_two_images_are_rejected(loss, n):
    with pytest.raises(ValueError, match=f"at least 2 images for a negative, not {n}"):
        loss(torch.ones(n, 3), torch.ones(n, 3), 0.5)


def test_gathering_alone_changes_nothing():
    z = torch.ones(2, 3)
    assert gather(z) is z
