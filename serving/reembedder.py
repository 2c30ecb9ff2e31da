"""Embeds collections again with another encoder, in the background, as somebody has asked for.

What is asked for is stored in the index, so any service that serves the encoder takes it up, also after a restart. The
pictures go through the same processes as those of requests, and take turns with them.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from serving.collection.index import Index
from serving.collection.items import Item
from serving.collection.problems import IndexProblem
from serving.collection.reembedding import Embedded, Reembedding, asked_for, given_up
from serving.collection.store import FileStore
from serving.errors import NotFound, Refusal
from serving.inference.served import ServedEncoder
from serving.library import Library

log = logging.getLogger("twinview")

LOOK_S = 5.0
AGAIN_S = 60.0  # after a failure
FOLLOWED_S = 3600.0  # after it is done: items that others still add with the old encoder are embedded too
THREADS = 2  # one embeds while the other reads
CLOSE_S = 10.0  # a few pictures are embedded by then


class Reembedder:
    """Works in a thread until it is closed."""

    def __init__(self, uri: str | Path, library: Callable[[], Library | None]):
        """uri      folder of the collections, or s3://bucket/prefix
        library  returns the service's, None while no encoder is loaded
        """
        self._library = library
        self._store = FileStore(uri)
        self._loop = asyncio.get_running_loop()
        self._failed: dict[tuple[str, str], float] = {}
        self._followed: dict[tuple[str, str], tuple] = {}
        """Versions of the other encoders' tables, when nothing was missing."""
        self._wake, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="reembedding", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """Look now: something has been asked for."""
        self._failed.clear()
        self._wake.set()

    def close(self) -> None:
        """Blocks until the pictures in progress are stored."""
        self._closing.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(CLOSE_S)

    def look(self) -> None:
        """Do what has been asked for, one after the other. Raises IndexProblem."""
        if (library := self._library()) is None:
            return
        for name, id in asked_for(self._store) if self._store.exists() else ():
            if self._closing.is_set():
                return
            try:
                index, encoder = library.successor(name, id)
            except NotFound:  # another service has this encoder
                continue
            work = Reembedding(index)
            try:
                due = self._is_due(work)
            except IndexProblem as problem:  # of this collection; others go on
                self._note_failure(index, problem)
                continue
            if due:
                with work.lease() as held:
                    if held:
                        self._work(work, library, encoder)

    def _is_due(self, work: Reembedding) -> bool:
        key = (work.index.name, work.index.encoder_id)
        if time.monotonic() - self._failed.get(key, -AGAIN_S) < AGAIN_S:
            return False
        progress = work.progress()
        if progress.state != "done" or time.time() - progress.at > FOLLOWED_S:
            return work.is_wanted()
        versions = work.source_versions()
        if self._followed.get(key) == versions:
            return False
        if work.missing(given_up(work.index)):
            return True
        self._followed[key] = versions
        return False

    def _work(self, work: Reembedding, library: Library, encoder: ServedEncoder) -> None:
        index = work.index
        log.info("embedding the collection %s again with %s", index.name, index.encoder_id)

        def embed(items: Sequence[Item], files: Sequence[bytes]) -> list[Embedded | str]:
            return asyncio.run_coroutine_threadsafe(library.embed_again(files, encoder), self._loop).result()

        try:
            read = partial(library.read_again, index, index.folders())
            progress = work.run(read, embed, THREADS, self._closing.is_set)
        except IndexProblem as problem:
            self._note_failure(index, problem)
        except Refusal as refusal:
            self._note_failure(index, refusal.detail)
        except Exception as error:
            self._note_failure(index, repr(error), exc_info=True)
        else:
            library.recount()  # it may be complete now
            done = f"{progress.done:,} of {progress.total:,}, skipped {progress.skipped:,}"
            log.info("embedding the collection %s again: %s (%s)", index.name, progress.state, done)

    def _note_failure(self, index: Index, why: object, exc_info: bool = False) -> None:
        """It is tried again after AGAIN_S."""
        self._failed[index.name, index.encoder_id] = time.monotonic()
        log.warning("embedding the collection %s again failed: %s", index.name, why, exc_info=exc_info)

    def _run(self) -> None:
        problem = ""
        while not self._closing.is_set():
            self._wake.clear()
            try:
                self.look()
                problem = ""
            except IndexProblem as error:
                if str(error) != problem:
                    log.warning("what is to be embedded again is not known: %s", error)
                problem = str(error)
            except Exception:
                log.exception("what is to be embedded again is not known")
            self._wake.wait(LOOK_S)
