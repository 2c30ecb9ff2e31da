"""Items of a collection: which ones are valid, and how they are stored as rows of the table."""

import hashlib
import re
from collections.abc import Container, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from serving.collection.problems import BadItem
from serving.protocol.filters import BASE, KEY
from serving.protocol.replies import Item
from serving.protocol.shown import shown

CHECKSUM = "checksum"
"""The column with each row's checksum; null in rows written before there was one."""

CONTENT_ID = re.compile(r"[0-9a-f]{32}")
ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,127}")
MOST_KEYS = 256
"""Most metadata keys of a collection, and so of an item. Each is a column that every search reads."""
TYPES = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}


class Column(NamedTuple):
    """The column of the table that stores one key of the metadata."""

    name: str
    kind: type


Columns = Mapping[str, Column]  # by key


def content_id(data: bytes) -> str:
    """Returns the id of a picture's file: a hash of its bytes."""
    return hashlib.sha256(data).hexdigest()[:32]


def is_content_id(id: str) -> bool:
    """Whether the id looks like a hash of `content_id`. The picture of such an item never changes."""
    return CONTENT_ID.fullmatch(id) is not None


def is_id(id: str) -> bool:
    """Whether the text is a valid id. Only valid ids may be used in paths and conditions."""
    return ID.fullmatch(id) is not None


def unit(vectors: np.ndarray) -> np.ndarray:
    """Returns the rows of `vectors` (n, d) scaled to length 1, float32; rows of zeros stay as they are."""
    vectors = np.asarray(vectors, np.float64)  # the squares of large or small numbers do not fit in float32
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.where(norms > 0, norms, 1)).astype(np.float32)


def checked_vectors(items: Sequence[Item], vectors: np.ndarray, dimension: int) -> np.ndarray:
    """Returns the unit vectors of `items` from `vectors` (n, dimension). Raises BadItem, which names the item."""
    vectors = np.asarray(vectors, np.float32)
    if vectors.shape != (len(items), dimension):
        raise BadItem(f"{len(items)} items need vectors ({len(items)}, {dimension}), not {vectors.shape}.")
    if len({item.id for item in items}) < len(items):
        raise BadItem("Two items of one upsert have the same id.")
    good = np.isfinite(vectors).all(axis=1) & (vectors != 0).any(axis=1)
    for item, fine in zip(items, good, strict=True):
        if not is_id(item.id):
            named = f"{item.name}: " if item.name else ""
            raise BadItem(f"{named}{shown(item.id)} is not an id: letters, digits, _, - and ., at most 128.")
        if not fine:
            raise BadItem(f"{item.name or item.id}: its vector is zero or not finite.")
    return unit(vectors)


def metadata_types(items: Sequence[Item]) -> dict[str, type]:
    """Returns the type of each metadata key of `items`. Raises BadItem, which names the item and the key."""
    types: dict[str, type] = {}
    for item in items:
        for key, value in item.metadata.items():
            metadata = f"{item.name or item.id}: the metadata"
            if key in BASE:
                raise BadItem(f"{metadata} {shown(key)} has the name of a field that every item has.")
            if not isinstance(key, str) or not KEY.fullmatch(key):
                raise BadItem(f"{metadata} {shown(key)} is not a key: letters, digits and _, at most 64.")
            if type(value) not in TYPES or (type(value) is float and not np.isfinite(value)):
                allowed = "only text, finite numbers, true and false are allowed"
                raise BadItem(f"{metadata} {key} is {shown(value)}; {allowed}.")
            if type(value) is int and not abs(value) < 2**63:
                raise BadItem(f"{metadata} {key} is {value}, which does not fit in 64 bits.")
            kind = types.setdefault(key, type(value))
            if {kind, type(value)} == {int, float}:
                types[key] = float
            elif kind is not type(value):
                raise BadItem(f"{metadata} {key} is {shown(value)}, and has another type in other items.")
    return types


def refuse_inexact(items: Sequence[Item], keys: Container[str]) -> None:
    """Raises BadItem for a whole number that would not be the same in a column of floating-point numbers.

    keys  of the metadata, whose columns have floating-point numbers
    """
    for item in items:
        for key, value in item.metadata.items():
            if key in keys and type(value) is int and int(float(value)) != value:
                raise BadItem(
                    f"{item.name or item.id}: the metadata {key} is {value}, which cannot be stored exactly, because "
                    f"{key} has fractions in other items; give it another name."
                )


def to_rows(items: Sequence[Item], vectors: np.ndarray, columns: Columns, schema: pa.Schema) -> pa.Table:
    """Returns items and vectors (n, d) as rows for a table with these metadata columns and this schema."""
    arrays = {name: [getattr(item, name) for item in items] for name in BASE}
    for key, (name, kind) in columns.items():
        values = (item.metadata.get(key) for item in items)
        arrays[name] = [float(value) if kind is float and value is not None else value for value in values]
    arrays[CHECKSUM] = [checksum(item, vector) for item, vector in zip(items, vectors, strict=True)]
    arrays["vector"] = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    return pa.table(arrays, schema=pa.schema([field for field in schema if field.name in arrays]))


def checksum(item: Item, vector: np.ndarray) -> int:
    """Returns a number of 64 bits that depends on all fields of the item and every bit of its unit vector (d,) float32.
    `picture` of it depends on the picture alone.

    A whole number and the same number with a fraction count as equal, because a key's column may be widened later.
    """
    seen = repr((item.id, item.width, item.height, item.bytes)).encode() + np.ascontiguousarray(vector, "<f4").tobytes()
    digest = hashlib.blake2b(seen, digest_size=4).digest() + hashlib.blake2b(_facts(item), digest_size=4).digest()
    return int.from_bytes(digest, "little", signed=True)


def picture(checksum: int) -> int:
    """Returns the 32 bits of a row's checksum that are the same as long as the item has the same picture."""
    return checksum % 2**32


def is_checksum(value: int | None, item: Item, vector: np.ndarray) -> bool:
    """Whether a row's checksum is right. Older rows have another one, or none."""
    older = hashlib.blake2b(_facts(item) + np.ascontiguousarray(vector, "<f4").tobytes(), digest_size=8).digest()
    return value in (None, checksum(item, vector), int.from_bytes(older, "little", signed=True))


def _facts(item: Item) -> bytes:
    metadata = sorted((key, float(value) if type(value) is int else value) for key, value in item.metadata.items())
    return repr(([getattr(item, name) for name in BASE], metadata)).encode()


def item_columns(columns: Columns) -> list[str]:
    """Returns the names of the columns that `to_item` reads."""
    return [*BASE, *(column.name for column in columns.values())]


def to_item(row: Mapping, columns: Columns) -> Item:
    metadata = {key: row[name] for key, (name, _) in columns.items() if row[name] is not None}
    return Item(*(row[name] for name in BASE), metadata=metadata)


def matrix(column: pa.Array | pa.ChunkedArray, dimension: int) -> np.ndarray:
    """Returns an Arrow column of vectors as an array (n, dimension)."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    return column.flatten().to_numpy(zero_copy_only=False).reshape(-1, dimension)
