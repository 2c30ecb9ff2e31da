"""A map of a collection: a position in the plane for each picture, with similar pictures close together.

The positions are PaCMAP (Wang et al. 2021, arXiv:2012.04456) of the unit vectors: it preserves both neighbourhoods and
the overall arrangement, and takes minutes for 100,000 pictures on two cores. A new map starts from the positions of the
last one, so that pictures stay about where they were.

Each picture also has a group, by k-means of the vectors, which gives it a colour if there are no labels.

Up to PLACED pictures added after the map was computed get the mean position of their nearest neighbours on the map, and
the group of the nearest one. Further new pictures have no position until the next map.
"""

import atexit
import contextlib
import importlib.util
import io
import logging
import os
import re
import tempfile
import warnings
from pathlib import Path
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
EMPTY: dict[str, Any] = {
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
        _find_numba_a_place()
        import pacmap  # takes 3 s
    except ImportError as error:
        raise DerivedProblem("a map needs the package pacmap, which is not installed: pip install pacmap") from error
    logging.getLogger(pacmap.__name__).setLevel(logging.ERROR)  # it warns about every setting
    reducer = pacmap.PaCMAP(n_neighbors=10, apply_pca=vectors.shape[1] > 100, random_state=seed, verbose=True)
    report("finding neighbours", 0.0)
    with contextlib.redirect_stdout(_Steps(report)):
        return reducer.fit_transform(vectors, init=before, save_pairs=False)


def _find_numba_a_place() -> None:
    """Numba, which PaCMAP uses, refuses to work where it can store compiled functions neither next to a package nor in
    the home folder, as in a container that is read-only. Then they are stored in a temporary folder."""
    if "NUMBA_CACHE_DIR" in os.environ or (spec := importlib.util.find_spec("pacmap")) is None:
        return
    package = Path(spec.origin or "").parent / "__pycache__"
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "numba")
    if not (is_writable(package) or is_writable(home)):
        folder = tempfile.TemporaryDirectory(prefix="twinview-numba-")
        atexit.register(folder.cleanup)
        os.environ["NUMBA_CACHE_DIR"] = folder.name
        importlib.import_module("numba").config.reload_config()


def is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


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
    nearest = (vectors @ centres.T - (centres**2).sum(axis=1) / 2).argmax(axis=1)
    order = np.argsort(-np.bincount(nearest, minlength=GROUPS), kind="stable")
    return np.argsort(order).astype(np.int32)[nearest]


def _components(vectors: np.ndarray) -> np.ndarray:
    places = np.zeros((len(vectors), 2), np.float32)
    if len(vectors) > 1:
        left, scale, _ = np.linalg.svd(vectors - vectors.mean(axis=0), full_matrices=False)
        first = (left * scale)[:, :2]
        signs = np.sign(first[np.abs(first).argmax(axis=0), range(first.shape[1])])  # an axis has an arbitrary sign
        places[:, : first.shape[1]] = first * signs
    return places


def _normal(places: np.ndarray) -> np.ndarray:
    if not len(places):
        return np.zeros((0, 2), np.float32)
    places = places - (places.max(axis=0) + places.min(axis=0)) / 2
    return (places / max(np.abs(places).max(), np.finfo(np.float32).tiny)).astype(np.float32)


def _before(index: Index, ids: list[str]) -> np.ndarray | None:
    """Returns the positions (n, 2) on the last map; ids that are not on it get one near the centre. None if less than
    half of the ids are on it."""
    last = Derived(index, "map").result()
    if last is None:
        return None
    places = dict(zip(last.arrays["ids"].tolist(), zip(last.arrays["x"], last.arrays["y"], strict=True), strict=True))
    before = [places.get(id.encode()) for id in ids]
    if 2 * sum(place is not None for place in before) < len(ids) or not places:
        return None
    rng = np.random.default_rng(0)
    return np.array([place or rng.normal(0, 0.01, 2) for place in before], np.float32)


class _Steps(io.TextIOBase):
    """Receives what PaCMAP prints, and reports its steps."""

    def __init__(self, report: Report):
        self._report = report

    def write(self, text: str) -> int:
        if match := re.search(r"Iteration:\s*(\d+)", text):
            self._report("arranging", int(match[1]) / STEPS)
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
    added = index.get_many(new[:PLACED])
    columns = (result.arrays[name].tolist() for name in ("x", "y", "group"))
    known_places = dict(zip(ids, zip(*columns, strict=True), strict=True))
    places = _places_of_new(index, {id: vector for id, (_, vector) in added.items()}, known_places)
    if places:
        new_labels = [added[id][0].label for id in places]
        labels = arrays["labels"].tolist()
        labels += sorted({label for label in new_labels if label is not None} - set(labels))
        number = {label: i for i, label in enumerate(labels)} | {None: -1}
        x, y, groups = zip(*places.values(), strict=True)
        more = {
            "ids": np.array([id.encode() for id in places], "S"),
            "x": np.array(x, np.float32),
            "y": np.array(y, np.float32),
            "group": np.array(groups, np.int32),
            "label": np.array([number[label] for label in new_labels], np.int32),
        }
        arrays |= {name: np.concatenate([arrays[name], column]) for name, column in more.items()}
        arrays["labels"] = np.array(labels, "U")
    return arrays | {"unplaced": len(new) - len(places)}


Place = tuple[float, float, int]  # x, y, group


def _places_of_new(index: Index, vectors: dict[str, np.ndarray], places: dict[str, Place]) -> dict[str, Place]:
    """Returns the places of new pictures with these unit vectors (d,), by id, from the `places` of the others. Pictures
    without a placed neighbour are left out."""
    results = index.search_many(np.stack(list(vectors.values())), SEARCHED) if vectors else []
    neighbours = {
        id: [(item.id, max(cosine, 0.0) + 1e-6) for item, cosine in result]
        for id, result in zip(vectors, results, strict=True)
    }
    places, new = dict(places), {}
    while ready := [id for id in neighbours if any(other in places for other, _ in neighbours[id])]:
        batch: dict[str, Place] = {}
        for id in ready:
            weighted = [(*places[other], weight) for other, weight in neighbours[id] if other in places][:NEIGHBOURS]
            x, y, groups, weights = zip(*weighted, strict=True)
            batch[id] = (float(np.average(x, weights=weights)), float(np.average(y, weights=weights)), groups[0])
        # Pictures whose neighbours are all new get a place in the next round, when the neighbours have one.
        places |= batch
        new |= batch
        neighbours = {id: result for id, result in neighbours.items() if id not in batch}
    return new
