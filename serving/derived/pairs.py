r"""Finds every pair of vectors with a cosine of at least a threshold, at a fraction of the cost of comparing all.

Three bounds exclude pairs that cannot reach the threshold t = cos theta. They never exclude one that does.

cells   Each vector belongs to the centre with which its inner product is largest. All vectors of cell B lie in the
        half-space y.b >= y.a, and x of cell A has the angle arcsin(x.(a - b) / |a - b|) to it. If that is more than
        theta, x has no neighbour in B.
heads   The first m coordinates in a basis sorted by variance. With x = (x1, x2) in this basis,
        x.y <= x1.y1 + |x2| |y2| (Cauchy-Schwarz): an inner product of m + 1 numbers instead of d.
cosines The remaining pairs are compared in full.

The centres lie in the span of the heads, so m numbers are enough to assign cells too. A sample decides
which m is cheapest.
"""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

from serving.limits import cores

MOST_PAIRS = 50_000_000  # 600 MB
BLOCK = 4096  # rows and columns of one block: 64 MB of inner products
CELLS_TOGETHER = 16
ALL_AT_ONCE = 8192  # vectors: up to this number, the bounds cost more than they save
SLACK = 1e-5  # float32 rounding errors of a bound of unit vectors are about 1e-6
FULL_COST = 40_000  # of one full cosine, in multiply-adds of a matrix product; measured
SAMPLE = 1024


class TooManyPairs(ValueError):
    """More pairs than MOST_PAIRS. The message is a sentence for the user."""


def refuse_too_many(count: int, threshold: float) -> None:
    """Raises TooManyPairs for more than MOST_PAIRS pairs with a cosine of at least `threshold`."""
    if count > MOST_PAIRS:
        raise TooManyPairs(
            f"more than {MOST_PAIRS:,} pairs have a cosine of {threshold:g} or more; choose a higher threshold"
        )


class NearPairs(NamedTuple):
    """Each pair once, by the numbers of its rows."""

    first: np.ndarray  # (p,) int32
    second: np.ndarray  # (p,) int32, first < second
    cosine: np.ndarray  # (p,) float32


def near_pairs(
    vectors: np.ndarray, threshold: float, report: Callable[[float], None] = lambda share: None
) -> NearPairs:
    """Returns all pairs of rows with a cosine of at least `threshold`.

    vectors    (n, d) float32, rows of length 1
    threshold  cosine, above 0, at most 1
    report     called with the share that is done
    raises     TooManyPairs beyond MOST_PAIRS
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be above 0 and at most 1, not {threshold:g}")
    n = len(vectors)
    if n < 2:
        return _joined([])
    rng = np.random.default_rng(0)
    d = vectors.shape[1]
    basis, m = _basis(vectors, threshold, rng) if n > ALL_AT_ONCE else (np.eye(d, dtype=np.float32), d)
    heads = np.empty((n, m + 1), np.float32)  # the last column is |x2|
    for i in range(0, n, BLOCK):
        turned = vectors[i : i + BLOCK] @ basis
        heads[i : i + BLOCK, :m] = turned[:, :m]
        heads[i : i + BLOCK, m] = np.linalg.norm(turned[:, m:], axis=1)
    centres = _centres(heads[:, :m], rng)
    own = np.concatenate([(heads[i : i + BLOCK, :m] @ centres.T).argmax(axis=1) for i in range(0, n, BLOCK)])
    order = np.argsort(own, kind="stable").astype(np.int32)
    heads, own = heads[order], own[order]
    cells = _Cells(vectors, heads, centres, own, order, threshold)
    parts, count = [], 0
    with threadpool_limits(1), ThreadPoolExecutor(cores()) as pool:  # BLAS threads are slow at small products
        try:
            for end, pairs in pool.map(cells.pairs, range(0, len(centres), CELLS_TOGETHER)):
                parts.append(pairs)
                count += len(pairs.first)
                refuse_too_many(count, threshold)
                report(1 - (1 - end / n) ** 2)  # each cell is compared with itself and later ones
        finally:
            pool.shutdown(cancel_futures=True)
    return _joined(parts)


class _Cells:
    """Vectors sorted by cell: row r is vectors[order[r]]; its head is heads[r], its cell own[r]."""

    def __init__(
        self,
        vectors: np.ndarray,
        heads: np.ndarray,
        centres: np.ndarray,
        own: np.ndarray,
        order: np.ndarray,
        threshold: float,
    ):
        self.vectors, self.heads, self.centres, self.own, self.order = vectors, heads, centres, own, order
        self.threshold = threshold
        self.ends = np.searchsorted(own, np.arange(len(centres) + 1))
        self.score = np.einsum("ij,ij->i", heads[:, :-1], centres[own])

    def pairs(self, first_cell: int) -> tuple[int, NearPairs]:
        """Returns the row after CELLS_TOGETHER cells, and the pairs within them and with later cells."""
        cells = range(first_cell, min(first_cell + CELLS_TOGETHER, len(self.centres)))
        start, centres = self.ends[first_cell], self.centres[cells.start : cells.stop]
        sine = math.sqrt(1 - self.threshold**2)
        within = np.linalg.norm(self.centres[:, None] - centres, axis=2) * sine + SLACK  # (c, cells)
        beyond = self.score[start:, None] - self.heads[start:, :-1] @ centres.T  # (rows, cells)
        reaches = beyond <= within[self.own[start:]]
        parts = []
        for column, cell in enumerate(cells):
            rows = np.flatnonzero(reaches[self.ends[cell] - start :, column]) + self.ends[cell]
            for a, b in self._candidates(rows, self.ends[cell], self.ends[cell + 1]):
                a, b = self.order[a], self.order[b]
                cosine = np.einsum("ij,ij->i", self.vectors[a], self.vectors[b])
                near = cosine >= self.threshold
                parts.append(NearPairs(np.minimum(a, b)[near], np.maximum(a, b)[near], cosine[near]))
        return self.ends[cells.stop], _joined(parts)

    def _candidates(self, rows: np.ndarray, start: int, end: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields pairs of one of `rows` and an earlier row of start to end whose bound reaches the threshold."""
        for i in range(0, len(rows), BLOCK):
            block = rows[i : i + BLOCK]
            left = self.heads[block]
            for j in range(start, end, BLOCK):
                right = self.heads[j : min(j + BLOCK, end)]
                hits = np.flatnonzero((left @ right.T).ravel() >= self.threshold - SLACK)
                a, b = block[hits // len(right)], hits % len(right) + j
                a, b = a[a > b], b[a > b]
                for piece in range(0, len(a), BLOCK):
                    yield a[piece : piece + BLOCK], b[piece : piece + BLOCK]


def _joined(parts: list[NearPairs]) -> NearPairs:
    none = NearPairs(np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32))
    return NearPairs(*(np.concatenate(columns) for columns in zip(none, *parts, strict=True)))


def _basis(vectors: np.ndarray, threshold: float, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """Returns an orthonormal basis (d, d), sorted by variance on a sample, and the number of coordinates in a head."""
    n, d = vectors.shape
    sample = vectors[rng.choice(n, min(n, 16 * SAMPLE), replace=False)]
    basis = np.linalg.eigh(sample.T @ sample)[1][:, ::-1]
    turned = sample[:SAMPLE] @ basis
    squares = np.cumsum(turned**2, axis=1)
    best, least = d, math.inf
    for m in [m for m in (16, 32, 64, 96, 128, 192, 256, 384) if m < d] + [d]:
        rest = np.sqrt(np.maximum(squares[:, -1] - squares[:, m - 1], 0))
        bound = turned[:, :m] @ turned[:, :m].T + np.outer(rest, rest)
        share = np.triu(bound >= threshold - SLACK, 1).mean() * 2
        if (cost := m + FULL_COST * share) < least:
            best, least = m, cost
    return np.ascontiguousarray(basis), best


def _centres(heads: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns centres (c, m) of spherical k-means on a sample."""
    cells = 1 if len(heads) <= ALL_AT_ONCE else int(4 * math.sqrt(len(heads)))
    sample = np.ascontiguousarray(heads[rng.choice(len(heads), min(len(heads), 32 * cells), replace=False)])
    centres = sample[:cells].copy()
    for _ in range(6 if cells > 1 else 0):
        length = np.linalg.norm(centres, axis=1, keepdims=True)
        centres /= np.maximum(length, np.finfo(np.float32).tiny)
        own = np.concatenate([(sample[i : i + BLOCK] @ centres.T).argmax(1) for i in range(0, len(sample), BLOCK)])
        order = np.argsort(own, kind="stable")
        present, starts = np.unique(own[order], return_index=True)
        centres[present] = np.add.reduceat(sample[order], starts, axis=0)
    return centres / np.maximum(np.linalg.norm(centres, axis=1, keepdims=True), np.finfo(np.float32).tiny)
