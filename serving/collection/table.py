"""One LanceDB table. Only this file calls LanceDB's query API; store.py opens the connection.

LanceDB writes new files, then a manifest that lists them; writing the manifest is the commit. Comments give the reason
where a line follows from a measurement.
"""

import random
import re
import struct
import threading
import time
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa

from export.suggest import did_you_mean
from serving.collection import manifest
from serving.collection.items import (
    CHECKSUM,
    MOST_KEYS,
    TYPES,
    Column,
    Item,
    is_id,
    item_columns,
    matrix,
    metadata_types,
    refuse_inexact,
    to_item,
    to_rows,
)
from serving.collection.problems import BadItem, IndexProblem, NothingToUndo, UnknownKey
from serving.collection.store import FileStore
from serving.protocol.filters import BASE, Filter, literal
from serving.protocol.shown import shown

FOR_EVER = timedelta(days=36_500)
MARGIN = timedelta(minutes=1)  # in which LanceDB gets to deleting old versions
RETRY_S = 60  # a commit that keeps conflicting with other writers is given up after this time
CONFLICT = re.compile(r"conflict|concurrent|retryable|already exists|table .* was not found.*latest", re.IGNORECASE)

IDS_INDEXED_FROM = 20_000  # rows; below, reading all ids is as fast
INDEXED_FROM = 5000  # rows; below, all vectors are compared, which takes 30 ms for 1,280 numbers
INDEX_TYPE = "IVF_RQ"
BITS = 4  # for each number of a vector in the index; with fewer, vectors without clusters are not found
PARTITION_ROWS = 8192  # LanceDB splits and joins partitions to about this size when it adds rows
PROBED = 128  # partitions: all of a million rows
REFINED = 5  # times as many rows as are asked for have their exact cosine computed
UNINDEXED_BYTES = 2**25  # of vectors; more that are not in the index make a search 35 ms longer
IDS_TOGETHER = 1000  # in one condition

Handle = Any  # LanceDB's own table object
T = TypeVar("T")


class Cancelled(NamedTuple):
    """A change that was undone."""

    change: set[int]
    """The versions that it made."""
    undo: set[int]
    """Those of its undo; none if others had changed the same rows since."""


class Before(NamedTuple):
    """A row as a version has it."""

    version: int
    checksum: int | None
    """None if it was not there."""


class LanceTable:
    """The table `name` of `store`, opened at first use. Every read sees the newest commit. All methods but `exists` and
    `upsert` require that the table exists. Errors of LanceDB become IndexProblem inside `explained`."""

    def __init__(self, store: FileStore, name: str, dimension: int):
        self.store, self.name, self.dimension = store, name, dimension
        self.root = f"{name}.lance"
        self._opened: Handle | None = None
        self._lock = threading.Lock()

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
            raise

    def refresh(self) -> None:
        """See the newest commit from now on, also in an object store."""
        self._handle.checkout_latest()

    # Writing

    def upsert(self, items: Sequence[Item], vectors: np.ndarray, types: Mapping[str, type]) -> tuple[int, int, int]:
        """Add or replace items with their unit vectors (n, d); create the table if needed. Durable when it returns.
        Returns the version that it made, and how many items were added and replaced.

        types  of the metadata keys
        """

        def change(handle: Handle) -> tuple[int, int, int]:
            result = self._merge(handle, items, vectors, types)
            return result.version, result.num_inserted_rows, result.num_updated_rows

        return self._commit(change, create=True)

    def _merge(self, handle: Handle, items: Sequence[Item], vectors: np.ndarray, types: Mapping[str, type]) -> Any:
        """Returns LanceDB's result."""
        self._add_columns(handle, items, types)
        rows = to_rows(items, vectors, _columns(handle), handle.schema)
        return handle.merge_insert("id").when_matched_update_all().when_not_matched_insert_all().execute(rows)

    def change(self, ids: Sequence[str], edit: Callable[[Item], Item]) -> tuple[set[str], list[int]]:
        """Replace the items of those of `ids` that the table has by edit(item), and keep their vectors. Returns these
        ids, and the version that it made, if any. Durable when it returns. Raises BadItem."""

        def change(handle: Handle) -> tuple[set[str], list[int]]:
            known = list(self.get(ids).values())
            if not known:
                return set(), []
            items, vectors = [edit(item) for item, _ in known], np.stack([vector for _, vector in known])
            self._add_columns(handle, items, metadata_types(items))
            rows = to_rows(items, vectors, _columns(handle), handle.schema)
            # One that is deleted meanwhile stays deleted.
            result = handle.merge_insert("id").when_matched_update_all().execute(rows)
            return {item.id for item in items}, [result.version]

        return self._commit(change)

    def create(self) -> None:
        """Create the table without rows, unless it exists."""
        self._commit(lambda handle: None, create=True)

    def drop(self) -> None:
        """Delete the table with all its versions."""
        self.store.connect().drop_table(self.name)
        self._opened = None

    def delete(self, ids: Sequence[str]) -> int:
        """Returns the version that it made. Durable when it returns."""
        return self._commit(lambda handle: handle.delete(_among(ids)).version)

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
        return set(self.checksums(ids))

    def checksums(self, ids: Iterable[str] | None = None) -> dict[str, int]:
        """Returns the checksum of each row, or of those of `ids` that the table has; 0 for a row without one."""
        return self._checksums(self._handle, ids)

    def _checksums(self, handle: Handle, ids: Iterable[str] | None = None) -> dict[str, int]:
        columns = ["id", CHECKSUM] if CHECKSUM in handle.schema.names else ["id"]
        found: dict[str, int] = {}
        for condition in [None] if ids is None else map(_among, _chunks(ids)):
            for rows in _query(handle, columns, condition).to_batches():
                sums = rows[CHECKSUM].fill_null(0) if len(columns) > 1 else pa.array([0] * len(rows))
                found |= zip(rows["id"].to_pylist(), sums.to_pylist(), strict=True)
        return found

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

    def page_after(self, after: str, limit: int, where: Filter | None) -> list[Item]:
        """Returns the first items whose ids come after `after`, in the order of their ids."""
        from lancedb.query import ColumnOrdering

        handle = self._handle
        columns, condition = _columns(handle), _condition(where, handle)
        later = f"id > {literal(after)}" + (f" AND ({condition})" if condition else "")
        query = _query(handle, item_columns(columns), later).order_by([ColumnOrdering(column_name="id")]).limit(limit)
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
        columns = _columns(handle)
        query = _nearest(handle, vectors, k, _condition(where, handle))
        results: list[list[tuple[Item, float]]] = [[] for _ in vectors]
        for row in query.select([*item_columns(columns), "_distance"]).to_arrow().to_pylist():
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
            _nearest(handle, vector, 1, None).nprobes(handle.count_rows()).to_arrow()

    # Maintenance

    def maintain(self, since: float) -> None:
        """Merge small files, build the indices that are needed, and delete the versions from before the time `since`
        (Unix seconds), except the newest of those: the first change after that time is undone to it."""
        self._commit(partial(self._maintain, since))

    def _maintain(self, since: float, handle: Handle) -> None:
        if unused := _unused(handle, _columns(handle)):  # every search would read them
            handle.drop_columns(unused)
        handle.optimize(cleanup_older_than=FOR_EVER)  # also adds new rows to the indices; takes minutes for millions
        handle.optimize(cleanup_older_than=_oldest_needed(handle, since) + MARGIN)
        from lancedb.index import BTree, IvfRq

        rows, facts = handle.count_rows(), self._index_facts(handle)
        if rows >= IDS_INDEXED_FROM and not any(index.columns == ["id"] for index in handle.list_indices()):
            handle.create_index("id", config=BTree())  # without it every upsert and `get` reads all ids
        if rows >= INDEXED_FROM and (facts is None or facts.index_type != INDEX_TYPE):
            partitions = max(1, rows // PARTITION_ROWS)
            handle.create_index("vector", config=IvfRq("dot", partitions, BITS), replace=True)

    def _index_facts(self, handle: Handle) -> Any | None:
        """Returns LanceDB's statistics of the vector index, None without one."""
        names = [index.name for index in handle.list_indices() if index.columns == ["vector"]]
        return handle.index_stats(names[0]) if names else None

    # History

    def kept(self) -> set[int]:
        """Returns the numbers of the versions that are not deleted yet."""
        return {version["version"] for version in self._handle.list_versions()}

    def history(self) -> Iterator[tuple[int, datetime, Callable[[], tuple[int, int, int]]]]:
        """Yields (version, time, counts) of each change of rows, newest first. `counts` returns how many rows were
        added, changed and deleted. Versions that only maintenance made are left out, and the oldest that is kept."""
        versions = self._handle.list_versions()
        for at in reversed(range(1, len(versions))):
            old, new = versions[at - 1], versions[at]
            if self._changes_rows(old, new):
                yield new["version"], new["timestamp"].astimezone(), partial(self._counts, old, new)

    def _counts(self, old: dict, new: dict) -> tuple[int, int, int]:
        more = int(new["metadata"]["total_rows"]) - int(old["metadata"]["total_rows"])
        try:
            before, after = (manifest.read(self.store, self.root, one["version"]).fragments for one in (old, new))
        except (ValueError, struct.error):
            return max(more, 0), 0, max(-more, 0)
        there = {fragment.number for fragment in before}
        written = sum(fragment.rows for fragment in after if fragment.number not in there)
        return max(more, 0), max(written - max(more, 0), 0), max(-more, 0)

    def touched(self, versions: Collection[int]) -> set[str]:
        """Returns the ids of the rows that these versions changed."""
        return set(self._differences(self._handle, sorted(versions)))

    def take_back(
        self, versions: Collection[int], only: Container[str] | None, cancelled: Sequence[Cancelled], made: list[int]
    ) -> None:
        """Make the rows again what they were before these versions, except for rows that others have changed since.

        only       ids of the rows to make so; None for all
        cancelled  changes that were undone: rows are made what they were before those, too
        made       the versions that this makes are added to it, also if it fails half way
        raises     NothingToUndo when the versions before are no longer kept
        """
        self._commit(lambda handle: self._take_back(handle, sorted(versions), only, cancelled, made))

    def _take_back(
        self,
        handle: Handle,
        versions: list[int],
        only: Container[str] | None,
        cancelled: Sequence[Cancelled],
        made: list[int],
    ) -> None:
        if versions[0] - 1 not in self.kept():
            raise NothingToUndo("The versions from before are no longer kept.")
        later = {version for version, _, _ in self.history() if version > versions[0]}
        later -= {*versions}.union(*(one.change | one.undo for one in cancelled if min(one.change) > versions[0]))
        earlier = [one for one in cancelled if min(one.change) < versions[0]]
        if only is None and not later and all(one.undo for one in earlier):
            handle.restore(versions[0] - 1)
            made.append(handle.version)
            return
        differences, now = self._differences(handle, versions), self.checksums()
        changed = {
            id: before
            for id, (before, after) in differences.items()
            if now.get(id) == after and (only is None or id in only)
        }
        ours = self._before_cancelled(changed, sorted(set().union(*(one.change for one in earlier))))
        for ids in _chunks(id for id, version in ours.items() if version is None and id in now):
            made.append(handle.delete(_among(ids)).version)
        for version in sorted({version for version in ours.values() if version is not None}):
            before = self._at(version)
            for ids in _chunks(id for id, other in ours.items() if other == version):
                for items, vectors in self._scan(before, _among(ids), IDS_TOGETHER):
                    made.append(self._merge(handle, items, vectors, metadata_types(items)).version)

    def _differences(self, handle: Handle, versions: list[int]) -> dict[str, tuple[Before, int | None]]:
        """Returns of each row that these versions changed what it was before, and the checksum that it then had, None
        if it was deleted."""
        changes = self._changes()
        differences: dict[str, tuple[Before, int | None]] = {}
        for first, last in _runs(versions, changes):
            before, after = (self._checksums(self._at(version)) for version in (first - 1, last))
            for id in {**before, **after}:
                if before.get(id) != after.get(id):
                    old = differences[id][0] if id in differences else Before(first - 1, before.get(id))
                    differences[id] = (old, after.get(id))
        return differences

    def _before_cancelled(self, rows: Mapping[str, Before], versions: list[int]) -> dict[str, int | None]:
        """Returns a version that has each row as it was before, or None if it was not there.

        versions  made by changes that were undone. An undo leaves a row that was changed again later, so what they have
                  made of it may come to light only now
        """
        rows, kept = dict(rows), self.kept()
        for first, last in reversed([*_runs(versions, self._changes())] if versions else []):
            if first - 1 not in kept:
                break
            before, after = (self._checksums(self._at(version), rows) for version in (first - 1, last))
            for id, row in rows.items():
                if after.get(id) == row.checksum and last <= row.version:
                    rows[id] = Before(first - 1, before.get(id))
        return {id: None if row.checksum is None else row.version for id, row in rows.items()}

    def _changes(self) -> list[int]:
        """Returns the versions that changed rows, the oldest first."""
        return [version for version, _, _ in self.history()][::-1]

    def _at(self, version: int) -> Handle:
        """Returns the table as it was, to read from."""
        handle = self.store.connect().open_table(self.name)
        handle.checkout(version)
        return handle

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
            if self._opened is not None and self.store.local and not (self.store.local / self.root).is_dir():
                self._opened = None  # it was deleted through another object
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
        ours = {field.name: field.type for field in self._schema() if field.name != CHECKSUM}  # older tables have none
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
        checksum = pa.field(CHECKSUM, pa.int64())
        return pa.schema([pa.field("id", pa.string(), nullable=False, metadata=key), *facts, vector, checksum])

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

    def _add_columns(self, handle: Handle, items: Sequence[Item], types: Mapping[str, type]) -> None:
        """Add columns for the new keys of `items`. If a key with a column of whole numbers gets a fraction, a column of
        floating-point numbers is added that holds the old values too, and is read from then on: one commit, so that a
        crash leaves no intermediate state."""
        columns, unused = _columns(handle), []
        for key, kind in types.items():
            old = columns[key].kind if key in columns else kind
            if old is not kind and {old, kind} != {int, float}:
                if own := _unused(handle, [key]):
                    unused += own
                    continue
                raise BadItem(
                    f"The metadata {key} is {_KINDS[kind]} here and {_KINDS[old]} in the items of the collection; "
                    f"give it another name."
                )
        widened = [key for key, kind in types.items() if key in columns and (columns[key].kind, kind) == (int, float)]
        kinds = {key: column.kind for key, column in columns.items()}
        refuse_inexact(items, {key for key, kind in types.items() if float in (kind, kinds.get(key))})
        for key in widened:
            self._refuse_large(handle, key, columns[key].name)
        if len({*columns, *types}) > MOST_KEYS:
            unused += _unused(handle, [key for key in columns if key not in types])
        if unused:
            handle.drop_columns(unused)
            columns = _columns(handle)
        if len({*columns, *types}) > MOST_KEYS:
            raise BadItem(
                f"The collection has {len(columns)} metadata keys and would have {len({*columns, *types})}; "
                f"at most {MOST_KEYS} are allowed."
            )
        new = [pa.field(_column_name(key, kind), TYPES[kind]) for key, kind in types.items() if key not in columns]
        if CHECKSUM not in handle.schema.names:
            new.append(pa.field(CHECKSUM, pa.int64()))
        if new:
            handle.add_columns(new)
        if widened:
            handle.add_columns({_column_name(key, float): f"CAST(`{columns[key].name}` AS DOUBLE)" for key in widened})

    def _refuse_large(self, handle: Handle, key: str, column: str) -> None:
        """Raises BadItem if an item has a whole number that may not be the same as a floating-point number."""
        large = _query(handle, [column], f"`{column}` NOT BETWEEN {-(2**53)} AND {2**53}").limit(1).to_list()
        if large:
            raise BadItem(
                f"The metadata {key} has a fraction here and is {large[0][column]} in an item of the collection, which "
                f"could then not be stored exactly; give it another name."
            )

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


def _unused(handle: Handle, keys: Iterable[str]) -> list[str]:
    """Returns the columns of those of the metadata `keys` for which no item has a value any more."""
    unused = []
    for key in keys:
        own = [name for name in handle.schema.names if name in (f"meta_{key}", f"whole_{key}")]
        if not handle.count_rows(" OR ".join(f"`{name}` IS NOT NULL" for name in own)):
            unused += own
    return unused


def _condition(where: Filter | None, handle: Handle) -> str | None:
    """Returns the filter as SQL, after checking its keys and values against the columns. Raises UnknownKey."""
    if where is None or where == Filter(()):
        return None
    columns = _columns(handle)
    kinds = {**{key: column.kind for key, column in columns.items()}, **BASE}
    for key in where.keys:
        if key not in kinds:
            near = did_you_mean(key, kinds)
            raise UnknownKey(f"No item has the key {key}{near or '.'} The keys are {', '.join(kinds)}.")
    for key, value in where.values():
        numbers = kinds[key] in (int, float) and type(value) in (int, float)
        if not numbers and type(value) is not kinds[key]:
            raise UnknownKey(f"The filter on {key} compares with {shown(value)}, but {key} is {_KINDS[kinds[key]]}.")
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
    query = query.distance_type("dot").limit(k).nprobes(PROBED).refine_factor(REFINED)
    return query if condition is None else query.where(condition, prefilter=True)


def _runs(versions: Sequence[int], changes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yields the first and the last of those of `versions` that no other change separates; both are sorted."""
    first = last = versions[0]
    for version in versions[1:]:
        if any(last < other < version for other in changes):
            yield first, last
            first = version
        last = version
    yield first, last


def _among(ids: Sequence[str]) -> str:
    return f"id IN ({', '.join(map(literal, ids))})"


def _chunks(ids: Iterable[str]) -> Iterator[list[str]]:
    """Yields the valid ids, each once, IDS_TOGETHER at a time."""
    valid = [id for id in dict.fromkeys(ids) if is_id(id)]
    return (valid[at : at + IDS_TOGETHER] for at in range(0, len(valid), IDS_TOGETHER))


def _oldest_needed(handle: Handle, since: float) -> timedelta:
    """Returns the age of the newest version from before the time `since`; without one, of the oldest version."""
    times = [version["timestamp"].astimezone() for version in handle.list_versions()]
    oldest = max((at for at in times if at.timestamp() <= since), default=min(times))
    return datetime.now().astimezone() - oldest
