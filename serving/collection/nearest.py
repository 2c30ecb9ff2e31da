"""Nearest-neighbour search among unit vectors in memory: almost exact, at a fraction of the cost.

A full comparison reads all n x d numbers and is limited by memory bandwidth. So each vector also has a head: its
coordinates in the m directions of highest variance in a sample, m = d / 8, at least 32. The FIRST best by heads are
compared in full, then four times as many, and so on, until the result no longer changes. If heads say little about
the cosines (noise without neighbours), in the end all vectors are compared.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

LEAST_HEAD = 32
FIRST, PART = 128, 1024  # at least 128, and at least 1/1024 of all rows
GROWTH = 4
MOST = 16  # above 1/16 of all rows, comparing all rows is as fast
STRIPES = 8  # the best score of every eight rows gives the bound that about FIRST rows exceed
HEADS_FROM = 4096  # rows; fewer are all compared in full
REFIT_GROWTH = 4  # the directions are computed again when there are this many times more rows
SAMPLE = 2048
ITERATIONS = 3
TOGETHER = 64  # queries in one matrix product
SCORES_AT_ONCE = 8_000_000  # 32 MB of inner products
ONE_CORE = 2**18  # multiply-adds; OpenBLAS splits larger products over all cores, and waits for busy ones
WORTH_GATHERING = 16  # if a filter matches less than 1/16 of the rows, only those are compared


@dataclass(frozen=True)
class Nearest:
    """n vectors. Immutable: `added` and `removed` return another object, which shares the memory.

    keys   (capacity,) uint64, each once     rows (capacity, d) float32     heads (capacity, m) float32
    alive  (n,) bool, False for removed rows; None if there are none
    """

    n: int
    keys: np.ndarray
    rows: np.ndarray
    heads: np.ndarray
    basis: np.ndarray  # (d, m)
    fitted: int = 0  # number of rows when `basis` was computed
    alive: np.ndarray | None = None

    @classmethod
    def empty(cls, dimension: int, capacity: int) -> "Nearest":
        m = min(dimension, max(LEAST_HEAD, dimension // 8))
        rows, heads = (np.empty((capacity, width), np.float32) for width in (dimension, m))  # uses memory when written
        return cls(0, np.empty(capacity, np.uint64), rows, heads, np.empty((dimension, m), np.float32))

    @classmethod
    def from_parts(cls, parts: Iterable[tuple[np.ndarray, np.ndarray]], dimension: int, capacity: int) -> "Nearest":
        """Returns an object with these parts: keys (a,), unit vectors (a, d). capacity: most rows it has room for."""
        nearest = cls.empty(dimension, capacity)
        for keys, vectors in parts:
            nearest = nearest._with(keys, vectors)
        return nearest._fitted()

    @property
    def count(self) -> int:
        return self.n if self.alive is None else int(self.alive.sum())

    def added(self, keys: np.ndarray, vectors: np.ndarray) -> "Nearest":
        """Returns a copy with `vectors` (a, d) of `keys` (a,) added. Call this only on the newest object."""
        grown = self._with(keys, vectors)
        if self.fitted:
            _product(vectors, self.basis, grown.heads[grown.n - len(keys) : grown.n])
        return grown._fitted() if grown.n >= REFIT_GROWTH * self.fitted else grown

    def _with(self, keys: np.ndarray, vectors: np.ndarray) -> "Nearest":
        n = self.n + len(keys)
        if n > len(self.keys):
            if self.alive is None:
                raise ValueError(f"{n:,} vectors are more than the {len(self.keys):,} that can be stored")
            return self._moved(self.alive)._with(keys, vectors)  # removed rows occupy room too
        self.keys[self.n : n], self.rows[self.n : n] = keys, vectors
        alive = None if self.alive is None else np.concatenate([self.alive, np.ones(len(keys), bool)])
        return replace(self, n=n, alive=alive)

    def removed(self, keys: np.ndarray) -> "Nearest":
        """Returns a copy without the rows of `keys`."""
        alive = np.ones(self.n, bool) if self.alive is None else self.alive.copy()
        alive[self.positions(keys)] = False
        left = replace(self, alive=alive)
        return left._moved(alive) if 4 * left.count < 3 * self.n else left

    @cached_property
    def _order(self) -> np.ndarray | None:
        """The positions sorted by key; None if they are sorted already."""
        keys = self.keys[: self.n]
        return None if (keys[1:] > keys[:-1]).all() else np.argsort(keys, kind="stable")

    def positions(self, keys: np.ndarray) -> np.ndarray:
        """Returns the ascending positions of those of `keys` that exist."""
        at = np.searchsorted(self.keys[: self.n], keys, sorter=self._order)
        at, keys = at[at < self.n], keys[at < self.n]
        at = at if self._order is None else self._order[at]
        return np.sort(at[self.keys[at] == keys])

    def search(
        self, queries: np.ndarray, k: int, among: np.ndarray | None = None
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns keys (k,) and cosines (k,), nearest first, for each unit row of `queries` (q, d). among: positions to
        search, None for all."""
        barred = None if self.alive is None else ~self.alive
        if among is not None:
            if self.alive is not None:
                among = among[self.alive[among]]
            if WORTH_GATHERING * len(among) < self.n:
                gathered = self.rows[among]
                return [self._best(among, _dots(gathered, query), k) for query in queries]
            barred = np.ones(self.n, bool)
            barred[among] = False
        step = max(1, min(TOGETHER, SCORES_AT_ONCE // max(1, self.n)))
        return [
            self._refined(query, scores, k, barred)
            for at in range(0, len(queries), step)
            for query, scores in zip(queries[at : at + step], self._scores(queries[at : at + step]), strict=True)
        ]

    def _scores(self, queries: np.ndarray) -> np.ndarray:
        """Returns scores (q, n): inner products of heads, or cosines if there are no heads."""
        side = (self.heads if self.fitted else self.rows)[: self.n]
        projected = np.einsum("qi,im->qm", queries, self.basis) if self.fitted else queries
        if len(queries) == 1:
            return _dots(side, projected[0])[None]
        scores = np.empty((len(queries), self.n), np.float32)
        _product(side, projected.T, scores.T)
        return scores

    def _refined(
        self, query: np.ndarray, scores: np.ndarray, k: int, barred: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        if barred is not None:
            np.copyto(scores, -np.inf, where=barred)
        if not self.fitted:
            return self._best(np.arange(self.n), scores, k)
        stripes = scores[: self.n // STRIPES * STRIPES].reshape(STRIPES, -1).max(axis=0)
        if barred is not None:
            stripes = stripes[stripes > -np.inf]  # partition is slow where many are equal
        counts, count = [], max(FIRST, 4 * k, self.n // PART)
        while MOST * count <= self.n and count < len(stripes):
            counts.append(-count)
            count *= GROWTH
        before = np.empty(0, np.intp)
        for bound in np.partition(stripes, counts)[counts] if counts else ():
            at = np.flatnonzero(scores >= bound)
            at, cosines = _top(at, _dots(self.rows[at], query), k)
            if len(before) == k and len(np.setdiff1d(at, before, assume_unique=True)) <= k // 100:
                return self.keys[at], cosines
            before = at
        cosines = _dots(self.rows[: self.n], query)
        if barred is not None:
            np.copyto(cosines, -np.inf, where=barred)
        return self._best(np.arange(self.n), cosines, k)

    def _best(self, at: np.ndarray, cosines: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        at, cosines = _top(at, cosines, k)
        present = cosines > -np.inf
        return self.keys[at[present]], cosines[present]

    def _fitted(self) -> "Nearest":
        """Returns a copy with new heads: the directions of highest variance, by subspace iteration."""
        if self.n < HEADS_FROM:
            return self
        sample = self.rows[: self.n : max(1, self.n // SAMPLE)].copy()
        basis = np.random.default_rng(0).standard_normal(self.basis.shape, dtype=np.float32)
        for _ in range(ITERATIONS):
            basis = _orthonormal(_product(sample.T, _product(sample, basis)))
        heads = np.empty_like(self.heads)  # other threads still read the old ones
        _product(self.rows[: self.n], basis, heads[: self.n])
        return replace(self, basis=basis, heads=heads, fitted=self.n)

    def _moved(self, alive: np.ndarray) -> "Nearest":
        """Returns a copy of the rows that are `alive`, in new memory."""
        kept = np.flatnonzero(alive)
        moved = Nearest.empty(self.rows.shape[1], len(self.keys))
        for new, old in ((moved.keys, self.keys), (moved.rows, self.rows), (moved.heads, self.heads)):
            np.take(old, kept, axis=0, out=new[: len(kept)], mode="clip")
        return replace(moved, n=len(kept), basis=self.basis, fitted=self.fitted)


def _dots(rows: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Returns rows @ query on one core, limited by memory bandwidth."""
    return np.einsum("ij,j->i", rows, query)


def _orthonormal(columns: np.ndarray) -> np.ndarray:
    """Returns an orthonormal basis (d, m) of the columns' span, with columns of 0 if its dimension is less than m.
    LAPACK's QR would make thousands of small calls on all cores."""
    strengths, mixed = np.linalg.eigh(_product(columns.T, columns).astype(np.float64))
    scales = np.where(strengths > 1e-6 * strengths[-1], np.maximum(strengths, 1e-300) ** -0.5, 0)
    return _product(columns, (mixed * scales).astype(np.float32))


def _product(a: np.ndarray, b: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Returns a @ b, computed on one core."""
    out = np.empty((len(a), b.shape[1]), np.float32) if out is None else out
    step = max(1, ONE_CORE // b.size)
    for at in range(0, len(a), step):
        np.matmul(a[at : at + step], b, out=out[at : at + step])
    return out


def _top(at: np.ndarray, scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the k largest, largest first."""
    if k < len(scores):
        best = np.argpartition(scores, -k)[-k:]
        at, scores = at[best], scores[best]
    order = np.argsort(-scores, kind="stable")
    return at[order], scores[order]
