"""Linear evaluation against scikit-learn on the same features."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from training.evaluation import linear


@pytest.fixture(scope="module")
def blobs():
    """2,500 points of 5 overlapping classes, in 20 dimensions of different scales."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 2500)
    h = rng.normal(0, 1, (5, 20))[labels] * 0.7 + rng.normal(0, 1, (2500, 20))
    h = (h * np.geomspace(0.01, 100, 20) + 3).astype(np.float32)
    return torch.from_numpy(h), torch.from_numpy(labels)


@pytest.fixture(scope="module")
def entangled(blobs):
    """The same in 60 dimensions, with a thousandfold range of variances over the directions."""
    rng = np.random.default_rng(1)
    h = np.concatenate([blobs[0].numpy() / np.geomspace(0.01, 100, 20), rng.normal(0, 1, (2500, 40))], axis=1)
    rotations = [np.linalg.qr(rng.normal(0, 1, (60, 60)))[0] for _ in range(2)]
    return torch.from_numpy((h @ rotations[0] * np.geomspace(1e-3, 1, 60) @ rotations[1]).astype(np.float32)), blobs[1]


@pytest.mark.parametrize("decay", [1.0, 1e-2, pytest.param(1e-5, marks=pytest.mark.slow)])
@pytest.mark.parametrize("features", ["blobs", "entangled", "blobs as they are"])
def test_a_fit_equals_scikit_learns(features, decay, request, monkeypatch):
    h, labels = request.getfixturevalue(features.split()[0])
    if features == "blobs as they are":
        monkeypatch.setattr(linear, "AXES_MOST", 0)
    known, asked = slice(0, 1500), slice(1500, None)
    ours = linear.fit(h[known], labels[known], decay)
    scaler = StandardScaler().fit(h[known].double().numpy())
    theirs = LogisticRegression(C=1 / (decay * 1500), tol=1e-8, max_iter=2000)
    theirs.fit(scaler.transform(h[known].double().numpy()), labels[known].numpy())
    x = scaler.transform(h[asked].double().numpy())
    expected = theirs.predict(x)
    assert np.mean(ours.predict(h[asked]).numpy() != expected) <= 0.002
    np.testing.assert_allclose(ours(h[asked]).softmax(dim=1).numpy(), theirs.predict_proba(x), atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("decay", [1e-2, 1e-5])
def test_with_more_features_than_pictures_the_fit_is_as_good_as_scikit_learns(entangled, decay):
    h, labels = (part[:40] for part in entangled)
    ours = linear.fit(h, labels, decay)
    x = ((h - ours.mean) / ours.scale).double()
    theirs = LogisticRegression(C=1 / (decay * 40), tol=1e-8, max_iter=2000).fit(x.numpy(), labels.numpy())
    weight, bias = torch.from_numpy(theirs.coef_.T), torch.from_numpy(theirs.intercept_)

    def objective(weight: torch.Tensor, bias: torch.Tensor) -> float:
        return (F.cross_entropy(x @ weight + bias, labels) + decay / 2 * weight.square().sum()).item()

    assert objective(ours.weight.double(), ours.bias.double()) < 1.001 * objective(weight, bias)


@pytest.mark.slow
def test_the_sweep_uses_the_decay_that_is_best_on_the_held_out_part_to_fit_everything(blobs):
    h, labels = blobs
    places = torch.arange(300)
    kept, held = places[:200], places[200:]
    best, decay, accuracies = linear.sweep(h[:300], labels[:300], kept, held, (10.0, 0.1, 1e-6))
    for each, accuracy in accuracies.items():
        alone = linear.fit(h[kept], labels[kept], each)
        assert accuracy == pytest.approx((alone.predict(h[held]) == labels[held]).float().mean().item(), abs=0.011)
    assert accuracies[decay] == max(accuracies.values())
    torch.testing.assert_close(best.weight, linear.fit(h[:300], labels[:300], decay).weight)


def test_of_decays_with_equal_accuracy_the_strongest_is_chosen():
    h = torch.tensor([[-1.0], [-2.0], [1.0], [2.0]]).repeat(4, 1)
    labels = (h[:, 0] > 0).long()
    places = torch.arange(16)
    assert linear.sweep(h, labels, places[:8], places[8:], (1.0, 0.1))[1] == 1.0


def test_a_constant_feature_does_not_matter(blobs):
    h, labels = blobs
    still = torch.cat([h, torch.full((len(h), 1), 7.0)], dim=1)
    torch.testing.assert_close(linear.fit(still, labels, 0.1)(still), linear.fit(h, labels, 0.1)(h), atol=1e-3, rtol=0)


@pytest.mark.slow
def test_the_published_recipe_comes_near_the_optimum(blobs):
    h, labels = blobs
    h = (h - h.mean(dim=0)) / h.std(dim=0)
    sgd, optimum = (
        w.predict(h).eq(labels).float().mean() for w in (linear.sgd(h, labels), linear.fit(h, labels, 1e-6))
    )
    assert sgd > optimum - 0.01
    assert torch.equal(linear.sgd(h[:600], labels[:600]).weight, linear.sgd(h[:600], labels[:600]).weight)


def test_a_decay_of_zero_is_refused(blobs):
    with pytest.raises(ValueError, match="decay must be above 0, not 0"):
        linear.fit(*blobs, 0)
