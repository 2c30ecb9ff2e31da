"""Makes the results of small collections by itself, soon after a collection has changed: its duplicates and its map.

A result is computed if it is missing or out of date, once the collection has not changed from one look to the next and
no fill of it is running. Computing changes no table, so it does not cause another computation. A collection that keeps
changing is left alone, and one that changes now and then is computed at most every REST_S.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from export.artifact import ModelCard
from serving.collection.index import Index, names
from serving.collection.problems import IndexProblem
from serving.derived.task import KINDS, Derived

log = logging.getLogger("twinview")

MOST = 20_000  # pictures; larger collections are computed when somebody asks for it
LOOK_S = 5.0
REST_S = 60.0  # at least, from the end of a computation to the next one of the same result
SETTINGS: dict[str, dict[str, Any]] = {"duplicates": {"threshold": None}, "map": {"seed": 0}}  # of the first result


def is_automatic(count: int) -> bool:
    """Whether the results of a collection with so many pictures are made by themselves."""
    return 0 < count <= MOST


class AutomaticResults:
    """Looks at the collections every LOOK_S, in a thread, until it is closed."""

    def __init__(self, uri: str | Path, encoders: Callable[[], Sequence[ModelCard]]):
        """uri       folder of the collections, or s3://bucket/prefix
        encoders  returns the cards of the encoders that are served; the vectors of others are left alone
        """
        self._uri, self._encoders = uri, encoders
        self._seen: dict[tuple[str, str], int] = {}  # version of each table at the last look
        self._settled: dict[tuple[str, str, str], int] = {}  # version for which a result is there, or has been tried
        self._running: Derived | None = None
        self._problem = ""
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="automatic results", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._closing.set()

    def look(self) -> None:
        """Start at most one computation. Raises IndexProblem."""
        if self._running and self._running.progress().state == "computing":
            return
        self._running = None
        for card in self._encoders():
            for name in names(self._uri, card.id):
                index = Index(self._uri, card.id, card.dimension, name)
                version = index.version()
                has_changed = self._seen.get((name, card.id)) != version
                self._seen[name, card.id] = version
                if not has_changed and is_automatic(index.count()) and self._start_one(index, version):
                    return

    def _start_one(self, index: Index, version: int) -> bool:
        """Start the first computation that is due, and return whether there was one."""
        for kind in KINDS:
            if self._settled.get((index.name, index.encoder_id, kind)) == version:
                continue
            with index.filling() as free, index.store.lease("automatic") as alone:  # no other process starts it too
                if free and alone and self._is_due(derived := Derived(index, kind), version):
                    result = derived.result()
                    derived.start(**(result.settings if result else SETTINGS[kind]))
                    self._running = derived
                    return True
        return False

    def _is_due(self, derived: Derived, version: int) -> bool:
        progress = derived.progress()
        if progress.state == "computing" or time.time() - progress.at < REST_S:
            return False
        self._settled[derived.index.name, derived.index.encoder_id, derived.kind] = version
        result = derived.result(progress)
        return result is None or result.stale

    def _run(self) -> None:
        while not self._closing.wait(LOOK_S):
            problem = ""
            try:
                self.look()
            except IndexProblem as error:
                problem = str(error)
                if problem != self._problem:
                    log.warning("no results are made by themselves: %s", problem)
            except Exception:  # after any error the next look may succeed
                log.exception("looking for results to make failed")
            self._problem = problem
