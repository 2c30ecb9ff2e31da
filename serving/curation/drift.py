r"""Whether new pictures look like those of a collection: the maximum mean discrepancy (Gretton et al. 2012, A Kernel
Two-Sample Test, JMLR 13), by random features of an RBF kernel (Rahimi and Recht 2007; Zhao and Meng 2015,
arXiv:1405.2664).

With features \phi of n new pictures x and m pictures y of the collection, the statistic is the square of
|mean \phi(x) - mean \phi(y)|. If all n + m pictures are from the same source, permuting them gives the distribution of

    (1/n + 1/m) \sum_i \lambda_i z_i^2,    \lambda_i the eigenvalues of the covariance of \phi,  z_i normal

It does not depend on the new pictures, so it is computed once per collection, as the gamma distribution with the same
first three moments (Bodenham and Adams 2016, A comparison of efficient approximations for a weighted sum of chi-squared
random variables). So p-values far below 1 / permutations are known, as an alarm needs that is looked at often.
"""

from dataclasses import dataclass

import numpy as np

WINDOW = 500  # new pictures that are compared
REFERENCE = 4_000  # most pictures of a collection that they are compared with
COMPONENTS = 128  # principal components, all of which count the same: a blur changes small ones more than large ones
FREQUENCIES = 256
SCALED_BY = 1_000  # pictures of the collection whose distances give the kernel's width
ALARM = 1e-7
"""Pictures with a smaller p-value differ. One comparison a minute makes 10,000 a week: were p-values so small exact,
one week in a thousand would have a false alarm. Collections with many copies have more of them: the halves that scale
the directions and give the null then hold the same pictures."""
LEAST_P = 1e-12  # smaller ones are not told apart


@dataclass(frozen=True)
class Comparison:
    """How far new pictures lie from a collection."""

    distance: float
    """Maximum mean discrepancy beyond what chance gives, 0 (alike) to 1.41 (nothing in common)."""
    p_value: float
    """Share of samples of the collection that lie at least as far from it, from LEAST_P to 1."""

    @property
    def differs(self) -> bool:
        return self.p_value < ALARM


class Reference:
    """What new pictures are compared with."""

    def __init__(self, vectors: np.ndarray, seed: int = 0):
        """vectors  (m, d) float32, m >= 4: unit vectors of pictures of the collection, in random order. The first half
        scales the directions, so that p-values, which come from the second, do not depend on chance in it.
        """
        scaled_by, vectors = vectors[: len(vectors) // 2], vectors[len(vectors) // 2 :]
        scales = _scales(scaled_by)
        width = _width(scaled_by @ scales)
        random = np.random.default_rng(seed).standard_normal((scales.shape[1], FREQUENCIES), np.float32)
        self._frequencies = scales @ random / np.float32(width)
        features = self.features(vectors)
        self._mean = features.mean(axis=0)
        self._count = len(features)
        centred = features - self._mean
        covariance = (centred.T @ centred).astype(np.float64) / (len(features) - 1)  # (D, D)
        square = covariance @ covariance
        self._cumulants = float(np.trace(covariance)), float(np.trace(square)), float(np.vdot(square, covariance))

    def features(self, vectors: np.ndarray) -> np.ndarray:
        """vectors (n, d): unit vectors. Returns (n, 2 FREQUENCIES) float32."""
        angles = vectors @ self._frequencies
        return np.concatenate([np.cos(angles), np.sin(angles)], axis=1) / np.float32(np.sqrt(FREQUENCIES))

    def compare(self, vectors: np.ndarray) -> Comparison:
        """vectors (n, d), n >= 2: unit vectors of new pictures"""
        return self.compare_mean(self.features(vectors).mean(axis=0), len(vectors))

    def compare_mean(self, mean: np.ndarray, count: int) -> Comparison:
        """mean (2 FREQUENCIES,) of the features of `count` new pictures"""
        from scipy.special import gammaincc  # takes a moment to load, and the service may never need it

        statistic = float(((mean.astype(np.float64) - self._mean) ** 2).sum())
        share = 1 / count + 1 / self._count
        first, second, third = self._cumulants
        if not first > 1e-9:  # all pictures of the collection are the same one
            return Comparison(statistic**0.5, 1.0 if statistic < 1e-9 else LEAST_P)
        # shifted gamma with mean `first`, variance 2 `second` and third central moment 8 `third`, times share
        shape = second**3 / third**2
        p_value = float(gammaincc(shape / 2, max(0.0, shape / 2 + (statistic / share - first) * second / third / 2)))
        return Comparison(max(0.0, statistic - share * first) ** 0.5, max(p_value, LEAST_P))


def _scales(vectors: np.ndarray) -> np.ndarray:
    """Returns (d, c) that turns vectors (n, d) into their principal components, each of variance 1."""
    centred = (vectors - vectors.mean(axis=0)).astype(np.float64)
    variances, directions = np.linalg.eigh(centred.T @ centred / len(vectors))  # ascending
    kept = min(COMPONENTS, len(vectors) // 4, int((variances > max(1e-10, 1e-6 * variances[-1])).sum()))
    if not kept:  # all pictures are the same one
        return np.eye(vectors.shape[1], dtype=np.float32)
    return (directions[:, -kept:] / np.sqrt(variances[-kept:])).astype(np.float32)


def _width(vectors: np.ndarray) -> float:
    """Returns the median distance of two of the first pictures; 1 if most are the same."""
    some = vectors[:SCALED_BY].astype(np.float64)
    squares = (some**2).sum(axis=1)
    distances = (squares[:, None] + squares - 2 * some @ some.T)[np.triu_indices(len(some), 1)]
    width = max(0.0, float(np.median(distances))) ** 0.5
    return width if width > 1e-3 else 1.0
