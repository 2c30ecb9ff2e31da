"""Concurrent writes of one collection, over an index that notes what it is asked for."""

import asyncio
import threading
from unittest.mock import Mock

import numpy as np
import pytest

from serving.collection import writes
from serving.collection.index import IndexProblem, Item
from serving.collection.writes import CommitQueue, Written
from serving.errors import Busy
from tests.conftest import PATIENCE_S


class Noted:
    """An Index in memory, whose changes are numbered. A commit waits for `go_on`; ids that begin with "bad" fail
    whatever they come in."""

    name, stored, encoder_id, rows_per_maintenance = "pictures", "pictures", "means", 1000

    def __init__(self):
        self.rows: dict[str, np.ndarray] = {}
        self.commits: list[tuple[str, list[str]]] = []
        self.go_on = threading.Event()
        self.go_on.set()
        self.begun = threading.Semaphore(0)  # a commit each
        self.tidied = 0
        self.last_change: str | None = None

    def known(self, ids):
        return {id for id in ids if id in self.rows}

    def upsert(self, items, vectors, thumbnails=None, allow_other_encoder=False, originals=None):
        self._begin("put", [item.id for item in items])
        self.rows |= {item.id: vector for item, vector in zip(items, vectors, strict=True)}

    def delete(self, ids):
        ids = list(ids)
        self._begin("delete", ids)
        return {id for id in ids if self.rows.pop(id, None) is not None}

    def maintain(self):
        self.tidied += 1
        return True

    def _begin(self, what, ids):
        self.begun.release()
        assert self.go_on.wait(PATIENCE_S)
        self.commits.append((what, ids))
        self.last_change = f"change {len(self.commits)}"
        if any(id.startswith("bad") for id in ids):
            raise IndexProblem("bad")


@pytest.fixture
def index():
    return Noted()


@pytest.fixture
def writer():
    made = CommitQueue(1000)
    yield made
    made.close()


def put(writer, index, *ids, value: float = 1.0):
    items = [Item(id, id, None, None, 0, 0, 0) for id in ids]
    return writer.upsert(index, items, np.full((len(ids), 2), value, np.float32), {})


async def begin(index, first) -> asyncio.Task:
    """Returns while the commit of the first runs, until `go_on` is set."""
    index.go_on.clear()
    task = asyncio.create_task(first)
    assert await asyncio.to_thread(index.begun.acquire, timeout=PATIENCE_S)
    return task


async def written_after_the_first(index, first, *others) -> list:
    """What each returns; the others came while the commit of the first ran."""
    tasks = [await begin(index, first)]
    tasks += [asyncio.create_task(other) for other in others]
    await asyncio.sleep(0)  # each has joined the queue
    index.go_on.set()
    return await asyncio.gather(*tasks, return_exceptions=True)


async def after_the_first(index, first, *others) -> list:
    """The answer of each, without its change."""
    written = await written_after_the_first(index, first, *others)
    return [one.answer if isinstance(one, Written) else one for one in written]


def test_each_write_returns_its_change_which_those_of_a_commit_share(writer, index):
    async def ask():
        return await written_after_the_first(
            index,
            put(writer, index, "a"),
            put(writer, index, "b"),
            put(writer, index, "c"),
            writer.delete(index, ["b"]),
            writer.delete(index, ["nothing"]),
        )

    shared = [["change 2"], ["change 2"], ["change 3"], []]
    assert [written.changes for written in asyncio.run(ask())] == [["change 1"], *shared]
    assert index.last_change is None, "other threads write through this object too"


def test_writes_that_arrive_during_a_commit_share_the_next_one(writer, index):
    async def ask():
        return await after_the_first(index, put(writer, index, "a"), *(put(writer, index, f"b{i}") for i in range(50)))

    assert asyncio.run(ask()) == [[True]] * 51
    assert index.commits == [("put", ["a"]), ("put", [f"b{i}" for i in range(50)])]


def test_each_write_returns_which_of_its_items_were_new(writer, index):
    async def ask():
        puts = [put(writer, index, "a", "b"), put(writer, index, "b", "c", "c")]
        return await after_the_first(index, put(writer, index, "a"), *puts)

    assert asyncio.run(ask()) == [[True], [False, True], [False, True, False]]


def test_writes_take_effect_in_order_of_arrival(writer, index):
    async def ask():
        return await after_the_first(
            index,
            put(writer, index, "a"),
            put(writer, index, "a", value=2),
            writer.delete(index, ["a", "b", "a"]),
            put(writer, index, "a", value=3),
            put(writer, index, "a", value=4),
            writer.delete(index, ["b"]),
        )

    assert asyncio.run(ask()) == [[True], [False], ["a"], [True], [False], []]
    assert index.rows["a"].tolist() == [4, 4]


def test_a_failing_write_fails_only_its_own_request(writer, index):
    async def ask():
        puts = [put(writer, index, "b"), put(writer, index, "bad"), put(writer, index, "c")]
        return await after_the_first(index, put(writer, index, "a"), *puts)

    first, b, bad, c = asyncio.run(ask())
    assert (first, b, c) == ([True], [True], [True])
    assert isinstance(bad, IndexProblem)
    assert set(index.rows) == {"a", "b", "c"}
    assert asyncio.run(put(writer, index, "d")).answer == [True]


def test_a_cancelled_write_is_not_written(writer, index):
    async def ask():
        first = await begin(index, put(writer, index, "a"))
        gone = asyncio.create_task(put(writer, index, "gone"))
        stays = asyncio.create_task(put(writer, index, "b"))
        await asyncio.sleep(0)  # both have joined the queue
        gone.cancel()
        index.go_on.set()
        await asyncio.gather(first, stays)

    asyncio.run(ask())
    assert set(index.rows) == {"a", "b"}


def test_writes_beyond_the_limit_are_refused_until_there_is_room(index):
    writer = CommitQueue(10)

    async def ask():
        with writer.room(8):
            with pytest.raises(Busy, match="10 rows to write, the most it takes at once") as refused:
                writer.room(3).__enter__()
            assert refused.value.headers == {"Retry-After": "1"}
        with writer.room(10):
            pass

    asyncio.run(ask())
    writer.close()


def test_maintenance_follows_many_commits_or_some_time_after_a_few(writer, index, monkeypatch):
    monkeypatch.setattr("serving.collection.writes.MAINTAIN_COMMITS", 5)

    async def many():
        for i in range(11):
            await put(writer, index, str(i))

    asyncio.run(many())
    writer._maintenance.submit(lambda: None).result()
    assert index.tidied == 2

    writer._queues.clear()
    timers = []

    async def few():
        loop = asyncio.get_running_loop()
        monkeypatch.setattr(loop, "call_later", lambda seconds, *call: timers.append((seconds, *call)) or Mock())
        await put(writer, index, "a")
        await put(writer, index, "b")
        monkeypatch.undo()

    asyncio.run(few())
    ((seconds, maintain, queue),) = timers  # one for the two of them
    assert seconds == writes.MAINTAIN_S
    maintain(queue)
    writer._maintenance.submit(lambda: None).result()
    assert index.tidied == 3


def test_maintenance_follows_many_rows(writer, index):
    index.rows_per_maintenance = 4

    async def ask():
        for rows in (["a", "b"], ["c"]):
            await put(writer, index, *rows)
        assert index.tidied == 0
        await put(writer, index, "d")

    asyncio.run(ask())
    writer._maintenance.submit(lambda: None).result()
    assert index.tidied == 1


def test_failed_maintenance_is_logged_and_writing_continues(writer, index, monkeypatch, caplog, wait_until):
    monkeypatch.setattr("serving.collection.writes.MAINTAIN_COMMITS", 1)

    def fail():
        raise IndexProblem("the disk is gone")

    index.maintain = fail
    assert asyncio.run(put(writer, index, "a")).answer == [True]
    words = ["maintenance of the collection pictures failed: the disk is gone"]
    wait_until(lambda: caplog.messages == words, "the failure is not logged")
    assert asyncio.run(put(writer, index, "b")).answer == [True]


def test_a_commit_has_a_limit_of_rows(writer, index, monkeypatch):
    monkeypatch.setattr("serving.collection.writes.MOST_ROWS", 3)

    async def ask():
        puts = [put(writer, index, f"b{i}", f"c{i}") for i in range(3)]
        big = put(writer, index, *"defgh")
        return await after_the_first(index, put(writer, index, "a"), *puts, big)

    asyncio.run(ask())
    assert [len(ids) for _, ids in index.commits] == [1, 2, 2, 2, 5]
