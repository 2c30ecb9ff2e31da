"""Figures of an evaluation: confusion matrices, pictures classified right and wrong, pictures and their nearest."""

from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure

from training.data.stream import StreamedRows
from training.evaluation import tiles

EXAMPLES = (4, 7)  # rows and columns of the pictures classified right, and of those classified wrong
QUERIES, NEIGHBOURS = 6, 8
NAMED = 20  # up to this many classes, a confusion matrix has their names
PRINTED = 12  # up to this many classes, its cells have numbers


@dataclass(frozen=True)
class Predictions:
    title: str
    pixels: np.ndarray | StreamedRows  # uint8 (Q, S, S, 3)
    true: np.ndarray
    """(Q,) int64, index into `classes`."""
    predicted: np.ndarray
    classes: list[str]


@dataclass(frozen=True)
class Neighbours:
    title: str
    pixels: np.ndarray | StreamedRows
    rows: list[tuple[int, list[int], list[float]]]
    """Row of a picture, rows of its nearest pictures, and their cosines."""


def confusion(true: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """(classes, classes) int64: pictures of class i predicted as class j."""
    return np.bincount(true * classes + predicted, minlength=classes**2).reshape(classes, classes)


def write_predictions(path: Path, results: list[Predictions]) -> None:
    """One block per classifier: confusion matrix in percent of the true class, examples right and wrong."""
    figure = plt.figure(figsize=(17, 5.6 * len(results)), layout="constrained")
    blocks = figure.subfigures(len(results), 1, squeeze=False)[:, 0]
    for block, result in zip(blocks, results, strict=True):
        block.suptitle(result.title, fontweight="bold")
        left, right, wrong = block.subfigures(1, 3, width_ratios=[1.1, 1, 1])
        _confusion(left.subplots(), result)
        is_right = result.true == result.predicted
        _examples(right, f"right: {is_right.sum():,} of {len(is_right):,}", result, np.flatnonzero(is_right))
        _examples(wrong, f"wrong: {(~is_right).sum():,} (true, predicted)", result, np.flatnonzero(~is_right))
    figure.savefig(path, dpi=90)
    plt.close(figure)


def write_neighbours(path: Path, results: list[Neighbours]) -> None:
    """One block per encoder: pictures (left) and those nearest to them."""
    height = 1.4 * max(len(result.rows) for result in results) + 0.5
    figure = plt.figure(figsize=(10.5, height * len(results)), layout="constrained")
    blocks = figure.subfigures(len(results), 1, squeeze=False)[:, 0]
    for block, result in zip(blocks, results, strict=True):
        block.suptitle(result.title, fontweight="bold")
        rows = [[result.pixels[place] for place in (query, *places)] for query, places, _ in result.rows]
        words = [["", *(f"{cosine:.3f}" for cosine in cosines)] for *_, cosines in result.rows]
        tiles.draw(block.subplots(), rows, words, (len(rows), max(map(len, rows))))
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _confusion(axis: Axes, result: Predictions) -> None:
    counts = confusion(result.true, result.predicted, len(result.classes))
    shares = 100 * counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    axis.set(xlabel="predicted", ylabel="true", title="% of the true class")
    if len(result.classes) <= NAMED:
        places = range(len(result.classes))
        axis.set_xticks(places, result.classes, rotation=45, ha="right", rotation_mode="anchor", fontsize=8)
        axis.set_yticks(places, result.classes, fontsize=8)
    if len(result.classes) <= PRINTED:
        for i, j in np.ndindex(shares.shape):
            if shares[i, j] >= 0.5:
                colour = "white" if shares[i, j] > 60 else "black"
                axis.text(j, i, f"{shares[i, j]:.0f}", ha="center", va="center", fontsize=8, color=colour)


def _examples(figure: SubFigure, title: str, result: Predictions, places: np.ndarray) -> None:
    """Draw a random choice of the pictures at `places`, the same every time."""
    figure.suptitle(title, fontsize=10)
    rows, columns = EXAMPLES
    chosen = np.sort(np.random.default_rng(0).permutation(places)[: rows * columns])
    pictures = [result.pixels[place] for place in chosen]
    words = []
    for place in chosen:
        names = dict.fromkeys((result.true[place], result.predicted[place]))  # one name if it is right
        words.append("\n".join(result.classes[label][:14] for label in names))
    in_rows = [slice(at, at + columns) for at in range(0, len(chosen), columns)]
    tiles.draw(figure.subplots(), [pictures[row] for row in in_rows], [words[row] for row in in_rows], EXAMPLES, 0.4, 7)
