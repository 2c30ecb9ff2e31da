r"""Measurements of h that need no labels.

alignment        E |a - b|^2 of two views of a picture, on unit h; 0 if h is invariant     (arXiv:2005.10242, alpha 2)
uniformity       log E exp(-2 |x - y|^2) over pairs of pictures, on unit h; 0 if all are equal, near -4 at best
effective rank   exp of the entropy of the normalised singular values of h, not centred: the number of directions over
                 which h spreads                                                            (RankMe, arXiv:2210.02885)
near-duplicates  share of pictures with another one at least as near as a slightly changed copy, whose median cosine is
                 the threshold: a fixed one would mean something different for each encoder
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from training.evaluation.retrieval import nearest


class NearDuplicates(NamedTuple):
    share: float
    threshold: float  # least cosine of near-duplicates
    pairs: list[tuple[int, int, float]]  # rows and cosine, the nearest first, each pair once


def alignment(h_a: Tensor, h_b: Tensor) -> float:
    """h_a, h_b (N, d) float; row i of each is a view of picture i."""
    return (F.normalize(h_a, dim=1) - F.normalize(h_b, dim=1)).square().sum(dim=1).mean().item()


def uniformity(h: Tensor) -> float:
    """h (N, d) float, N >= 2."""
    h = F.normalize(h, dim=1)
    n, total = len(h), 0.0
    for start in range(0, n, 1024):
        squared = 2 - 2 * (h[start : start + 1024] @ h.T)  # |x - y|^2 of unit vectors
        total += (-2 * squared.clamp(min=0)).exp().double().sum().item()
    return math.log((total - n) / (n * (n - 1)))  # without the pairs of a picture with itself


def effective_rank(h: Tensor) -> float:
    """h (N, d) float -> from 1 to min(N, d)."""
    singular = torch.linalg.svdvals(h.double())
    shares = singular / singular.sum()
    return torch.special.entr(shares).sum().exp().item()


def near_duplicates(h: Tensor, changed: Tensor, limit: int) -> NearDuplicates:
    """h, changed (N, d) float; row i of `changed` is h of a slightly changed copy of i. Lists `limit` pairs at most."""
    threshold = F.cosine_similarity(h, changed, dim=1).median().item()
    cosines, rows = (values[:, 0] for values in nearest(h, h, 1, exclude_self=True))
    near = cosines >= threshold
    pairs = {(min(i, j), max(i, j)): c for i, (j, c) in enumerate(zip(rows.tolist(), cosines.tolist(), strict=True))}
    listed = sorted(((i, j, c) for (i, j), c in pairs.items() if c >= threshold), key=lambda pair: -pair[2])
    return NearDuplicates(near.float().mean().item(), threshold, listed[:limit])
