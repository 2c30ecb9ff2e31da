"""The vectors of a table in this process's memory, following its commits.

LanceDB's row id says fragment and row, and a fragment's vectors never change: a commit adds fragments and strikes out
rows. So following reads the new fragments, and the list of row ids only when rows are gone. Rows, filters and vectors
are of one version, whatever others commit meanwhile.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence

import numpy as np

from serving.collection.nearest import Nearest

MOST_BYTES = 2**30  # of vectors; a larger table is searched where it lies
BATCH_BYTES = 2**25  # read at once: of what is smaller, the allocator keeps much when it is freed
REMEMBERED = 16  # filters


class Snapshot:
    """A table at one version. `reader` is LanceDB's handle of it."""

    def __init__(self, reader, version: int, nearest: Nearest):
        self.reader, self.version, self.nearest = reader, version, nearest
        self._among: OrderedDict[str, np.ndarray] = OrderedDict()

    def search(self, vectors: np.ndarray, k: int, where: str | None) -> list[tuple[list[int], list[float]]]:
        """Row ids and cosines of the k nearest to each of the unit `vectors` (n, d), nearest first."""
        found = self.nearest.search(vectors, k, None if where is None else self._kept(where))
        return [(keys.tolist(), cosines.tolist()) for keys, cosines in found]

    def rows(self, keys: Collection[int], columns: Sequence[str]) -> dict[int, dict]:
        """`columns` of the rows `keys`, by key."""
        if not keys:
            return {}
        rows = self.reader.take_row_ids(list(keys)).select([*columns, "_rowid"]).to_arrow()
        return {row.pop("_rowid"): row for row in rows.to_pylist()}

    def _kept(self, where: str) -> np.ndarray:
        """Positions of the rows that the filter keeps."""
        if (kept := self._among.get(where)) is None:
            kept = self.nearest.positions(_keys(self.reader.search().where(where).select(["_rowid"]).to_arrow()))
            self._among[where] = kept
            while len(self._among) > REMEMBERED:
                self._among.popitem(last=False)
        return kept


class Resident:
    """The newest snapshot of a table. Any thread may ask."""

    def __init__(self, dimension: int):
        self.dimension = dimension
        self.most = MOST_BYTES // (4 * dimension)  # rows
        self._lock = threading.Lock()
        self._last: Snapshot | None = None

    def snapshot(self, table, reopen: Callable) -> Snapshot | None:
        """Of LanceDB's `table` as it is now; None where it is too large. reopen() gives another handle of it."""
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
                self._last = None  # whose memory is free before the new one is filled
            self._last = Snapshot(reader, version, nearest or self._loaded(reader))
            return self._last

    def forget(self) -> None:
        with self._lock:
            self._last = None

    def _followed(self, nearest: Nearest, reader) -> Nearest | None:
        """`nearest` with what has changed since; None where most has, or where it is another table of that name."""
        if not nearest.count:
            return None
        fragment = int(nearest.keys[: nearest.n].max()) >> 32
        new = _vectors(reader).where(f"_rowid >= {(fragment + 1) << 32}").to_arrow()
        count = reader.count_rows() - len(new)
        if nearest.count != count:
            there = _keys(reader.search().select(["_rowid"]).to_arrow())
            nearest = nearest.removed(np.setdiff1d(nearest.keys[: nearest.n], there))
        # Compaction has rewritten most; or what was gone has been restored; or it is another table.
        if count <= len(new) or nearest.count != count or not self._is_same(nearest, reader):
            return None
        for batch in new.to_batches():
            nearest = nearest.added(_keys(batch), self._matrix(batch))
        return nearest

    def _is_same(self, nearest: Nearest, reader) -> bool:
        """Whether the last row that is known is what the table holds."""
        at = nearest.n - 1 if nearest.alive is None else int(np.flatnonzero(nearest.alive)[-1])
        rows = reader.take_row_ids([int(nearest.keys[at])]).select(["vector"]).to_arrow().to_batches()
        return len(rows) == 1 and np.array_equal(self._matrix(rows[0]), nearest.rows[at : at + 1])

    def _loaded(self, reader) -> Nearest:
        batches = _vectors(reader).to_batches(max(1, BATCH_BYTES // (4 * self.dimension)))
        parts = ((_keys(batch), self._matrix(batch)) for batch in batches)
        return Nearest.of(parts, self.dimension, self.most)

    def _matrix(self, batch) -> np.ndarray:
        return batch["vector"].flatten().to_numpy(zero_copy_only=False).reshape(-1, self.dimension)


def _vectors(reader):
    return reader.search().select(["_rowid", "vector"])


def _keys(rows) -> np.ndarray:
    return rows["_rowid"].to_numpy()
