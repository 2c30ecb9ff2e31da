"""Which items of a collection another one does not cover: `coverage.py` for what collections know of pictures."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from serving.collection.index import Index
from serving.collection.items import Item
from serving.curation.coverage import K, coverage
from serving.curation.items import read_items
from serving.protocol.filters import Filter


class NoneToCover(Exception):
    """There are no pictures to be covered."""


class TooFewToCover(Exception):
    """There are too few pictures to cover others. The message completes the sentence "<collection> ..."."""


@dataclass(frozen=True)
class UncoveredItems:
    rows: Sequence[tuple[Item, float, Item]]
    """All items that are not covered, each with its cosine to the nearest of the others, and that one; the farthest
    first."""
    compared: int
    """Number of items that could be covered."""
    by: int
    """Number of the others."""
    both: int
    """Number of items that are in both, and so covered."""
    share: float
    """Share of the items that is covered."""
    usual: float
    """Share of the others that the rest of them covers."""


def uncovered_items(index: Index, other: Index, where: Filter | None, by_where: Filter | None) -> UncoveredItems:
    """The items of `index` that those of `other` do not cover. Both have vectors of the same encoder.

    where     only these items
    by_where  only by these
    raises    NoneToCover, TooFewToCover, IndexProblem
    """
    items, vectors = _by_id(index, where)
    others, by = _by_id(other, by_where)
    if not items:
        raise NoneToCover
    if len(others) <= K:
        raise TooFewToCover(f"has {len(others)} of the {K + 1} pictures that are needed to cover others")
    found = coverage(vectors, by)
    missing = np.flatnonzero(~found.covered)
    missing = missing[np.argsort(found.cosine[missing], kind="stable")]
    rows = [(items[row], round(float(found.cosine[row]), 4), others[found.nearest[row]]) for row in missing.tolist()]
    both = len({item.id for item in items} & {item.id for item in others})
    return UncoveredItems(rows, len(items), len(others), both, 1 - len(rows) / len(items), found.usual)


def _by_id(index: Index, where: Filter | None) -> tuple[list[Item], np.ndarray]:
    """Returns the items with their vectors (n, d), in the order of their ids."""
    items, vectors = read_items(index, where)
    order = sorted(range(len(items)), key=lambda row: items[row].id)
    return [items[row] for row in order], vectors[order]
