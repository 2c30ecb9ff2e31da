"""Searches a collection by a new encoder before every item is embedded again.

Items that only the old encoder has embedded are compared by estimates: a map, learnt from the items that both have
embedded, turns their old vectors into vectors as the new encoder would give. The old encoder itself is not needed.
The share of such items shrinks while the re-embedding runs, and at its end there are none.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from serving.collection.index import Index
from serving.collection.items import Item, unit
from serving.collection.problems import UnknownKey
from serving.collection.reembedding import Reembedding
from serving.collection.table import LanceTable
from serving.collection.vector_map import VectorMap
from serving.protocol.filters import Filter

log = logging.getLogger("twinview")

LEAST_PAIRS, LEAST_SHARE = 300, 0.01  # items of both tables, and their share of the old table; fewer estimate badly
MOST_PAIRS = 5000  # that a map is learnt from, which takes a second for 1,280 numbers
CHECK_S = 1.0  # between two checks how far the re-embedding is
CANDIDATES = 5  # times as many old vectors as are asked for are estimated
MOST_CANDIDATES = 1000  # unless more results are asked for

Rows = list[tuple[Item, float]]


@dataclass(frozen=True)
class OldVectors:
    """The table of the old encoder, and how its vectors are read."""

    table: LanceTable
    map: VectorMap
    count: int
    """Number of items in the new table when the map was learnt."""


class Upgrade:
    """The items that `index` has, and those of the old table that it is to have. Thread-safe. Raises IndexProblem."""

    def __init__(self, index: Index):
        self.index = index
        self._old: OldVectors | None = None
        self._check_at = 0.0
        self._lock = threading.Lock()

    def get_many(self, ids: Iterable[str]) -> dict[str, tuple[Item, np.ndarray]]:
        """As `Index.get_many`, with estimated vectors of the items that only the old table has."""
        ids = set(ids)
        found = self.index.get_many(ids)
        if (old := self.old_vectors()) is None or not (ids := ids - found.keys()):
            return found
        return self._estimated(old, ids) | found

    def search_many(self, directions: np.ndarray, k: int, where: Filter | None) -> tuple[list[Rows], bool]:
        """As `Index.search_many`, among the items of both tables; and whether some were compared by estimates.

        directions  (n, d), of the new encoder
        """
        if (old := self.old_vectors()) is None:
            return self.index.search_many(directions, k, where), False
        directions = unit(directions)
        more = max(k, min(CANDIDATES * k, MOST_CANDIDATES))
        candidates = self._known_keys(lambda: old.table.nearest(unit(old.map.directions(directions)), more, where))
        ids = {item.id for rows in candidates or () for item, _ in rows}
        # Before the new table is searched, so that an item which is embedded just now is in one of both.
        estimated = self._estimated(old, ids - self.index.known(ids))
        exact = self._known_keys(lambda: self.index.search_many(directions, k, where), candidates is None)
        nothing: list[Rows] = [[] for _ in directions]
        merged = []
        for direction, near, nearest in zip(directions, candidates or nothing, exact or nothing, strict=True):
            there = {item.id for item, _ in nearest}
            rest = [estimated[item.id] for item, _ in near if item.id in estimated and item.id not in there]
            if rest:
                items, vectors = zip(*rest, strict=True)
                cosines = old.map.cosines(np.stack(vectors) @ direction)
                nearest = [*nearest, *zip(items, cosines.tolist(), strict=True)]
            merged.append(sorted(nearest, key=lambda row: -row[1])[:k])
        return merged, True

    def _known_keys(self, search: Callable[[], list[Rows]], needed: bool = False) -> list[Rows] | None:
        """Returns None if this table has no key of the metadata that the filter names, but the other may. Raises
        UnknownKey if the key is `needed`."""
        try:
            with self.index._table.explained("read"):
                return search()
        except UnknownKey:
            if needed:
                raise
            return None

    def old_vectors(self) -> OldVectors | None:
        """Returns None when there is no unfinished re-embedding, and while too few items have been embedded again."""
        with self._lock:
            if time.monotonic() >= self._check_at:
                self._old = self._checked(self._old)
                self._check_at = time.monotonic() + CHECK_S
            return self._old

    def _checked(self, known: OldVectors | None) -> OldVectors | None:
        work = Reembedding(self.index)
        progress = work.progress()
        if progress.state in ("none", "done") or progress.done >= progress.total or not self.index._table.exists():
            return None
        with self.index._table.explained("read"):
            table = max(work._sources(), key=lambda table: table.count(), default=None)
            if table is None:
                return None
            count = self.index.count()
            if known is not None and known.table.name == table.name and count < 2 * known.count:
                return known
            if count < max(LEAST_PAIRS, LEAST_SHARE * table.count()):
                return None
            ids, new = self.index._table.sample(MOST_PAIRS)
            old = table.get(ids)
        both = [i for i, id in enumerate(ids) if id in old]
        if len(both) < LEAST_PAIRS:
            return None
        learnt = VectorMap.learn(np.stack([old[ids[i]][1] for i in both]), new[both])
        log.info("searching %s by vectors of %s, estimated from %d pairs", self.index.name, table.name, len(both))
        return OldVectors(table, learnt, count)

    def _estimated(self, old: OldVectors, ids: Iterable[str]) -> dict[str, tuple[Item, np.ndarray]]:
        """Returns items of the old table with estimated unit vectors (d,), by id."""
        with self.index._table.explained("read"):
            rows = old.table.get(ids)
        if not rows:
            return {}
        vectors = old.map(np.stack([vector for _, vector in rows.values()]))
        return {id: (item, vector) for (id, (item, _)), vector in zip(rows.items(), vectors, strict=True)}
