"""What a comparison of two encoders says, in one sentence: the one place for its words."""

import math

Z = 1.96  # standard deviations of a 95 % interval
MEASURES = {"knn": ("queries", "kNN accuracy"), "views_matched": ("pictures", "pairs of views that find each other")}
"""The shares of knn.metrics that show whether training helped, with labels and without: their cases and names."""


def difference(before: float, after: float, n: int) -> tuple[float, float]:
    """The 95 % interval of the difference of two shares of n cases each, as if they were different cases: for the same
    ones it is wider than it had to be."""
    half = Z * math.sqrt((before * (1 - before) + after * (1 - after)) / n)
    return after - before - half, after - before + half


def is_clear(limits: tuple[float, float]) -> bool:
    """Whether the interval of a difference leaves out 0."""
    return limits[0] > 0 or limits[1] < 0


def compared(one: str, other: str, what: str, shares: tuple[float, float], limits: tuple[float, float]) -> str:
    """Such as "tiny is better than raw pixels: kNN accuracy 57.3% against 24.2%, by 33.1 points (30.0 to 36.2)".

    shares  of the one and of the other
    limits  of the first minus the second
    """
    figures = f"{what} {shares[0]:.1%} against {shares[1]:.1%}"
    if not is_clear(limits):
        return f"{one} is not distinguishable from {other}: {figures}"
    low, high = sorted(abs(100 * limit) for limit in limits)
    points = f"by {abs(100 * (shares[0] - shares[1])):.1f} points ({low:.1f} to {high:.1f})"
    return f"{one} is {'better' if limits[0] > 0 else 'worse'} than {other}: {figures}, {points}"


def trained(before: dict, after: dict) -> tuple[bool, str]:
    """Whether training made the encoder better for certain, and the sentence that says so.

    before, after  results of knn.metrics
    """
    measure = next(measure for measure in MEASURES if measure in after)
    cases, what = MEASURES[measure]
    old, new = before[measure], after[measure]
    limits = difference(old, new, after[cases])
    if not is_clear(limits):
        return False, (
            f"training changed nothing that {after[cases]:,} pictures can show: {what} {old:.1%} before, {new:.1%} "
            "after. Train longer or on more pictures, or use the encoder that you started from"
        )
    return limits[0] > 0, compared("the result", "its start", what, (new, old), limits)
