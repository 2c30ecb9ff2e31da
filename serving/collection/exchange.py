"""A collection as one Parquet file: `twinview index export` and `twinview embed` write it, `index import` reads it.

    id, name      string         as in the index
    label, path   string         null if the item has none
    width, height int32          pixels, upright
    bytes         int64          size of the original file
    vector        float32[d]     FixedSizeList
    ...                          metadata: one column for each key; string, int64, double or bool; null if the item has
                                 no value; named meta_KEY if the key has the name of a column above or starts with meta_

The schema's metadata names the encoder and the collection. The file has no thumbnails.

Files that other programs wrote are read too: pandas, for example, drops the encoder's name and the length of the
vectors. columns.py says which of their columns become metadata.
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

from serving.collection.columns import (
    ColumnProblem,
    MetadataColumns,
    metadata_columns,
    python_rows,
    refuse_twins,
    value_of,
)
from serving.collection.items import TYPES, Item
from serving.collection.store import fsync

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
OWN, PREFIX = {*FACTS.names, "vector"}, "meta_"
SIZES = ("width", "height", "bytes")
TEXT = (pa.types.is_string, pa.types.is_large_string, pa.types.is_null)
NUMBER = (pa.types.is_integer, pa.types.is_floating, pa.types.is_null)  # a missing number makes others of pandas floats
LISTS = (pa.types.is_fixed_size_list, pa.types.is_list, pa.types.is_large_list)


class FileProblem(ValueError):
    """A file that cannot be read or written. The message names it."""


@dataclass(frozen=True)
class Contents:
    """The format and origin of a file; `rows` reads its rows."""

    path: Path
    encoder: str | None
    """None if another program has written the file."""
    dimension: int
    collection: str | None
    """None if the rows are not from a collection."""
    count: int
    metadata: MetadataColumns

    def rows(self) -> Iterator[tuple[list[Item], np.ndarray]]:
        """Yields items and their vectors (n, d), n <= ROWS_AT_ONCE. If an id occurs twice, the first is kept. Raises
        FileProblem."""
        seen: set[str] = set()
        with _readable(self.path), pyarrow.parquet.ParquetFile(self.path) as file:
            for batch in file.iter_batches(ROWS_AT_ONCE):
                if batch["id"].null_count or batch["name"].null_count:
                    raise FileProblem(f"{self.path} has a row without an id or a name")
                try:
                    vectors = _vectors(batch["vector"], self.dimension)
                except ValueError as error:
                    raise FileProblem(f"{self.path}: the vectors are not all of the length {self.dimension}") from error
                try:
                    rows = python_rows(batch.drop_columns(["vector"]))
                except ColumnProblem as problem:
                    raise FileProblem(f"{self.path}: {problem}") from problem
                items = [_item(row, self.metadata.values(row)) for row in rows]
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
    try:
        refuse_twins(schema.names)
    except ColumnProblem as problem:
        raise FileProblem(f"{path}: {problem}") from problem
    if missing := [name for name in ("id", "name", "vector") if name not in schema.names]:
        raise FileProblem(f"{path} has no column {missing[0]}; its columns are {', '.join(schema.names)}")
    vector = schema.field("vector").type
    if not (any(test(vector) for test in LISTS) and pa.types.is_floating(vector.value_type)):
        raise FileProblem(f"{path}: the column vector has the type {vector}, not a list of numbers")
    for name in FACTS.names:
        allowed = NUMBER if name in SIZES else TEXT
        if name in schema.names and not any(test(schema.field(name).type) for test in allowed):
            raise FileProblem(f"{path}: the column {name} has the type {schema.field(name).type}, which is not allowed")
    try:
        metadata = metadata_columns(schema, [name for name in schema.names if name not in OWN], prefix=PREFIX)
    except ColumnProblem as problem:
        raise FileProblem(f"{path}: {problem}") from problem
    encoder, collection = (notes[note].decode() if note in notes else None for note in (ENCODER, COLLECTION))
    return Contents(path, encoder, _dimension(path, vector), collection, count, metadata)


def _dimension(path: Path, vector: pa.DataType) -> int:
    """Length of the vectors. Raises FileProblem."""
    if pa.types.is_fixed_size_list(vector):
        return vector.list_size
    with _readable(path), pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(1, columns=["vector"]):
            if (first := batch["vector"][0].as_py()) is not None:
                if not first:
                    raise FileProblem(f"{path} has an empty vector")
                return len(first)
    raise FileProblem(f"{path} has no vectors")


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
            try:
                self._file = pyarrow.parquet.ParquetWriter(self._part, self._schema, **options)
            except BaseException:
                self._part.unlink(missing_ok=True)
                raise
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
    """Returns the vectors (n, d) float32; zeros for null. Raises ValueError if one has another length."""
    if not pa.types.is_fixed_size_list(column.type):
        column = column.cast(pa.list_(column.type.value_type, dimension))  # ArrowInvalid is a ValueError
    flat = column.fill_null(pa.scalar([0.0] * dimension, column.type)).flatten()
    return flat.fill_null(0).to_numpy(zero_copy_only=False).astype(np.float32, copy=False).reshape(-1, dimension)


def _item(row: dict, metadata: dict[str, Any]) -> Item:
    facts: dict[str, Any] = {"label": None, "path": None, "width": 0, "height": 0, "bytes": 0}
    given: dict[str, Any] = {name: value for name in FACTS.names if (value := value_of(row.get(name))) is not None}
    sizes: dict[str, Any] = {name: int(given[name]) for name in SIZES if name in given}
    return Item(**facts | given | sizes, metadata=metadata)


def _column(key: str) -> str:
    return f"{PREFIX}{key}" if key in OWN or key.startswith(PREFIX) else key
