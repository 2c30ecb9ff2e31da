"""Which items of a collection to label first: `pick` with what a collection knows of its pictures."""

from dataclasses import dataclass

import numpy as np

from serving.collection.index import Index
from serving.collection.items import Item
from serving.curation.items import read_items, values_of
from serving.curation.pick import balanced, pick
from serving.protocol.filters import Filter
from serving.protocol.queries import PickMethod


@dataclass(frozen=True)
class PickedItems:
    items: list[Item]
    """The most useful first; all candidates if there are fewer than asked for."""
    candidates: int
    """Number of pictures to pick from."""
    found: int
    """Number of pictures that match the filter, the labelled ones included."""


def pick_items(
    index: Index,
    k: int,
    method: PickMethod = "central",
    where: Filter | None = None,
    balanced_by: str | None = None,
    labelled_too: bool = False,
    seed: int = 0,
) -> PickedItems:
    """Pick k items without a label; what is like a labelled one is not picked either.

    balanced_by   a metadata key, or label: as many of each of its values, as far as there are enough
    labelled_too  pick also items that have a label
    raises        NoValues, IndexProblem
    """
    items, vectors = read_items(index, where)
    labelled = np.array([item.label is not None and not labelled_too for item in items], bool)
    candidates = int((~labelled).sum())
    if not candidates:
        return PickedItems([], 0, len(items))
    if balanced_by is None:
        rows = pick(vectors, k, method, labelled, seed)
    else:
        rows = _of_each_value(values_of(items, balanced_by), vectors, k, method, labelled, seed)
    return PickedItems([items[row] for row in rows], candidates, len(items))


def _of_each_value(
    values: list[str | None], vectors: np.ndarray, k: int, method: PickMethod, labelled: np.ndarray, seed: int
) -> np.ndarray:
    """Returns rows: the first of each value, then the second of each."""
    names = sorted({value for value in values if value is not None})
    of = np.array([-1 if value is None else names.index(value) for value in values])
    groups = [np.flatnonzero(of == i) for i in range(len(names))]
    counts = balanced(k, np.array([(~labelled[rows]).sum() for rows in groups]))
    picked = [
        rows[pick(vectors[rows], int(count), method, labelled[rows], seed)]
        for rows, count in zip(groups, counts, strict=True)
    ]
    longest = max(len(rows) for rows in picked)
    return np.array([rows[i] for i in range(longest) for rows in picked if i < len(rows)], np.int64)
