"""What was judged, to look at: who is taken for whom, pictures right and wrong, pictures and their nearest."""

from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

EXAMPLES = (4, 7)  # rows and columns of pictures right, and of pictures wrong
QUERIES, NEIGHBOURS = 6, 8
NAMED = 20  # classes, beyond which a confusion's axes carry no names
PRINTED = 12  # and beyond which its cells no numbers


@dataclass(frozen=True)
class Predictions:
    title: str
    pixels: np.ndarray
    """uint8 (Q, S, S, 3), or whatever gives pictures by index."""
    true: np.ndarray
    """(Q,) int64, index into `classes`."""
    predicted: np.ndarray
    classes: list[str]


@dataclass(frozen=True)
class Neighbours:
    title: str
    pixels: np.ndarray
    rows: list[tuple[int, list[int], list[float]]]
    """A picture, those nearest to it, and their cosines."""


def confusion(true: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """(classes, classes) int64: pictures of class i that were taken for class j."""
    return np.bincount(true * classes + predicted, minlength=classes**2).reshape(classes, classes)


def write_predictions(path: Path, all_of: list[Predictions]) -> None:
    """A block a classifier: its confusion in percent of the true class, examples of right and of wrong."""
    figure = plt.figure(figsize=(17, 5.6 * len(all_of)), layout="constrained")
    blocks = figure.subfigures(len(all_of), 1, squeeze=False)[:, 0]
    for block, one in zip(blocks, all_of, strict=True):
        block.suptitle(one.title, fontweight="bold")
        left, right, wrong = block.subfigures(1, 3, width_ratios=[1.1, 1, 1])
        _confusion(left.subplots(), one)
        is_right = one.true == one.predicted
        _examples(right, f"right: {is_right.sum():,} of {len(is_right):,}", one, np.flatnonzero(is_right))
        _examples(wrong, f"wrong: {(~is_right).sum():,} (true, taken for)", one, np.flatnonzero(~is_right))
    figure.savefig(path, dpi=90)
    plt.close(figure)


def write_neighbours(path: Path, all_of: list[Neighbours]) -> None:
    """A block an encoder: pictures (left) and those nearest to them."""
    height = 1.3 * max(len(one.rows) for one in all_of) + 0.5
    figure = plt.figure(figsize=(13, height * len(all_of)), layout="constrained")
    blocks = figure.subfigures(len(all_of), 1, squeeze=False)[:, 0]
    for block, one in zip(blocks, all_of, strict=True):
        block.suptitle(one.title, fontweight="bold")
        columns = 1 + max(len(places) for _, places, _ in one.rows)
        grid = block.subplots(len(one.rows), columns, squeeze=False)
        for axes, (query, places, cosines) in zip(grid, one.rows, strict=True):
            [axis.axis("off") for axis in axes]
            _show(axes[0], one.pixels[query])
            for axis, place, cosine in zip(axes[1:], places, cosines, strict=False):
                _show(axis, one.pixels[place], f"{cosine:.3f}")
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _confusion(axis, one: Predictions) -> None:
    counts = confusion(one.true, one.predicted, len(one.classes))
    shares = 100 * counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    axis.set(xlabel="taken for", ylabel="true", title="% of the true class")
    if len(one.classes) <= NAMED:
        places = range(len(one.classes))
        axis.set_xticks(places, one.classes, rotation=45, ha="right", rotation_mode="anchor", fontsize=8)
        axis.set_yticks(places, one.classes, fontsize=8)
    if len(one.classes) <= PRINTED:
        for i, j in np.ndindex(shares.shape):
            if shares[i, j] >= 0.5:
                colour = "white" if shares[i, j] > 60 else "black"
                axis.text(j, i, f"{shares[i, j]:.0f}", ha="center", va="center", fontsize=8, color=colour)


def _examples(figure, title: str, one: Predictions, places: np.ndarray) -> None:
    """Some of them, the same ones every time."""
    figure.suptitle(title, fontsize=10)
    rows, columns = EXAMPLES
    chosen = np.sort(np.random.default_rng(0).permutation(places)[: rows * columns])
    for i, axis in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        axis.axis("off")
        if i < len(chosen):
            true, predicted = one.true[chosen[i]], one.predicted[chosen[i]]
            names = dict.fromkeys((true, predicted))  # one where it is right
            _show(axis, one.pixels[chosen[i]], "\n".join(one.classes[label][:14] for label in names))


def _show(axis, picture, title: str = "") -> None:
    axis.imshow(picture)
    axis.set_title(title, fontsize=7)
