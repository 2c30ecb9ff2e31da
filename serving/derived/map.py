"""A map of a collection: a position in the plane for each picture, with similar pictures close together.

The positions are PaCMAP (Wang et al. 2021, arXiv:2012.04456) of the unit vectors: it preserves both neighbourhoods and
the overall arrangement, and takes minutes for 100,000 pictures on two cores. A new map starts from the positions of the
last one, so that pictures stay about where they were.

Each picture also has a group, by k-means of the vectors, which gives it a colour if there are no labels.

Up to PLACED pictures added after the map was computed get the mean position of their nearest neighbours on the map, and
the group of the nearest one. Others have no position until the next map.
"""

import contextlib
import io
import logging
import re
import warnings
from typing import Any

import numpy as np

from serving.collection.index import Index
from serving.derived.task import Derived, DerivedProblem, Report, Result, read_all

FEW = 64  # up to this number, the map is the two principal components, with one group
GROUPS = 12  # as many as there are distinguishable colours
SAMPLE = 10_000  # vectors to find the groups' centres
STEPS = 450  # iterations of PaCMAP
NEIGHBOURS = 8  # that determine a new picture's position
SEARCHED = 32  # neighbours to search, since some have no position
PLACED = 500  # new pictures; each costs a search
EMPTY = {
    "ids": np.zeros(0, "S1"),
    "x": np.zeros(0, np.float32),
    "y": np.zeros(0, np.float32),
    "group": np.zeros(0, np.int32),
    "label": np.zeros(0, np.int32),
    "labels": np.zeros(0, "U1"),
    "unplaced": 0,
}


def compute(index: Index, report: Report, seed: int) -> dict[str, np.ndarray]:
    """Returns ids (n,) bytes; x, y (n,) float32, -1 to 1, in the same scale; group (n,) int32, 0 the largest; labels;
    label (n,) int32, position in labels or -1."""
    columns, vectors = read_all(index, report, ("id", "label"))
    labels = sorted({label for label in columns["label"] if label is not None})
    number = {label: i for i, label in enumerate(labels)} | {None: -1}
    places = _normal(_pacmap(vectors, seed, _before(index, columns["id"]), report))
    return {
        "ids": np.array([id.encode() for id in columns["id"]], "S"),
        "x": np.ascontiguousarray(places[:, 0]),
        "y": np.ascontiguousarray(places[:, 1]),
        "group": _groups(vectors, seed, report),
        "label": np.array([number[label] for label in columns["label"]], np.int32),
        "labels": np.array(labels, "U"),
    }


def _pacmap(vectors: np.ndarray, seed: int, before: np.ndarray | None, report: Report) -> np.ndarray:
    """Returns positions (n, 2), the same for the same vectors, seed and `before`."""
    if len(vectors) <= FEW:
        return _components(vectors)
    report("preparing", 0.0)
    try:
        import pacmap  # takes 3 s
    except ImportError as error:
        raise DerivedProblem("a map needs the package pacmap, which is not installed: pip install pacmap") from error
    logging.getLogger(pacmap.__name__).setLevel(logging.ERROR)  # it warns about every setting
    reducer = pacmap.PaCMAP(n_neighbors=10, apply_pca=vectors.shape[1] > 100, random_state=seed, verbose=True)
    report("finding neighbours", 0.0)
    with contextlib.redirect_stdout(_Steps(report)):
        return reducer.fit_transform(vectors, init=before, save_pairs=False)


def _groups(vectors: np.ndarray, seed: int, report: Report) -> np.ndarray:
    """Returns the group (n,) int32 of each vector, 0 the largest."""
    if len(vectors) <= FEW:
        return np.zeros(len(vectors), np.int32)
    from scipy.cluster.vq import kmeans2  # PaCMAP needs this package too

    report("grouping", 0.0)
    rng = np.random.default_rng(seed)
    sample = vectors[rng.choice(len(vectors), min(len(vectors), SAMPLE), replace=False)]
    with warnings.catch_warnings(action="ignore"):  # about a group without members, which is harmless
        centres, _ = kmeans2(sample, GROUPS, iter=20, minit="++", rng=rng)
    found = (vectors @ centres.T - (centres**2).sum(axis=1) / 2).argmax(axis=1)
    order = np.argsort(-np.bincount(found, minlength=GROUPS), kind="stable")
    return np.argsort(order).astype(np.int32)[found]


def _components(vectors: np.ndarray) -> np.ndarray:
    places = np.zeros((len(vectors), 2), np.float32)
    if len(vectors) > 1:
        left, scale, _ = np.linalg.svd(vectors - vectors.mean(axis=0), full_matrices=False)
        some = (left * scale)[:, :2]
        places[:, : some.shape[1]] = some * np.sign(some[np.abs(some).argmax(axis=0), range(some.shape[1])])
    return places


def _normal(places: np.ndarray) -> np.ndarray:
    if not len(places):
        return np.zeros((0, 2), np.float32)
    places = places - (places.max(axis=0) + places.min(axis=0)) / 2
    return (places / max(np.abs(places).max(), np.finfo(np.float32).tiny)).astype(np.float32)


def _before(index: Index, ids: list[str]) -> np.ndarray | None:
    """Returns the positions (n, 2) on the last map, near the centre for ids it does not have; None if it has less than
    half of them."""
    kept = Derived(index, "map").result()
    if kept is None:
        return None
    places = dict(zip(kept.arrays["ids"].tolist(), zip(kept.arrays["x"], kept.arrays["y"], strict=True), strict=True))
    found = [places.get(id.encode()) for id in ids]
    if 2 * sum(place is not None for place in found) < len(ids) or not places:
        return None
    rng = np.random.default_rng(0)
    return np.array([place or rng.normal(0, 0.01, 2) for place in found], np.float32)


class _Steps(io.TextIOBase):
    """Receives what PaCMAP prints, and reports its steps."""

    def __init__(self, report: Report):
        self._report = report

    def write(self, text: str) -> int:
        if found := re.search(r"Iteration:\s*(\d+)", text):
            self._report("arranging", int(found[1]) / STEPS)
        return len(text)


def current(index: Index, result: Result) -> dict[str, Any]:
    """Returns the arrays of `compute` without deleted pictures and with new ones, and `unplaced`: the number of new
    pictures without a position."""
    arrays = dict(result.arrays)
    if not result.stale:
        return arrays | {"unplaced": 0}
    ids = [id.decode() for id in arrays["ids"].tolist()]
    known = index.ids()
    new = sorted(known - set(ids))
    stays = np.array([id in known for id in ids], bool)
    for name in ("ids", "x", "y", "group", "label"):
        arrays[name] = arrays[name][stays]
    found = index.get_many(new[:PLACED])
    hits = index.search_many(np.stack([v for _, v in found.values()]), SEARCHED) if found else []
    near = {
        id: [(one.id, max(cosine, 0.0) + 1e-6) for one, cosine in some] for id, some in zip(found, hits, strict=True)
    }
    columns = (result.arrays[name].tolist() for name in ("x", "y", "group"))
    known_places = dict(zip(ids, zip(*columns, strict=True), strict=True))
    places = []
    while placed := [id for id in near if any(one in known_places for one, _ in near[id])]:
        # Pictures whose neighbours are all new get a position after those have theirs.
        for id in placed:
            some = [(*known_places[one], weight) for one, weight in near[id] if one in known_places][:NEIGHBOURS]
            x, y, groups, weights = zip(*some, strict=True)
            place = (np.average(x, weights=weights), np.average(y, weights=weights), groups[0])
            places.append((id.encode(), *place, found[id][0].label))
        known_places |= {place[0].decode(): place[1:4] for place in places[-len(placed) :]}
        near = {id: some for id, some in near.items() if id not in known_places}
    if places:
        labels = arrays["labels"].tolist()
        labels += sorted({label for *_, label in places if label is not None} - set(labels))
        number = {label: i for i, label in enumerate(labels)} | {None: -1}
        arrays["ids"] = np.concatenate([arrays["ids"], np.array([place[0] for place in places], "S")])
        for axis, i in (("x", 1), ("y", 2)):
            arrays[axis] = np.concatenate([arrays[axis], np.array([place[i] for place in places], np.float32)])
        arrays["group"] = np.concatenate([arrays["group"], np.array([place[3] for place in places], np.int32)])
        arrays["label"] = np.concatenate([arrays["label"], np.array([number[p[4]] for p in places], np.int32)])
        arrays["labels"] = np.array(labels, "U")
    return arrays | {"unplaced": len(new) - len(places)}
