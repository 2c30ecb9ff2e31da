"""Whether an encoder that was trained further finds its way better on the pictures than the one it started from.

With labels, by kNN accuracy. Without, by how far up a picture comes when it is looked for, among many, by a view of it
that is rotated, tilted, partly covered and noisy: changes that training does not make, so that an encoder which only
learnt its own augmentation gains nothing. That does not see everything: training that was far too strong made pictures
easier to find and their classes harder. So, without labels, a result that gives most pictures other neighbours than its
start is not trusted either. How often this verdict is right stands in training/RECORDS.md.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from training.evaluation import words

ROTATION = math.radians(25)
TILT = 0.25  # of the perspective: how much nearer one edge is than the other
COVERED = 0.45  # side of the grey square, as a share of the picture's
NOISE = 0.03  # standard deviation, for colours in [0, 1]
PICTURES = 500  # most pictures that are compared
LEAST_SHARED = 0.25  # of each picture's nearest ones, with those by the start


class Verdict(NamedTuple):
    better: bool
    """Whether the result is better than the start."""
    sentence: str


def found_again(encode: Callable[[np.ndarray], Tensor], pixels: np.ndarray) -> float:
    """Mean reciprocal rank of each picture, as `ranks` has them: 1 if all come first."""
    return (1 / ranks(encode, pixels)).mean().item()


def ranks(encode: Callable[[np.ndarray], Tensor], pixels: np.ndarray) -> Tensor:
    """Rank of each picture among all, by the cosine to its changed view: (N,) int64, 1 for the first. The last of equal
    ones, so that an encoder that gives every picture the same h finds none.

    encode  uint8 (n, S, S, 3) -> h (n, d)
    pixels  uint8 (N, S, S, 3)
    """
    h, changed = (F.normalize(encode(x), dim=1) for x in (pixels, changed_views(pixels, seed=0)))
    cosines = changed @ h.T  # (N, N): row i is the view of picture i
    return (~(cosines < cosines.diagonal()[:, None])).sum(dim=1)


def changed_views(pixels: np.ndarray, seed: int) -> np.ndarray:
    """uint8 (N, S, S, 3) -> the same shape: each picture rotated, in perspective, partly covered, and noisy."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    n, _, height, width = x.shape

    def uniform(limit: float) -> Tensor:
        return (torch.rand(n, 1, 1, generator=generator) * 2 - 1) * limit

    rows, columns = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    angle = uniform(ROTATION)
    across = angle.cos() * columns - angle.sin() * rows  # (N, H, W)
    down = angle.sin() * columns + angle.cos() * rows
    depth = 1 + uniform(TILT) * columns + uniform(TILT) * rows
    grid = torch.stack([across / depth, down / depth], dim=-1)
    x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    side = int(COVERED * min(height, width))
    for i in range(n):
        top, left = (int(torch.randint(0, extent - side + 1, (), generator=generator)) for extent in (height, width))
        x[i, :, top : top + side, left : left + side] = 0.5
    x = (x + NOISE * torch.randn(x.shape, generator=generator)).clamp(0, 1)
    return (x * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()


def verdict(start: str, before: dict, after: dict) -> Verdict:
    """The verdict on two results of `SimCLR.measure`, or of `training.teacher.compare`: of the encoder named `start`
    and of the result."""
    measure = next(name for name in ("knn", "agreement", "found_again") if name in after)
    old, new = before[measure], after[measure]
    if measure == "knn":
        what = f"kNN accuracy on {after['queries']:,} pictures"
    elif measure == "agreement":
        what = f"share of the ten nearest of each of {after['pictures']:,} pictures that are the teacher's"
    else:
        what = f"score of finding each of {after['judged']:,} pictures by a changed view of it"
        shared = after["neighbours_shared"]
        if shared < LEAST_SHARED:
            reason = f"{shared:.0%} of each picture's ten nearest ones are the same"
            return Verdict(False, f"too far from {start} as it was to be trusted without labels: {reason}")
    cases = after.get({"knn": "queries", "agreement": "pictures"}.get(measure))
    if cases and new != old and not words.is_clear(words.difference(old, new, cases)):
        reason = f"{what} {old:.1%} before, {new:.1%} after"
        return Verdict(new > old, f"not distinguishable from {start} as it was: {reason}")
    if new == old:
        return Verdict(False, f"neither better nor worse than {start} as it was: {what} {old:.1%} before and after")
    comparison = "better" if new > old else "worse"
    return Verdict(new > old, f"{comparison} than {start} as it was: {what} {old:.1%} before, {new:.1%} after")
