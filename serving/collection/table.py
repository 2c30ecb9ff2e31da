"""One LanceDB table: its schema, durable commits, retries, maintenance, history.

Lance writes new files and then a manifest that names them; a commit is the manifest. What it learnt from measuring
stands beside each line.
"""

import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timedelta

import numpy as np
import pyarrow as pa

from serving.collection import manifest
from serving.collection.resident import Resident, Snapshot
from serving.collection.store import Store, StoreProblem
from serving.protocol.filters import BASE, Filter, FilterProblem

OLD_VERSIONS_KEPT = timedelta(hours=1)  # a reader that began before may still need them, and `undo`
RETRY_S = 60  # a commit that others are always faster than is given up
CONFLICT = re.compile(r"conflict|concurrent|retryable|already exists|table .* was not found.*latest", re.IGNORECASE)
TYPES = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}

INDEXED_FROM = 20_000  # rows; below, reading all ids is as fast
PROBED = 10  # of that many partitions of the vector index one is read
STALE_SHARE = 0.2  # of rows that came since the index was built; they are looked at one by one
BYPASS_SHARE = 0.05  # a filter that keeps less is answered exactly, and faster, without the index


class IndexProblem(StoreProblem):
    """A collection that cannot be read or written, or an item that cannot be kept. The message says what to do."""


class BadItem(IndexProblem):
    """An item that cannot be kept as it is given."""


class UnknownKey(IndexProblem, FilterProblem):
    """A filter on a key that no row has, or by a value of another type."""


class Table:
    """The table `name` of `store`, opened at first use. Reads are of the newest commit."""

    def __init__(self, store: Store, name: str, dimension: int):
        self.store, self.name, self.dimension = store, name, dimension
        self.root = f"{name}.lance"
        self._opened = None
        self._lock = threading.Lock()
        self._resident = Resident(dimension)

    def open(self, create: bool = False):
        """LanceDB's table; None where there is none and none is to be made."""
        with self._lock:
            if self._opened is None:
                self._opened = self._open(create)
            return self._opened

    def _open(self, create: bool):
        if not create and not self.store.exists():
            return None
        connection = self.store.connect()
        manifest.recover(self.store, self.root)
        try:
            table = connection.open_table(self.name)
        except ValueError as error:
            if "not found" not in str(error):
                raise
            if not create:
                return None  # or another process is about to make it
            table = self._create(connection)
        schema = table.schema
        ours = {field.name: field.type for field in self._schema()}
        if any(name not in schema.names or schema.field(name).type != kind for name, kind in ours.items()):
            raise IndexProblem(
                f"{self.store.uri} holds a table {self.name} that is not from here; choose another place."
            )
        return table

    def _create(self, connection):
        try:
            return connection.create_table(self.name, schema=self._schema(), exist_ok=True)
        except ValueError as error:
            if "does not match existing" not in str(error):
                raise
            return connection.open_table(self.name)  # another process was faster, and has added columns since

    def _schema(self) -> pa.Schema:
        # Without this mark two processes that add the same new id at once would leave two rows of it.
        key = {"lance-schema:unenforced-primary-key": "true"}
        facts = [pa.field(name, TYPES[kind]) for name, kind in BASE.items() if name != "id"]
        vector = pa.field("vector", pa.list_(pa.float32(), self.dimension))
        return pa.schema([pa.field("id", pa.string(), nullable=False, metadata=key), *facts, vector])

    @contextmanager
    def explained(self, done: str) -> Iterator[None]:
        """Errors as IndexProblem; the table is opened anew after one."""
        try:
            with explained(self.store, done):
                yield
        except IndexProblem as problem:
            if problem.__cause__ is not None:
                self._opened = None
                self._resident.forget()
            raise

    def commit(self, change: Callable, create: bool = False):
        """change(table), durable when it returns. Where another writer was faster, again."""
        until, pause = time.monotonic() + RETRY_S, 0.02
        while True:
            try:
                if (table := self.open(create)) is None:
                    return None
                done = change(table)
                self.store.flush(self.root)
                return done
            except (RuntimeError, ValueError, OSError) as error:
                if not CONFLICT.search(str(error)) or time.monotonic() > until:
                    raise
                self._opened = None
                time.sleep(pause * random.uniform(0.5, 1.5))  # so that they do not meet again
                pause = min(2 * pause, 2)

    # Columns of metadata

    def columns(self, table) -> dict[str, tuple[str, type]]:
        """The table's column and the type of each key of metadata."""
        found = {}
        for field in table.schema:
            prefix, mark, key = field.name.partition("_")
            kind = _PYTHON.get(field.type)
            if mark and prefix in ("meta", "whole") and kind and (prefix == "meta" or key not in found):
                found[key] = (field.name, kind)
        return found

    def add_columns(self, table, wanted: Mapping[str, type]) -> None:
        """Columns for keys that are new. Where a fraction comes to a column of whole numbers, a column of numbers is
        added that holds them too and is read from then on: one commit, so that no crash leaves half of it."""
        there = self.columns(table)
        for key, kind in wanted.items():
            old = there[key][1] if key in there else kind
            if old is not kind and {old, kind} != {int, float}:
                raise BadItem(
                    f"The metadata {key} is {_KINDS[kind]} here and {_KINDS[old]} in the rows that are there; "
                    f"give it another name."
                )
        if fields := [pa.field(_named(key, kind), TYPES[kind]) for key, kind in wanted.items() if key not in there]:
            table.add_columns(fields)
        widened = [key for key, kind in wanted.items() if key in there and (there[key][1], kind) == (int, float)]
        if widened:
            table.add_columns({_named(key, float): f"CAST(`{there[key][0]}` AS DOUBLE)" for key in widened})

    def where(self, table, where: Filter | None) -> str | None:
        """The filter in LanceDB's words, its keys and values checked against the columns."""
        if where is None or not where.conditions:
            return None
        columns = self.columns(table)
        kinds = {**{key: kind for key, (_, kind) in columns.items()}, **BASE}
        for key in where.keys:
            if key not in kinds:
                raise UnknownKey(f"No picture has the key {key}; there are {', '.join(kinds)}.")
        for key, value in where.values():
            numbers = kinds[key] in (int, float) and type(value) in (int, float)
            if not numbers and type(value) is not kinds[key]:
                raise UnknownKey(f"The filter on {key} compares with {value!r}, and {key} is {_KINDS[kinds[key]]}.")
        return where.sql({key: name for key, (name, _) in columns.items() if key not in BASE})

    # Searching

    def snapshot(self, table) -> Snapshot | None:
        """The vectors in memory, None where they are too many."""
        return self._resident.snapshot(table, lambda: self.store.connect().open_table(self.name))

    def query(self, table, vectors: np.ndarray, k: int, where: str | None):
        """LanceDB's query for the k nearest to each of `vectors` (n, d): where they are too many for memory."""
        query = table.search(list(vectors) if len(vectors) > 1 else vectors[0], vector_column_name="vector")
        query = query.distance_type("dot").limit(k)
        if where is None:
            return query.nprobes(max(1, _partitions(table.count_rows()) // PROBED))
        rows, kept = table.count_rows(), table.count_rows(where)
        query = query.where(where, prefilter=True)
        return query.bypass_vector_index() if kept < BYPASS_SHARE * rows else query.nprobes(_partitions(rows))

    # Maintenance

    def maintain(self, table) -> None:
        """Join small pieces, forget versions of more than an hour ago, index what wants it."""
        table.optimize(cleanup_older_than=OLD_VERSIONS_KEPT)
        from lancedb.index import BTree, IvfFlat

        rows, facts = table.count_rows(), self.index_facts(table)
        if rows >= INDEXED_FROM and not any(found.columns == ["id"] for found in table.list_indices()):
            table.create_index("id", config=BTree())  # without it every upsert and `get` reads all ids
        stale = facts is None or facts.num_unindexed_rows > STALE_SHARE * rows
        if stale and rows > self._resident.most:
            config = IvfFlat(distance_type="dot", num_partitions=_partitions(rows))
            table.create_index("vector", config=config, replace=True)

    def index_facts(self, table):
        """LanceDB's statistics of the vector index, None without one."""
        names = [found.name for found in table.list_indices() if found.columns == ["vector"]]
        return table.index_stats(names[0]) if names else None

    # History

    def history(self, table, newest: int | None = None) -> list[tuple[int, datetime, int]]:
        """(version, when, rows) of the changes of rows, or the `newest` of them, oldest first. Maintenance makes
        versions too: they are left out."""
        versions = table.list_versions()
        found = []
        for at in reversed(range(len(versions))):
            if at == 0 or self._changes_rows(versions[at - 1], versions[at]):
                rows = int(versions[at]["metadata"]["total_rows"])
                found.append((versions[at]["version"], versions[at]["timestamp"].astimezone(), rows))
            if len(found) == newest:
                break
        return found[::-1]

    def _changes_rows(self, before: dict, version: dict) -> bool:
        old, new = before["metadata"], version["metadata"]
        if new["total_rows"] != old["total_rows"]:
            return True
        if int(new["total_data_file_rows"]) > int(old["total_data_file_rows"]):
            return True  # compaction writes no more than it has read
        return manifest.changes_rows(self.store, self.root, version["version"])  # two small files

    def undo(self, table) -> int:
        """Restore what was before the last change of rows; the new version."""
        changes = self.history(table, newest=2)
        if len(changes) < 2:
            raise IndexProblem(f"Nothing of {self.name} can be undone: no version before the last change is kept.")
        table.restore(changes[0][0])
        return table.version


@contextmanager
def explained(store: Store, done: str) -> Iterator[None]:
    """Errors as IndexProblem. `done`: "read" or "written"."""
    try:
        with store.explained(done):
            yield
    except IndexProblem:
        raise
    except StoreProblem as problem:
        raise IndexProblem(str(problem)) from problem.__cause__ or problem


_KINDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


_PYTHON = {kind: python for python, kind in TYPES.items()}


def _named(key: str, kind: type) -> str:
    """The column of a key: a name space of its own, so that no key meets a column of ours."""
    return f"{'whole' if kind is int else 'meta'}_{key}"


def _partitions(rows: int) -> int:
    return max(1, round(rows**0.5 / 2))
