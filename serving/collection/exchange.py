"""A collection as one Parquet file: `twinview index export` and `twinview embed` write it, `index import` reads it.

    id, name      string         as in the index
    label, path   string         null if the item has none
    width, height int32          pixels, upright
    bytes         int64          size of the original file
    vector        float32[d]     FixedSizeList
    ...                          metadata: one column for each key; string, int64, double or bool; null if the item has
                                 no value; named meta_KEY if the key has the name of a column above or starts with meta_

The schema's metadata names the encoder and the collection. The file has no thumbnails.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from serving.collection.items import TYPES, Item
from serving.collection.store import fsync
from serving.protocol.filters import KEY

ENCODER, COLLECTION = b"twinview.encoder", b"twinview.collection"
ROWS_AT_ONCE = 4096  # in one row group
FACTS = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("name", pa.string()),
        pa.field("label", pa.string()),
        pa.field("path", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("bytes", pa.int64()),
    ]
)
OWN = {*FACTS.names, "vector"}
SIZES = ("width", "height", "bytes")
TEXT, WHOLE = (pa.types.is_string, pa.types.is_large_string), (pa.types.is_integer,)
PLAIN = (*TEXT, *WHOLE, pa.types.is_floating, pa.types.is_boolean, pa.types.is_null)


class FileProblem(ValueError):
    """A file that cannot be read or written. The message names it."""


@dataclass(frozen=True)
class Contents:
    """The format and origin of a file; `rows` reads its rows."""

    path: Path
    encoder: str
    dimension: int
    collection: str | None
    """None if the rows are not from a collection."""
    count: int

    def rows(self) -> Iterator[tuple[list[Item], np.ndarray]]:
        """Yields items and their vectors (n, d), n <= ROWS_AT_ONCE. If an id occurs twice, the first is kept. Raises
        FileProblem."""
        seen: set[str] = set()
        with _readable(self.path), pyarrow.parquet.ParquetFile(self.path) as file:
            for batch in file.iter_batches(ROWS_AT_ONCE):
                if batch["id"].null_count or batch["name"].null_count:
                    raise FileProblem(f"{self.path} has a row without an id or a name")
                vectors = _vectors(batch["vector"], self.dimension)
                items = [_item(row) for row in batch.drop_columns(["vector"]).to_pylist()]
                new = [i for i, item in enumerate(items) if item.id not in seen and not seen.add(item.id)]
                sound = np.isfinite(vectors).all(axis=1) & vectors.any(axis=1)
                if not sound.all():
                    raise FileProblem(f"{self.path}: the vector of {items[sound.argmin()].id} is zero or not finite")
                yield [items[i] for i in new], vectors[new]


def contents(path: Path) -> Contents:
    """Returns what the file contains. Raises FileProblem if it is not in this format."""
    with _readable(path), pyarrow.parquet.ParquetFile(path) as file:
        schema, count = file.schema_arrow, file.metadata.num_rows
    notes = schema.metadata or {}
    if missing := [name for name in ("id", "name", "vector") if name not in schema.names]:
        raise FileProblem(f"{path} has no column {missing[0]}; its columns are {', '.join(schema.names)}")
    if ENCODER not in notes:
        raise FileProblem(f"{path} does not name the encoder of its vectors, as `twinview index export` does")
    vector = schema.field("vector").type
    if not (pa.types.is_fixed_size_list(vector) and pa.types.is_floating(vector.value_type)):
        raise FileProblem(f"{path}: the column vector has the type {vector}, not a FixedSizeList of numbers")
    for field in schema:
        allowed = PLAIN
        if field.name in FACTS.names:
            allowed = (*(WHOLE if field.name in SIZES else TEXT), pa.types.is_null)
        if field.name != "vector" and not any(test(field.type) for test in allowed):
            raise FileProblem(f"{path}: the column {field.name} has the type {field.type}, which is not allowed")
        if field.name not in OWN and not KEY.fullmatch(_key(field.name)):
            raise FileProblem(f"{path}: {field.name!r} is not a metadata key: letters, digits and _, at most 64")
    collection = notes[COLLECTION].decode() if COLLECTION in notes else None
    return Contents(path, notes[ENCODER].decode(), vector.list_size, collection, count)


class ParquetWriter:
    """Writes a file batch by batch, under a temporary name; it replaces the old file when it is complete."""

    def __init__(
        self,
        path: Path,
        encoder: str,
        dimension: int,
        collection: str | None = None,
        metadata: Mapping[str, type] | None = None,
    ):
        """metadata  keys that items may have, and the types of their values"""
        self._path, self._part = path, path.with_name(path.name + ".part")
        vector = pa.field("vector", pa.list_(pa.float32(), dimension), nullable=False)
        columns = [*FACTS, *(pa.field(_column(key), TYPES[kind]) for key, kind in (metadata or {}).items()), vector]
        notes = {ENCODER: encoder} | ({COLLECTION: collection} if collection else {})
        self._schema = pa.schema(columns, notes)
        self._keys = list(metadata or {})

    def __enter__(self) -> "ParquetWriter":
        with writable(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            options = {"compression": "zstd", "use_dictionary": ["label"]}  # other columns hardly repeat values
            self._file = pyarrow.parquet.ParquetWriter(self._part, self._schema, **options)
        return self

    def write(self, items: Sequence[Item], vectors: np.ndarray) -> None:
        """Append items and vectors (n, d), n >= 1. Raises FileProblem."""
        columns = [[getattr(item, name) for item in items] for name in FACTS.names]
        columns += [[item.metadata.get(key) for item in items] for key in self._keys]
        arrays = [pa.array(column, field.type) for column, field in zip(columns, self._schema, strict=False)]
        flat = pa.array(np.ascontiguousarray(vectors, np.float32).ravel())
        arrays.append(pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]))
        with writable(self._path):
            self._file.write_table(pa.Table.from_arrays(arrays, schema=self._schema))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            with writable(self._path):
                self._file.close()
                if kind is None:
                    fsync(self._part)
                    self._part.replace(self._path)
                    fsync(self._path.parent)
        finally:
            self._part.unlink(missing_ok=True)


@contextmanager
def writable(path: Path) -> Iterator[None]:
    """Turn the system's errors on writing into FileProblem."""
    try:
        yield
    except OSError as error:
        raise FileProblem(f"{path} cannot be written: {os.strerror(error.errno) if error.errno else error}") from error


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        why = os.strerror(error.errno) if getattr(error, "errno", None) else str(error).splitlines()[0]
        raise FileProblem(f"{path} cannot be read as Parquet: {why}") from error


def _vectors(column: pa.Array, dimension: int) -> np.ndarray:
    """Returns the vectors (n, d) float32; zeros for null."""
    flat = column.fill_null(pa.scalar([0.0] * dimension, column.type)).flatten()
    return flat.fill_null(0).to_numpy(zero_copy_only=False).astype(np.float32, copy=False).reshape(-1, dimension)


def _item(row: dict) -> Item:
    facts: dict[str, Any] = {"label": None, "path": None, "width": 0, "height": 0, "bytes": 0}
    facts |= {name: value for name in FACTS.names if (value := row.pop(name, None)) is not None}
    return Item(**facts, metadata={_key(column): value for column, value in row.items() if value is not None})


def _column(key: str) -> str:
    return f"meta_{key}" if key in OWN or key.startswith("meta_") else key


def _key(column: str) -> str:
    return column.removeprefix("meta_")
