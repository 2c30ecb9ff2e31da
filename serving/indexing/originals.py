"""Where the pictures of a collection come from.

    a folder, a .zip, .tar shards, a torchvision name    as training/data/sources.py lists them
    a .parquet, or a glob of them                        a row a picture; below
    the collection itself                                to embed it anew by another encoder

A Parquet list has a column `path` (relative ones start where the list lies) or `image` with the files' bytes, plain or
as Hugging Face's data sets have them: {bytes, path}. `name` and `label` are taken where they are there, and every other
column of texts, numbers, truth values or dates becomes metadata. What follows from the picture itself (id, width,
height, bytes, vector, thumbnail) is worked out anew.
"""

import glob
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from export.artifact import UnreadableImage
from serving.collection.index import Index, Item
from training.data.sources import DataError, Picture, open_source, read_file

ROWS_AT_ONCE = 256  # of a Parquet list; with the pictures inside it is some 30 MB
WORKED_OUT = {"id", "width", "height", "bytes", "vector", "thumbnail"}
ALL = "all"


@dataclass(frozen=True, slots=True)
class Original:
    """A file that may be a picture, and what is known of it."""

    name: str
    label: str | None
    path: str | None
    read: Callable[[], bytes] = field(repr=False, compare=False)
    """The file's bytes, from any thread. raises UnreadableImage."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    id: str | None = None
    """What its content is known to be, where it is."""


class Originals(NamedTuple):
    count: int
    each: Iterable[Original]


def open_originals(data: str | None, split: str = ALL) -> Originals:
    """Everything of a source, or of one of its splits. raises DataError, also while it is read."""
    if lists := _lists(data or ""):
        return _of_lists(lists, split)
    pictures = open_source(data or "").pictures
    if split == ALL:
        return Originals(len(pictures), map(original, pictures))
    chosen = [i for i, picture in enumerate(pictures) if picture.split == split]
    if not chosen:
        raise DataError(f"{data} has no {split} split")
    return Originals(len(chosen), (original(pictures[i]) for i in chosen))


def original(picture: Picture) -> Original:
    path = text(str(picture.path)) if picture.path else None
    return Original(text(picture.name), picture.label and text(picture.label), path, picture.read)


def stored(index: Index) -> Originals:
    """What a collection holds, from where it was read."""
    items = (item for some, _ in index.scan() for item in some)
    return Originals(index.count(), map(_again, items))


def text(name: str) -> str:
    """File names may hold bytes that are no text; a table takes none."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _again(item: Item) -> Original:
    return Original(item.name, item.label, item.path, partial(_stored, item.path), item.metadata, item.id)


def _stored(path: str | None) -> bytes:
    if path is None:
        raise UnreadableImage("is in no file of its own; add its source again by the new encoder")
    return read_file(Path(path))


def _lists(data: str) -> list[Path]:
    path = os.path.expanduser(data)
    if not path.lower().endswith(".parquet") or os.path.isdir(path):
        return []
    found = [Path(path)] if os.path.exists(path) else [Path(match) for match in sorted(glob.glob(path, recursive=True))]
    if not found:
        raise DataError(f"there is no file {data}")
    return found


def _of_lists(lists: list[Path], split: str) -> Originals:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        files = [pyarrow.parquet.ParquetFile(path) for path in lists]
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{_named(lists)} cannot be read as Parquet: {str(error).splitlines()[0]}") from error
    for path, file in zip(lists, files, strict=True):
        _check(path, file.schema_arrow, split)
    count = sum(file.metadata.num_rows for file in files)
    if split != ALL:
        columns = (file.read(["split"])["split"].to_pylist() for file in files)
        count = sum(value == split for column in columns for value in column)
    if not count:
        raise DataError(f"{_named(lists)} has no {'rows' if split == ALL else f'{split} split'}")
    return Originals(count, _rows(lists, files, split))


def _named(lists: list[Path]) -> str:
    return str(lists[0]) if len(lists) == 1 else f"{lists[0]} to {lists[-1].name}"


def _check(path: Path, schema, split: str) -> None:
    import pyarrow.types as types

    names = set(schema.names)
    if not names & {"path", "image"}:
        raise DataError(f"{path} has no column path or image; its columns are {', '.join(schema.names)}")
    if split != ALL and "split" not in names:
        raise DataError(f"{path} has no column split, so there is no {split} split")
    plain = (types.is_string, types.is_large_string, types.is_boolean, types.is_integer, types.is_floating)
    dates = (types.is_timestamp, types.is_date, types.is_dictionary, types.is_decimal, types.is_null)
    for name in names - WORKED_OUT - {"path", "image"}:
        if not any(test(schema.field(name).type) for test in (*plain, *dates)):
            raise DataError(f"{path}: the column {name} holds {schema.field(name).type}, which no metadata can be")


def _rows(lists: list[Path], files: list, split: str) -> Iterator[Original]:
    for path, file in zip(lists, files, strict=True):
        columns = [name for name in file.schema_arrow.names if name not in WORKED_OUT]
        number = 0
        for batch in file.iter_batches(ROWS_AT_ONCE, columns=columns):
            for row in batch.to_pylist():
                number += 1
                if split in (ALL, row.get("split")):
                    yield _row(path, number, row)


def _row(list_: Path, number: int, row: dict) -> Original:
    """Takes `row` to pieces; what is left of it is metadata."""
    path, image = row.pop("path", None), row.pop("image", None)
    if isinstance(image, dict):
        path, image = path or image.get("path"), image.get("bytes")
    name, label = row.pop("name", None), row.pop("label", None)
    name = str(name if name is not None else path or f"{list_.name}, row {number}")
    where = os.path.abspath(list_.parent / os.path.expanduser(path)) if path and image is None else None
    read = partial(_inside, image) if where is None else partial(read_file, Path(where))
    metadata = {key: _plain(value) for key, value in row.items() if value is not None}
    return Original(name, None if label is None else str(label), where, read, metadata)


def _inside(image: bytes | None) -> bytes:
    if image is None:
        raise UnreadableImage("has neither a path nor an image in its row")
    return image


def _plain(value: Any) -> str | int | float | bool:
    """Dates as ISO 8601 has them."""
    if isinstance(value, str | int | float | bool):
        return value
    return value.isoformat() if hasattr(value, "isoformat") else float(value)
