"""The collection: vectors and facts of pictures in LanceDB, thumbnails as files beside.

    INDEX/<encoder id>.lance/       one table per encoder, so vectors of two encoders never meet
    INDEX/thumbnails/ab/<id>.jpg    by the first two letters of the id; written before the row that names it

A picture's id is the hash of its file's bytes: indexing it again changes nothing. Any number of processes may read
and write at once. What `upsert` has returned from survives a crash of the machine.
"""

import hashlib
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import timedelta
from pathlib import Path

import numpy as np

OLD_VERSIONS_KEPT = timedelta(hours=1)  # a reader that began before may still need them


class IndexProblem(Exception):
    """A folder that is no index, or one that is damaged. The message names it and says what to do."""


@dataclass(frozen=True)
class Item:
    id: str
    name: str
    label: str | None
    path: str | None
    width: int  # pixels, upright
    height: int


COLUMNS = [field.name for field in fields(Item)]


def content_id(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


class Index:
    """The pictures that one encoder has embedded. All methods block, may be called from any thread, and raise
    IndexProblem."""

    def __init__(self, folder: Path, encoder_id: str, dimension: int):
        self.folder = Path(folder)
        self.encoder_id = encoder_id
        self.dimension = dimension
        self._connection = None
        self._opened = None
        self._durable: set[Path] = set()

    def upsert(self, items: Sequence[Item], vectors: np.ndarray) -> None:
        """Add or replace, all or none. `vectors` (n, d), of any length but 0; ids must differ."""
        import pyarrow as pa

        columns = {name: [getattr(item, name) for item in items] for name in COLUMNS}
        columns["vector"] = pa.FixedSizeListArray.from_arrays(pa.array(unit(vectors).ravel()), self.dimension)
        with self._explained("written"):
            thumbnails = {self._thumbnail_path(item.id).parent for item in items}
            for folder in sorted(thumbnails | {self.folder / "thumbnails"}):
                _fsync(folder)
            table = self._table(create=True)
            rows = pa.table(columns, schema=self._schema())
            table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all().execute(rows)
            self._flush()

    def search(self, vector: np.ndarray, k: int, without: str | None = None) -> list[tuple[Item, float]]:
        """The k nearest to `vector` (d,), with their cosine, nearest first; `without` is the id of one to leave out."""
        with self._explained("read"):
            if (table := self._table()) is None:
                return []
            query = table.search(unit(vector[None])[0], vector_column_name="vector")
            query = query.distance_type("dot").limit(k).select([*COLUMNS, "_distance"])
            if without is not None and _possible(without):
                query = query.where(f"id != '{without}'", prefilter=True)
            return [(_item(row), 1.0 - row["_distance"]) for row in query.to_list()]

    def get(self, id: str) -> tuple[Item, np.ndarray] | None:
        """The item and its unit vector (d,)."""
        with self._explained("read"):
            if not _possible(id) or (table := self._table()) is None:
                return None
            rows = table.search().where(f"id = '{id}'").select([*COLUMNS, "vector"]).limit(1).to_list()
            return (_item(rows[0]), np.asarray(rows[0]["vector"], np.float32)) if rows else None

    def page(self, limit: int, offset: int = 0) -> list[Item]:
        with self._explained("read"):
            if (table := self._table()) is None:
                return []
            return [_item(row) for row in table.search().select(COLUMNS).offset(offset).limit(limit).to_list()]

    def count(self) -> int:
        with self._explained("read"):
            table = self._table()
            return table.count_rows() if table is not None else 0

    def ids(self) -> set[str]:
        with self._explained("read"):
            if (table := self._table()) is None:
                return set()
            return set(table.search().select(["id"]).to_arrow()["id"].to_pylist())

    def compact(self) -> None:
        """Join what many small upserts have left in pieces."""
        with self._explained("written"):
            if (table := self._table()) is not None:
                table.optimize(cleanup_older_than=OLD_VERSIONS_KEPT)
                self._flush()

    def thumbnail(self, id: str) -> Path | None:
        """The JPEG file."""
        path = self._thumbnail_path(id)
        return path if _possible(id) and path.is_file() else None

    def add_thumbnail(self, id: str, jpeg: bytes) -> None:
        """Write it, unless it is there. The upsert of its item makes it durable."""
        path = self._thumbnail_path(id)
        if path.exists():
            return
        with self._explained("written"):
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f".{id}.{os.getpid()}-{threading.get_ident()}.part")
            part.write_bytes(jpeg)
            _fsync(part)
            part.replace(path)

    def _thumbnail_path(self, id: str) -> Path:
        return self.folder / "thumbnails" / id[:2] / f"{id}.jpg"

    def _schema(self):
        import pyarrow as pa

        # Without this mark two processes that add the same new id at once would leave two rows of it.
        key = {"lance-schema:unenforced-primary-key": "true"}
        return pa.schema(
            [
                pa.field("id", pa.string(), nullable=False, metadata=key),
                pa.field("name", pa.string()),
                pa.field("label", pa.string()),
                pa.field("path", pa.string()),
                pa.field("width", pa.int32()),
                pa.field("height", pa.int32()),
                pa.field("vector", pa.list_(pa.float32(), self.dimension)),
            ]
        )

    def _table(self, create: bool = False):
        """LanceDB's table; None where there is none and none is to be made."""
        import lancedb  # seconds, and the supervisor of `bentoml serve` loads this module too

        if self._opened is not None:
            return self._opened
        if self._connection is None:
            if not create and not self.folder.is_dir():
                return None  # connecting would make the folder
            # At 0 every read looks for what other processes have written.
            self._connection = lancedb.connect(self.folder, read_consistency_interval=timedelta(0))
        if create:
            table = self._connection.create_table(self.encoder_id, schema=self._schema(), exist_ok=True)
        else:
            try:
                table = self._connection.open_table(self.encoder_id)
            except ValueError as error:
                if "not found" not in str(error):
                    raise
                return None  # or another process is about to make it
        if table.schema.names != self._schema().names or table.schema.field("vector").type.list_size != self.dimension:
            raise IndexProblem(
                f"{self.folder} holds a table {self.encoder_id} that is not from here; choose another folder."
            )
        self._opened = table
        return table

    @contextmanager
    def _explained(self, done: str) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError, OSError) as error:  # what LanceDB raises, without classes of its own
            self._opened = self._connection = None
            raise IndexProblem(
                f"The index in {self.folder} cannot be {done} ({_first_line(error)}). If it is damaged, move it away "
                f"and fill a new one with `python serving/bulk.py`."
            ) from error

    def _flush(self) -> None:
        """Lance leaves what it wrote to the disk's cache: flush new files, then the folders that name them."""
        root = self.folder / f"{self.encoder_id}.lance"
        present = {path for path in root.rglob("*") if path.is_file()}
        new = present - self._durable
        for path in new:
            _fsync(path)
        for folder in {path.parent for path in new} | {root, self.folder}:
            _fsync(folder)
        self._durable = present


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows of (n, d) at length 1, float32."""
    vectors = np.asarray(vectors, np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(np.float32).tiny)


def _item(row: dict) -> Item:
    return Item(*(row[name] for name in COLUMNS))


def _possible(id: str) -> bool:
    """Whether this could be an id; nothing else may reach a path or a filter."""
    return len(id) == 32 and set(id) <= set("0123456789abcdef")


def _first_line(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return text.partition(", /")[0].partition("\n")[0]  # without the place in Lance's sources


def _fsync(path: Path) -> None:
    """Flush a file or folder. One that another process's clean-up has just removed needs none."""
    if os.name == "nt":  # has no such call for folders, nor for files opened to read
        return
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
