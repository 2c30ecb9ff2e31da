"""Takes a collection over to another encoder: embeds its items again, from their originals.

    INDEX/reembedding/<name>.<encoder id>/order.json      what was asked for; written by whoever asks
    INDEX/reembedding/<name>.<encoder id>/progress.json   written by the one process that works on it
    INDEX/reembedding/<name>.<encoder id>/skipped.json    ids of the items that could not be embedded

It is complete when each item of the other encoders' tables is in the new one, by its id. Items are written, changed and
deleted meanwhile. So after rows are written, their items are looked up again in the table that they came from: if one
has changed, its row is deleted and made again.
"""

import json
import secrets
import threading
import time
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np

from serving.collection.index import Index
from serving.collection.items import Item
from serving.collection.lease import Lease
from serving.collection.names import names_of
from serving.collection.problems import BadItem, IndexProblem
from serving.collection.store import FileStore
from serving.collection.table import LanceTable
from serving.protocol.replies import ReembeddingState, Skipped

FOLDER = "reembedding"
ROWS_TOGETHER = 512  # in one commit
FILES_TOGETHER = 8
BYTES_TOGETHER = 2**25  # of files; one alone may have more
NAMED = 20  # skipped items that the progress names
REPORT_S = 2.0
SILENT_S = 60.0  # without a report for this long, the process that worked on it has ended
NO_ORIGINAL = "has no original that can be read here, or it has changed"


class Embedded(NamedTuple):
    """What a picture's file has become."""

    vector: np.ndarray  # (d,)
    thumbnail: bytes
    width: int
    height: int
    bytes: int


Read = Callable[[Item], bytes | str]
"""Returns the file of an item's picture, or the reason why there is none. Called from several threads."""
Embed = Callable[[Sequence[Item], Sequence[bytes]], Sequence[Embedded | str]]
"""Embeds files of items, or says for each why not. Called from several threads."""


@dataclass(frozen=True)
class Order:
    id: str
    wanted: bool = True
    """False after it was cancelled."""
    without_skipped: bool = False
    """Whether it counts as complete without the items that cannot be embedded."""


@dataclass(frozen=True)
class Progress:
    state: ReembeddingState = "none"
    done: int = 0
    """Items that are in the new table, of those in the others."""
    total: int = 0
    skipped: int = 0
    first_skipped: tuple[Skipped, ...] = ()
    problem: str | None = None
    order: str = ""
    at: float = 0.0
    """Time of the last report, Unix seconds."""

    @property
    def missing(self) -> int:
        """Number of items that are still to be embedded."""
        return 0 if self.state in ("none", "done") else max(0, self.total - self.done)


class Stopped(Exception):
    """The work is to end: it was cancelled, or this process ends."""


class Reembedding:
    """The work of taking a collection over to the encoder of `index`. Raises IndexProblem."""

    def __init__(self, index: Index):
        self.index = index
        self._folder = f"{FOLDER}/{index.stored}.{index.encoder_id}"
        self.now = Progress()
        """How far this object has come."""
        self.skipped: dict[str, Skipped] = {}
        """By id, by the last `run` of this object."""
        self._whole = index

    # Asking

    def progress(self) -> Progress:
        order, now = self._order(), self._reported()
        if order is None:
            return Progress()
        if now.order != order.id:
            now = Progress("waiting", now.done, now.total, order=order.id)
        elif now.state == "running" and time.time() - now.at > SILENT_S:
            now = replace(now, state="waiting")
        return replace(now, state="stopped") if not order.wanted and _is_open(now) else now

    def start(self, without_skipped: bool = False) -> Progress:
        """Ask for it. It goes on if it is running already."""
        order, now = self._order(), self.progress()
        if order is None or not _is_open(now) or (without_skipped and not order.without_skipped):
            self._write("order", asdict(Order(secrets.token_hex(8), without_skipped=without_skipped)))
        return self.progress()

    def cancel(self) -> Progress:
        """What is embedded by then stays; `start` goes on from there."""
        order = self._order()
        if order is not None and _is_open(self.progress()):
            self._write("order", asdict(replace(order, wanted=False)))
        return self.progress()

    def take_back(self) -> None:
        """Note that what was embedded is being undone: it is then as if it had been stopped, and not complete."""
        self._write("order", asdict(Order(secrets.token_hex(8), wanted=False)))

    def was_taken_back(self) -> bool:
        """Whether it was undone, or stopped before it was complete."""
        return self.progress().state == "stopped"

    def is_wanted(self) -> bool:
        """Whether there is something to do."""
        return _is_open(self.progress())

    def is_done(self) -> bool:
        return self.progress().state == "done"

    # Working

    def lease(self) -> AbstractContextManager[Lease]:
        """True for the one process that may `run` it."""
        return self.index.store.lease(f"reembed.{self.index.stored}.{self.index.encoder_id}")

    def run(
        self,
        read: Read,
        embed: Embed,
        threads: int,
        stopping: Callable[[], bool] = lambda: False,
        files: int | None = None,
        watch: Callable[[Progress], object] = lambda progress: None,
    ) -> Progress:
        """Embed what is missing, and return how that ended. The caller has the lease. What is embedded is stored when
        this returns or raises, also after Ctrl-C. `skipped` then has all items that were skipped.

        threads   that read and embed
        stopping  whether to return because this process ends
        files     that a thread embeds together
        watch     called with the progress
        """
        skipped = self.skipped = {}
        self.now, self._files, self._watch = Progress("running"), files or FILES_TOGETHER, watch
        interrupted = self._interrupted = threading.Event()

        def ends() -> bool:
            return stopping() or interrupted.is_set()

        order = self._order()
        follows = order is None or self.is_done()
        try:
            with (
                self.index.filling(),
                self.index._table.explained("written"),
                self.index.one_change("follow" if follows else "reembed", None if follows else order.id) as self._whole,
            ):
                self.index.create(allow_other_encoder=True)
                with ThreadPoolExecutor(threads, "reembedding") as pool:
                    self._take_over_all(pool, partial(self._embedded, read, embed, ends), skipped, ends)
                self.index.maintain()
            return self.finish(skipped.values())
        except Stopped:
            if self._order() is not None:  # the collection was not deleted
                self._report(skipped, replace(self.now, state="waiting"))
            return self.progress()
        except Exception as error:
            if self._order() is None:  # the collection was deleted in the middle of a write
                return Progress()
            with suppress(IndexProblem):  # a full disk has no room for this either: it will be taken up again
                reason = str(error) if isinstance(error, IndexProblem) else "it failed; the service's log says why"
                self._report(skipped, replace(self.now, state="failed", problem=reason))
            raise

    def finish(self, skipped: Collection[Skipped]) -> Progress:
        """Note how it ended: complete, or without items that were skipped. The caller has the lease."""
        order = self._order() or Order(secrets.token_hex(8))
        self._write("order", asdict(order))
        self._write("skipped", [one.id for one in skipped])
        state: ReembeddingState = "done" if order.without_skipped or not skipped else "incomplete"
        self._report({one.id: one for one in skipped}, replace(self.now, state=state))
        return self.progress()

    def source_versions(self) -> tuple[tuple[str, int], ...]:
        """Returns the other encoders' tables with their versions."""
        with self.index._table.explained("read"):
            return tuple((table.name, table.version) for table in self._sources())

    def _sources(self) -> list[LanceTable]:
        return [table for table in self.index._all_tables() if table.name != self.index._table.name]

    def missing(self, apart_from: Collection[str] = ()) -> list[tuple[LanceTable, list[str]]]:
        """Returns ids of items that only other encoders' tables have, by table, the fullest table first. They are in an
        order that has nothing to do with the pictures: those that are done first stand for all, for upgrade.py."""
        with self.index._table.explained("read"):
            known = self.index._table.ids() if self.index._table.exists() else set()
            everything: set[str] = set()
            found = []
            for table in sorted(self._sources(), key=lambda table: table.count(), reverse=True):
                ids = table.ids()
                found.append((table, sorted(ids - everything - known, key=_shuffled)))
                everything |= ids
            left = sum(len(ids) for _, ids in found)
            self.now = replace(self.now, total=len(everything), done=len(everything) - left)
            return _apart_from(apart_from, found)

    def _take_over_all(
        self, pool: ThreadPoolExecutor, embed: Callable, skipped: dict[str, Skipped], stopping: Callable[[], bool]
    ) -> None:
        rows = 0
        while missing := self._missing(skipped):  # again, for those that were written meanwhile
            for table, ids in missing:
                for at in range(0, len(ids), ROWS_TOGETHER):
                    self._check(stopping)
                    self._report(skipped, self.now)
                    rows += self._take_over(table, ids[at : at + ROWS_TOGETHER], pool, embed, skipped)
                    if rows >= self.index.rows_per_maintenance:
                        self.index.maintain()
                        rows = 0

    def _missing(self, skipped: dict[str, Skipped]) -> list[tuple[LanceTable, list[str]]]:
        """Returns `missing` apart from `skipped`, after taking those from it that have been deleted or added since."""
        missing = self.missing()
        left = {id for _, ids in missing for id in ids}
        for id in skipped.keys() - left:
            del skipped[id]
        return _apart_from(skipped, missing)

    def _take_over(
        self,
        table: LanceTable,
        ids: Sequence[str],
        pool: ThreadPoolExecutor,
        embed: Callable,
        skipped: dict[str, Skipped],
    ) -> int:
        """Returns the number of rows that were written."""
        checksums = table.checksums(ids)
        items = [item for item, _ in table.get(checksums).values()]
        rows: dict[str, tuple[Item, Embedded]] = {}
        parts = [items[at : at + self._files] for at in range(0, len(items), self._files)]
        stopped: BaseException | None = None
        reported = time.monotonic()
        work = [pool.submit(embed, part) for part in parts]
        for part, future in zip(parts, work, strict=True):
            try:
                answers = future.result()
            except (Exception, KeyboardInterrupt) as error:  # what the others have embedded is stored first
                stopped = stopped or error
                self._interrupted.set()
                continue
            for item, answer in zip(part, answers, strict=True):
                if isinstance(answer, str):
                    skipped[item.id] = Skipped(item.id, item.name, answer)
                else:
                    rows[item.id] = (item, answer)
            self.now = replace(self.now, done=self.now.done + sum(not isinstance(one, str) for one in answers))
            self._watch(replace(self.now, skipped=len(skipped)))
            if time.monotonic() - reported > REPORT_S:
                self._report(skipped, self.now)
                reported = time.monotonic()
        if self._order() is None:  # the collection was deleted
            raise Stopped
        if rows:
            self._store(rows, skipped)
            self._settle(table, {id: checksums[id] for id in rows})
        if again := skipped.keys() & checksums.keys():  # a file may have been replaced while it was read
            for id in self._changed(table, {id: checksums[id] for id in again}):
                del skipped[id]
        if stopped:
            raise stopped
        return len(rows)

    def _embedded(
        self, read: Read, embed: Embed, stopping: Callable[[], bool], items: Sequence[Item]
    ) -> list[Embedded | str]:
        answers: dict[str, Embedded | str] = {}
        files: list[tuple[Item, bytes]] = []
        for i, item in enumerate(items):
            self._check(stopping)
            data = read(item)
            if isinstance(data, str):
                answers[item.id] = data
            else:
                files.append((item, data))
            if files and (i + 1 == len(items) or sum(len(data) for _, data in files) > BYTES_TOGETHER):
                group, contents = zip(*files, strict=True)
                answers |= {one.id: answer for one, answer in zip(group, embed(group, contents), strict=True)}
                files = []
        return [answers[item.id] for item in items]

    def _store(self, rows: Mapping[str, tuple[Item, Embedded]], skipped: dict[str, Skipped]) -> None:
        items = [_with_size(item, made) for item, made in rows.values()]
        vectors = np.stack([made.vector for _, made in rows.values()])
        files = self.index.files  # the thumbnail that is there belongs to the newest picture
        thumbnails = {id: made.thumbnail for id, (_, made) in rows.items() if files.read("thumbnails", id) is None}
        try:
            self._whole.upsert(items, vectors, thumbnails, allow_other_encoder=True)
        except BadItem as problem:  # metadata of another type than in the new table
            if len(rows) == 1:
                skipped.update({item.id: Skipped(item.id, item.name, f"cannot be stored: {problem}") for item in items})
                return
            for id, row in rows.items():
                self._store({id: row}, skipped)

    def _settle(self, table: LanceTable, checksums: Mapping[str, int]) -> None:
        """Delete rows again whose items have changed or gone meanwhile.

        checksums  of the items in `table`, from before they were embedded
        """
        self._whole.retract(self._changed(table, checksums))

    def _changed(self, table: LanceTable, checksums: Mapping[str, int]) -> dict[str, int]:
        """Returns those of the checksums whose items have others now, or are gone."""
        if table.name in {other.name for other in self._sources()}:
            table.refresh()
            now = table.checksums(checksums)
        else:
            now = {}  # the collection was deleted
        return {id: checksum for id, checksum in checksums.items() if now.get(id) != checksum}

    def _check(self, stopping: Callable[[], bool]) -> None:
        """Raises Stopped."""
        order = self._order()
        if stopping() or order is None or not order.wanted:
            raise Stopped

    # Files

    def _order(self) -> Order | None:
        return None if (content := self._read("order")) is None else Order(**content)

    def _reported(self) -> Progress:
        if (content := self._read("progress")) is None:
            return Progress()
        first = tuple(Skipped(**one) for one in content.pop("first_skipped"))
        return Progress(**content, first_skipped=first)

    def _report(self, skipped: Mapping[str, Skipped], now: Progress) -> None:
        order = self._order()
        if order is None:
            return  # the collection was deleted
        first = tuple(list(skipped.values())[:NAMED])
        now = replace(now, skipped=len(skipped), first_skipped=first, order=order.id, at=time.time())
        self._write("progress", asdict(now))
        self._forget_if_dropped()

    def _forget_if_dropped(self) -> None:
        """Delete what was written after the collection had been deleted."""
        if not self.index.exists():
            self.index.store.delete([f"{self._folder}/{name}.json" for name in ("order", "progress", "skipped")])

    def _read(self, name: str) -> dict | None:
        content = self.index.store.read(path := f"{self._folder}/{name}.json")
        try:
            return None if content is None else json.loads(content)
        except ValueError as error:
            raise IndexProblem(f"{self.index.store.uri}/{path} is damaged; delete it.") from error

    def _write(self, name: str, content: object) -> None:
        self.index.store.write(f"{self._folder}/{name}.json", json.dumps(content).encode())


def given_up(index: Index) -> set[str]:
    """Returns the ids of items that this encoder's table need not have, because somebody said so."""
    work = Reembedding(index)
    return set(work._read("skipped") or ()) if work.is_done() else set()


def is_complete(index: Index, others: Sequence[Index]) -> bool:
    """Whether the table of `index` has each item of the others' tables, by its id, but for those that were given up."""
    count, without = index.count(), given_up(index)
    if any(count + len(without) < other.count() for other in others):
        return False  # so that ids are read only shortly before it is complete
    known = index.ids() | without
    return all(other.ids() <= known for other in others)


def asked_for(store: FileStore) -> Iterator[tuple[str, str]]:
    """Yields collection and encoder of every re-embedding that anybody has asked for."""
    names = names_of(store)
    for path in store.list(FOLDER):
        if path.endswith("/order.json"):
            name, _, encoder = path.split("/")[-2].partition(".")
            yield names.shown(name), encoder


def _shuffled(id: str) -> tuple[int, str]:
    return zlib.crc32(id.encode()), id


def _apart_from(
    without: Collection[str], missing: Sequence[tuple[LanceTable, list[str]]]
) -> list[tuple[LanceTable, list[str]]]:
    rest = [(table, [id for id in ids if id not in without]) for table, ids in missing]
    return [(table, ids) for table, ids in rest if ids]


def _is_open(progress: Progress) -> bool:
    return progress.state in ("waiting", "running")


def _with_size(item: Item, made: Embedded) -> Item:
    """Returns the item; with the size of the picture if it has none, as after an import."""
    return item if item.bytes else replace(item, width=made.width, height=made.height, bytes=made.bytes)
