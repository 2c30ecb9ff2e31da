"""A collection: vectors and facts of pictures in LanceDB, thumbnails as files beside.

    INDEX/<name>.<encoder id>.lance/       a table an encoder, so that vectors of two encoders never meet
    INDEX/thumbnails/<name>/ab/<id>.jpg    by the first two letters of the id; written before the row that names it
    INDEX/deleted/<name>/<id>.jpg          of items deleted in the last hour, for `undo`

INDEX is a folder or s3://bucket/prefix. A picture's id is the hash of its file's bytes, unless it was given another:
indexing it again changes nothing. Any number of processes may read and write at once. What `upsert` has returned from
survives a crash.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path

import numpy as np

from serving.collection import items as rows
from serving.collection import manifest
from serving.collection.items import Item, content_id, matrix, possible, selected, to_item, unit
from serving.collection.store import Store
from serving.collection.summary import ROWS, summary
from serving.collection.table import OLD_VERSIONS_KEPT, IndexProblem, Table, explained
from serving.collection.verify import verify
from serving.protocol import replies
from serving.protocol.filters import Filter, literal

__all__ = ["DEFAULT", "Index", "IndexProblem", "Item", "WrongEncoder", "collections", "content_id", "unit"]

DEFAULT = "pictures"
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
AT_ONCE = 1000  # ids of one condition


class WrongEncoder(IndexProblem):
    """The collection holds vectors of another encoder."""


class Index:
    """The pictures of collection `name` that one encoder has embedded. All methods block, may be called from any
    thread, and raise IndexProblem. Reads of a collection that is not there are empty; of one that only another encoder
    has embedded they raise WrongEncoder."""

    def __init__(self, uri: str | Path, encoder_id: str, dimension: int, name: str = DEFAULT):
        if not NAME.fullmatch(name):
            raise IndexProblem(f"{name!r} is no name of a collection: letters, digits, _ and -, at most 64.")
        self.store, self.name, self.encoder_id, self.dimension = Store(uri), name, encoder_id, dimension
        self._table = Table(self.store, f"{name}.{encoder_id}", dimension)

    # Writing

    def upsert(
        self,
        items: Sequence[Item],
        vectors: np.ndarray,
        thumbnails: Mapping[str, bytes] = {},
        beside: bool = False,
    ) -> None:
        """Add or replace, all or none, durable when it returns. `vectors` (n, d), of any length but 0; ids differ;
        `thumbnails` JPEG files by id. `beside`: make this encoder's table though another's is there."""
        if not len(items):
            return
        vectors, kinds = rows.checked(items, vectors, self.dimension), rows.kinds(items)
        with self._table.explained("written"):
            if self._table.open() is None and not beside:
                self._refuse_other()
            self.store.write_many({self.thumbnail_path(id): jpeg for id, jpeg in thumbnails.items()})

            def merge(table) -> None:
                self._table.add_columns(table, kinds)
                new = rows.to_rows(items, vectors, self._table.columns(table), table.schema)
                table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all().execute(new)

            self._table.commit(merge, create=True)

    def delete(self, ids: Iterable[str]) -> int:
        """How many were there. Their thumbnails go too, but those that another encoder's table names."""
        ids = [id for id in dict.fromkeys(ids) if possible(id)]
        with self._table.explained("written"):
            if not ids or self._opened() is None:
                return 0
            gone = self._table.commit(lambda table: table.delete(_among(ids)).num_deleted_rows)
            self._put_aside(ids)
            return gone

    # Reading

    def search(
        self,
        vector: np.ndarray,
        k: int,
        where: Filter | None = None,
        without: Collection[str] = (),
        threshold: float | None = None,
    ) -> list[tuple[Item, float]]:
        """The k nearest to `vector` (d,), with their cosine, nearest first. `without` are ids to leave out; below the
        cosine `threshold` nothing is returned."""
        found = self.search_many(np.asarray(vector)[None], k, where, without)[0]
        return [(item, cosine) for item, cosine in found if threshold is None or cosine >= threshold]

    def search_many(
        self, vectors: np.ndarray, k: int, where: Filter | None = None, without: Collection[str] = ()
    ) -> list[list[tuple[Item, float]]]:
        """`search` of each of `vectors` (n, d), in one pass."""
        vectors = np.asarray(vectors, np.float32)
        if vectors.ndim != 2 or vectors.shape[1] != self.dimension or not np.isfinite(vectors).all():
            raise IndexProblem(f"Searching {self.name} wants vectors of {self.dimension} finite numbers.")
        without = {without} if isinstance(without, str) else set(without)
        with self._table.explained("read"):
            if k < 1 or not len(vectors) or (table := self._opened()) is None:
                return [[] for _ in vectors]
            found = self._nearest(table, unit(vectors), k + len(without), self._table.where(table, where))
        return [[(item, cosine) for item, cosine in some if item.id not in without][:k] for some in found]

    def get(self, id: str) -> tuple[Item, np.ndarray] | None:
        """The item and its unit vector (d,)."""
        return self.get_many([id]).get(id)

    def get_many(self, ids: Iterable[str]) -> dict[str, tuple[Item, np.ndarray]]:
        """Those that are there."""
        found = {}
        with self._table.explained("read"):
            if (table := self._opened()) is not None:
                for some in _chunks([id for id in dict.fromkeys(ids) if possible(id)]):
                    for items, vectors in self._scan(table, _among(some), AT_ONCE):
                        found |= {item.id: (item, vector) for item, vector in zip(items, vectors, strict=True)}
        return found

    def known(self, ids: Iterable[str]) -> set[str]:
        """Those of `ids` that are there."""
        with self._table.explained("read"):
            return set() if (table := self._opened()) is None else _known(table, ids)

    def ids(self) -> set[str]:
        with self._table.explained("read"):
            if (table := self._opened()) is None:
                return set()
            return _ids(table)

    def page(self, limit: int, offset: int = 0, where: Filter | None = None) -> list[Item]:
        with self._table.explained("read"):
            if limit < 1 or (table := self._opened()) is None:
                return []
            columns = self._table.columns(table)
            query = table.search().select(selected(columns))
            if (condition := self._table.where(table, where)) is not None:
                query = query.where(condition)
            return [to_item(row, columns) for row in query.offset(offset).limit(limit).to_arrow().to_pylist()]

    def count(self, where: Filter | None = None) -> int:
        with self._table.explained("read"):
            if (table := self._opened()) is None:
                return 0
            return table.count_rows(self._table.where(table, where))

    def scan(self, where: Filter | None = None, batch: int = 4096) -> Iterator[tuple[list[Item], np.ndarray]]:
        """All items with their unit vectors (n, d), `batch` at a time, in the order of the table, of one version."""
        with self._table.explained("read"):
            if (table := self._opened()) is not None:
                yield from self._scan(table, self._table.where(table, where), batch)

    def vectors(self) -> tuple[list[str], np.ndarray]:
        """Ids and vectors (n, d) float32 of all."""
        with self._table.explained("read"):
            if (table := self._opened()) is None:
                return [], np.empty((0, self.dimension), np.float32)
            whole = table.search().select(["id", "vector"]).to_arrow()
            return whole["id"].to_pylist(), matrix(whole["vector"], self.dimension)

    def keys(self) -> dict[str, type]:
        """Metadata keys, and the types of their values."""
        with self._table.explained("read"):
            if (table := self._opened()) is None:
                return {}
            return {key: kind for key, (_, kind) in self._table.columns(table).items()}

    def summary(self) -> list[replies.Key]:
        """What its items can be filtered by beside name, path and size."""
        with self._table.explained("read"):
            if (table := self._opened()) is None:
                return []
            columns = {"label": ("label", str), **self._table.columns(table)}
            rows = table.search().select([name for name, _ in columns.values()]).limit(ROWS).to_arrow()
        return summary(rows, columns)

    def thumbnail_path(self, id: str) -> str:
        """Its place in the store, whether or not it is there."""
        if not possible(id):
            raise IndexProblem(f"{id!r} is no id: letters, digits, _, - and ., at most 128.")
        return f"thumbnails/{self.name}/{id[:2]}/{id}.jpg"

    def read_thumbnail(self, id: str) -> bytes | None:
        """The JPEG file."""
        with self._table.explained("read"):
            return self.store.read(self.thumbnail_path(id)) if possible(id) else None

    # Looking after

    def facts(self) -> replies.Collection:
        with self._table.explained("read"):
            table = self._opened()
            index = None if table is None else self._table.index_facts(table)
            return replies.Collection(
                name=self.name,
                encoder=self.encoder_id,
                others=self._others(),
                dimension=self.dimension,
                count=table.count_rows() if table is not None else 0,
                bytes=self.store.size(self._table.root) if table is not None else 0,
                index=index.index_type if index else "none",
                version=table.version if table is not None else 0,
            )

    def verify(self) -> list[str]:
        """Sentences about what is wrong; [] is sound. Reads everything."""
        return verify(self)

    def maintain(self) -> bool:
        """Join what many small upserts have left in pieces, forget old versions, build the index that searching wants.
        False where another process is at it. Searches go on."""
        with self._table.explained("written"):
            if self._opened() is None:
                return True
            with self.store.lease(f"maintain.{self._table.name}") as held:
                if held:
                    self._table.commit(self._table.maintain)
                    self.store.sweep(f"deleted/{self.name}", OLD_VERSIONS_KEPT.total_seconds())
                return held

    def versions(self) -> list[tuple[int, datetime, int]]:
        """(version, when, how many pictures) after each change, oldest first, as far back as they are kept."""
        with self._table.explained("read"):
            return [] if (table := self._opened()) is None else self._table.history(table)

    def undo(self) -> int:
        """Take back the last change: the version before is restored as a new one, whose number is returned. Undoing
        again takes back the undoing."""
        with self._table.explained("written"):
            if (table := self._opened()) is None:
                raise IndexProblem(f"The collection {self.name} is not there; nothing can be undone.")
            before = _ids(table)
            version = self._table.commit(self._table.undo)
            after = _ids(self._table.open())
            self._put_aside(before - after)
            self.store.move({self._aside(id): self.thumbnail_path(id) for id in after - before})
            return version

    def _put_aside(self, ids: Collection[str]) -> None:
        """Thumbnails of items that are gone, for as long as `undo` may want them; but not those that another encoder's
        table names."""
        kept: set[str] = set()
        for encoder in self._others():
            kept |= _known(self.store.connect().open_table(f"{self.name}.{encoder}"), ids)
        self.store.move({self.thumbnail_path(id): self._aside(id) for id in set(ids) - kept})

    def _aside(self, id: str) -> str:
        return f"deleted/{self.name}/{id}.jpg"

    def _opened(self):
        """LanceDB's table, None where the collection is not there."""
        if (table := self._table.open()) is None:
            self._refuse_other()
        return table

    def _others(self) -> list[str]:
        return sorted(
            encoder for name, encoder in _tables(self.store) if name == self.name and encoder != self.encoder_id
        )

    def _refuse_other(self) -> None:
        if others := self._others():
            raise WrongEncoder(
                f"{self.name} holds vectors of {others[0]}, and this is {self.encoder_id}; "
                f"re-embed it: twinview index reembed --collection {self.name}"
            )

    def _nearest(self, table, vectors: np.ndarray, k: int, condition: str | None) -> list[list[tuple[Item, float]]]:
        """The k nearest to each of the unit `vectors` (n, d), with their exact cosine."""
        columns = self._table.columns(table)
        if (snapshot := self._table.snapshot(table)) is not None:
            nearest = snapshot.search(vectors, k, condition)
            rows = snapshot.rows({key for keys, _ in nearest for key in keys}, selected(columns))
            items = {key: to_item(row, columns) for key, row in rows.items()}
            return [[(items[key], min(1.0, cosine)) for key, cosine in zip(*some, strict=True)] for some in nearest]
        query = self._table.query(table, vectors, k, condition).select(selected(columns, "_distance"))
        found: list[list[tuple[Item, float]]] = [[] for _ in vectors]
        for row in query.to_arrow().to_pylist():
            found[row.get("query_index", 0)].append((to_item(row, columns), min(1.0, 1.0 - row["_distance"])))
        return found

    def _scan(self, table, condition: str | None, batch: int) -> Iterator[tuple[list[Item], np.ndarray]]:
        columns = self._table.columns(table)
        query = table.search().select(selected(columns, "vector"))
        if condition is not None:
            query = query.where(condition)
        for some in query.to_batches(batch_size=batch):
            items = [to_item(row, columns) for row in some.drop_columns("vector").to_pylist()]
            yield items, matrix(some["vector"], self.dimension)


def collections(uri: str | Path) -> list[replies.Collection]:
    """Of all tables of all collections."""
    store = Store(uri)
    found = []
    with explained(store, "read"):
        for name, encoder in _tables(store):
            manifest.recover(store, f"{name}.{encoder}.lance")
            dimension = store.connect().open_table(f"{name}.{encoder}").schema.field("vector").type.list_size
            found.append(Index(uri, encoder, dimension, name).facts())
    return found


def _tables(store: Store) -> list[tuple[str, str]]:
    """(collection, encoder) of each table."""
    if not store.exists():
        return []
    names, token = [], None
    while True:
        page = store.connect().list_tables(page_token=token)
        names += page.tables
        if (token := page.page_token) is None:
            break
    parts = (name.partition(".") for name in sorted(names))
    return [(name, encoder) for name, dot, encoder in parts if dot and NAME.fullmatch(name)]


def _ids(table) -> set[str]:
    return set(table.search().select(["id"]).to_arrow()["id"].to_pylist())


def _known(table, ids: Iterable[str]) -> set[str]:
    found = set()
    for some in _chunks([id for id in dict.fromkeys(ids) if possible(id)]):
        found |= set(table.search().where(_among(some)).select(["id"]).limit(len(some)).to_arrow()["id"].to_pylist())
    return found


def _among(ids: Sequence[str]) -> str:
    return f"id IN ({', '.join(map(literal, ids))})"


def _chunks(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    return (ids[at : at + AT_ONCE] for at in range(0, len(ids), AT_ONCE))
