"""Estimating vectors of a new encoder from those of the old one. The encoders are matrices here."""

import numpy as np
import pytest

from serving.collection.items import unit
from serving.collection.vector_map import RIDGE, VectorMap


def gaussian(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def rotation(d: int, more: int) -> np.ndarray:
    """(d, more) with orthonormal rows: keeps lengths and angles."""
    return np.linalg.qr(gaussian(more, d))[0].T


@pytest.mark.parametrize(("d_old", "d_new"), [(8, 8), (12, 8), (8, 12)])
def test_a_rotation_is_found_also_into_another_number_of_dimensions(d_old, d_new):
    z = unit(gaussian(700, 8))
    old, new = z @ rotation(8, d_old), z @ rotation(8, d_new)
    learnt = VectorMap.learn(old[:500], new[:500])
    np.testing.assert_allclose(learnt(old[500:]), new[500:], atol=0.02)
    assert learnt.shift == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize(("n", "d", "rank"), [(60, 100, 100), (200, 30, 30), (200, 30, 3)])
def test_it_is_ridge_regression_with_fewer_pairs_than_numbers_and_with_dependent_numbers_too(n, d, rank):
    old = unit(gaussian(n, rank) @ gaussian(rank, d) + 1)
    new = unit(gaussian(n, 5, seed=1))
    learnt = VectorMap.learn(old, new)
    x = old.astype(np.float64) - old.mean(axis=0, dtype=np.float64)
    penalty = RIDGE * (x**2).sum(axis=1).mean()
    more = np.concatenate([x, np.sqrt(penalty) * np.eye(d)])  # least squares with these rows is ridge regression
    expected = np.linalg.lstsq(more, np.concatenate([new - new.mean(axis=0), np.zeros((d, 5))]), rcond=None)[0]
    np.testing.assert_allclose(learnt.matrix, expected, atol=1e-5)
    np.testing.assert_allclose(old.mean(axis=0) @ learnt.matrix + learnt.offset, new.mean(axis=0), atol=1e-5)


def test_old_vectors_that_are_all_equal_say_nothing():
    new = unit(gaussian(100, 4) + 1)
    learnt = VectorMap.learn(np.tile(unit(np.ones((1, 6))), (100, 1)), new)
    np.testing.assert_allclose(learnt(unit(gaussian(2, 6)))[0], unit(new.mean(axis=0)[None])[0], atol=1e-5)
    assert np.isfinite(learnt.shift)


def test_the_nearest_estimates_have_cosines_as_the_nearest_vectors_have():
    z = gaussian(850, 16)
    new, old = unit(z), unit(z[:, :4])  # the old encoder does not see most of it
    learnt = VectorMap.learn(old[:500], new[:500])
    query, rest = new[500:600], slice(600, 850)
    cosines = query @ learnt(old[rest]).T
    highest = np.sort(cosines)[:, -10:]
    real = np.sort(query @ new[rest].T)[:, -10:].mean()
    assert abs(highest.mean() - real) > 0.05
    assert learnt.cosines(highest).mean() == pytest.approx(real, abs=0.02)
    assert learnt.cosines(np.array([9.0, -9.0])).tolist() == [1, -1]


def test_directions_give_the_products_with_the_estimates_up_to_their_length():
    old, new = unit(gaussian(100, 6)), unit(gaussian(100, 9))
    learnt = VectorMap.learn(old, new)
    query = gaussian(3, 9)
    products = learnt.directions(query) @ old.T + (query @ learnt.offset)[:, None]
    np.testing.assert_allclose(products, query @ (old @ learnt.matrix + learnt.offset).T, atol=1e-4)


@pytest.mark.parametrize("shapes", [((60, 4), (61, 4)), ((20, 4), (20, 4)), ((60,), (60, 4))])
def test_other_shapes_are_refused(shapes):
    old, new = (np.ones(shape, np.float32) for shape in shapes)
    with pytest.raises(ValueError, match="same pictures"):
        VectorMap.learn(old, new)
