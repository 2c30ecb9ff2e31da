"""A collection: vectors and metadata of pictures in LanceDB, thumbnails and originals in files.

    INDEX/<name>.<encoder id>.lance/              one table for each encoder: vectors of two are never compared
    INDEX/random-pairs/<name>.<encoder id>.npz    how alike random items are, by random_pairs.py
    INDEX/thumbnails/, originals/, deleted/       files of the items, by files.py
    INDEX/names.json                              names of renamed collections, and aliases, by names.py
    INDEX/changes/<name>/                         which commits belong to one change, by changes.py
    INDEX/folders/<name>.json                     folders that commands were given; only below them are files read

INDEX is a folder or s3://bucket/prefix. A picture's id is the hash of its file's bytes by default, so indexing it again
changes nothing. Any number of processes may read and write at the same time. When `upsert` returns, the items survive
a crash.
"""

import copy
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from serving.collection.changes import ChangeWriter, Kind, drop_changes, id_of_commit, needed_since, sweep_changes
from serving.collection.files import ItemFiles
from serving.collection.items import Item, checked_vectors, content_id, is_id, matrix, metadata_types, unit
from serving.collection.lease import Lease
from serving.collection.names import NAME, names_of, read_names, refuse_bad_name, rename, set_alias
from serving.collection.problems import BadName, IndexProblem, WrongEncoder
from serving.collection.random_pairs import LearntPairs
from serving.collection.store import FileStore
from serving.collection.summary import ROWS, summary
from serving.collection.table import UNINDEXED_BYTES, LanceTable, table_names
from serving.collection.verify import verify
from serving.protocol import replies
from serving.protocol.filters import Filter
from serving.protocol.shown import counted

__all__ = ["DEFAULT", "Index", "IndexProblem", "Item", "WrongEncoder", "collections", "content_id", "unit"]

DEFAULT = "pictures"


class Index:
    """The pictures of collection `name` that one encoder has embedded. All methods block, may be called from any
    thread, and raise IndexProblem. If the collection does not exist, reads return nothing; if only other encoders have
    embedded it, they raise WrongEncoder."""

    def __init__(
        self, uri: str | Path, encoder_id: str, dimension: int, name: str = DEFAULT, stored: str | None = None
    ):
        """name    of the collection, or an alias
        stored  its name in paths, if that is known already
        """
        refuse_bad_name(name)
        self.store, self.encoder_id, self.dimension = FileStore(uri), encoder_id, dimension
        self.name, self.stored = (name, stored) if stored else names_of(self.store).resolve(name)
        self._table = LanceTable(self.store, f"{self.stored}.{encoder_id}", dimension)
        self.files = ItemFiles(self.store, self.stored, self._all_tables)
        self.random_pairs = LearntPairs(self._table, f"random-pairs/{self.stored}.{encoder_id}.npz")
        self._change: ChangeWriter | None = None
        self.last_change: str | None = None
        """Id of the change that the last write through this object made; None if it wrote nothing. An object that
        several threads use has no such write: copy it."""

    # Writing

    def upsert(
        self,
        items: Sequence[Item],
        vectors: np.ndarray,
        thumbnails: Mapping[str, bytes] = {},
        allow_other_encoder: bool = False,
        originals: Mapping[str, bytes] = {},
    ) -> None:
        """Add or replace all of the items or none. They are durable when this returns. Items that get another picture
        are deleted from the tables of other encoders, which have vectors of the picture before.

        items                distinct ids
        vectors              (n, d), any length but 0
        thumbnails           JPEG files by id
        allow_other_encoder  create this encoder's table even if another encoder has embedded the collection
        originals            files of pictures to keep, by id, of items that have a thumbnail
        """
        self.last_change = None
        if not len(items):
            return
        vectors, types = checked_vectors(items, vectors, self.dimension), metadata_types(items)
        with self._table.explained("written"):
            self._check_creation(allow_other_encoder)
            replaced = self.files.write(thumbnails, originals)
            try:
                version, added, changed = self._table.upsert(items, vectors, types)
            except Exception:
                self.files.take_back(replaced)
                raise
            self.files.restore(thumbnails, originals)
            commits = [(self._table.name, version)]
            for table in self._all_tables()[1:] if replaced.changed else ():
                if known := table.known(replaced.changed):
                    commits.append((table.name, table.delete(sorted(known))))
            self.files.keep_replaced(replaced)
            self._note(commits, added, changed)

    @contextmanager
    def one_change(self, kind: Kind = "write", id: str | None = None) -> Iterator["Index"]:
        """Yields this collection; what is written through that object is one change, and is undone together. A context
        that is abandoned leaves its change open, as a process that was killed does.

        id  of a change that others write to, too
        """
        if self._change is not None:
            yield self
            return
        whole = copy.copy(self)
        writer = whole._change = ChangeWriter(self.store, self.stored, kind, id)
        abandoned = False
        try:
            yield whole
        except GeneratorExit:  # by garbage collection, which can run where writing would wait for ever
            abandoned = True
            raise
        finally:
            if not abandoned:
                with suppress(IndexProblem):
                    writer.end()

    @property
    def change_id(self) -> str | None:
        """Inside `one_change`: the change's id."""
        return self._change.change.id if self._change else None

    def _note(self, commits: Sequence[tuple[str, int]], added: int = 0, changed: int = 0, deleted: int = 0) -> None:
        """commits  tables and versions; a single one is a change by itself, and need not be noted"""
        with suppress(IndexProblem):  # the items are stored; without the note, each commit is undone by itself
            if self._change is not None:
                self._change.add(commits, added, changed, deleted)
                self.last_change = self._change.change.id
            elif len(commits) > 1:
                writer = ChangeWriter(self.store, self.stored)
                writer.add(commits, added, changed, deleted, open=False)
                self.last_change = writer.change.id
            else:
                self.last_change = id_of_commit(*commits[0])

    def filling(self) -> AbstractContextManager[Lease]:
        """A lease for as long as many items are being added, so that other processes can tell; it stops nobody."""
        return self.store.lease(f"fill.{self._table.name}")

    def add_folders(self, folders: Iterable[str]) -> None:
        """Remember absolute paths of folders with pictures of this collection. No route of the service can name one; a
        copy of items gets those of their collection."""
        known = self.folders()
        if new := sorted({*known, *folders} - {*known}):
            self.store.write(f"folders/{self.stored}.json", json.dumps([*known, *new]).encode())

    def change(self, facts: Mapping[str, Mapping[str, Any]]) -> set[str]:
        """Change facts of items, for all encoders; their pictures and vectors stay. Returns the ids that existed.

        facts   by id, any of name, label, path and metadata; of the metadata the keys to set, or to remove by None
        raises  BadItem, and then no item is changed
        """

        def edit(item: Item) -> Item:
            new = dict(facts[item.id])
            metadata = item.metadata | new.pop("metadata", {})
            return replace(item, **new, metadata={key: value for key, value in metadata.items() if value is not None})

        self.last_change = None
        ids = [id for id in facts if is_id(id)]
        changed: dict[str, set[str]] = {}
        commits: list[tuple[str, int]] = []
        with self._table.explained("written"):
            tables = self._all_tables() if ids else []
            for table in tables:
                changed[table.name], made = table.change(ids, edit)
                commits += [(table.name, version) for version in made]
            for table in tables[:-1]:  # again, since items may have been taken over from one to another meanwhile
                table.refresh()
                if new := table.known(ids) - changed[table.name]:
                    commits += [(table.name, version) for version in table.change(sorted(new), edit)[1]]
            everything = set().union(*changed.values())
            if commits:
                self._note(commits, changed=len(everything))
            return everything

    def create(self, allow_other_encoder: bool = False) -> None:
        """Create the collection without items, unless it exists."""
        with self._table.explained("written"):
            self._check_creation(allow_other_encoder)
            self._table.create()

    def drop(self) -> int:
        """Delete the collection: the tables of all encoders, files and derived results. It cannot be undone.
        Returns how many items it had."""
        with self._table.explained("written"):
            if aliases := names_of(self.store).aliases_of(self.stored):
                raise BadName(f"{self.name} has the alias {aliases[0]}; delete that first, or switch it.")
            tables = self._all_tables()
            count = max((table.count() for table in tables), default=0)
            for table in tables:
                table.drop()
                self.store.delete(list(self.store.list(table.root)))  # what other processes wrote meanwhile
            self.files.drop()
            drop_changes(self.store, self.stored)
            for folder in ("derived", "random-pairs", "reembedding", "folders"):
                files = self.store.list(folder)
                self.store.delete([path for path in files if path.startswith(f"{folder}/{self.stored}.")])
            return count

    def rename(self, new: str) -> None:
        """Give the collection another name. Raises BadName."""
        with self._table.explained("written"):
            rename(self.store, self.name, new, exists=self._is_taken(new))

    def set_alias(self, alias: str) -> None:
        """Let an alias stand for this collection, and no longer for another one. Raises BadName."""
        with self._table.explained("written"):
            set_alias(self.store, alias, self.name, exists=self._is_taken(alias))

    def _is_taken(self, name: str) -> bool:
        stored = names_of(self.store).resolve(name)[1]
        return any(other == stored for other, _ in _tables(self.store))

    def delete(self, ids: Iterable[str], of_all_encoders: bool = True) -> set[str]:
        """Delete the items, with their files, from the tables of all encoders, or only from this one's. Returns
        those of `ids` that existed."""
        self.last_change = None
        ids = [id for id in dict.fromkeys(ids) if is_id(id)]
        with self._table.explained("written"):
            if not ids:
                return set()
            deleted: dict[str, list[int]] = {}
            commits = []
            tables = self._all_tables() if of_all_encoders else [self._table]
            for table in [*tables, *tables[:-1]]:  # again, since items may be taken over from one to another meanwhile
                table.refresh()
                present = table.checksums(ids)
                if present:
                    commits.append((table.name, table.delete(list(present))))
                for id, checksum in present.items():
                    deleted.setdefault(id, []).append(checksum)
            if commits:
                self._note(commits, deleted=len(deleted))
            self.files.put_aside(deleted)
            return set(deleted)

    def retract(self, rows: Mapping[str, int]) -> None:
        """Delete items from this encoder's table that were taken over from another one, and changed there meanwhile.

        rows  by id, their checksums in the other table
        """
        with self._table.explained("written"):
            present = self._table.checksums(rows) if rows else {}
            if present:
                self._note([(self._table.name, self._table.delete(list(present)))], added=-len(present))
                self.files.put_aside({id: [checksum, rows[id]] for id, checksum in present.items()})

    # Reading

    def search(self, vector: np.ndarray, k: int, where: Filter | None = None) -> list[tuple[Item, float]]:
        """Returns the k items nearest to `vector` (d,) with their cosine, nearest first."""
        return self.search_many(np.asarray(vector)[None], k, where)[0]

    def search_many(self, vectors: np.ndarray, k: int, where: Filter | None = None) -> list[list[tuple[Item, float]]]:
        """Returns the results of `search` for each of `vectors` (n, d), in one pass."""
        vectors = np.asarray(vectors, np.float32)
        if vectors.ndim != 2 or vectors.shape[1] != self.dimension or not np.isfinite(vectors).all():
            raise IndexProblem(f"Searching {self.name} needs vectors of {self.dimension} finite numbers.")
        with self._table.explained("read"):
            if k < 1 or not len(vectors) or not self._exists():
                return [[] for _ in vectors]
            return self._table.nearest(unit(vectors), k, where)

    def exists(self) -> bool:
        """Whether there is such a collection, of any encoder."""
        with self._table.explained("read"):
            return self._table.exists() or bool(self._other_encoders())

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

    def paths(self) -> dict[str, str]:
        """Returns the paths of the items' files, by id, of those that have one."""
        with self._table.explained("read"):
            rows = self._table.read(["id", "path"]).to_pylist() if self._exists() else []
        return {row["id"]: row["path"] for row in rows if row["path"]}

    def page(self, limit: int, offset: int = 0, where: Filter | None = None) -> list[Item]:
        with self._table.explained("read"):
            return self._table.page(limit, offset, where) if limit >= 1 and self._exists() else []

    def page_after(self, after: str, limit: int, where: Filter | None = None) -> list[Item]:
        """Returns the first items whose ids come after `after`, in the order of their ids: pages that are read one
        after the other have each item once that is there all the time, whatever is written meanwhile."""
        with self._table.explained("read"):
            return self._table.page_after(after, limit, where) if limit >= 1 and self._exists() else []

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

    def sample(self, most: int) -> np.ndarray:
        """Returns the unit vectors (n, d) float32 of `most` random items, or of all if there are fewer."""
        with self._table.explained("read"):
            return self._table.sample(most)[1] if self._exists() else np.empty((0, self.dimension), np.float32)

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
        return self.files.path("thumbnails", id)

    def folders(self) -> list[str]:
        """Returns the folders below which the paths of items may be read."""
        content = self.store.read(f"folders/{self.stored}.json")
        try:
            return [str(folder) for folder in json.loads(content or b"[]")]
        except ValueError as error:
            raise IndexProblem(f"{self.store.uri}/folders/{self.stored}.json is damaged; delete it.") from error

    def read_thumbnail(self, id: str) -> bytes | None:
        """Returns the thumbnail's JPEG file, None if there is none."""
        with self._table.explained("read"):
            return self.files.read("thumbnails", id)

    def read_original(self, id: str) -> bytes | None:
        """Returns the file of an uploaded picture, None if it was not kept."""
        with self._table.explained("read"):
            return self.files.read("originals", id)

    # Maintenance

    def facts(self, measured: bool = False) -> replies.Collection:
        """measured: with the size of the originals, for which they have to be listed."""
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
                aliases=names_of(self.store).aliases_of(self.stored),
                originals=self.files.original_bytes() if measured else 0,
            )

    def verify(self) -> list[str]:
        """Returns a sentence for each kind of damage, [] if there is none. Reads the whole collection."""
        try:
            with self._table.explained("read"):
                return verify(self._table, self.files.sizes("originals")) if self._exists() else []
        except IndexProblem as problem:
            return [str(problem)]

    def without_thumbnail(self) -> int:
        """Returns the number of items without a thumbnail: it was lost, or they were put in or imported as vectors."""
        with self._table.explained("read"):
            return len(self.ids() - self.files.ids("thumbnails"))

    def maintain(self) -> bool:
        """Merge the small files that small upserts leave, delete versions that no change is undone to any more, build
        the index for searching, and learn how alike random items are.
        Returns False if another process is doing it. Searches continue meanwhile."""
        with self._table.explained("written"):
            if not self._exists():
                return True
            with self.store.lease(f"maintain.{self._table.name}") as held:
                since = needed_since(self.store, self.stored)
                steps = (
                    lambda: self._table.maintain(since),
                    self.random_pairs.up_to_date,
                    lambda: self.files.sweep(time.time() - since),
                    lambda: sweep_changes(self.store, self.stored),
                )
                for step in steps:
                    if not held:  # another process has taken over
                        return False
                    step()
                return True

    @property
    def rows_per_maintenance(self) -> int:
        """After so many new rows `maintain` should run, so that searches do not become slow."""
        return max(1, UNINDEXED_BYTES // (4 * self.dimension))

    def _exists(self) -> bool:
        if self._table.exists():
            return True
        self._refuse_other_encoder()
        return False

    def _check_creation(self, allow_other_encoder: bool) -> None:
        """Raises WrongEncoder, or IndexProblem when the name has been given to another collection since this object was
        made: a table of the name in paths would belong to no collection."""
        if self._table.exists():
            return
        if read_names(self.store).resolve(self.name)[1] != self.stored:
            raise IndexProblem(f"Another collection has been renamed to {self.name} just now; try again.")
        if not allow_other_encoder:
            self._refuse_other_encoder()

    def _refuse_other_encoder(self) -> None:
        if others := self._other_encoders():
            count = LanceTable.existing(self.store, f"{self.stored}.{others[0]}").count()
            raise WrongEncoder(
                f"{self.name} holds vectors of {others[0]}, and this is {self.encoder_id}. Name another collection or "
                f"index, or embed all {counted(count, 'item')} of {self.name} again: twinview index reembed "
                f"--collection {self.name}, or PUT /collections/{self.name}/reembedding"
            )

    def _other_encoders(self) -> list[str]:
        tables = _tables(self.store)
        return sorted(encoder for stored, encoder in tables if stored == self.stored and encoder != self.encoder_id)

    def _all_tables(self) -> list[LanceTable]:
        """Returns the table of each encoder that has embedded the collection."""
        others = [LanceTable.existing(self.store, f"{self.stored}.{encoder}") for encoder in self._other_encoders()]
        return [*([self._table] if self._table.exists() else []), *others]


def collections(uri: str | Path) -> list[replies.Collection]:
    """Returns the facts of every table: one for each collection and encoder."""
    store = FileStore(uri)
    facts = []
    with store.explained("read"):
        shown = names_of(store).shown
        for stored, encoder in _tables(store):
            dimension = LanceTable.existing(store, f"{stored}.{encoder}").dimension
            facts.append(Index(uri, encoder, dimension, shown(stored), stored).facts(measured=True))
    return facts


def names(uri: str | Path, encoder_id: str) -> list[str]:
    """Returns the names of the collections that this encoder has embedded."""
    store = FileStore(uri)
    with store.explained("read"):
        shown = names_of(store).shown
        return [shown(stored) for stored, encoder in _tables(store) if encoder == encoder_id]


def existing_collections(uri: str | Path, name: str | None = None) -> list[replies.Collection]:
    """Like `collections`, or only those of that name. Raises IndexProblem if there are none."""
    refuse_missing_index(uri)
    everything = collections(uri)
    if not everything:
        raise IndexProblem(f"{uri} holds no collection" + (f", and so not {name}" if name else ""))
    if name is None:
        return everything
    resolved = names_of(FileStore(uri)).resolve(name)[0]
    if chosen := [facts for facts in everything if facts.name == resolved]:
        return chosen
    raise IndexProblem(f"there is no collection {name} in {uri}; {others_in_words(everything)}")


def others_in_words(everything: Iterable[replies.Collection]) -> str:
    """Says which collections there are."""
    names = sorted({facts.name for facts in everything})
    if len(names) < 2:
        return f"there is only {names[0]}" if names else "there are none"
    return f"there are {', '.join(names)}"


def refuse_missing_index(uri: str | Path) -> None:
    """Raises IndexProblem if the folder does not exist."""
    if not FileStore(uri).exists():
        raise IndexProblem(f"there is no index at {uri}")


def _tables(store: FileStore) -> list[tuple[str, str]]:
    """Returns (the collection's name in paths, encoder) of each table."""
    parts = (name.partition(".") for name in table_names(store))
    return [(name, encoder) for name, dot, encoder in parts if dot and NAME.fullmatch(name)]
