"""A collection: vectors and metadata of pictures in LanceDB, thumbnails in files.

    INDEX/<name>.<encoder id>.lance/              one table for each encoder: vectors of two are never compared
    INDEX/random-pairs/<name>.<encoder id>.npz    how alike random items are, by random_pairs.py
    INDEX/thumbnails/<name>/ab/<id>.jpg           in folders by the id's first two letters; written before the row
    INDEX/deleted/<name>/<id>.jpg                 thumbnails of items deleted in the last hour, for `undo`

INDEX is a folder or s3://bucket/prefix. A picture's id is the hash of its file's bytes by default, so indexing it again
changes nothing. Any number of processes may read and write at the same time. When `upsert` returns, the items survive
a crash.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path

import numpy as np

from serving.collection.items import Item, checked_vectors, content_id, is_id, matrix, metadata_types, unit
from serving.collection.problems import IndexProblem, WrongEncoder
from serving.collection.random_pairs import LearntPairs
from serving.collection.store import FileStore
from serving.collection.summary import ROWS, summary
from serving.collection.table import OLD_VERSIONS_KEPT, LanceTable, table_names
from serving.collection.verify import verify
from serving.protocol import replies
from serving.protocol.filters import Filter

__all__ = ["DEFAULT", "Index", "IndexProblem", "Item", "WrongEncoder", "collections", "content_id", "unit"]

DEFAULT = "pictures"
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


class Index:
    """The pictures of collection `name` that one encoder has embedded. All methods block, may be called from any
    thread, and raise IndexProblem. If the collection does not exist, reads return nothing; if only other encoders have
    embedded it, they raise WrongEncoder."""

    def __init__(self, uri: str | Path, encoder_id: str, dimension: int, name: str = DEFAULT):
        if not NAME.fullmatch(name):
            raise IndexProblem(f"{name!r} is not a collection's name: letters, digits, _ and -, at most 64.")
        self.store, self.name, self.encoder_id, self.dimension = FileStore(uri), name, encoder_id, dimension
        self._table = LanceTable(self.store, f"{name}.{encoder_id}", dimension)
        self.random_pairs = LearntPairs(self._table, f"random-pairs/{name}.{encoder_id}.npz")

    # Writing

    def upsert(
        self,
        items: Sequence[Item],
        vectors: np.ndarray,
        thumbnails: Mapping[str, bytes] = {},
        allow_other_encoder: bool = False,
    ) -> None:
        """Add or replace all of the items or none. They are durable when this returns.

        items                distinct ids
        vectors              (n, d), any length but 0
        thumbnails           JPEG files by id
        allow_other_encoder  create this encoder's table even if another encoder has embedded the collection
        """
        if not len(items):
            return
        vectors, types = checked_vectors(items, vectors, self.dimension), metadata_types(items)
        with self._table.explained("written"):
            if not (self._table.exists() or allow_other_encoder):
                self._refuse_other_encoder()
            self.store.write_many({self.thumbnail_path(id): jpeg for id, jpeg in thumbnails.items()})
            self._table.upsert(items, vectors, types)

    def filling(self) -> AbstractContextManager[bool]:
        """A lease for as long as many items are being added, so that other processes can tell; it stops nobody."""
        return self.store.lease(f"fill.{self._table.name}")

    def delete(self, ids: Iterable[str]) -> int:
        """Delete the items and return how many existed. Their thumbnails are deleted too, unless another encoder's
        table still has the item."""
        ids = [id for id in dict.fromkeys(ids) if is_id(id)]
        with self._table.explained("written"):
            if not ids or not self._exists():
                return 0
            deleted = self._table.delete(ids)
            self._put_aside(ids)
            return deleted

    # Reading

    def search(
        self,
        vector: np.ndarray,
        k: int,
        where: Filter | None = None,
        without: Collection[str] = (),
        threshold: float | None = None,
    ) -> list[tuple[Item, float]]:
        """Returns the k items nearest to `vector` (d,) with their cosine, nearest first.

        without    ids to leave out
        threshold  lowest cosine to return
        """
        results = self.search_many(np.asarray(vector)[None], k, where, without)[0]
        return [(item, cosine) for item, cosine in results if threshold is None or cosine >= threshold]

    def search_many(
        self, vectors: np.ndarray, k: int, where: Filter | None = None, without: Collection[str] = ()
    ) -> list[list[tuple[Item, float]]]:
        """Returns the results of `search` for each of `vectors` (n, d), in one pass."""
        vectors = np.asarray(vectors, np.float32)
        if vectors.ndim != 2 or vectors.shape[1] != self.dimension or not np.isfinite(vectors).all():
            raise IndexProblem(f"Searching {self.name} needs vectors of {self.dimension} finite numbers.")
        without = {without} if isinstance(without, str) else set(without)
        with self._table.explained("read"):
            if k < 1 or not len(vectors) or not self._exists():
                return [[] for _ in vectors]
            results = self._table.nearest(unit(vectors), k + len(without), where)
        return [[(item, cosine) for item, cosine in result if item.id not in without][:k] for result in results]

    def get(self, id: str) -> tuple[Item, np.ndarray] | None:
        """Returns the item and its unit vector (d,), None if it does not exist."""
        return self.get_many([id]).get(id)

    def get_many(self, ids: Iterable[str]) -> dict[str, tuple[Item, np.ndarray]]:
        """Returns items and unit vectors (d,) by id, for those of `ids` that exist."""
        with self._table.explained("read"):
            return self._table.get(ids) if self._exists() else {}

    def known(self, ids: Iterable[str]) -> set[str]:
        """Returns those of `ids` that exist."""
        with self._table.explained("read"):
            return self._table.known(ids) if self._exists() else set()

    def ids(self) -> set[str]:
        with self._table.explained("read"):
            return self._table.ids() if self._exists() else set()

    def page(self, limit: int, offset: int = 0, where: Filter | None = None) -> list[Item]:
        with self._table.explained("read"):
            return self._table.page(limit, offset, where) if limit >= 1 and self._exists() else []

    def count(self, where: Filter | None = None) -> int:
        with self._table.explained("read"):
            return self._table.count(where) if self._exists() else 0

    def version(self) -> int:
        """Returns a number that grows with every change, 0 if the collection does not exist."""
        with self._table.explained("read"):
            return self._table.version if self._exists() else 0

    def scan(self, where: Filter | None = None, batch: int = 4096) -> Iterator[tuple[list[Item], np.ndarray]]:
        """Yields all items with their unit vectors (n, d), n <= batch, of one version, in the order of the table."""
        with self._table.explained("read"):
            if self._exists():
                yield from self._table.scan(where, batch)

    def vectors(self) -> tuple[list[str], np.ndarray]:
        """Returns ids and unit vectors (n, d) float32 of all items."""
        with self._table.explained("read"):
            if not self._exists():
                return [], np.empty((0, self.dimension), np.float32)
            rows = self._table.read(["id", "vector"])
            return rows["id"].to_pylist(), matrix(rows["vector"], self.dimension)

    def keys(self) -> dict[str, type]:
        """Returns the metadata keys and the types of their values."""
        with self._table.explained("read"):
            return {key: column.kind for key, column in self._table.columns().items()} if self._exists() else {}

    def summary(self) -> list[replies.Key]:
        """Returns the keys to filter by, with their commonest values and ranges: `label` and the metadata."""
        with self._table.explained("read"):
            if not self._exists():
                return []
            columns = {"label": ("label", str), **self._table.columns()}
            rows = self._table.read([name for name, _ in columns.values()], limit=ROWS)
        return summary(rows, columns)

    def thumbnail_path(self, id: str) -> str:
        """Returns where the store has this item's thumbnail, whether or not it exists."""
        if not is_id(id):
            raise IndexProblem(f"{id!r} is not an id: letters, digits, _, - and ., at most 128.")
        return f"thumbnails/{self.name}/{id[:2]}/{id}.jpg"

    def read_thumbnail(self, id: str) -> bytes | None:
        """Returns the thumbnail's JPEG file, None if there is none."""
        with self._table.explained("read"):
            return self.store.read(self.thumbnail_path(id)) if is_id(id) else None

    # Maintenance

    def facts(self) -> replies.Collection:
        with self._table.explained("read"):
            exists = self._exists()
            return replies.Collection(
                name=self.name,
                encoder=self.encoder_id,
                others=self._other_encoders(),
                dimension=self.dimension,
                count=self._table.count() if exists else 0,
                bytes=self.store.size(self._table.root) if exists else 0,
                index=self._table.index_type() if exists else "none",
                version=self._table.version if exists else 0,
            )

    def verify(self) -> list[str]:
        """Returns a sentence for each kind of damage, [] if there is none. Reads the whole collection."""
        try:
            with self._table.explained("read"):
                return verify(self._table, self._thumbnails) if self._exists() else []
        except IndexProblem as problem:
            return [str(problem)]

    def maintain(self) -> bool:
        """Merge the small files that small upserts leave, delete old versions, build the index for searching, and learn
        how alike random items are.
        Returns False if another process is doing it. Searches continue meanwhile."""
        with self._table.explained("written"):
            if not self._exists():
                return True
            with self.store.lease(f"maintain.{self._table.name}") as held:
                if held:
                    self._table.maintain()
                    self.random_pairs.up_to_date()
                    self.store.sweep(f"deleted/{self.name}", OLD_VERSIONS_KEPT.total_seconds())
                return held

    def versions(self) -> list[tuple[int, datetime, int]]:
        """Returns (version, time, number of items) after each change, oldest first; old versions are deleted."""
        with self._table.explained("read"):
            return self._table.history() if self._exists() else []

    def undo(self) -> int:
        """Revert the last change: restore the version before it as a new version, and return the new number. A second
        undo reverts the first."""
        with self._table.explained("written"):
            if not self._exists():
                raise IndexProblem(f"The collection {self.name} does not exist; there is nothing to undo.")
            before = self._table.ids()
            version = self._table.undo()
            after = self._table.ids()
            self._put_aside(before - after)
            self.store.move({self._aside(id): self.thumbnail_path(id) for id in after - before})
            return version

    def _exists(self) -> bool:
        if self._table.exists():
            return True
        self._refuse_other_encoder()
        return False

    def _refuse_other_encoder(self) -> None:
        if others := self._other_encoders():
            raise WrongEncoder(
                f"{self.name} holds vectors of {others[0]}, and this is {self.encoder_id}; "
                f"re-embed it: twinview index reembed --collection {self.name}"
            )

    def _other_encoders(self) -> list[str]:
        tables = _tables(self.store)
        return sorted(encoder for name, encoder in tables if name == self.name and encoder != self.encoder_id)

    def _put_aside(self, ids: Collection[str]) -> None:
        """Move thumbnails of deleted items to deleted/, where `undo` finds them, except those that other tables use."""
        used: set[str] = set()
        for encoder in self._other_encoders():
            used |= LanceTable.existing(self.store, f"{self.name}.{encoder}").known(ids)
        self.store.move({self.thumbnail_path(id): self._aside(id) for id in set(ids) - used})

    def _aside(self, id: str) -> str:
        return f"deleted/{self.name}/{id}.jpg"

    def _thumbnails(self) -> set[str]:
        """Returns the ids that have a thumbnail."""
        return {path.rpartition("/")[2].removesuffix(".jpg") for path in self.store.list(f"thumbnails/{self.name}")}


def collections(uri: str | Path) -> list[replies.Collection]:
    """Returns the facts of every table: one for each collection and encoder."""
    store = FileStore(uri)
    facts = []
    with store.explained("read"):
        for name, encoder in _tables(store):
            dimension = LanceTable.existing(store, f"{name}.{encoder}").dimension
            facts.append(Index(uri, encoder, dimension, name).facts())
    return facts


def names(uri: str | Path, encoder_id: str) -> list[str]:
    """Returns the names of the collections that this encoder has embedded."""
    store = FileStore(uri)
    with store.explained("read"):
        return [name for name, encoder in _tables(store) if encoder == encoder_id]


def existing_collections(uri: str | Path, name: str | None = None) -> list[replies.Collection]:
    """Like `collections`, or only those of that name. Raises IndexProblem if there are none."""
    everything = collections(uri)
    chosen = [facts for facts in everything if name in (None, facts.name)]
    if not chosen:
        names = ", ".join(sorted({facts.name for facts in everything}))
        raise IndexProblem(f"{uri} holds no collection{f' {name}; it has {names}' if everything else ''}")
    return chosen


def _tables(store: FileStore) -> list[tuple[str, str]]:
    """Returns (collection, encoder) of each table."""
    parts = (name.partition(".") for name in table_names(store))
    return [(name, encoder) for name, dot, encoder in parts if dot and NAME.fullmatch(name)]
