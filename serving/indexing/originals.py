"""The files that a collection is filled from.

    a folder, a .zip, .tar shards, a torchvision name    as training/data/sources.py lists them
    a .parquet, or a glob of them                        one row per picture; see below
    the collection itself                                to re-embed it with another encoder

A Parquet list has a column `path` (relative paths start at the list's folder) or `image` with the files' bytes, either
plain or as in Hugging Face's data sets: {bytes, path}. `name` and `label` are optional; every other column of texts,
numbers, truth values or dates becomes metadata. Columns that can be computed from the picture (id, width, height,
bytes, vector, thumbnail) are ignored.
"""

import glob
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from export.artifact import UnreadableImage
from serving.collection.index import Index
from training.data.sources import DataError, Picture, open_source, read_file

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet

ROWS_AT_ONCE = 256  # of a Parquet list; some 30 MB if the pictures are inside
COMPUTED = {"id", "width", "height", "bytes", "vector", "thumbnail"}
ALL = "all"


@dataclass(frozen=True, slots=True)
class Original:
    """A file that may be a picture, and its item's fields."""

    name: str
    label: str | None
    path: str | None
    read: Callable[[], bytes] = field(repr=False, compare=False)
    """The file's bytes, from any thread. raises UnreadableImage."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    id: str | None = None
    """The id of its content, if it has been indexed before."""


class Originals(NamedTuple):
    count: int
    files: Iterable[Original]


def open_originals(data: str | None, split: str = ALL) -> Originals:
    """The files of a source, or of one of its splits. Raises DataError, also while the files are listed."""
    if lists := _lists(data or ""):
        return _open_lists(lists, split)
    pictures = open_source(data or "").pictures
    if split == ALL:
        return Originals(len(pictures), map(original, pictures))
    chosen = [i for i, picture in enumerate(pictures) if picture.split == split]
    if not chosen:
        raise DataError(f"{data} has no {split} split")
    return Originals(len(chosen), (original(pictures[i]) for i in chosen))


def original(picture: Picture) -> Original:
    path = valid_text(str(picture.path)) if picture.path else None
    return Original(valid_text(picture.name), picture.label and valid_text(picture.label), path, picture.read)


def indexed_originals(index: Index) -> Originals:
    """The items of a collection, to be read again from their paths."""
    files = (
        Original(item.name, item.label, item.path, partial(_read_again, item.path), item.metadata, item.id)
        for items, _ in index.scan()
        for item in items
    )
    return Originals(index.count(), files)


def valid_text(name: str) -> str:
    """Replaces the bytes of a file name that are not UTF-8: a table cannot store them."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _read_again(path: str | None) -> bytes:
    if path is None:
        raise UnreadableImage("is not a file of its own; run `index add` with its source and the new encoder")
    return read_file(Path(path))


def _lists(data: str) -> list[Path]:
    """The Parquet files that `data` names; empty if it names something else."""
    path = os.path.expanduser(data)
    if not path.lower().endswith(".parquet") or os.path.isdir(path):
        return []
    lists = [Path(path)] if os.path.exists(path) else [Path(match) for match in sorted(glob.glob(path, recursive=True))]
    if not lists:
        raise DataError(f"there is no file {data}")
    return lists


def _open_lists(lists: list[Path], split: str) -> Originals:
    import pyarrow as pa
    import pyarrow.parquet

    name = str(lists[0]) if len(lists) == 1 else f"{lists[0]} to {lists[-1].name}"
    try:
        files = [pyarrow.parquet.ParquetFile(path) for path in lists]
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{name} cannot be read as Parquet: {str(error).splitlines()[0]}") from error
    for path, file in zip(lists, files, strict=True):
        _check_columns(path, file.schema_arrow, split)
    count = sum(file.metadata.num_rows for file in files)
    if split != ALL:
        columns = (file.read(["split"])["split"].to_pylist() for file in files)
        count = sum(value == split for column in columns for value in column)
    if not count:
        raise DataError(f"{name} has no {'rows' if split == ALL else f'{split} split'}")
    return Originals(count, _list_rows(lists, files, split))


def _check_columns(path: Path, schema: "pa.Schema", split: str) -> None:
    import pyarrow.types as types

    names = set(schema.names)
    if not names & {"path", "image"}:
        raise DataError(f"{path} has no column path or image; its columns are {', '.join(schema.names)}")
    if split != ALL and "split" not in names:
        raise DataError(f"{path} has no column split, so there is no {split} split")
    plain = (types.is_string, types.is_large_string, types.is_boolean, types.is_integer, types.is_floating)
    dates = (types.is_timestamp, types.is_date, types.is_dictionary, types.is_decimal, types.is_null)
    for name in names - COMPUTED - {"path", "image"}:
        if not any(test(schema.field(name).type) for test in (*plain, *dates)):
            raise DataError(f"{path}: the column {name} holds {schema.field(name).type}, which cannot be metadata")


def _list_rows(lists: list[Path], files: "list[pyarrow.parquet.ParquetFile]", split: str) -> Iterator[Original]:
    for path, file in zip(lists, files, strict=True):
        columns = [name for name in file.schema_arrow.names if name not in COMPUTED]
        number = 0
        for batch in file.iter_batches(ROWS_AT_ONCE, columns=columns):
            for row in batch.to_pylist():
                number += 1
                if split in (ALL, row.get("split")):
                    yield _from_row(path, number, row)


def _from_row(list_: Path, number: int, row: dict[str, Any]) -> Original:
    """Returns the original that a row describes. Takes the known columns out of `row`; the others are metadata."""
    path, image = row.pop("path", None), row.pop("image", None)
    if isinstance(image, dict):
        path, image = path or image.get("path"), image.get("bytes")
    name, label = row.pop("name", None), row.pop("label", None)
    name = str(name if name is not None else path or f"{list_.name}, row {number}")
    file = os.path.abspath(list_.parent / os.path.expanduser(path)) if path and image is None else None
    read = partial(_bytes_of, image) if file is None else partial(read_file, Path(file))
    metadata = {key: _metadata_value(value) for key, value in row.items() if value is not None}
    return Original(name, None if label is None else str(label), file, read, metadata)


def _bytes_of(image: bytes | None) -> bytes:
    if image is None:
        raise UnreadableImage("has neither a path nor an image in its row")
    return image


def _metadata_value(value: Any) -> str | int | float | bool:
    """Dates become ISO 8601 text."""
    if isinstance(value, str | int | float | bool):
        return value
    return value.isoformat() if hasattr(value, "isoformat") else float(value)
