"""From which cosine on two pictures of a collection are near-duplicates, told from the collection itself.

With one encoder copies have a cosine of 0.92 and different pictures at most 0.9; with another, different pictures have
0.999. What tells a copy with any encoder is a gap: it is several times nearer than the pictures that come after it. A
pair has a gap if this holds seen from both of its pictures. The threshold is the lowest cosine from which on nearly
all pairs have one.
"""

from collections.abc import Callable

import numpy as np

from serving.derived.copies import first_identical
from serving.derived.pairs import TooManyPairs, near_pairs

EXACT = 2e-6  # 1 - cosine of two files with the same pixels is less: rounding of float32
GAP = 0.3  # a copy's 1 - cosine is at most this share of that of the next picture
PURE = 0.98  # share of pairs from the threshold on that have a gap
LOWEST = 0.8  # no threshold is lower
NEIGHBOURS = 10  # a picture may have nearly as many copies
SAMPLE = 8192  # pictures whose neighbours are looked at, of a larger collection
BLOCK = 1024


def own_threshold(vectors: np.ndarray, report: Callable[[float], None] = lambda share: None) -> float:
    """Returns a cosine of LOWEST to 1 - EXACT. Exact copies count neither for a gap nor against it.

    vectors  (n, d) float32, rows of length 1
    report   called with the share that is done
    raises   TooManyPairs, of pictures that the encoder does not tell apart
    """
    vectors = _once(vectors)
    n = len(vectors)
    if n < 3:  # there is no next picture
        return 1 - EXACT
    sample = np.sort(np.random.default_rng(0).permutation(n)[:SAMPLE])
    others, far, gaps = _neighbours(vectors, sample, lambda share: report(share / 2))
    pairs: dict[tuple[int, int], tuple[float, dict[int, bool]]] = {}  # 1 - cosine, and the gap as each of both sees it
    for row, a in enumerate(sample.tolist()):
        for b, distance, gap in zip(others[row].tolist(), far[row].tolist(), gaps[row].tolist(), strict=True):
            pairs.setdefault((min(a, b), max(a, b)), (distance, {}))[1][a] = gap
    nearest = sorted(pairs.items(), key=lambda pair: pair[1][0])[: len(sample)]
    unseen = np.setdiff1d([id for pair, _ in nearest for id in pair], sample)  # of pictures outside the sample
    others, _, gaps = _neighbours(vectors, unseen, lambda share: report(0.5 + share / 2))
    for row, b in enumerate(unseen.tolist()):
        for a, gap in zip(others[row].tolist(), gaps[row].tolist(), strict=True):
            if seen := pairs.get((min(a, b), max(a, b))):
                seen[1][b] = gap
    distances = np.array([distance for _, (distance, _) in nearest])
    has_gap = np.array([all(seen.values()) for _, (_, seen) in nearest])
    pure = np.cumsum(has_gap) / np.arange(1, len(has_gap) + 1) >= PURE
    ends = np.flatnonzero(pure & has_gap)
    # Without a copy to learn from: nearer than different pictures are to each other.
    distance = distances[ends[-1]] + EXACT / 2 if len(ends) else GAP * distances[0]
    return float(np.clip(1 - distance, LOWEST, 1 - EXACT))


def _once(vectors: np.ndarray) -> np.ndarray:
    """Returns the first vector of each set of exact copies, (m, d). Raises TooManyPairs."""
    vectors = vectors[first_identical(vectors) == np.arange(len(vectors))]
    try:
        again = near_pairs(vectors, 1 - EXACT).second
    except TooManyPairs as error:
        raise TooManyPairs(
            "so many pictures have nearly the same vector that near-duplicates cannot be found; use another encoder"
        ) from error
    once = np.ones(len(vectors), bool)
    once[again] = False
    return vectors[once]


def _neighbours(
    vectors: np.ndarray, rows: np.ndarray, report: Callable[[float], None]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the nearest others of these rows, each (r, k): their rows, their 1 - cosine in ascending order, and
    whether a gap follows on them or on a later one of the k."""
    k = min(NEIGHBOURS, len(vectors) - 2)
    nearest, far = np.zeros((len(rows), k), np.int64), np.zeros((len(rows), k + 1), np.float32)
    for start in range(0, len(rows), BLOCK):
        some = rows[start : start + BLOCK]
        distance = 1 - vectors[some] @ vectors.T  # (block, n)
        distance[np.arange(len(some)), some] = 3  # farther than any other
        first = np.argpartition(distance, k, axis=1)[:, : k + 1]
        first = np.take_along_axis(first, np.take_along_axis(distance, first, 1).argsort(axis=1), 1)
        nearest[start : start + BLOCK] = first[:, :k]
        far[start : start + BLOCK] = np.take_along_axis(distance, first, 1)
        report((start + len(some)) / len(rows))
    gap = far[:, :-1] <= GAP * far[:, 1:]
    return nearest, far[:, :-1], np.flip(np.logical_or.accumulate(np.flip(gap, 1), axis=1), 1)
