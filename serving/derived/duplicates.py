"""Near-duplicates of a collection: groups of pictures in which one picture can replace the others.

    twinview duplicates --collection pictures --threshold 0.95 --output groups.csv

A group is a picture to keep and the pictures whose cosine to it is at least the threshold. The picture with the most
pixels is kept (then the largest file, then the lowest id), those near it form its group, and so on with the rest. So
every picture of a group resembles the one that is kept, and no two kept pictures are near-duplicates. Connected
components guarantee neither: if the threshold is a little too low, they chain half of a collection together, and the
ends of a chain are not similar.

Copies of a file are one item already, since an id is the hash of the content. Pictures with a cosine of 1.0000 here are
different files that look the same to the encoder: another format, another size, other metadata.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import islice, pairwise

import numpy as np

from serving.collection.index import Index, Item
from serving.derived.pairs import TooManyPairs, near_pairs
from serving.derived.task import DerivedProblem, Report, read_all

THRESHOLD = 0.95  # cosine of near-duplicates, unless the user gives another
LEAST = 0.9  # cosine of the pairs that are stored: any higher threshold is answered from them without computing


@dataclass(frozen=True)
class DuplicateGroup:
    keep: Item
    others: list[tuple[Item, float]]
    """The other items with their cosine to `keep`, nearest first."""


def compute(index: Index, report: Report, threshold: float) -> dict[str, np.ndarray]:
    """Returns ids (n,) bytes, best picture first; pairs a, b (p,) int32, positions in ids, a < b, sorted; their cosine
    (p,) float32."""
    columns, vectors = read_all(index, report, ("id", "width", "height", "bytes"))
    ids = np.array([id.encode() for id in columns["id"]], "S")
    pixels = np.multiply(columns["width"], columns["height"], dtype=np.int64)
    order = np.lexsort((ids, -np.array(columns["bytes"], np.int64), -pixels))
    try:
        pairs = near_pairs(vectors, threshold, lambda share: report("comparing", share))
    except TooManyPairs as error:
        raise DerivedProblem(str(error)) from error
    rank = np.empty(len(order), np.int32)
    rank[order] = np.arange(len(order), dtype=np.int32)
    a, b = np.sort([rank[pairs.first], rank[pairs.second]], axis=0)
    sorted_ = np.lexsort((b, -pairs.cosine, a))
    return {"ids": ids[order], "a": a[sorted_], "b": b[sorted_], "cosine": pairs.cosine[sorted_]}


def group(
    arrays: dict[str, np.ndarray], threshold: float, known: Collection[str] | None = None
) -> list[tuple[str, list[str]]]:
    """Returns groups of ids (keep, others), the largest first, from the arrays of `compute`.

    threshold  not lower than the one of `compute`
    known      the ids that still exist, if some were deleted
    """
    ids, near = arrays["ids"], arrays["cosine"] >= threshold
    if known is not None:
        exists = np.array([id.decode() in known for id in ids.tolist()], bool)
        near &= exists[arrays["a"]] & exists[arrays["b"]]
    a, b = arrays["a"][near], arrays["b"][near]
    taken = np.zeros(len(ids), bool)
    edges = np.flatnonzero(np.diff(a, prepend=-1, append=-1))  # where a changes
    groups = []
    for start, end in pairwise(edges):
        if not taken[a[start]]:
            others = b[start:end]
            others = others[~taken[others]]
            taken[others] = True
            if len(others):
                groups.append((a[start], others))
    groups.sort(key=lambda group: -len(group[1]))
    return [(ids[keep].decode(), [id.decode() for id in ids[others]]) for keep, others in groups]


def looked_up(index: Index, groups: list[tuple[str, list[str]]], threshold: float) -> Iterator[DuplicateGroup]:
    """Yields the groups with their current items, without those that were deleted or are no longer near."""
    waiting = iter(groups)
    while batch := list(islice(waiting, 256)):
        known = index.get_many(id for first, others in batch for id in (first, *others))
        for first, others in batch:
            if first not in known:
                continue
            keep, vector = known[first]
            near = [(known[id][0], min(1.0, float(known[id][1] @ vector))) for id in others if id in known]
            near = [(item, cosine) for item, cosine in near if cosine >= threshold - 1e-6]
            if near:
                yield DuplicateGroup(keep, sorted(near, key=lambda entry: -entry[1]))
