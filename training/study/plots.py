"""Figures of the studies, in the form of the paper's: each function draws the rows of a study into a figure.

Values are in percent; a whisker is the interval of the mean over seeds, a dot is one seed.
"""

import math
from collections.abc import Sequence
from statistics import fmean

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from training.study.verdict import RunRow, halfwidth

READ = ("linear h", "linear z", "mlp h", "mlp z")
OF_H, OF_Z = "linear evaluation of h, %", "linear evaluation of z, %"


def heads(figure: Figure, rows: Sequence[RunRow]) -> None:
    """Fig. 8: groups of bars by the dimension of z; a run without a head has a group of its own."""
    places = {dimension: i for i, dimension in enumerate(sorted({row.labels["dimension"] for row in rows}, key=_last))}
    left, right = figure.subplots(1, 2, sharey=True)
    for axis, name, label in ((left, "linear h", OF_H), (right, "linear z", OF_Z)):
        for head, shift in (("none", 0.0), ("linear", -0.15), ("non-linear", 0.15)):
            bars = [row for row in rows if row.labels["head"] == head]
            _bars(axis, [places[row.labels["dimension"]] + shift for row in bars], bars, name, rows, 0.28, head)
        axis.set_xticks(list(places.values()), list(places))
        axis.set(xlabel="dimension of z", ylabel=label)
        axis.margins(y=0.15)
    left.legend(ncols=3, loc="upper left")


def factors(figure: Figure, rows: Sequence[RunRow]) -> None:
    """Table 3: for each factor, how well it is read from h and from z, and chance."""
    titles = {"all": "trained with every augmentation", "no colour": "trained without colour jitter and grey"}
    for axis, (views, title) in zip(figure.subplots(2, 1, sharex=True), titles.items(), strict=True):
        bars = [row for row in rows if row.labels["views"] == views]
        for shift, name in enumerate(READ):
            _bars(axis, [i + 0.2 * (shift - 1.5) for i in range(len(bars))], bars, name, rows, 0.19, name)
        chance = [100 * fmean(row.values["chance"]) for row in bars]
        axis.hlines(chance, np.arange(len(bars)) - 0.4, np.arange(len(bars)) + 0.4, color="black", label="chance")
        axis.set_xticks(range(len(bars)), [row.labels["factor"] for row in bars], rotation=20)
        axis.set(title=title, ylabel="accuracy, %")
    figure.axes[0].legend(ncols=5, fontsize=8)


def pairs(figure: Figure, rows: Sequence[RunRow]) -> None:
    """Fig. 5: a symmetric matrix, single augmentations on the diagonal, row means in the last column."""
    names = list(dict.fromkeys(row.labels["first"] for row in rows))
    table = np.zeros((len(names), len(names) + 1))
    for row in rows:
        i, j = (names.index(row.labels[side]) for side in ("first", "second"))
        table[i, j] = table[j, i] = 100 * fmean(row.values["linear h"])
    table[:, -1] = table[:, :-1].mean(axis=1)
    axis = figure.subplots()
    image = axis.imshow(table, cmap="viridis")
    middle = (table.min() + table.max()) / 2
    for i, j in np.ndindex(table.shape):
        axis.text(j, i, f"{table[i, j]:.1f}", ha="center", va="center", color="w" if table[i, j] < middle else "k")
    axis.set_xticks(range(len(names) + 1), [*names, "average"])
    axis.set_yticks(range(len(names)), names)
    axis.set(title=f"{OF_H}; alone on the diagonal")
    figure.colorbar(image)


def batches(figure: Figure, rows: Sequence[RunRow]) -> None:
    """Fig. 9: groups of bars by epochs, and beside them those of DCL and of four views."""
    axis, groups = figure.subplots(), {}
    for row in rows:
        labels = row.labels
        what = "" if labels["loss"] == "NT-Xent" else f"\n{labels['loss']}"
        what += "" if labels["views"] == 2 else f"\n{labels['views']} views"
        groups.setdefault(f"{labels['epochs']}{what}", []).append(row)
    for shift in range(len(next(iter(groups.values())))):
        bars = [group[shift] for group in groups.values()]
        views = bars[0].labels["batch"] * bars[0].labels["views"]
        places = [i + 0.27 * (shift - 1) for i in range(len(bars))]
        _bars(axis, places, bars, "linear h", rows, 0.25, f"{views:,} views a step")
    axis.set_xticks(range(len(groups)), list(groups))
    axis.set(xlabel="epochs", ylabel=OF_H)
    axis.margins(y=0.15)
    axis.legend(ncols=3, loc="upper left")


def temperatures(figure: Figure, rows: Sequence[RunRow]) -> None:
    taus = [row.labels["tau"] for row in rows]
    left, right = figure.subplots(1, 2)
    for axis, name, label in ((left, "linear h", OF_H), (right, "views matched z", "views matched by z, %")):
        means, halves = _spread(rows, name, rows)
        axis.errorbar(taus, means, yerr=halves, capsize=3, marker="o")
        axis.set_xscale("log")
        axis.set_xticks(taus, [f"{tau:g}" for tau in taus])
        axis.minorticks_off()
        axis.set(xlabel="temperature", ylabel=label)


def strengths(figure: Figure, rows: Sequence[RunRow]) -> None:
    left, right = figure.subplots(1, 2)
    by_histogram = "views matched by histogram"
    for axis, name, label in ((left, "linear h", OF_H), (right, by_histogram, f"{by_histogram}s of colour alone, %")):
        _bars(axis, range(len(rows)), rows, name, rows, 0.7)
        axis.set_xticks(range(len(rows)), [row.labels["strength"] for row in rows])
        axis.set(xlabel="strength of colour distortion", ylabel=label)


def _last(value: int | str) -> float:
    """Sort key: numbers first, then words."""
    return value if isinstance(value, int) else math.inf


def _spread(bars: Sequence[RunRow], name: str, rows: Sequence[RunRow]) -> tuple[list[float], list[float]]:
    """Means and halves of their intervals (0 with one seed), in percent."""
    halves = [halfwidth(rows, name, len(row.values[name])) for row in bars]
    return [100 * fmean(row.values[name]) for row in bars], [0 if math.isnan(half) else 100 * half for half in halves]


def _bars(
    axis: Axes,
    places: Sequence[float],
    bars: Sequence[RunRow],
    name: str,
    rows: Sequence[RunRow],
    width: float,
    label: str | None = None,
) -> None:
    means, halves = _spread(bars, name, rows)
    axis.bar(places, means, width, yerr=halves, capsize=2, label=label)
    for place, row in zip(places, bars, strict=True):
        axis.plot([place] * len(row.values[name]), [100 * v for v in row.values[name]], "k.", markersize=3)
