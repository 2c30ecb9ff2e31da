"""Near-duplicates of a whole collection: recall, and time relative to comparing all pairs.

    python benchmarks/duplicates.py

The vectors form clusters; a twentieth of them are noisy copies of others. In one set the variance decreases from
direction to direction, as in vectors of encoders; in the other it is the same in all directions, the worst case for
the bounds of the search. All pairs are compared by matrix products in blocks, on all cores.
"""

if __name__ == "__main__" and not __package__:
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import time
from dataclasses import dataclass

import numpy as np
import tyro

from benchmarks.result import publish
from serving.collection.index import unit
from serving.derived.pairs import near_pairs

CLUSTERS = 2000
BLOCK = 2048
QUICK = 25_000


@dataclass(frozen=True)
class Options:
    rows: int = 100_000
    """Number of vectors."""
    dimension: int = 512
    """Length of the vectors."""
    threshold: float = 0.95
    """Least cosine of near-duplicates."""
    quick: bool = False
    """25,000 vectors only."""


def main(options: Options) -> None:
    n = QUICK if options.quick else options.rows
    rows = []
    for spectrum, power in (("decaying", -0.5), ("flat", 0.0)):
        vectors = clustered(n, options.dimension, power)
        started = time.perf_counter()
        expected = all_pairs(vectors, options.threshold)
        all_s, started = time.perf_counter() - started, time.perf_counter()
        pairs = near_pairs(vectors, options.threshold)
        ours_s = time.perf_counter() - started
        found = set((pairs.first.astype(np.int64) * n + pairs.second).tolist())
        rows.append(
            {
                "spectrum": spectrum,
                "vectors": n,
                "pairs": len(expected),
                "found": len(found & expected),
                "too many": len(found - expected),
                "all pairs (s)": all_s,
                "ours (s)": ours_s,
                "share": ours_s / all_s,
            }
        )
    recall = min(row["found"] / row["pairs"] for row in rows)
    publish("duplicates", rows, {"pairs_recall": recall, "over_all_pairs": rows[0]["share"]})


def clustered(n: int, d: int, power: float) -> np.ndarray:
    """Unit vectors (n, d) in clusters; direction k is scaled by k ** power."""
    rng = np.random.default_rng(0)
    scale = np.arange(1, d + 1, dtype=np.float32) ** power
    centres = rng.standard_normal((CLUSTERS, d), np.float32)
    vectors = (centres[rng.integers(CLUSTERS, size=n)] + 0.6 * rng.standard_normal((n, d), np.float32)) * scale
    originals, copies = rng.integers(n, size=(2, n // 20))
    noise = unit(rng.standard_normal((len(copies), d))) * rng.uniform(0.05, 0.5, (len(copies), 1))
    vectors[copies] = unit(vectors[originals]) + noise
    return unit(vectors)


def all_pairs(vectors: np.ndarray, threshold: float) -> set[int]:
    """The pairs i < j above the threshold, each as i * n + j."""
    n, pairs = len(vectors), set()
    for i in range(0, n, BLOCK):
        for j in range(i, n, BLOCK):
            a, b = np.nonzero(vectors[i : i + BLOCK] @ vectors[j : j + BLOCK].T >= threshold)
            a, b = a + i, b + j
            pairs.update((a * n + b)[a < b].tolist())
    return pairs


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
