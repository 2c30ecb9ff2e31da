"""Which items of a collection are odd: `odd.py` and `broken.py` with what a collection knows of its pictures."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np

from export.artifact import UnreadableImage, read_image
from serving.collection.index import Index
from serving.collection.items import Item
from serving.curation.broken import Defect, defect
from serving.curation.items import read_items
from serving.curation.odd import LEAST, label_doubts, outlier_factors
from serving.limits import cores
from serving.protocol.filters import Filter
from serving.protocol.queries import OddKind


class CannotCompare(Exception):
    """The pictures cannot be compared. The message completes the sentence "<collection> ..."."""


@dataclass(frozen=True)
class OddItems:
    rows: Sequence[tuple[Item, tuple[str | float, ...]]]
    """The most odd items first, each with what is odd about it."""
    odd: int
    """Number of odd pictures; `rows` are the first of them."""
    compared: int
    """Number of pictures that were looked at."""
    left_out: int
    """Number of pictures that could not be looked at: without a label, or without a thumbnail."""


def outliers(index: Index, k: int, where: Filter | None = None) -> OddItems:
    """The k items with the largest outlier factors, with these. Raises CannotCompare, IndexProblem."""
    items, vectors = read_items(index, where)
    if len(items) < LEAST:
        raise CannotCompare(f"has {len(items)} of the {LEAST} pictures that are needed to find outliers")
    factors = outlier_factors(vectors)
    first = np.argsort(-factors, kind="stable")[:k]
    return OddItems([(items[row], (_rounded(factors[row]),)) for row in first], len(items), len(items), 0)


def doubtful_labels(index: Index, k: int, where: Filter | None = None) -> OddItems:
    """The k items whose neighbours speak most for another label than theirs, with that label and the score. Raises
    CannotCompare, IndexProblem."""
    items, vectors = read_items(index, where)
    rows = np.array([row for row, item in enumerate(items) if item.label is not None], np.int64)
    if len(rows) < LEAST:
        raise CannotCompare(f"has {len(rows)} of the {LEAST} pictures with a label that are needed to compare labels")
    labels, numbers = np.unique([str(items[row].label) for row in rows], return_inverse=True)
    if len(labels) < 2:
        raise CannotCompare(f"has no label but {labels[0]}, and at least two are needed to compare labels")
    suggested, score = label_doubts(vectors[rows], numbers)
    odd = np.flatnonzero(suggested != numbers)
    first = odd[np.argsort(-score[odd], kind="stable")][:k]
    listed = [(items[rows[i]], (str(labels[suggested[i]]), _rounded(score[i]))) for i in first]
    return OddItems(listed, len(odd), len(rows), len(items) - len(rows))


def broken(index: Index, k: int, where: Filter | None = None) -> OddItems:
    """The k items with the worst defects, with the defect's name and the measured value. Raises CannotCompare,
    IndexProblem."""
    found: list[tuple[Item, Defect]] = []
    compared = left_out = 0
    with ThreadPoolExecutor(cores()) as pool:
        for items, _ in index.scan(where):
            for item, (seen, problem) in zip(items, pool.map(partial(_look, index), items), strict=True):
                compared, left_out = compared + seen, left_out + (not seen)
                if problem:
                    found.append((item, problem))
    if not compared:
        raise CannotCompare("has no thumbnail that can be read, and broken pictures are found by thumbnails")
    found.sort(key=lambda one: -one[1].severity)
    rows = [(item, (problem.name, _rounded(problem.value))) for item, problem in found[:k]]
    return OddItems(rows, len(found), compared, left_out)


def _look(index: Index, item: Item) -> tuple[bool, Defect | None]:
    """Returns whether the item has a thumbnail that can be read, and the defect that it shows."""
    data = index.read_thumbnail(item.id)
    if data is None:
        return False, None
    try:
        return True, defect(read_image(data))
    except UnreadableImage:
        return False, None


def _rounded(value: float) -> float:
    return round(float(value), 4)


FINDERS: dict[OddKind, Callable[[Index, int, Filter | None], OddItems]] = {
    "outliers": outliers,
    "labels": doubtful_labels,
    "broken": broken,
}
