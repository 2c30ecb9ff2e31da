"""Keeps the vectors of a table in this process's memory, up to date with its commits.

LanceDB's row id consists of fragment and row, and a fragment's vectors never change: a commit adds fragments and
deletes rows. So an update reads the new fragments, and the list of row ids only if rows were deleted. Rows, filters and
vectors are of one version, even if other processes commit meanwhile.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from serving.collection.nearest import Nearest

MOST_BYTES = 2**30  # most bytes of vectors; a larger table is searched by LanceDB
BATCH_BYTES = 2**25  # read at once; with smaller batches the allocator would keep much of the freed memory
REMEMBERED = 16  # filters whose rows are cached


class Snapshot:
    """A table at one version. `reader` is LanceDB's table object."""

    def __init__(self, reader: Any, version: int, nearest: Nearest):
        self.reader, self.version, self.nearest = reader, version, nearest
        self._among: OrderedDict[str, np.ndarray] = OrderedDict()

    def search(self, vectors: np.ndarray, k: int, where: str | None) -> list[tuple[list[int], list[float]]]:
        """Returns row ids and cosines of the k nearest to each of the unit `vectors` (n, d), nearest first."""
        found = self.nearest.search(vectors, k, None if where is None else self._kept(where))
        return [(keys.tolist(), cosines.tolist()) for keys, cosines in found]

    def rows(self, keys: Collection[int], columns: Sequence[str]) -> dict[int, dict]:
        """Returns these columns of the rows with these row ids, by row id."""
        if not keys:
            return {}
        rows = self.reader.take_row_ids(list(keys)).select([*columns, "_rowid"]).to_arrow()
        return {row.pop("_rowid"): row for row in rows.to_pylist()}

    def _kept(self, where: str) -> np.ndarray:
        """Returns the positions of the rows that match the filter."""
        if (kept := self._among.get(where)) is None:
            kept = self.nearest.positions(_keys(self.reader.search().where(where).select(["_rowid"]).to_arrow()))
            self._among[where] = kept
            while len(self._among) > REMEMBERED:
                self._among.popitem(last=False)
        return kept


class Resident:
    """The newest snapshot of a table. Thread-safe."""

    def __init__(self, dimension: int):
        self.dimension = dimension
        self.most = MOST_BYTES // (4 * dimension)  # rows
        self._lock = threading.Lock()
        self._last: Snapshot | None = None

    def snapshot(self, table: Any, reopen: Callable[[], Any]) -> Snapshot | None:
        """Returns the current snapshot of LanceDB's `table`; None if the table is too large. reopen() returns another
        object for the same table."""
        with self._lock:
            version = table.version
            if self._last is not None and version == self._last.version:
                return self._last
            reader = reopen()
            reader.checkout(version)
            if reader.count_rows() > self.most:
                self._last = None
                return None
            nearest = None
            if self._last is not None and (nearest := self._followed(self._last.nearest, reader)) is None:
                self._last = None  # frees its memory before the new one is filled
            self._last = Snapshot(reader, version, nearest or self._loaded(reader))
            return self._last

    def forget(self) -> None:
        with self._lock:
            self._last = None

    def _followed(self, nearest: Nearest, reader: Any) -> Nearest | None:
        """Returns `nearest` with the changes since; None if most rows changed, or if the table has been replaced."""
        if not nearest.count:
            return None
        fragment = int(nearest.keys[: nearest.n].max()) >> 32
        new = _vectors(reader).where(f"_rowid >= {(fragment + 1) << 32}").to_arrow()
        count = reader.count_rows() - len(new)
        if nearest.count != count:
            there = _keys(reader.search().select(["_rowid"]).to_arrow())
            nearest = nearest.removed(np.setdiff1d(nearest.keys[: nearest.n], there))
        # Compaction has rewritten most rows, or deleted rows have been restored, or the table has been replaced.
        if count <= len(new) or nearest.count != count or not self._is_same(nearest, reader):
            return None
        for batch in new.to_batches():
            nearest = nearest.added(_keys(batch), self._matrix(batch))
        return nearest

    def _is_same(self, nearest: Nearest, reader: Any) -> bool:
        """Whether the last row in memory is the one in the table."""
        at = nearest.n - 1 if nearest.alive is None else int(np.flatnonzero(nearest.alive)[-1])
        rows = reader.take_row_ids([int(nearest.keys[at])]).select(["vector"]).to_arrow().to_batches()
        return len(rows) == 1 and np.array_equal(self._matrix(rows[0]), nearest.rows[at : at + 1])

    def _loaded(self, reader: Any) -> Nearest:
        batches = _vectors(reader).to_batches(max(1, BATCH_BYTES // (4 * self.dimension)))
        parts = ((_keys(batch), self._matrix(batch)) for batch in batches)
        return Nearest.from_parts(parts, self.dimension, self.most)

    def _matrix(self, batch: Any) -> np.ndarray:
        return batch["vector"].flatten().to_numpy(zero_copy_only=False).reshape(-1, self.dimension)


def _vectors(reader: Any) -> Any:
    return reader.search().select(["_rowid", "vector"])


def _keys(rows: Any) -> np.ndarray:
    return rows["_rowid"].to_numpy()
