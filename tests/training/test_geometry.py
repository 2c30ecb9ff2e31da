"""Figures without labels, on sets with known values."""

import math

import pytest
import torch

from training.evaluation import geometry


def test_alignment_is_0_for_equal_and_4_for_opposite_views():
    h = torch.randn(20, 5)
    assert geometry.alignment(h, 3 * h) == pytest.approx(0, abs=1e-6)
    assert geometry.alignment(h, -h) == pytest.approx(4)


def test_uniformity_is_that_of_plain_loops():
    h = torch.nn.functional.normalize(torch.randn(30, 4, dtype=torch.float64), dim=1)
    pairs = [math.exp(-2 * (h[i] - h[j]).square().sum()) for i in range(30) for j in range(i)]
    assert geometry.uniformity(5 * h.float()) == pytest.approx(math.log(sum(pairs) / len(pairs)), abs=1e-5)


def test_collapse_has_uniformity_0_and_rank_1():
    h = torch.ones(50, 8)
    assert geometry.uniformity(h) == pytest.approx(0, abs=1e-6)
    assert geometry.effective_rank(h) == pytest.approx(1, abs=1e-3)


def test_effective_rank_counts_directions_of_equal_weight():
    assert geometry.effective_rank(torch.eye(6, 10).repeat(5, 1)) == pytest.approx(6)
    uneven = torch.diag(torch.tensor([3.0, 1.0]))
    assert geometry.effective_rank(uneven) == pytest.approx(math.exp(0.75 * math.log(4 / 3) + 0.25 * math.log(4)))


def test_only_pictures_as_near_as_a_changed_copy_are_near_duplicates():
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(40, 16, generator=generator)
    h[7] = h[3] + 0.001  # the same picture again
    h[9] = h[8] + 0.002
    found = geometry.near_duplicates(h, h + 0.05 * torch.randn(40, 16, generator=generator), limit=1)
    assert found.share == pytest.approx(4 / 40)
    assert [pair[:2] for pair in found.pairs] == [(3, 7)]
    assert 0.98 < found.threshold < 1


def test_a_single_outlier_among_the_copies_does_not_move_the_threshold():
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(9, 16, generator=generator)
    copies = h + torch.linspace(0, 0.5, 9)[:, None] * torch.randn(9, 16, generator=generator)
    cosines = torch.nn.functional.cosine_similarity(h, copies).sort().values
    assert geometry.near_duplicates(h, copies, 0).threshold == pytest.approx(cosines[4].item())
