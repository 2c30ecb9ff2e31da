r"""Whether a claim held: a contrast of means and its confidence interval over seeds.

With two or three seeds the standard deviation of a single cell is unreliable, so one deviation s, assumed equal for all
cells, is pooled over a study's rows: s^2 = sum (x - mean of its row)^2 / nu with nu = values - rows. A contrast c, the
sum of some groups' means minus that of others, has the standard error e = s sqrt(sum 1 / n) and the interval c +- t e
with Student's t. Values are assumed independent, so each must come from a run of its own.

The power of the test is stated as the true difference that it finds in POWER of all studies: (t + t_POWER) e (Bloom
1995, doi:10.1177/0193841X9501900504). An interval that lies within ABSENT of zero shows that there is no difference of
that size.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from scipy import stats

LEVEL = 0.95  # of the intervals
POWER = 0.8
ABSENT = 0.01  # accuracies that are nearer to each other count as equal


@dataclass(frozen=True)
class RunRow:
    """One row of a study's table: its labels, and for each figure one value per seed."""

    labels: dict
    values: dict[str, list[float]]


@dataclass(frozen=True)
class SeedGroup:
    """One figure of all rows whose labels fulfil `where`."""

    figure: str
    where: Callable[[dict], bool]

    def values(self, rows: Sequence[RunRow]) -> list[float]:
        return [value for row in rows if self.where(row.labels) for value in row.values[self.figure]]


@dataclass(frozen=True)
class Claim:
    """The claim that the sum of the means of `more` is greater than that of `less`."""

    words: str
    more: tuple[SeedGroup, ...]
    less: tuple[SeedGroup, ...]


def pooled(rows: Sequence[RunRow], figure: str) -> tuple[float, int]:
    """s and its degrees of freedom; (nan, 0) if each row has one value."""
    groups = [row.values[figure] for row in rows if figure in row.values]
    freedom = sum(len(values) - 1 for values in groups)
    if not freedom:
        return math.nan, 0
    squares = sum((value - fmean(values)) ** 2 for values in groups for value in values)
    return math.sqrt(squares / freedom), freedom


def quantile(freedom: int) -> float:
    """Two-sided quantile of Student's t at LEVEL."""
    return float(stats.t.ppf((1 + LEVEL) / 2, freedom))


def halfwidth(rows: Sequence[RunRow], figure: str, n: int) -> float:
    """Half the width of the interval of a mean of n values; nan if each row has one value."""
    s, freedom = pooled(rows, figure)
    return quantile(freedom) * s / math.sqrt(n) if freedom else math.nan


def judge(claim: Claim, rows: Sequence[RunRow]) -> dict:
    """The contrast, its interval, the detectable difference, and a sentence that says whether the claim held.

    held    True; False: the reverse did; None: neither
    absent  the interval lies within ABSENT of zero and contains it
    """
    contrast, variance, freedoms = 0.0, 0.0, []
    for sign, groups in ((1, claim.more), (-1, claim.less)):
        for group in groups:
            values = group.values(rows)
            s, freedom = pooled(rows, group.figure)
            contrast += sign * fmean(values)
            variance += s**2 / len(values)
            freedoms.append(freedom)
    if not min(freedoms):
        words = f"{claim.words}: {100 * contrast:+.1f} points with one seed, so it cannot be judged."
        return {"claim": claim.words, "contrast": contrast, "held": None, "absent": False, "sentence": words}
    error, t = math.sqrt(variance), quantile(min(freedoms))
    low, high = contrast - t * error, contrast + t * error
    detectable = (t + float(stats.t.ppf(POWER, min(freedoms)))) * error
    held = True if low > 0 else False if high < 0 else None
    absent = held is None and low > -ABSENT and high < ABSENT
    verdict = {True: "held", False: "did not hold, the reverse did", None: "undecided"}[held]
    verdict = f"no difference of {100 * ABSENT:.0f} point or more" if absent else verdict
    words = (
        f"{claim.words}: {verdict}, {100 * contrast:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f}); "
        f"{POWER:.0%} power at {100 * detectable:.1f} points."
    )
    facts = {"low": low, "high": high, "detectable": detectable, "held": held, "absent": absent}
    return {"claim": claim.words, "contrast": contrast} | facts | {"sentence": words}
