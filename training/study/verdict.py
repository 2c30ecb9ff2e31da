r"""Whether a claim held, by what another seed would have given.

With two or three seeds a cell's own deviation says little, so one deviation s is pooled over a study's rows:
s^2 = sum (x - mean of its row)^2 / nu with nu = values - rows, taken as the same everywhere. A contrast, the sum of
some groups' means minus that of others, has the interval  c +- t s sqrt(sum 1 / n).  Values are taken as independent:
so each is of a run of its own.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean

LEVEL = 0.95


@dataclass(frozen=True)
class RunRow:
    """A line of a study's table: what sets it apart, and each figure once a seed."""

    labels: dict
    values: dict[str, list[float]]


@dataclass(frozen=True)
class SeedGroup:
    """One figure of some rows."""

    figure: str
    where: Callable[[dict], bool]
    """Of a row's labels."""

    def values(self, rows: Sequence[RunRow]) -> list[float]:
        return [value for row in rows if self.where(row.labels) for value in row.values[self.figure]]


@dataclass(frozen=True)
class Claim:
    """That the means of `more` add up to more than those of `less`."""

    words: str
    more: tuple[SeedGroup, ...]
    less: tuple[SeedGroup, ...]


def t_quantile(freedom: int, level: float = LEVEL) -> float:
    """Of Student's t, two-sided: the expansion in 1/nu (Abramowitz & Stegun 26.7.5), to 0.5 %; exact for 1 and 2."""
    if freedom == 1:
        return math.tan(math.pi * level / 2)
    if freedom == 2:
        return level * math.sqrt(2 / (1 - level**2))
    z = NormalDist().inv_cdf((1 + level) / 2)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))


def pooled(rows: Sequence[RunRow], figure: str) -> tuple[float, int]:
    """s and its degrees of freedom; (nan, 0) where each row has one value."""
    of = [row.values[figure] for row in rows if figure in row.values]
    freedom = sum(len(values) - 1 for values in of)
    if not freedom:
        return math.nan, 0
    squares = sum((value - fmean(values)) ** 2 for values in of for value in values)
    return math.sqrt(squares / freedom), freedom


def halfwidth(rows: Sequence[RunRow], figure: str, n: int) -> float:
    """Of the interval of a mean of n values; nan without spread."""
    s, freedom = pooled(rows, figure)
    return t_quantile(freedom) * s / math.sqrt(n) if freedom else math.nan


def judge(claim: Claim, rows: Sequence[RunRow]) -> dict:
    """The contrast, its interval, and a sentence: held, the reverse, or not told apart."""
    contrast, variance, freedoms = 0.0, 0.0, []
    for sign, groups in ((1, claim.more), (-1, claim.less)):
        for group in groups:
            values = group.values(rows)
            s, freedom = pooled(rows, group.figure)
            contrast += sign * fmean(values)
            variance += s**2 / len(values)
            freedoms.append(freedom)
    if not min(freedoms):
        words = f"{claim.words}: {100 * contrast:+.1f} points with one seed, so there is no spread to judge by."
        return {"claim": claim.words, "contrast": contrast, "held": None, "sentence": words}
    half = t_quantile(min(freedoms)) * math.sqrt(variance)
    low, high = contrast - half, contrast + half
    held = True if low > 0 else False if high < 0 else None
    verdict = {True: "held", False: "did not hold, the reverse did", None: "not told apart"}[held]
    words = f"{claim.words}: {verdict}, {100 * contrast:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f})."
    return {"claim": claim.words, "contrast": contrast, "low": low, "high": high, "held": held, "sentence": words}
