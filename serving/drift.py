"""Follows whether the pictures that reach the service look like those of its collections.

Requests only leave their vectors here. `look`, which is called every few seconds, compares them off the event loop: the
last WINDOW pictures of a collection, once EVERY new ones have come and REST_S have passed since the last comparison.
The reference is sampled again when a quarter of the collection is new or deleted, and once a day.
"""

import logging
import threading
from collections import deque
from dataclasses import dataclass, field
from time import monotonic

import numpy as np

from serving.collection.index import Index
from serving.collection.items import unit
from serving.collection.problems import IndexProblem, WrongEncoder
from serving.curation.drift import REFERENCE, WINDOW, Comparison, Reference

log = logging.getLogger("twinview")

EVERY = 100  # new pictures between two comparisons
REST_S = 60.0  # at least, between two comparisons
LEAST = 500  # pictures of a collection; fewer say too little about what it is
CHANGED_SHARE = 0.25
OLDEST_S = 86_400.0  # age of a reference: its pictures may have been replaced by others
FOLLOWED = 32  # collections; of more, those that got no picture for longest are forgotten


@dataclass(frozen=True)
class Look:
    """What is known about the pictures that were sent for a collection."""

    collection: str
    model: str
    """Id of the encoder."""
    pictures: int
    """Number of pictures, at most WINDOW."""
    drift: Comparison | None
    """The newest comparison; None while there are fewer than WINDOW pictures, or LEAST in the collection."""


@dataclass
class _Followed:
    index: Index
    vectors: deque[np.ndarray] = field(default_factory=lambda: deque(maxlen=WINDOW))  # (d,), not yet of unit length
    new: int = 0
    """Pictures since the last comparison."""
    looked_at: float = -REST_S
    reference: Reference | None = None
    count: int = 0
    """Pictures of the collection when the reference was sampled."""
    sampled_at: float = 0.0
    drift: Comparison | None = None

    @property
    def is_due(self) -> bool:
        enough = len(self.vectors) == WINDOW and (self.drift is None or self.new >= EVERY)
        return enough and monotonic() >= self.looked_at + REST_S


class DriftWatch:
    """Thread-safe."""

    def __init__(self):
        self._followed: dict[tuple[str, str], _Followed] = {}  # (name in paths, encoder id); the latest to get one last
        self._lock, self._looking = threading.Lock(), threading.Lock()
        self._problem = ""

    def note(self, index: Index, vectors: np.ndarray) -> None:
        """Count pictures that a request has sent for a collection. vectors (n, d), of any length."""
        key = index.stored, index.encoder_id
        with self._lock:
            followed = self._followed[key] = self._followed.pop(key, None) or _Followed(index)
            followed.index = index  # it may have been renamed
            followed.vectors.extend(np.array(vectors, np.float32))  # a copy: a batch has other requests' vectors too
            followed.new += len(vectors)
            if len(self._followed) > FOLLOWED:
                del self._followed[next(iter(self._followed))]

    def forget(self, index: Index) -> None:
        """Forget the pictures of a collection, for all encoders."""
        with self._lock:
            for key in [key for key in self._followed if key[0] == index.stored]:
                del self._followed[key]

    def look(self) -> None:
        """Compare what is due. Blocks, and raises nothing: the caller has other work to do. A problem is logged once,
        and the next comparison tries again."""
        with self._looking:
            with self._lock:
                due = [followed for followed in self._followed.values() if followed.is_due]
            problem = ""
            for followed in due:
                try:
                    self._compare(followed)
                except WrongEncoder:  # another encoder has embedded the collection
                    followed.drift = None
                except IndexProblem as error:
                    problem = str(error)
                except Exception:
                    log.exception("new pictures were not compared with the collection %s", followed.index.name)
            if problem and problem != self._problem:
                log.warning("new pictures were not compared with their collection: %s", problem)
            if due:
                self._problem = problem

    def looks(self) -> list[Look]:
        with self._lock:
            return [_look(followed) for followed in self._followed.values()]

    def values(self) -> list[tuple[str, str, float, float, int]]:
        """Returns collection, model, distance, p-value and number of pictures of each comparison."""
        looks, drifts = self.looks(), list[tuple[str, str, float, float, int]]()
        for look in looks:
            if look.drift is not None:
                drifts.append((look.collection, look.model, look.drift.distance, look.drift.p_value, look.pictures))
        return drifts

    def look_of(self, index: Index) -> Look:
        with self._lock:
            return _look(self._followed.get((index.stored, index.encoder_id)) or _Followed(index))

    def _compare(self, followed: _Followed) -> None:
        """Raises IndexProblem."""
        with self._lock:
            vectors = unit(np.stack(followed.vectors))
            followed.new, followed.looked_at = 0, monotonic()
        count = followed.index.count()
        changed = abs(count - followed.count) > CHANGED_SHARE * followed.count
        if count < LEAST:
            followed.reference = None
        elif followed.reference is None or changed or followed.looked_at > followed.sampled_at + OLDEST_S:
            followed.reference = Reference(followed.index.sample(REFERENCE))
            followed.count, followed.sampled_at = count, followed.looked_at
        followed.drift = followed.reference.compare(vectors) if followed.reference else None


def _look(followed: _Followed) -> Look:
    index = followed.index
    return Look(index.name, index.encoder_id, len(followed.vectors), followed.drift)
