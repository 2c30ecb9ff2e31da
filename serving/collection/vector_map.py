"""Estimates the vectors that a new encoder would give, from those of the old one.

Drift-Adapter (Vejendla 2025, arXiv:2509.23471) maps new queries to old vectors. This maps old vectors to new ones by
ridge regression on pictures that both have embedded, which benchmarks/upgrade.py found to be better. Cosines of
estimated vectors are on another scale than those of real ones, so they are corrected.
"""

from dataclasses import dataclass

import numpy as np

from serving.collection.items import unit

RIDGE = 0.3  # times the mean squared length of the centred old vectors
NEAREST = 10  # highest cosines of each picture, whose means are compared


@dataclass(frozen=True)
class VectorMap:
    """x -> x A + b, scaled to length 1"""

    matrix: np.ndarray
    """(d_old, d_new) float32, A"""
    offset: np.ndarray
    """(d_new,) float32, b"""
    shift: float = 0.0
    """How much higher the nearest vectors' cosines are than those of their estimates; may be negative."""

    @classmethod
    def learn(cls, old: np.ndarray, new: np.ndarray) -> "VectorMap":
        """Learns from the unit vectors of the same n pictures, n > 20.

        old, new  (n, d_old), (n, d_new)
        raises    ValueError
        """
        if not (old.ndim == new.ndim == 2 and len(old) == len(new) > 2 * NEAREST):
            raise ValueError(f"vectors of the same pictures are needed, not {old.shape} and {new.shape}")
        shifts = []
        for start in (0, 1):  # a half is estimated by what the other half teaches
            half, other = slice(start, None, 2), slice(1 - start, None, 2)
            estimated = cls(*_ridge(old[other], new[other]))(old[half])
            shifts.append(_highest(new[half] @ new[half].T) - _highest(new[half] @ estimated.T))
        return cls(*_ridge(old, new), float(np.mean(shifts)))

    def __call__(self, old: np.ndarray) -> np.ndarray:
        """Estimated unit vectors (n, d_new) for those of the old encoder (n, d_old)."""
        return unit(old @ self.matrix + self.offset)

    def cosines(self, estimated: np.ndarray) -> np.ndarray:
        """Cosines on the scale of real vectors, from those of estimated vectors to the new encoder's: (n,)"""
        return (estimated + self.shift).clip(-1, 1)

    def directions(self, new: np.ndarray) -> np.ndarray:
        """Directions (n, d_old) in which the old vectors lie whose estimates lie in the directions `new` (n, d_new)."""
        return new @ self.matrix.T


def _ridge(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The A and b with the least |xA + b - y|^2 + penalty |A|^2 (Hoerl & Kennard 1970, Ridge Regression,
    doi:10.1080/00401706.1970.10488634, Eq. 2.1; centred, so that b has no penalty)."""
    n, d = x.shape
    x, y = x.astype(np.float64), y.astype(np.float64)
    x_mean, y_mean = x.mean(axis=0), y.mean(axis=0)
    x, y = x - x_mean, y - y_mean
    penalty = RIDGE * (x**2).sum() / n or 1.0  # any will do if all rows of x are equal
    if n < d:  # both give the same A; the smaller system is solved
        matrix = x.T @ np.linalg.solve(x @ x.T + penalty * np.eye(n), y)
    else:
        matrix = np.linalg.solve(x.T @ x + penalty * np.eye(d), x.T @ y)
    return matrix.astype(np.float32), (y_mean - x_mean @ matrix).astype(np.float32)


def _highest(cosines: np.ndarray) -> float:
    """Returns the mean of the NEAREST highest of each row of (n, n), without the diagonal: a picture with itself."""
    np.fill_diagonal(cosines, -np.inf)
    return float(np.partition(cosines, -NEAREST, axis=1)[:, -NEAREST:].mean())
