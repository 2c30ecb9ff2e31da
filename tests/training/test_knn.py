"""kNN against plain loops, and which measurement `metrics` chooses."""

import math

import numpy as np
import pytest
import torch

from training.augment import AugmentSettings
from training.config import PretrainSettings
from training.encoders import ResNetEncoder
from training.evaluation import knn


def loops(bank, labels, queries, k, temperature):
    """Wu et al. 2018 in float64, one query and one neighbour at a time."""
    answers = []
    for query in queries.tolist():
        near = []
        for row, label in zip(bank.tolist(), labels.tolist(), strict=True):
            dot = sum(a * b for a, b in zip(query, row, strict=True))
            near.append((dot / math.hypot(*query) / math.hypot(*row), label))
        near.sort(key=lambda pair: -pair[0])
        votes = {}
        for cosine, label in near[:k]:
            votes[label] = votes.get(label, 0.0) + math.exp(cosine / temperature)
        answers.append(max(votes, key=votes.get))
    return answers


def test_predictions_are_those_of_plain_loops():
    generator = torch.Generator().manual_seed(0)
    bank = torch.randn(60, 5, generator=generator) * torch.rand(60, 1, generator=generator)  # lengths must not matter
    labels = torch.randint(0, 4, (60,), generator=generator)
    queries = torch.randn(25, 5, generator=generator)
    for k, temperature in ((1, 0.1), (7, 0.1), (20, 0.5), (60, 0.07)):
        assert knn.knn_predict(bank, labels, queries, k, temperature).tolist() == loops(
            bank, labels, queries, k, temperature
        )


def test_votes_of_far_neighbours_count_at_any_temperature():
    bank = torch.tensor([[0.8, 0.6], [0.8, -0.6], [0.0, 1.0]])
    queries = torch.tensor([[1.0, 0.0]])
    assert knn.knn_predict(bank, torch.tensor([3, 3, 0]), queries, 3, 0.001).tolist() == [3]


@pytest.mark.parametrize("k", [0, 4])
def test_k_must_fit_the_bank(k):
    with pytest.raises(ValueError, match=f"bank's 3 rows, not {k}"):
        knn.knn_predict(torch.eye(3), torch.arange(3), torch.eye(3), k)


def test_equal_views_match_and_exchanged_views_do_not():
    h = torch.eye(6)
    assert knn.views_matched(h, 3 * h) == 1.0
    assert knn.views_matched(h, h.roll(1, dims=0)) == 0.0


class FakeStore:
    """Pixels whose mean depends on the class, so that any encoder that keeps brightness is right."""

    def __init__(self, labels):
        self.labels = np.array(labels, dtype=np.int64)
        rng = np.random.default_rng(0)
        level = np.where(self.labels == 1, 220, 20)[:, None, None, None]
        self.pixels = (level + rng.integers(0, 20, (len(labels), 16, 16, 3))).astype(np.uint8)


class Brightness(torch.nn.Module):
    """h = (mean, 1 - mean): a right angle between black and white."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, x):
        mean = x.mean(dim=(1, 2, 3))
        return self.scale * torch.stack([mean, 1 - mean], dim=1)


def test_queries_are_the_labelled_test_set():
    train, test = FakeStore([0, 1] * 30), FakeStore([0, 1] * 5)
    assert knn.metrics(Brightness(), train, test, PretrainSettings(), 1000) == {
        "knn": 1.0,
        "k": 1,
        "bank": 60,
        "queries": 10,
    }


def test_wrong_labels_reduce_the_accuracy():
    train, test = FakeStore([0, 1] * 30), FakeStore([0, 1] * 5)
    test.labels = 1 - test.labels
    assert knn.metrics(Brightness(), train, test, PretrainSettings(), 1000)["knn"] == 0.0


def test_without_a_test_set_a_tenth_of_the_labelled_pictures_are_queries_and_not_in_the_bank():
    train = FakeStore([0, 1] * 30)
    train.labels[:20] = -1
    found = knn.metrics(Brightness(), train, None, PretrainSettings(), 1000)
    assert (found["bank"], found["queries"], found["knn"]) == (36, 4, 1.0)


def test_without_labels_views_are_matched():
    settings = PretrainSettings(encoder="tiny", size_px=16, augment=AugmentSettings())
    found = knn.metrics(ResNetEncoder("tiny", 1, 16), FakeStore([-1] * 12), None, settings, 1000)
    assert found.keys() == {"views_matched", "pictures"}
    assert 0 <= found["views_matched"] <= 1
    assert found["pictures"] == 12
