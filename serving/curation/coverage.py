r"""How well pictures B cover pictures A: the share of A within the manifold of B, as improved precision and recall
measure it (Kynkäänniemi et al. 2019, arXiv:1904.06991, Eq. 1).

    a is covered  <=>  |a - b| <= |b - NN_k(b)| for some b of B,    NN_k(b) the k-th nearest other picture of B, k = 3

So a has a picture of B around it that is as near as that one's own neighbours. Vectors have length 1, so cosines are
compared instead of distances. Not even B covers all of its own pictures: `usual` is the share to compare with.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from threadpoolctl import threadpool_limits

from serving.curation.neighbours import neighbours
from serving.limits import cores

K = 3  # as in the paper
ROWS, COLUMNS = 1024, 4096  # of one block: 16 MiB of cosines for each core
ROUNDING = 2e-6  # of the cosine of two vectors that are the same


@dataclass(frozen=True)
class Coverage:
    covered: np.ndarray
    """(m,) bool"""
    nearest: np.ndarray
    """(m,) int64: rows of B."""
    cosine: np.ndarray
    """(m,) float32: to the nearest one."""
    usual: float
    """Share of the pictures of B that are covered by the others of B."""


def coverage(vectors: np.ndarray, by: np.ndarray) -> Coverage:
    """Compares each of `vectors` with all of `by`.

    vectors  (m, d) float32, rows of length 1
    by       (n, d) float32, rows of length 1, n > K
    """
    rows, cosines = neighbours(by, K)
    reach = cosines[:, -1] - np.float32(ROUNDING)  # (n,) lowest cosine to what each one covers
    usual = len(np.unique(rows)) / len(by)  # b is covered by the others if it is among the K nearest of one of them
    covered, nearest = np.zeros(len(vectors), bool), np.zeros(len(vectors), np.int64)
    best = np.full(len(vectors), -2, np.float32)

    def fill(start: int) -> None:
        some = slice(start, start + ROWS)
        for column in range(0, len(by), COLUMNS):
            cosine = vectors[some] @ by[column : column + COLUMNS].T  # (rows, columns)
            first = cosine.argmax(axis=1)
            value = cosine[np.arange(len(first)), first]
            nearest[some] = np.where(value > best[some], column + first, nearest[some])
            best[some] = np.maximum(best[some], value)
            cosine -= reach[column : column + COLUMNS]
            covered[some] |= cosine.max(axis=1) >= 0

    with threadpool_limits(1), ThreadPoolExecutor(cores()) as pool:  # each block on one core, comparison included
        list(pool.map(fill, range(0, len(vectors), ROWS)))
    return Coverage(covered, nearest, best, usual)
