"""One LanceDB table. Only this file calls LanceDB's query API; store.py opens the connection.

LanceDB writes new files, then a manifest that lists them; writing the manifest is the commit. Comments give the reason
where a line follows from a measurement.
"""

import random
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from serving.collection import manifest
from serving.collection.items import TYPES, Column, Item, is_id, item_columns, matrix, to_item, to_rows
from serving.collection.problems import BadItem, IndexProblem, UnknownKey
from serving.collection.resident import Resident
from serving.collection.store import FileStore
from serving.protocol.filters import BASE, Filter, literal

OLD_VERSIONS_KEPT = timedelta(hours=1)  # for readers that began before, and for `undo`
RETRY_S = 60  # a commit that keeps conflicting with other writers is given up after this time
CONFLICT = re.compile(r"conflict|concurrent|retryable|already exists|table .* was not found.*latest", re.IGNORECASE)

INDEXED_FROM = 20_000  # rows; below, reading all ids is as fast
PROBED = 10  # a search reads one in this many partitions of the vector index
STALE_SHARE = 0.2  # with a larger share of unindexed rows, which are compared one by one, the index is rebuilt
BYPASS_SHARE = 0.05  # if a filter matches a smaller share of rows, comparing them all is exact and faster
IDS_TOGETHER = 1000  # in one condition

Handle = Any  # LanceDB's own table object
T = TypeVar("T")


class LanceTable:
    """The table `name` of `store`, opened at first use. Every read sees the newest commit. All methods but `exists` and
    `upsert` require that the table exists. Errors of LanceDB become IndexProblem inside `explained`."""

    def __init__(self, store: FileStore, name: str, dimension: int):
        self.store, self.name, self.dimension = store, name, dimension
        self.root = f"{name}.lance"
        self._opened: Handle | None = None
        self._lock = threading.Lock()
        self._resident = Resident(dimension)

    @classmethod
    def existing(cls, store: FileStore, name: str) -> "LanceTable":
        """Returns an existing table, with the dimension that it has."""
        manifest.recover(store, f"{name}.lance")
        handle = store.connect().open_table(name)
        return cls(store, name, handle.schema.field("vector").type.list_size)

    def exists(self) -> bool:
        return self._open() is not None

    @contextmanager
    def explained(self, done: str) -> Iterator[None]:
        """Turn errors into IndexProblem; after one the table is opened again. `done`: "read" or "written"."""
        try:
            with self.store.explained(done):
                yield
        except IndexProblem as problem:
            if problem.__cause__ is not None:
                self._opened = None
                self._resident.forget()
            raise

    # Writing

    def upsert(self, items: Sequence[Item], vectors: np.ndarray, types: Mapping[str, type]) -> None:
        """Add or replace items with their unit vectors (n, d); create the table if needed. Durable when it returns.
        `types`: of the metadata keys."""

        def change(handle: Handle) -> None:
            self._add_columns(handle, types)
            rows = to_rows(items, vectors, _columns(handle), handle.schema)
            handle.merge_insert("id").when_matched_update_all().when_not_matched_insert_all().execute(rows)

        self._commit(change, create=True)

    def delete(self, ids: Sequence[str]) -> int:
        """Returns how many rows were deleted. Durable when it returns."""
        return self._commit(lambda handle: handle.delete(_among(ids)).num_deleted_rows)

    # Reading

    @property
    def version(self) -> int:
        return self._handle.version

    def columns(self) -> dict[str, Column]:
        """Returns the columns of the metadata by key."""
        return _columns(self._handle)

    def count(self, where: Filter | None = None) -> int:
        handle = self._handle
        return handle.count_rows(_condition(where, handle))

    def ids(self) -> set[str]:
        return set(self.read(["id"])["id"].to_pylist())

    def known(self, ids: Iterable[str]) -> set[str]:
        """Returns those of `ids` that the table has."""
        known: set[str] = set()
        for chunk in _chunks(ids):
            query = self._handle.search().where(_among(chunk)).select(["id"]).limit(len(chunk))
            known |= set(query.to_arrow()["id"].to_pylist())
        return known

    def get(self, ids: Iterable[str]) -> dict[str, tuple[Item, np.ndarray]]:
        """Returns the items and vectors (d,) of those of `ids` that the table has."""
        rows = {}
        for chunk in _chunks(ids):
            for items, vectors in self._scan(self._handle, _among(chunk), IDS_TOGETHER):
                rows |= {item.id: (item, vector) for item, vector in zip(items, vectors, strict=True)}
        return rows

    def page(self, limit: int, offset: int, where: Filter | None) -> list[Item]:
        handle = self._handle
        columns = _columns(handle)
        query = _query(handle, item_columns(columns), _condition(where, handle)).offset(offset).limit(limit)
        return [to_item(row, columns) for row in query.to_arrow().to_pylist()]

    def scan(self, where: Filter | None, batch: int) -> Iterator[tuple[list[Item], np.ndarray]]:
        """Yields items and vectors (n, d), n <= batch, of one version, in the order of the table."""
        handle = self._handle
        return self._scan(handle, _condition(where, handle), batch)

    def read(self, columns: Sequence[str], limit: int | None = None) -> pa.Table:
        """Returns these columns of all rows, or of the first `limit`."""
        query = _query(self._handle, columns, None)
        return (query if limit is None else query.limit(limit)).to_arrow()

    def sample(self, most: int, seed: int = 0) -> tuple[list[str], np.ndarray]:
        """Returns ids and vectors (n, d) of `most` random rows, or of all if there are fewer."""
        handle = self._handle
        rows = handle.count_rows()
        positions = np.sort(np.random.default_rng(seed).choice(rows, min(most, rows), replace=False))
        chosen = handle.take_offsets(positions.tolist()).select(["id", "vector"]).to_arrow()
        return chosen["id"].to_pylist(), matrix(chosen["vector"], self.dimension)

    def batches(self, fragment: manifest.Fragment | None = None, batch: int = 4096) -> Iterator[pa.RecordBatch]:
        """Yields all columns of all rows, or of one fragment's."""
        condition = None
        if fragment is not None:  # Lance's row address is the fragment's number, then the row's, 32 bits each
            condition = f"_rowaddr >= {fragment.number << 32} AND _rowaddr < {(fragment.number + 1) << 32}"
        return _query(self._handle, None, condition).to_batches(batch_size=batch)

    # Searching

    def nearest(self, vectors: np.ndarray, k: int, where: Filter | None = None) -> list[list[tuple[Item, float]]]:
        """Returns the k items nearest to each of the unit `vectors` (n, d), with their exact cosine, nearest first."""
        handle = self._handle
        columns, condition = _columns(handle), _condition(where, handle)
        snapshot = self._resident.snapshot(handle, lambda: self.store.connect().open_table(self.name))
        if snapshot is not None:
            nearest = snapshot.search(vectors, k, condition)
            rows = snapshot.rows({key for keys, _ in nearest for key in keys}, item_columns(columns))
            items = {key: to_item(row, columns) for key, row in rows.items()}
            return [[(items[key], min(1.0, cosine)) for key, cosine in zip(*result, strict=True)] for result in nearest]
        query = _nearest(handle, vectors, k, condition).select([*item_columns(columns), "_distance"])
        results: list[list[tuple[Item, float]]] = [[] for _ in vectors]
        for row in query.to_arrow().to_pylist():
            results[row.get("query_index", 0)].append((to_item(row, columns), min(1.0, 1.0 - row["_distance"])))
        return results

    def index_type(self) -> str:
        """Returns the type of the vector index, "none" without one."""
        facts = self._index_facts(self._handle)
        return facts.index_type if facts else "none"

    def check_index(self) -> None:
        """Read the whole vector index, if there is one, by searching all of it. Raises LanceDB's error."""
        handle = self._handle
        if self._index_facts(handle) is not None:
            vector = np.full((1, self.dimension), self.dimension**-0.5, np.float32)
            _nearest(handle, vector, 1, "true").to_arrow()

    # Maintenance

    def maintain(self) -> None:
        """Merge small files, delete versions older than OLD_VERSIONS_KEPT, and build the indices that are needed."""
        self._commit(self._maintain)

    def _maintain(self, handle: Handle) -> None:
        handle.optimize(cleanup_older_than=OLD_VERSIONS_KEPT)
        from lancedb.index import BTree, IvfFlat

        rows, facts = handle.count_rows(), self._index_facts(handle)
        if rows >= INDEXED_FROM and not any(index.columns == ["id"] for index in handle.list_indices()):
            handle.create_index("id", config=BTree())  # without it every upsert and `get` reads all ids
        stale = facts is None or facts.num_unindexed_rows > STALE_SHARE * rows
        if stale and rows > self._resident.most:
            config = IvfFlat(distance_type="dot", num_partitions=_partitions(rows))
            handle.create_index("vector", config=config, replace=True)

    def _index_facts(self, handle: Handle) -> Any | None:
        """Returns LanceDB's statistics of the vector index, None without one."""
        names = [index.name for index in handle.list_indices() if index.columns == ["vector"]]
        return handle.index_stats(names[0]) if names else None

    # History

    def history(self) -> list[tuple[int, datetime, int]]:
        """Returns (version, time, rows) after each change of rows, oldest first."""
        return list(self._history(self._handle))[::-1]

    def undo(self) -> int:
        """Restore the state before the last change of rows as a new version, and return that version's number."""
        return self._commit(self._undo)

    def _undo(self, handle: Handle) -> int:
        history = self._history(handle)
        if next(history, None) is None or (before := next(history, None)) is None:
            raise IndexProblem(f"{self.name} cannot be undone: no version from before the last change is kept.")
        handle.restore(before[0])
        return handle.version

    def _history(self, handle: Handle) -> Iterator[tuple[int, datetime, int]]:
        """Yields as `history`, newest first. Versions that only maintenance made are left out."""
        versions = handle.list_versions()
        for at in reversed(range(len(versions))):
            if at == 0 or self._changes_rows(versions[at - 1], versions[at]):
                version = versions[at]
                yield version["version"], version["timestamp"].astimezone(), int(version["metadata"]["total_rows"])

    def _changes_rows(self, before: dict, version: dict) -> bool:
        old, new = before["metadata"], version["metadata"]
        if new["total_rows"] != old["total_rows"]:
            return True
        if int(new["total_data_file_rows"]) > int(old["total_data_file_rows"]):
            return True  # compaction never writes more rows than it reads
        return manifest.changes_rows(self.store, self.root, version["version"])  # reads two small files

    def fragments(self) -> tuple[manifest.Fragment, ...]:
        """Returns the groups of rows that the newest version consists of, with their files. Raises ValueError for a
        damaged manifest."""
        return manifest.read(self.store, self.root, self.version).fragments

    # Opening and committing

    @property
    def _handle(self) -> Handle:
        if (handle := self._open()) is None:
            raise IndexProblem(f"{self.store.uri} has no table {self.name}.")
        return handle

    def _open(self, create: bool = False) -> Handle | None:
        """Returns LanceDB's table, None if it does not exist and is not to be created."""
        with self._lock:
            if self._opened is None:
                self._opened = self._opened_or_created(create)
            return self._opened

    def _opened_or_created(self, create: bool) -> Handle | None:
        if not create and not self.store.exists():
            return None
        connection = self.store.connect()
        manifest.recover(self.store, self.root)
        try:
            handle = connection.open_table(self.name)
        except ValueError as error:
            if "not found" not in str(error):
                raise
            if not create:
                return None  # another process may be creating it
            handle = self._create(connection)
        schema = handle.schema
        ours = {field.name: field.type for field in self._schema()}
        if any(name not in schema.names or schema.field(name).type != kind for name, kind in ours.items()):
            raise IndexProblem(
                f"{self.store.uri} has a table {self.name} that was not written by Twinview or has another dimension; "
                f"choose another folder."
            )
        return handle

    def _create(self, connection: Any) -> Handle:
        try:
            return connection.create_table(self.name, schema=self._schema(), exist_ok=True)
        except ValueError as error:
            if "does not match existing" not in str(error):
                raise
            return connection.open_table(self.name)  # another process created it first, and has added columns since

    def _schema(self) -> pa.Schema:
        # Without this mark, two processes that add the same new id at the same time would add two rows.
        key = {"lance-schema:unenforced-primary-key": "true"}
        facts = [pa.field(name, TYPES[kind]) for name, kind in BASE.items() if name != "id"]
        vector = pa.field("vector", pa.list_(pa.float32(), self.dimension))
        return pa.schema([pa.field("id", pa.string(), nullable=False, metadata=key), *facts, vector])

    def _commit(self, change: Callable[[Handle], T], create: bool = False) -> T:
        """Returns change(handle), after making it durable. Tries again if another writer committed first."""
        until, pause = time.monotonic() + RETRY_S, 0.02
        while True:
            try:
                handle = self._open(create=True) if create else self._handle
                result = change(handle)
                self.store.flush(self.root)
                return result
            except (RuntimeError, ValueError, OSError) as error:
                if not CONFLICT.search(str(error)) or time.monotonic() > until:
                    raise
                self._opened = None
                time.sleep(pause * random.uniform(0.5, 1.5))  # so that the writers do not collide again
                pause = min(2 * pause, 2)

    def _add_columns(self, handle: Handle, types: Mapping[str, type]) -> None:
        """Add columns for new keys. If a key with a column of whole numbers gets a fraction, a column of
        floating-point numbers is added that holds the old values too, and is read from then on: one commit, so that a
        crash leaves no intermediate state."""
        columns = _columns(handle)
        for key, kind in types.items():
            old = columns[key].kind if key in columns else kind
            if old is not kind and {old, kind} != {int, float}:
                raise BadItem(
                    f"The metadata {key} is {_KINDS[kind]} here and {_KINDS[old]} in the items of the collection; "
                    f"give it another name."
                )
        new = {key: kind for key, kind in types.items() if key not in columns}
        if new:
            handle.add_columns([pa.field(_column_name(key, kind), TYPES[kind]) for key, kind in new.items()])
        widened = [key for key, kind in types.items() if key in columns and (columns[key].kind, kind) == (int, float)]
        if widened:
            handle.add_columns({_column_name(key, float): f"CAST(`{columns[key].name}` AS DOUBLE)" for key in widened})

    def _scan(self, handle: Handle, condition: str | None, batch: int) -> Iterator[tuple[list[Item], np.ndarray]]:
        columns = _columns(handle)
        for rows in _query(handle, [*item_columns(columns), "vector"], condition).to_batches(batch_size=batch):
            items = [to_item(row, columns) for row in rows.drop_columns("vector").to_pylist()]
            yield items, matrix(rows["vector"], self.dimension)


def table_names(store: FileStore) -> list[str]:
    """Returns the names of all tables, sorted."""
    names: list[str] = []
    token = None
    while store.exists():
        page = store.connect().list_tables(page_token=token)
        names += page.tables
        if (token := page.page_token) is None:
            break
    return sorted(names)


_KINDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
_PYTHON = {arrow: python for python, arrow in TYPES.items()}


def _column_name(key: str, kind: type) -> str:
    """Returns the column's name for a metadata key; the prefix keeps it apart from the columns that every table has."""
    return f"{'whole' if kind is int else 'meta'}_{key}"


def _columns(handle: Handle) -> dict[str, Column]:
    columns: dict[str, Column] = {}
    for field in handle.schema:
        prefix, mark, key = field.name.partition("_")
        kind = _PYTHON.get(field.type)
        if mark and prefix in ("meta", "whole") and kind and (prefix == "meta" or key not in columns):
            columns[key] = Column(field.name, kind)
    return columns


def _condition(where: Filter | None, handle: Handle) -> str | None:
    """Returns the filter as SQL, after checking its keys and values against the columns. Raises UnknownKey."""
    if where is None or not where.conditions:
        return None
    columns = _columns(handle)
    kinds = {**{key: column.kind for key, column in columns.items()}, **BASE}
    for key in where.keys:
        if key not in kinds:
            raise UnknownKey(f"No item has the key {key}; the keys are {', '.join(kinds)}.")
    for key, value in where.values():
        numbers = kinds[key] in (int, float) and type(value) in (int, float)
        if not numbers and type(value) is not kinds[key]:
            raise UnknownKey(f"The filter on {key} compares with {value!r}, but {key} is {_KINDS[kinds[key]]}.")
    return where.sql({key: column.name for key, column in columns.items() if key not in BASE})


def _query(handle: Handle, columns: Sequence[str] | None, condition: str | None) -> Any:
    """Returns LanceDB's query for these columns, or all, of the rows that meet the condition."""
    query = handle.search()
    if columns is not None:
        query = query.select(list(columns))
    return query if condition is None else query.where(condition)


def _nearest(handle: Handle, vectors: np.ndarray, k: int, condition: str | None) -> Any:
    """Returns LanceDB's query for the k nearest to each of `vectors` (n, d)."""
    query = handle.search(list(vectors) if len(vectors) > 1 else vectors[0], vector_column_name="vector")
    query = query.distance_type("dot").limit(k)
    if condition is None:
        return query.nprobes(max(1, _partitions(handle.count_rows()) // PROBED))
    rows, matching = handle.count_rows(), handle.count_rows(condition)
    query = query.where(condition, prefilter=True)
    return query.bypass_vector_index() if matching < BYPASS_SHARE * rows else query.nprobes(_partitions(rows))


def _partitions(rows: int) -> int:
    return max(1, round(rows**0.5 / 2))


def _among(ids: Sequence[str]) -> str:
    return f"id IN ({', '.join(map(literal, ids))})"


def _chunks(ids: Iterable[str]) -> Iterator[list[str]]:
    """Yields the valid ids, each once, IDS_TOGETHER at a time."""
    valid = [id for id in dict.fromkeys(ids) if is_id(id)]
    return (valid[at : at + IDS_TOGETHER] for at in range(0, len(valid), IDS_TOGETHER))
