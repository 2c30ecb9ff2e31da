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

import csv
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path

import numpy as np

from serving.derived import Derived, DerivedProblem, Report, Result, whole
from serving.index import Index, Item
from serving.near import TooManyPairs, near_pairs
from serving.place import Table

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


@dataclass(frozen=True, kw_only=True)
class DuplicatesSettings(Table):
    """List near-duplicates: which picture can stay for which others."""

    threshold: float = 0.95
    """The least cosine of two pictures that count as the same."""
    output: Path = Path("groups.csv")
    """A row a picture: group, whether it stays, cosine to the one that stays, and what is known of it."""


def run(settings: DuplicatesSettings) -> int:
    """How many could go. raises IndexProblem, DerivedProblem"""
    if not 0 < settings.threshold <= 1:
        raise DerivedProblem(f"--threshold {settings.threshold:g}: over 0 and at most 1")
    index = settings.one()
    result = _fresh(Derived(index, "duplicates"), settings.threshold)
    groups = group(result.arrays, settings.threshold)
    rows = [("group", "stays", "cosine", "id", "name", "label", "path", "width", "height", "bytes")]
    for number, found in enumerate(looked_up(index, groups, settings.threshold), 1):
        for item, cosine in [(found.keep, 1.0), *found.others]:
            stays = "yes" if item is found.keep else "no"
            facts = (item.id, item.name, item.label, item.path, item.width, item.height, item.bytes)
            rows.append((number, stays, f"{cosine:.4f}", *facts))
    try:
        settings.output.parent.mkdir(parents=True, exist_ok=True)
        with open(settings.output, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            csv.writer(file).writerows(rows)
    except OSError as error:
        raise DerivedProblem(f"--output: {settings.output} cannot be written: {error.strerror}") from error
    count = rows[-1][0] if len(rows) > 1 else 0
    extra = len(rows) - 1 - count
    print(
        f"{len(result.arrays['ids']):,} pictures of {index.name}: {count:,} groups from a cosine of "
        f"{settings.threshold:g} on, {extra:,} pictures could go; listed in {settings.output}"
    )
    return extra


def _fresh(derived: Derived, threshold: float) -> Result:
    """What is there already, or what is now computed."""
    kept = derived.result()
    if kept and not kept.stale and kept.settings["threshold"] <= threshold:
        return kept
    print(f"comparing {derived.index.count():,} pictures of {derived.index.name}", file=sys.stderr)
    return derived.compute(threshold=min(threshold, LEAST))
