"""How alike two random items of a collection are, to say what a cosine means there.

    INDEX/random-pairs/<collection>.<encoder id>.npz    cosines of random pairs, and some of the items they are from

With one encoder any two pictures have a cosine of 0.9, with another 0.1. A cosine's rank among random pairs means the
same with both: `closer_than` is the share of random pairs that are less alike.

The cosines are learnt by `Index.maintain`, which ends a filling, and by a thread after a search that found none or
outdated ones. They are outdated when a quarter of the collection is new, deleted, or has other vectors.
"""

import io
import logging
import math
import threading
import time
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields

import numpy as np

from serving.collection.problems import IndexProblem, TooFewItems
from serving.collection.table import LanceTable

log = logging.getLogger("twinview")

LEAST = 30  # items; fewer have too few pairs
SAMPLE = 2000  # items that the pairs are from
PAIRS = 100_000  # most pairs, so ranks have steps of 1e-5
WITNESSES = 64  # items that are compared later, to find out how many vectors have changed
CHANGED_SHARE = 0.25
ROUNDING = 1e-6  # two float32 cosines of the same vectors differ by less
CHECK_S = 1.0  # between two checks whether the cosines are outdated
DAMAGED = (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile)  # raised by numpy for a file of another format


@dataclass(frozen=True)
class RandomPairs:
    cosines: np.ndarray
    """(p,) float32, ascending"""
    count: int
    """Number of items in the collection when they were learnt."""
    ids: np.ndarray
    """(w,) text: the witnesses, at random from the collection"""
    vectors: np.ndarray
    """(w, d) float32: their unit vectors then"""

    @classmethod
    def among(cls, ids: Sequence[str], vectors: np.ndarray, count: int) -> "RandomPairs":
        """Returns all pairs of these items, at most PAIRS of them: then each item is in equally many pairs.

        ids, vectors  2 or more items and their unit vectors (n, d), at random from the collection
        count         number of items in the collection
        """
        n = len(ids)
        order = np.random.default_rng(0).permutation(n)
        vectors = np.asarray(vectors, np.float32)[order]
        if n * (n - 1) // 2 <= PAIRS:
            cosines = (vectors @ vectors.T)[np.triu_indices(n, 1)]
        else:
            steps = range(1, PAIRS // n + 1)  # less than n / 2, so that no pair occurs twice
            cosines = np.concatenate([np.einsum("ij,ij->i", vectors, np.roll(vectors, step, axis=0)) for step in steps])
        return cls(np.sort(cosines), count, np.array(ids, "U")[order[:WITNESSES]], vectors[:WITNESSES])

    def closer_than(self, cosine: float) -> float:
        """Returns the share of pairs with a lower cosine, 0 to 1, rounded down to 6 digits."""
        lower = int(np.searchsorted(self.cosines, np.float32(cosine - ROUNDING)))  # a float64 would copy the array
        return lower * 10**6 // len(self.cosines) / 10**6

    def cosine(self, closer_than: float) -> float:
        """Returns the lowest cosine of which `closer_than` is at least this share."""
        lower = math.ceil(closer_than * len(self.cosines) - 1e-6)
        return float(self.cosines[lower - 1]) + 2 * ROUNDING if lower else -1.0

    def to_bytes(self) -> bytes:
        buffer = io.BytesIO()
        np.savez(buffer, **vars(self))
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> "RandomPairs":
        """Raises one of DAMAGED."""
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            arrays = {field.name: file[field.name] for field in fields(cls)}
        return cls(**arrays | {"count": int(arrays["count"])})


class LearntPairs:
    """The random pairs of a table, None if it has fewer than LEAST items. Thread-safe. Raises IndexProblem."""

    def __init__(self, table: LanceTable, path: str):
        """path  of the file in the table's store"""
        self._table, self._path = table, path
        self._pairs: RandomPairs | None = None
        self._was_read = False
        self._version = -1  # of the table when the pairs were last found to be up to date
        self._check_at = 0.0
        self._lock, self._learning = threading.Lock(), threading.Lock()

    def known(self) -> RandomPairs | None:
        """Returns the pairs learnt last; None if there are none yet. They are checked, and learnt again, in a thread:
        a search never waits for it."""
        with self._lock:
            if not self._was_read:
                with self._table.explained("read"):
                    self._pairs, self._was_read = self._stored(), True
            if time.monotonic() >= self._check_at:
                self._check_at = math.inf
                threading.Thread(target=self._check, name="random pairs", daemon=True).start()
            return self._pairs

    def up_to_date(self) -> RandomPairs | None:
        """Returns pairs that are not outdated, and learns them first if necessary."""
        with self._learning, self._table.explained("read"):
            if not self._table.exists():
                return None
            version = self._table.version
            if version != self._version:
                pairs = self._stored()
                if self._is_outdated(pairs):
                    pairs = self._learn()
                with self._lock:
                    self._pairs, self._was_read, self._version = pairs, True, version
            return self._pairs

    def cosine(self, closer_than: float) -> float:
        """Returns the lowest cosine of which `closer_than` is at least this share. Raises TooFewItems."""
        if (pairs := self.up_to_date()) is None:
            name = self._table.name.partition(".")[0]
            raise TooFewItems(f"{name} has fewer than {LEAST} items, too few to rank a cosine; give a threshold")
        return pairs.cosine(closer_than)

    def _check(self) -> None:
        try:
            self.up_to_date()
        except Exception as error:  # searches work without ranks
            log.warning("the random pairs of %s could not be learnt: %s", self._table.name, error)
        finally:
            self._check_at = time.monotonic() + CHECK_S

    def _stored(self) -> RandomPairs | None:
        if self._table.count() < LEAST or (data := self._table.store.read(self._path)) is None:
            return None
        with suppress(*DAMAGED):
            return RandomPairs.from_bytes(data)

    def _is_outdated(self, pairs: RandomPairs | None) -> bool:
        count = self._table.count()
        if pairs is None:
            return count >= LEAST
        if count > (1 + CHANGED_SHARE) * pairs.count:
            return True
        now = self._table.get(pairs.ids.tolist())
        witnesses = zip(pairs.ids.tolist(), pairs.vectors, strict=True)
        same = sum(id in now and np.array_equal(now[id][1], vector) for id, vector in witnesses)
        return same < (1 - CHANGED_SHARE) * len(pairs.ids)

    def _learn(self) -> RandomPairs | None:
        ids, vectors = self._table.sample(SAMPLE)
        if len(ids) < LEAST:  # others have just been deleted
            return None
        pairs = RandomPairs.among(ids, vectors, self._table.count())
        try:
            self._table.store.write(self._path, pairs.to_bytes())
        except IndexProblem as problem:  # the index may be read-only for this process
            log.warning("the random pairs of %s were not stored: %s", self._table.name, problem)
        return pairs
