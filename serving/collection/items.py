"""An item of a collection, and how it stands in a row of the table."""

import hashlib
import re
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from serving.collection.table import TYPES, BadItem
from serving.protocol.filters import BASE, KEY
from serving.protocol.replies import Item

ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,127}")


def content_id(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def possible(id: str) -> bool:
    """Whether this could be an id; nothing else may reach a path or a filter."""
    return ID.fullmatch(id) is not None


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows of (n, d) at length 1, float32."""
    vectors = np.asarray(vectors, np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(np.float32).tiny)


def checked(items: Sequence[Item], vectors: np.ndarray, dimension: int) -> np.ndarray:
    """Unit vectors of `items` from `vectors` (n, dimension). raises BadItem, which names the item"""
    vectors = np.asarray(vectors, np.float32)
    if vectors.shape != (len(items), dimension):
        raise BadItem(f"{len(items)} items want vectors ({len(items)}, {dimension}), not {vectors.shape}.")
    if len({item.id for item in items}) < len(items):
        raise BadItem("Two items of one upsert have the same id.")
    good = np.isfinite(vectors).all(axis=1) & (vectors != 0).any(axis=1)
    for item, fine in zip(items, good, strict=True):
        if not possible(item.id):
            raise BadItem(f"{item.name}: {item.id!r} is no id: letters, digits, _, - and ., at most 128.")
        if not fine:
            raise BadItem(f"{item.name}: its vector is zero or not finite.")
    return unit(vectors)


def kinds(items: Sequence[Item]) -> dict[str, type]:
    """Types of the metadata keys of `items`. raises BadItem, which names the item and the key"""
    found: dict[str, type] = {}
    for item in items:
        for key, value in item.metadata.items():
            if not isinstance(key, str) or not KEY.fullmatch(key) or key in BASE:
                taken = "is a name of ours" if key in BASE else "is no key: letters, digits and _, at most 64"
                raise BadItem(f"{item.name}: the metadata {key!r} {taken}.")
            if type(value) not in TYPES or (type(value) is float and not np.isfinite(value)):
                raise BadItem(f"{item.name}: the metadata {key} is {value!r}; text, numbers, true and false are kept.")
            if type(value) is int and not abs(value) < 2**63:
                raise BadItem(f"{item.name}: the metadata {key} is {value}, which is more than 64 bits.")
            kind = found.setdefault(key, type(value))
            if {kind, type(value)} == {int, float}:
                found[key] = float
            elif kind is not type(value):
                raise BadItem(f"{item.name}: the metadata {key} is {value!r}, and of another type in other items.")
    return found


def to_rows(
    items: Sequence[Item], vectors: np.ndarray, columns: Mapping[str, tuple[str, type]], schema: pa.Schema
) -> pa.Table:
    """`columns`: the table's column and the type of each key of metadata."""
    arrays = {name: [getattr(item, name) for item in items] for name in BASE}
    for key, (name, kind) in columns.items():
        values = (item.metadata.get(key) for item in items)
        arrays[name] = [float(value) if kind is float and value is not None else value for value in values]
    arrays["vector"] = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    return pa.table(arrays, schema=pa.schema([field for field in schema if field.name in arrays]))


def selected(columns: Mapping[str, tuple[str, type]], *more: str) -> list[str]:
    """Names of the columns that `to_item` wants, and of `more`."""
    return [*BASE, *(name for name, _ in columns.values()), *more]


def to_item(row: Mapping, columns: Mapping[str, tuple[str, type]]) -> Item:
    metadata = {key: row[name] for key, (name, _) in columns.items() if row[name] is not None}
    return Item(*(row[name] for name in BASE), metadata)


def matrix(column: pa.Array | pa.ChunkedArray, dimension: int) -> np.ndarray:
    """An Arrow column of vectors as (n, dimension)."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    return column.flatten().to_numpy(zero_copy_only=False).reshape(-1, dimension)
