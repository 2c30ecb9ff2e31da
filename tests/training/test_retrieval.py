"""Retrieval against plain loops and scikit-learn, and kNN against scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from sklearn.neighbors import KNeighborsClassifier

from training.evaluation import retrieval
from training.evaluation.knn import knn_predict


@pytest.fixture(scope="module")
def sets():
    generator = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(80, 6, generator=generator), torch.randn(30, 6, generator=generator)
    labels = torch.arange(80) % 4
    return bank * torch.rand(80, 1, generator=generator), labels, queries, torch.arange(30) % 4


def test_figures_are_those_of_plain_loops_and_of_scikit_learn(sets, monkeypatch):
    monkeypatch.setattr(retrieval, "AT_ONCE", 4 * 80 * 7)  # several pieces, the last shorter
    bank, bank_labels, queries, labels = sets
    found = retrieval.metrics(queries, labels, bank, bank_labels, (1, 5))
    b, q = bank.double().numpy(), queries.double().numpy()
    cosine = q @ b.T / np.linalg.norm(q, axis=1)[:, None] / np.linalg.norm(b, axis=1)
    for i in range(30):
        order = sorted(range(80), key=lambda j: -cosine[i, j])
        hits = [bank_labels[j] == labels[i] for j in order]
        assert found["precision@5"][i] == pytest.approx(sum(hits[:5]) / 5)
        assert found["recall@5"][i] == float(any(hits[:5]))
        assert found["precision@1"][i] == found["recall@1"][i] == float(hits[0])
        expected = average_precision_score((bank_labels == labels[i]).numpy(), cosine[i])
        assert found["mAP"][i] == pytest.approx(expected, abs=1e-6)


def test_the_nearest_are_those_of_a_full_sort_without_the_picture_itself(sets, monkeypatch):
    monkeypatch.setattr(retrieval, "AT_ONCE", 80 * 7)
    bank = sets[0]
    cosine = torch.nn.functional.cosine_similarity(bank[:, None], bank[None], dim=2)
    cosines, places = retrieval.nearest(bank, bank, 3, exclude_self=True)
    expected = cosine.fill_diagonal_(-2).sort(dim=1, descending=True)
    assert torch.equal(places, expected.indices[:, :3])
    torch.testing.assert_close(cosines, expected.values[:, :3])
    assert retrieval.nearest(bank, bank, 1)[1][:, 0].tolist() == list(range(80))


def test_invalid_arguments_are_refused(sets):
    bank, bank_labels, queries, labels = sets
    with pytest.raises(ValueError, match="the number of candidates, 79, not 80"):
        retrieval.nearest(bank, bank, 80, exclude_self=True)
    with pytest.raises(ValueError, match="the bank's 80 pictures"):
        retrieval.metrics(queries, labels, bank, bank_labels, (81,))
    with pytest.raises(ValueError, match="no picture of class 9"):
        retrieval.metrics(queries, labels + 9, bank, bank_labels, (1,))


def test_knn_equals_scikit_learns(sets):
    bank, bank_labels, queries, _ = sets
    theirs = KNeighborsClassifier(
        9, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.1)
    )
    theirs.fit(bank.double().numpy(), bank_labels.numpy())
    assert knn_predict(bank, bank_labels, queries, 9, 0.1).tolist() == theirs.predict(queries.double().numpy()).tolist()


def test_neighbours_shared_are_counted_one_by_one():
    torch.manual_seed(0)
    h, other = torch.randn(9, 3), torch.randn(9, 5)

    def nearest(h: torch.Tensor, i: int) -> set[int]:
        cosines = {j: torch.nn.functional.cosine_similarity(h[i], h[j], dim=0).item() for j in range(9) if j != i}
        return set(sorted(cosines, key=cosines.get)[-3:])

    expected = np.mean([len(nearest(h, i) & nearest(other, i)) / 3 for i in range(9)])
    assert retrieval.neighbours_shared(h, other, 3) == pytest.approx(expected)
    assert retrieval.neighbours_shared(h, 2 * h) == 1.0  # of fewer than ten
