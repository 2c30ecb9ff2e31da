"""Pictures in tables: Parquet files, and the Arrow files of Hugging Face's data sets.

A picture is a cell of a column of files' bytes, of {bytes, path} as Hugging Face's feature Image, or of a list's column
`path`. Arrow files are mapped into memory, and of a Parquet file a row group is read at a time, so pictures are read
when they are needed.
"""

import json
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from export.artifact import UnreadableImage
from export.paths import at_home
from training.data.layout import SPLITS

if TYPE_CHECKING:
    import pyarrow as pa

HUB = "hf:"
GROUPS_BYTES = 2**28  # row groups of Parquet files that are kept in memory
FEWEST_GROUPS = 2  # however large they are: two neighbouring ones are read at the same time


class TableProblem(ValueError):
    """A table that cannot be used. The message is one sentence for the user that names it."""


class Given(NamedTuple):
    """What `hf:NAME[:SPLIT[:COLUMN]]` names."""

    name: str
    """A data set of the hub, or a path."""
    split: str
    column: str


@dataclass(frozen=True)
class TableFile:
    path: Path
    prefix: str
    """With which the names of its pictures start."""
    folder: tuple[str, ...]
    """The folders that it is in, and its split."""


class Columns(NamedTuple):
    """The columns of a table that are used."""

    image: str
    has_paths: bool
    """Whether each picture comes with the path of its file."""
    label: str | None
    classes: list[str]
    """What the numbers in the column of labels stand for; empty if it contains the labels themselves."""
    other_labels: list[str]
    has_splits: bool
    """Whether a column `split` names the split of each row."""

    @property
    def known(self) -> list[str]:
        """Those that are read for all rows at once."""
        return [name for name in (self.label, "split" if self.has_splits else None) if name]


@dataclass(frozen=True)
class Table:
    """The rows of a file, without their pictures."""

    file: TableFile
    stamp: str
    """Changes with the file."""
    columns: Columns
    labels: list[str | None]
    splits: list[str | None] | None
    """The column `split`, if there is one."""
    paths: "pa.ChunkedArray | None"

    def __len__(self) -> int:
        return len(self.labels)


def parse(data: str) -> Given | None:
    """None unless `data` begins with hf:"""
    name, split, column = [*data.removeprefix(HUB).split(":", 2), "", ""][:3]
    return Given(at_home(name), split, column) if data.startswith(HUB) else None


def is_parquet(path: str | Path) -> bool:
    return str(path).lower().endswith(".parquet")


def parquet_files(paths: Iterable[Path], above: Path) -> list[TableFile]:
    """The files with the names of their splits: of a folder, or of SPLIT.parquet and SPLIT-00000-of-00002.parquet.

    above  the folder that contains them all
    """
    # The trailing slash makes the order of the files that of the names of their pictures.
    paths = sorted(set(paths), key=lambda path: f"{path.relative_to(above).as_posix()}/")
    files, several = [], len(paths) > 1
    for path in paths:
        inside = path.relative_to(above)
        split = re.sub(r"-\d+-of-\d+$", "", path.stem)
        folder = (*inside.parent.parts, split) if split.lower() in SPLITS else inside.parent.parts
        files.append(TableFile(path, f"{inside.as_posix()}/" if several else "", folder))
    return files


def saved_files(folder: Path) -> list[TableFile]:
    """The Arrow files of a folder that `datasets` wrote with save_to_disk; none if it is another folder.

    raises  TableProblem
    """
    try:
        if (folder / "dataset_dict.json").is_file():
            names = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
            return [
                file
                for name in sorted(names)
                for file in _with_split(name, _files_of_state(folder / name / "state.json"))
            ]
        if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
            return _with_split("", _files_of_state(folder / "state.json"))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise TableProblem(f"{folder} is a damaged folder of save_to_disk: {_one_line(error)}") from error
    return []


def _files_of_state(state: Path) -> list[Path]:
    return [state.parent / file["filename"] for file in json.loads(state.read_text(encoding="utf-8"))["_data_files"]]


def _with_split(name: str, paths: list[Path]) -> list[TableFile]:
    return [TableFile(path, f"{name}/" if name else "", (name,) if name else ()) for path in paths]


def hub_files(given: Given) -> list[TableFile]:
    """The Arrow files of a data set of Hugging Face's hub, or of a folder in a layout that `datasets` knows. They are
    downloaded and written once, into the cache of `datasets`.

    raises  TableProblem
    """
    name = HUB + given.name
    try:
        import datasets
        import datasets.exceptions
    except ImportError as error:
        raise TableProblem(
            f"{name} needs the Python package {error.name}, which is not installed: pip install 'twinview[hf]'"
        ) from error
    unreachable = ""
    try:
        if not os.path.exists(given.name):
            unreachable = _reach_hub_or_use_cache()
        builder = datasets.load_dataset_builder(given.name)
        if known := list(builder.info.splits or builder.config.data_files or ()):
            check_split(given, known)
        builder.download_and_prepare()
        sets: Any = builder.as_dataset()
    except TableProblem:
        raise
    except ConnectionError as error:
        raise TableProblem(
            f"{name} cannot be downloaded; is there a network? ({unreachable or _one_line(error)})"
        ) from error
    except datasets.exceptions.DatasetNotFoundError as error:
        raise TableProblem(f"{name} is not a data set that can be read: {_one_line(error)}") from error
    except Exception as error:  # each format has its own exceptions
        reason = _one_line(error.__cause__ or error).partition(" Example of usage")[0]
        if "Config name is missing" in reason:
            reason += f". Give a folder written by datasets.load_dataset({given.name!r}, CONFIG).save_to_disk(FOLDER)"
        raise TableProblem(f"{name} cannot be read: {reason}") from error
    return [
        file
        for key in sorted(sets)
        for file in _with_split(key, [Path(part["filename"]) for part in sets[key].cache_files])
    ]


def _reach_hub_or_use_cache() -> str:
    """Why the hub cannot be reached, so that only what is in the cache of `datasets` can be read; empty if it can."""
    import datasets.config
    import huggingface_hub.constants

    if not huggingface_hub.constants.HF_HUB_OFFLINE:
        try:
            reach_hub()
        except OSError as error:
            huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
            return _one_line(error)
    return ""


def reach_hub() -> None:
    """Raises OSError at once when Hugging Face's hub cannot be reached, instead of after a minute of retries."""
    import httpx
    from huggingface_hub import constants

    try:
        httpx.head(constants.ENDPOINT, timeout=10)
    except httpx.HTTPError as error:
        raise OSError(f"{constants.ENDPOINT}: {error}") from error


def check_split(given: Given, known: Iterable[str | None]) -> None:
    """Raises TableProblem, with the splits that are there, for another one."""
    if given.split and given.split not in (known := set(known)):
        names = ", ".join(sorted(name for name in known if name))
        raise TableProblem(f"{given.name} has no split {given.split}; it has {names or 'no splits'}")


def open_table(file: TableFile, column: str, data: str) -> Table:
    """Read what is known of a file's rows, without their pictures.

    column  that of the pictures; empty: the only one there is
    data    the source, as it was given
    raises  TableProblem
    """
    import pyarrow as pa
    import pyarrow.compute
    import pyarrow.parquet

    try:
        facts = os.stat(file.path)
        stamp = f"{facts.st_size} {facts.st_mtime_ns}"
        if is_parquet(file.path):
            with pyarrow.parquet.ParquetFile(file.path) as parquet:
                columns = choose_columns(parquet.schema_arrow, column, data)
                known = parquet.read([*columns.known, *([f"{columns.image}.path"] if columns.has_paths else [])])
        else:
            table = _arrow(str(file.path), stamp)
            columns = choose_columns(table.schema, column, data)
            known = table.select([*columns.known, *([columns.image] if columns.has_paths else [])])
        paths = None
        if columns.has_paths:
            paths = pyarrow.compute.struct_field(known[columns.image], "path")  # pyrefly: ignore[missing-attribute]
    except (pa.ArrowException, OSError) as error:
        raise TableProblem(f"{file.path} cannot be read: {_one_line(error)}") from error
    labels = known[columns.label].to_pylist() if columns.label else [None] * known.num_rows
    splits = known["split"].to_pylist() if columns.has_splits else None
    return Table(file, stamp, columns, [_label(value, columns.classes) for value in labels], splits, paths)


def choose_columns(schema: "pa.Schema", column: str, data: str) -> Columns:
    """The columns of a table that are used. Arguments and errors as open_table."""
    import pyarrow.types as types

    features, names = _features(schema), schema.names
    declared = [name for name in names if features.get(name, {}).get("_type") == "Image"]
    structs = [name for name in names if _holds_files(schema.field(name).type)]
    plain = [name for name in names if _is_bytes(schema.field(name).type)]
    paths = [name for name in names if name == "path" and _is_text(schema.field(name).type)]
    found = declared or structs or plain or paths
    if column:
        found = [name for name in (*declared, *structs, *plain, *paths) if name == column][:1]
    if not found:
        what = f"{column} with pictures" if column else "of pictures, or of the bytes of their files"
        raise TableProblem(f"{data} has no column {what}; its columns are {', '.join(names)}")
    if len(found) > 1:
        choice = data if data.startswith(HUB) else f"{HUB}{data}"
        raise TableProblem(
            f"{data} has several columns of pictures, {', '.join(found)}: choose one, as in "
            f"{choice}{':' * (2 - choice.count(':', len(HUB)))}{found[0]}"
        )
    classes = [name for name in names if features.get(name, {}).get("_type") == "ClassLabel"]
    classes.sort(key=lambda name: name != "label")
    label, numbers = None, []
    if classes:
        label, numbers = classes[0], features[classes[0]].get("names") or []
    elif "label" in names and _is_label(schema.field("label").type):
        label = "label"
    image = schema.field(found[0]).type
    return Columns(
        found[0],
        types.is_struct(image) and image.get_field_index("path") >= 0,
        label,
        numbers,
        classes[1:],
        "split" in names and _is_text(schema.field("split").type),
    )


def read_cell(path: str, stamp: str, column: str, row: int) -> bytes | str:
    """The bytes of a picture's file, or the file's path. From any thread. Raises UnreadableImage."""
    import pyarrow as pa

    try:
        if is_parquet(path):
            cells, row = _GROUPS.cells(path, stamp, column, row)
        else:
            cells = _arrow(path, stamp)[column]
        cell = cells[row].as_py()
    except (pa.ArrowException, OSError, IndexError) as error:
        raise UnreadableImage(f"cannot be read from {path}: {_one_line(error)}") from error
    if isinstance(cell, dict):
        cell = cell["path"] if cell.get("bytes") is None and cell.get("path") else cell.get("bytes")
    if cell is None:
        raise UnreadableImage("has no picture in its row")
    return cell if isinstance(cell, bytes) else _file(path, cell)


def _file(table: str, path: str) -> str:
    """The path of a file that a row names: of Parquet files, which may come from others, only below their folder."""
    if "://" in path:
        raise UnreadableImage(f"is not in its row but at {path}, which is not downloaded")
    folder = os.path.realpath(os.path.dirname(table))
    place = os.path.realpath(os.path.join(folder, at_home(path)))
    if is_parquet(table) and not Path(place).is_relative_to(folder):
        raise UnreadableImage(f"is at {path}, which is not in the folder of {table}")
    return place


class _Groups:
    """The row groups of Parquet files that were read last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # threads that need the same group wait until one has read it
        self._kept: OrderedDict[tuple[str, str, str, int], pa.ChunkedArray] = OrderedDict()

    def cells(self, path: str, stamp: str, column: str, row: int) -> tuple["pa.ChunkedArray", int]:
        """The column in the group that holds a row, and the row's place in it. Raises ArrowException, OSError."""
        import pyarrow.parquet

        starts = _group_starts(path, stamp)
        group = int(np.searchsorted(starts, row, side="right")) - 1
        key = path, stamp, column, group
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            else:
                with pyarrow.parquet.ParquetFile(path) as file:
                    self._kept[key] = file.read_row_group(group, [column])[column]
                while len(self._kept) > FEWEST_GROUPS and sum(one.nbytes for one in self._kept.values()) > GROUPS_BYTES:
                    self._kept.popitem(last=False)
            return self._kept[key], row - int(starts[group])


_GROUPS = _Groups()


@lru_cache(10_000)
def _group_starts(path: str, stamp: str) -> np.ndarray:
    """The first row of each row group of a Parquet file."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    return np.cumsum([0, *rows[:-1]])


@lru_cache(10_000)
def _arrow(path: str, stamp: str) -> "pa.Table":
    """A file as `datasets` writes them, mapped into memory."""
    import pyarrow as pa

    return pa.ipc.open_stream(pa.memory_map(path)).read_all()


def _features(schema: "pa.Schema") -> dict[str, dict]:
    """Hugging Face's description of the columns; empty in files of other programs."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _is_bytes(kind: "pa.DataType") -> bool:
    import pyarrow.types as types

    return types.is_binary(kind) or types.is_large_binary(kind)


def _is_text(kind: "pa.DataType") -> bool:
    import pyarrow.types as types

    return types.is_string(kind) or types.is_large_string(kind)


def _is_label(kind: "pa.DataType") -> bool:
    import pyarrow.types as types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return _is_text(kind) or types.is_integer(kind) or types.is_boolean(kind) or types.is_floating(kind)


def _holds_files(kind: "pa.DataType") -> bool:
    """Whether it is {bytes, ...}, as of Hugging Face's feature Image."""
    import pyarrow.types as types

    return types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and _is_bytes(kind.field("bytes").type)


def _label(value: Any, classes: list[str]) -> str | None:
    if classes:
        return classes[value] if isinstance(value, int) and 0 <= value < len(classes) else None
    if isinstance(value, float):  # as pandas writes whole numbers, some of which are missing
        return None if value != value else f"{value:g}"
    return None if value is None else str(value).strip() or None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
