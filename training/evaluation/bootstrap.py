"""Confidence intervals of a mean over queries: the percentile bootstrap (Efron 1979).

They cover the choice of the queries, but not another training set or another seed of the training.
"""

import numpy as np

RESAMPLES, LEVEL = 1000, 0.95
AT_ONCE = 2**24  # most counts in memory


def interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """The interval that contains LEVEL of the means of resampled `values`. Raises ValueError for NaN or no values.

    values  (Q,) one number per query: 0 or 1 for wrong or right, average precision, or the difference of two encoders
    """
    values = np.asarray(values, dtype=np.float64)
    if not len(values) or not np.isfinite(values).all():
        raise ValueError(f"an interval needs finite values, one or more, not {values}")
    rng, n = np.random.default_rng(seed), len(values)
    means = []
    for start in range(0, RESAMPLES, step := max(1, AT_ONCE // n)):
        size = min(step, RESAMPLES - start)
        counts = rng.multinomial(n, np.full(n, 1 / n), size=size)  # (size, Q): how often each is drawn
        means.append(counts @ values / n)
    low, high = np.quantile(np.concatenate(means), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
