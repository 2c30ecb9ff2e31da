"""The files that a collection is filled from.

    a folder, a .zip, .tar shards, hf:NAME, ...          as training/data/sources.py lists them
    a .parquet, or a glob of them                        one row per picture; see below
    the collection itself                                to re-embed it with another encoder

A Parquet list has a column `path` (relative paths start at the list's folder; files are read only below it, and below
the folders of --pictures) or `image` with the files' bytes, either
plain or as in Hugging Face's data sets: {bytes, path}. `name` and `label` are optional; every other column of texts,
numbers, truth values or dates becomes metadata, as collection/columns.py says. Columns that can be computed from the
picture (id, width, height, bytes, vector, thumbnail) are ignored.
"""

import glob
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from export.artifact import UnreadableImage
from export.paths import at_home, local_path, valid_text
from serving.collection.columns import (
    ColumnProblem,
    MetadataColumns,
    metadata_columns,
    python_rows,
    refuse_twins,
    value_of,
)
from serving.collection.index import Index, Item, content_id
from serving.collection.store import FileStore
from serving.inference.original import read_below
from training.data.sources import MAX_FILE_BYTES, DataError, SourcePicture, open_source

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet

ROWS_AT_ONCE = 256  # of a Parquet list; some 30 MB if the pictures are inside
COMPUTED = {"id", "width", "height", "bytes", "vector", "thumbnail"}
OWN = COMPUTED | {"path", "image", "name", "label"}  # all other columns are metadata
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
    is_item: bool = False
    """Whether `read` returns the picture of the item `id` and nothing else, so that its hash is not looked at."""


class Originals(NamedTuple):
    count: int
    files: Iterable[Original]
    folders: Sequence[str] = ()
    """Absolute paths of the folders that contain the files."""
    kinds: Mapping[str, type] = {}
    """The metadata keys that the files may have, and the types of their values."""
    notes: Sequence[str] = ()
    """What a user should know, in sentences."""


def open_originals(data: str | None, split: str = ALL, folders: Sequence[str] = ()) -> Originals:
    """The files of a source, or of one of its splits. Raises DataError, also while the files are listed.

    folders  where a Parquet list may name files, besides its own folder
    """
    if lists := _lists(data or ""):
        return _open_lists(lists, split, absolute([*(str(path.parent) for path in lists), *folders]))
    pictures = open_source(data or "").pictures
    if os.path.isdir(path := at_home(data or "")):
        inside = absolute([path])
    else:
        parents = {os.path.dirname(os.path.abspath(picture.path)) for picture in pictures if picture.path}
        inside = [os.path.commonpath(parents)] if parents else []
    if split == ALL:
        return Originals(len(pictures), map(original, pictures), inside)
    chosen = [i for i, picture in enumerate(pictures) if picture.split == split]
    if not chosen:
        raise DataError(f"{data} has no {split} split")
    return Originals(len(chosen), (original(pictures[i]) for i in chosen), inside)


def absolute(folders: Iterable[str]) -> list[str]:
    """Absolute paths of folders as a user writes them, each once."""
    return list(dict.fromkeys(str(local_path(folder)) for folder in folders))


def original(picture: SourcePicture) -> Original:
    path = valid_text(str(picture.path)) if picture.path else None
    return Original(valid_text(picture.name), picture.label and valid_text(picture.label), path, picture.read)


def indexed_originals(index: Index, folders: Sequence[str]) -> Originals:
    """The items of a collection: the originals that were kept, others to be read again below the folders."""
    files = (
        Original(
            item.name,
            item.label,
            item.path,
            partial(read_again, index.store, index.files.path("originals", item.id), item, folders),
            item.metadata,
            item.id,
            is_item=True,
        )
        for items, _ in index.scan()
        for item in items
    )
    return Originals(index.count(), files, folders)


def read_again(store: FileStore, kept: str, item: Item, folders: Sequence[str]) -> bytes:
    """The file of an item's picture: the one that was kept at this path of the store, or the one at the item's own path
    below the folders. Raises UnreadableImage."""
    if (data := store.read(kept)) is not None:
        if len(data) != item.bytes:
            raise UnreadableImage("is not as it was uploaded: its file has another size")
        return data
    if item.path is None:
        raise UnreadableImage("is not a file of its own; run `index add` with its source and the new encoder")
    data = read_below(item.path, folders, MAX_FILE_BYTES)
    if content_id(data) != item.id:
        raise UnreadableImage(f"has changed since it was indexed: {item.path}")
    return data


def _lists(data: str) -> list[Path]:
    """The Parquet files that `data` names; empty if it names something else."""
    path = at_home(data)
    if not path.lower().endswith(".parquet") or os.path.isdir(path):
        return []
    lists = [Path(path)] if os.path.exists(path) else [Path(match) for match in sorted(glob.glob(path, recursive=True))]
    if not lists:
        raise DataError(f"there is no file {data}")
    return lists


def _open_lists(lists: list[Path], split: str, folders: Sequence[str]) -> Originals:
    import pyarrow as pa
    import pyarrow.parquet

    name = str(lists[0]) if len(lists) == 1 else f"{lists[0]} to {lists[-1].name}"
    columns, count = [], 0
    for path in lists:  # only one is open at a time: there may be more than the system allows to be open
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                columns.append(_columns(path, file.schema_arrow, split))
                if split == ALL:
                    count += file.metadata.num_rows
                else:
                    count += file.read(["split"])["split"].to_pylist().count(split)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from error
    if not count:
        raise DataError(f"{name} has no {'rows' if split == ALL else f'{split} split'}")
    kinds = {key: kind for one in columns for key, kind in one.kinds.items()}
    notes = dict.fromkeys(note for one in columns for note in one.notes)
    return Originals(count, _list_rows(lists, columns, split, folders), folders, kinds, list(notes))


def _columns(path: Path, schema: "pa.Schema", split: str) -> MetadataColumns:
    """The columns of a list that become metadata. Raises DataError."""
    import pyarrow.types as types

    names = schema.names
    try:
        refuse_twins(names)
        metadata = metadata_columns(schema, [name for name in names if name not in OWN])
    except ColumnProblem as problem:
        raise DataError(f"{path}: {problem}") from problem
    if not {*names} & {"path", "image"}:
        raise DataError(f"{path} has no column path or image; its columns are {', '.join(names)}")
    if split != ALL and "split" not in names:
        raise DataError(f"{path} has no column split, so there is no {split} split")
    texts, files = (types.is_string, types.is_large_string), (types.is_binary, types.is_large_binary, types.is_struct)
    for name, allowed, what in (("path", texts, "text"), ("image", files, "files' bytes")):
        if name in names and not any(test(schema.field(name).type) for test in (*allowed, types.is_null)):
            raise DataError(f"{path}: the column {name} holds {schema.field(name).type}, not {what}")
    return metadata


def _list_rows(
    lists: list[Path], columns: list[MetadataColumns], split: str, folders: Sequence[str]
) -> Iterator[Original]:
    import pyarrow.parquet

    for path, metadata in zip(lists, columns, strict=True):
        number = 0
        with pyarrow.parquet.ParquetFile(path) as file:
            known = [name for name in ("path", "image", "name", "label", "split") if name in file.schema_arrow.names]
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=list(dict.fromkeys([*known, *metadata.keys]))):
                try:
                    rows = python_rows(batch)
                except ColumnProblem as problem:
                    raise DataError(f"{path}: {problem}") from problem
                for row in rows:
                    number += 1
                    if split in (ALL, row.get("split")):
                        yield _from_row(path, number, row, metadata.values(row), folders)


def _from_row(
    list_: Path, number: int, row: dict[str, Any], metadata: dict[str, Any], folders: Sequence[str]
) -> Original:
    path, image = row.get("path"), row.get("image")
    if isinstance(image, dict):
        path, image = path or image.get("path"), image.get("bytes")
    name, label = value_of(row.get("name")), value_of(row.get("label"))
    name = str(name if name is not None else path or f"{list_.name}, row {number}")
    file = os.path.abspath(list_.parent / at_home(path)) if path and image is None else None
    read = partial(_bytes_of, image) if file is None else partial(read_below, file, folders, MAX_FILE_BYTES)
    label = None if label is None or not str(label).strip() else str(label)
    return Original(name, label, file, read, metadata)


def _bytes_of(image: bytes | None) -> bytes:
    if not isinstance(image, bytes):
        raise UnreadableImage("has neither a path nor an image in its row")
    return image
