"""Commits small writes of concurrent requests together: each commit costs some milliseconds of disk time, and leaves a
small file that every search has to read.

There is no timer: writes that arrive during a commit of their collection wait, and the next commit includes them all.
A request is answered when its write is durable. If a commit fails, its writes are tried one by one, so that only the
request with the invalid write gets the error.
"""

import asyncio
import copy
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from serving.collection.index import Index, IndexProblem, Item
from serving.limits import Gate

log = logging.getLogger("twinview")
T = TypeVar("T")

COMMITS_AT_ONCE = 4  # one per collection
MOST_ROWS = 4096  # in one commit, unless a single write has more
MAINTAIN_COMMITS = 64  # after this many small commits searches take half as long again
MAINTAIN_S = 60.0  # after the first commit since the last maintenance, even if few follow


@dataclass(frozen=True)
class _Upsert:
    items: Sequence[Item]
    vectors: np.ndarray
    """float32 (n, d)"""
    thumbnails: Mapping[str, bytes]
    originals: Mapping[str, bytes]

    def __len__(self) -> int:
        return len(self.items)


@dataclass(frozen=True)
class _Deletion:
    ids: Sequence[str]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class _Change:
    facts: Mapping[str, Mapping[str, Any]]

    def __len__(self) -> int:
        return len(self.facts)


Write = _Upsert | _Deletion | _Change


class Written(NamedTuple, Generic[T]):
    """What a write did."""

    answer: T
    changes: list[str]
    """Id of the change, which writes that shared a commit have together; empty if nothing was written."""


@dataclass
class _Queue:
    """The writes of one collection and encoder."""

    index: Index
    waiting: deque[tuple[Write, asyncio.Future]] = field(default_factory=deque)
    working: asyncio.Task | None = None
    commits: int = 0
    """Number since the last maintenance."""
    rows: int = 0
    """Number written since the last maintenance."""
    alarm: asyncio.TimerHandle | None = None


class CommitQueue:
    """Call all methods in the event loop's thread."""

    def __init__(self, rows_at_once: int):
        """rows_at_once  most rows that wait or are being written"""
        self._gate = Gate(rows_at_once, "rows to write")
        self._queues: dict[tuple[str, str], _Queue] = {}
        self._commits = ThreadPoolExecutor(COMMITS_AT_ONCE, "commits")
        self._maintenance = ThreadPoolExecutor(1, "maintenance")

    @contextmanager
    def room(self, rows: int) -> Iterator[None]:
        """Reserve room for rows to write; enter it before they are computed. Raises Busy."""
        with self._gate.admit(rows):
            yield

    async def upsert(
        self,
        index: Index,
        items: Sequence[Item],
        vectors: np.ndarray,
        thumbnails: Mapping[str, bytes],
        originals: Mapping[str, bytes] = {},
    ) -> Written[list[bool]]:
        """Returns for each item whether it is new; durable when this returns. If an id occurs twice, the last item is
        kept.

        vectors  (n, d), any length but 0
        raises   IndexProblem; then none of the items is written
        """
        return await self._enqueue(index, _Upsert(items, vectors, thumbnails, originals))

    async def delete(self, index: Index, ids: Sequence[str]) -> Written[list[str]]:
        """Returns those of `ids` that existed, each once; durable when this returns. Raises IndexProblem."""
        return await self._enqueue(index, _Deletion(ids))

    async def change(self, index: Index, facts: Mapping[str, Mapping[str, Any]]) -> Written[list[str]]:
        """Changes facts as `Index.change`. Returns the ids that existed; durable when this returns. Raises
        IndexProblem."""
        return await self._enqueue(index, _Change(facts))

    def close(self) -> None:
        for queue in self._queues.values():
            if queue.alarm:
                queue.alarm.cancel()
        self._commits.shutdown(wait=False)  # running commits finish
        self._maintenance.shutdown(wait=False, cancel_futures=True)

    async def _enqueue(self, index: Index, write: Write) -> Any:
        queue = self._queues.setdefault((index.stored, index.encoder_id), _Queue(index))
        done = asyncio.get_running_loop().create_future()
        queue.waiting.append((write, done))
        if queue.working is None:
            queue.working = asyncio.create_task(self._work(queue))
        return await done

    async def _work(self, queue: _Queue) -> None:
        """Commit until nothing waits."""
        loop, batch = asyncio.get_running_loop(), []
        try:
            while batch := _next(queue.waiting):
                answers = await loop.run_in_executor(self._commits, _commit, queue.index, [write for write, _ in batch])
                for (_, done), answer in zip(batch, answers, strict=True):
                    if done.done():  # its request was cancelled
                        continue
                    if isinstance(answer, Exception):
                        done.set_exception(answer)
                    else:
                        done.set_result(answer)
                self._count(queue, sum(len(write) for write, _ in batch))
        finally:
            queue.working = None
            for _, done in (*batch, *queue.waiting):  # without an answer yet, because the service stops
                done.cancel()

    def _count(self, queue: _Queue, rows: int) -> None:
        queue.commits += 1
        queue.rows += rows
        if queue.alarm is None:
            queue.alarm = asyncio.get_running_loop().call_later(MAINTAIN_S, self._maintain, queue)
        if queue.commits >= MAINTAIN_COMMITS or queue.rows >= queue.index.rows_per_maintenance:
            self._maintain(queue)

    def _maintain(self, queue: _Queue) -> None:
        if queue.alarm:
            queue.alarm.cancel()
        queue.alarm, queue.commits, queue.rows = None, 0, 0
        self._maintenance.submit(_maintain, queue.index)


def _next(waiting: deque[tuple[Write, asyncio.Future]]) -> list[tuple[Write, asyncio.Future]]:
    """Take the oldest writes that fit in one commit, skipping those whose request was cancelled."""
    batch, rows = [], 0
    while waiting and (not batch or rows + len(waiting[0][0]) <= MOST_ROWS):
        write, done = waiting.popleft()
        if not done.done():
            batch.append((write, done))
            rows += len(write)
    return batch


def _commit(index: Index, writes: list[Write]) -> list[Written | Exception]:
    """Commit in order, consecutive writes of one kind together. Returns the answer, or the error, of each."""
    answers: list[Written | Exception] = []
    index = copy.copy(index)  # whose last change is of this thread
    for kind, run in groupby(writes, type):
        group = list(run)
        together = TOGETHER[kind]
        try:
            answers += together(index, group)
        except Exception as error:
            answers += [error] if len(group) == 1 else [_alone(together, index, write) for write in group]
    return answers


def _alone(together: Callable[[Index, list], list[Written]], index: Index, write: Write) -> Written | Exception:
    try:
        return together(index, [write])[0]
    except Exception as error:  # any error must reach the request
        return error


def _changes(index: Index) -> list[str]:
    return [index.last_change] if index.last_change else []


def _upsert(index: Index, upserts: list[_Upsert]) -> list[Written[list[bool]]]:
    rows, thumbnails, originals = {}, {}, {}
    for upsert in upserts:
        rows |= {item.id: (item, vector) for item, vector in zip(upsert.items, upsert.vectors, strict=True)}
        thumbnails |= upsert.thumbnails
        originals |= upsert.originals
    seen = set(index.known(list(rows)))
    items, vectors = zip(*rows.values(), strict=True)
    index.upsert(items, np.stack(vectors), thumbnails, originals=originals)
    answers = []
    for upsert in upserts:
        answers.append([])
        for item in upsert.items:
            answers[-1].append(item.id not in seen)
            seen.add(item.id)
    return [Written(answer, _changes(index)) for answer in answers]


def _delete(index: Index, deletions: list[_Deletion]) -> list[Written[list[str]]]:
    left = index.delete(dict.fromkeys(id for deletion in deletions for id in deletion.ids))
    answers = []
    for deletion in deletions:
        gone = [id for id in dict.fromkeys(deletion.ids) if id in left]
        answers.append(Written(gone, _changes(index) if gone else []))
        left -= set(gone)
    return answers


def _change(index: Index, changes: list[_Change]) -> list[Written[list[str]]]:
    answers = []
    for change in changes:
        changed = index.change(change.facts)
        answers.append(Written([id for id in change.facts if id in changed], _changes(index)))
    return answers


TOGETHER: dict[type, Callable[[Index, list], list[Written]]] = {_Upsert: _upsert, _Deletion: _delete, _Change: _change}


def _maintain(index: Index) -> None:
    try:
        index.maintain()
    except IndexProblem as error:  # writes work without maintenance
        log.warning("maintenance of the collection %s failed: %s", index.name, error)
    except Exception:
        log.exception("maintenance of the collection %s failed", index.name)
