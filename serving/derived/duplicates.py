"""Near-duplicates of a collection: groups of pictures of which one can stay for all.

    twinview duplicates --collection pictures --threshold 0.95 --output groups.csv

A group is a picture that stays, and pictures with a cosine to it from the threshold on. The one with the most pixels
stays (then the largest file, then the lowest id), what is near it goes, and so on with the best that is left. So each
picture that goes has one like it that stays, and of those that stay no two are near-duplicates. Connected components
promise neither: at a threshold a little too low they chain half of a collection together by steps, and their ends are
not alike.

The same file twice is one item already, since an id is the hash of the content. What comes at a cosine of 1.0000 here
are other files that show the encoder the same: another format, another size, other metadata.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import islice, pairwise

import numpy as np

from serving.collection.index import Index, Item
from serving.derived.pairs import TooManyPairs, near_pairs
from serving.derived.task import DerivedProblem, Report, whole

LEAST = 0.9  # cosine of the pairs that are kept: any threshold from here on is answered from them at once


@dataclass(frozen=True)
class Group:
    keep: Item
    others: list[tuple[Item, float]]
    """With their cosine to it, nearest first."""


def compute(index: Index, report: Report, threshold: float) -> dict[str, np.ndarray]:
    """ids (n,) bytes, best picture first; a, b (p,) int32 numbers of ids, a < b, sorted; cosine (p,) float32."""
    columns, vectors = whole(index, report, ("id", "width", "height", "bytes"))
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
    """Of what `compute` gives: id that stays, and ids that go, the largest group first. `threshold`: at least the one
    it was computed with. known: the ids that there still are, where some are gone."""
    kept = arrays["cosine"] >= threshold
    if known is not None:
        there = np.array([id.decode() in known for id in arrays["ids"].tolist()], bool)
        kept &= there[arrays["a"]] & there[arrays["b"]]
    a, b = arrays["a"][kept], arrays["b"][kept]
    taken = np.zeros(len(arrays["ids"]), bool)
    edges = np.flatnonzero(np.diff(a, prepend=-1, append=-1))  # of the runs of one a
    found = []
    for start, end in pairwise(edges):
        if not taken[a[start]]:
            near = b[start:end]
            near = near[~taken[near]]
            taken[near] = True
            if len(near):
                found.append((a[start], near))
    found.sort(key=lambda one: -len(one[1]))
    ids = arrays["ids"]
    return [(ids[first].decode(), [id.decode() for id in ids[others]]) for first, others in found]


def looked_up(index: Index, groups: list[tuple[str, list[str]]], threshold: float) -> Iterator[Group]:
    """With the items as they are now: those that are gone, or are no longer near, are left out."""
    waiting = iter(groups)
    while some := list(islice(waiting, 256)):
        known = index.get_many(id for first, others in some for id in (first, *others))
        for first, others in some:
            if first not in known:
                continue
            keep, vector = known[first]
            near = [(known[id][0], min(1.0, float(known[id][1] @ vector))) for id in others if id in known]
            near = [(item, cosine) for item, cosine in near if cosine >= threshold - 1e-6]
            if near:
                yield Group(keep, sorted(near, key=lambda one: -one[1]))
