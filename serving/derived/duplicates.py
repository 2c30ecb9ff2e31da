"""Near-duplicates of a collection: groups of pictures in which one picture can replace the others.

    twinview duplicates --collection pictures --output groups.csv

A group is a picture to keep and the pictures whose cosine to it is at least the threshold. The picture with the most
pixels is kept (then the largest file, then the lowest id), those near it form its group, and so on with the rest. So
every picture of a group resembles the one that is kept, and no two kept pictures are near-duplicates. Connected
components guarantee neither: if the threshold is a little too low, they chain half of a collection together, and the
ends of a chain are not similar.

Copies of a file are one item already, since an id is the hash of the content. Exact copies here are different files
with the same pixels: in another format without loss, or with other metadata. They are told from near-duplicates by a
cosine of 1 and the same width and height. Unless the user gives a threshold, it comes from the collection: see
threshold.py.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import NamedTuple

import numpy as np

from serving.collection.index import Index, Item
from serving.derived.copies import compared_rows, first_identical, with_identical
from serving.derived.pairs import MOST_PAIRS, NearPairs, TooManyPairs, near_pairs
from serving.derived.task import Derived, DerivedProblem, Report, Result, read_all
from serving.derived.threshold import EXACT, own_threshold

LEAST = 0.9  # cosine of the pairs that are stored: any higher threshold is answered from them without computing
STORED_PAIRS = MOST_PAIRS // 10  # about, where more pairs than these have a cosine of LEAST
SAMPLE = 256  # pictures, to estimate the number of pairs
MOST_SUGGESTED = 0.1  # share of a collection: if more are near-duplicates, they are different pictures

Begin = Callable[[], object]


class IdGroup(NamedTuple):
    keep: str
    exact: list[str]
    near: list[str]


@dataclass(frozen=True)
class DuplicateGroup:
    keep: Item
    exact: list[Item]
    near: list[tuple[Item, float]]
    """The other items with their cosine to `keep`, nearest first."""


def compute(index: Index, report: Report, threshold: float | None = None) -> dict[str, np.ndarray]:
    """Compares all pictures.

    threshold  the lowest cosine that will be asked for; if it is None or higher, LEAST, or what the collection needs,
               unless too many pairs have that
    raises     DerivedProblem

    ids            (n,) bytes, best picture first
    a, b           (p,) int32, positions in ids, a < b, sorted
    cosine, exact  (p,) float32, bool: whether the pair are exact copies
    least          () lowest cosine of the pairs; above `own` if too many have that
    own            () the collection's own threshold
    """
    columns, vectors = read_all(index, report, ("id", "width", "height", "bytes"))
    ids = np.array([id.encode() for id in columns["id"]], "S")
    width, height, bytes_ = (np.array(columns[name], np.int64) for name in ("width", "height", "bytes"))
    order = np.lexsort((ids, -bytes_, -width * height))
    ids, width, height, vectors = ids[order], width[order], height[order], vectors[order]
    first = first_identical(vectors)
    compared = compared_rows(first)
    some = vectors[compared] if len(compared) < len(vectors) else vectors

    def pairs_from(cosine: float) -> NearPairs:
        pairs = near_pairs(some, cosine, lambda share: report("comparing", share))
        return with_identical(pairs, compared, first, cosine)

    try:
        own = own_threshold(vectors, lambda share: report("looking for copies", share))
        few = _least(some)
        least = min(own, few) if threshold is None else min(own, few, threshold)
        try:
            pairs = pairs_from(least)
        except TooManyPairs:
            least = max(own, few) if threshold is None else threshold
            pairs = pairs_from(least)
    except TooManyPairs as error:
        raise DerivedProblem(str(error)) from error
    a, b, cosine = pairs
    exact = (width[a] == width[b]) & (height[a] == height[b]) & (cosine >= 1 - EXACT)
    sorted_ = np.lexsort((b, -cosine, a))
    arrays = {"a": a, "b": b, "cosine": cosine, "exact": exact}
    sorted_arrays = {name: array[sorted_] for name, array in arrays.items()}
    return {"ids": ids, **sorted_arrays, "least": np.array(least), "own": np.array(own)}


def near_duplicates(index: Index, threshold: float | None = None, begin: Begin | None = None) -> tuple[Result, float]:
    """Returns a result with all near-duplicates of the collection, and the threshold: by default the collection's own.
    Without a result that is up to date, one is computed in this process and stored.

    threshold  lowest cosine, above 0 and at most 1
    begin      called before a computation
    raises     IndexProblem, DerivedProblem
    """
    derived = Derived(index, "duplicates")
    result = derived.result()
    if result is None or result.stale or (threshold is not None and result.arrays["least"] > threshold):
        if begin is not None:
            begin()
        result = derived.compute(threshold=threshold)
    least, own = float(result.arrays["least"]), float(result.arrays["own"])
    return result, max(least, own) if threshold is None else threshold


def _least(vectors: np.ndarray) -> float:
    """Returns a cosine of LEAST, or a higher one, that about STORED_PAIRS pairs have at most."""
    n = len(vectors)
    sample = np.random.default_rng(0).permutation(n)[:SAMPLE]
    cosines = (vectors[sample] @ vectors.T).ravel()
    wanted = int(2 * STORED_PAIRS / max(1, n) * len(sample)) + len(sample)  # each is its own neighbour too
    if wanted >= len(cosines):
        return LEAST
    return min(1 - EXACT, max(LEAST, float(np.partition(cosines, -wanted)[-wanted])))


def group(arrays: dict[str, np.ndarray], threshold: float, known: Collection[str] | None = None) -> list[IdGroup]:
    """Returns groups of ids, the largest first, from the arrays of `compute`.

    threshold  not lower than the one of `compute`
    known      the ids that still exist, if some were deleted
    """
    ids, near = arrays["ids"], arrays["cosine"] >= threshold
    if known is not None:
        exists = np.array([id.decode() in known for id in ids.tolist()], bool)
        near &= exists[arrays["a"]] & exists[arrays["b"]]
    a, b, exact = arrays["a"][near], arrays["b"][near], arrays["exact"][near]
    taken = np.zeros(len(ids), bool)
    edges = np.flatnonzero(np.diff(a, prepend=-1, append=-1))  # where a changes
    groups = []
    for start, end in pairwise(edges):
        if not taken[a[start]]:
            others, same = b[start:end], exact[start:end]
            free = ~taken[others]
            others, same = others[free], same[free]
            taken[others] = True
            if len(others):
                groups.append((a[start], others[same], others[~same]))
    groups.sort(key=lambda group: -len(group[1]) - len(group[2]))

    def texts(rows: np.ndarray) -> list[str]:
        return [id.decode() for id in ids[rows]]

    return [IdGroup(ids[keep].decode(), texts(exact), texts(near)) for keep, exact, near in groups]


def pairs_among(arrays: dict[str, np.ndarray], threshold: float, ids: Sequence[str]) -> NearPairs:
    """Returns the pairs from the arrays of `compute` of which both pictures are among `ids`, by their positions there.

    threshold  not lower than the one of `compute`
    """
    position = {id: row for row, id in enumerate(ids)}
    rows = np.array([position.get(id.decode(), -1) for id in arrays["ids"].tolist()], np.int32)
    a, b = rows[arrays["a"]], rows[arrays["b"]]
    here = (arrays["cosine"] >= threshold) & (a >= 0) & (b >= 0)
    a, b = a[here], b[here]
    return NearPairs(np.minimum(a, b), np.maximum(a, b), arrays["cosine"][here])


def is_too_much(groups: list[IdGroup], count: int) -> bool:
    """Whether so many of a collection's `count` pictures are near-duplicates that they should not be suggested to go.
    Exact copies do not count."""
    return sum(len(group.near) for group in groups) > MOST_SUGGESTED * count


def looked_up(index: Index, groups: list[IdGroup], threshold: float) -> Iterator[DuplicateGroup]:
    """Yields the groups with their current items, without those that were deleted or are no longer near."""
    waiting = iter(groups)
    while batch := list(islice(waiting, 256)):
        known = index.get_many(id for group in batch for id in (group.keep, *group.exact, *group.near))
        for group in batch:
            if group.keep not in known:
                continue
            keep, vector = known[group.keep]
            cosines = {id: min(1.0, float(known[id][1] @ vector)) for id in group.exact + group.near if id in known}
            exact = [id for id in group.exact if cosines.get(id, 0) >= 1 - 2 * EXACT]
            near = [id for id in cosines if id not in exact and cosines[id] >= threshold - 1e-6]
            if exact or near:
                near.sort(key=lambda id: -cosines[id])
                yield DuplicateGroup(keep, [known[id][0] for id in exact], [(known[id][0], cosines[id]) for id in near])
