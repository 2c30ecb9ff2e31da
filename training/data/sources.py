"""Sources of pictures: one argument, seven kinds.

    a folder          nested or flat
    a .zip            of such a folder; read without unpacking
    .tar shards       one .tar, a folder of them, 'shards/*.tar' or 'shards/{000..119}.tar', in the layout of
                      WebDataset; read without unpacking
    .parquet files    as .tar shards; a row per picture (training/data/tables.py)
    hf:NAME           a data set of Hugging Face's hub; hf:NAME:SPLIT takes one of its splits, hf:NAME:SPLIT:COLUMN or
                      hf:NAME::COLUMN one of several columns of pictures. NAME may be any folder that `datasets` reads,
                      or Parquet files; a folder written by save_to_disk needs no hf:
    cifar10, ...      a name in TORCHVISION: downloaded once, and kept as a folder of PNG files
    shapes            the built-in set of training/data/shapes.py: drawn once, and kept as a folder

Labels and splits are optional and follow from the folders: see training/data/layout.py. In shards the label is the
content of a sample's .cls file, and in tables it is in the column of labels.

Files are not filtered by suffix: decoding shows whether a file is a picture. Hidden files and __MACOSX are left out.
"""

import difflib
import errno
import glob
import importlib
import os
import re
import shutil
import socket
import tarfile
import threading
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple, overload

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from export.artifact import UnreadableImage, read_regular_file
from export.paths import at_home
from training.data import shapes, tables
from training.data.folder import FolderListing, is_hidden
from training.data.layout import layout
from training.data.tables import TableFile, TableProblem

# name: class in torchvision.datasets, its arguments for the split "train", and those for "test"
TORCHVISION = {
    "cifar10": ("CIFAR10", {"train": True}, {"train": False}),
    "cifar100": ("CIFAR100", {"train": True}, {"train": False}),
    "fashionmnist": ("FashionMNIST", {"train": True}, {"train": False}),
    "gtsrb": ("GTSRB", {"split": "train"}, {"split": "test"}),
    "imagenette": ("Imagenette", {"split": "train", "size": "160px"}, {"split": "val", "size": "160px"}),
    "kmnist": ("KMNIST", {"train": True}, {"train": False}),
    "mnist": ("MNIST", {"train": True}, {"train": False}),
    "stl10": ("STL10", {"split": "train+unlabeled"}, {"split": "test"}),
    "svhn": ("SVHN", {"split": "train"}, {"split": "test"}),
}
NAMES = ("shapes", *TORCHVISION)

SIDECARS = (".cls", ".json", ".txt")  # metadata of a WebDataset sample
NOTES = (*SIDECARS, ".md")  # beside shards and Parquet files
LEAST_TEST = 10  # smallest test split that is made from a source without one
TAR_BLOCK = 512
MOST_SHARDS = 1_000_000  # in one pair of braces
MAX_FILE_BYTES = 2**28  # so that a film in the folder does not fill the memory


class DataError(ValueError):
    """Data that cannot be used. The message is one sentence for the user that names the given data."""


def none_readable(skipped: Sequence[tuple[str, str]], source: str) -> DataError:
    """The error for a source without a readable picture. skipped: name and reason of each of its files."""
    name, reason = skipped[0]
    return DataError(f"no file of {source} is a readable picture: {name} {reason}")


@dataclass(frozen=True, slots=True)
class SourcePicture:
    """One file of a source; decoding shows whether it is a picture."""

    name: str
    """Path inside the source, '/'-separated, which the user recognises. Unique within a source."""
    label: str | None
    split: str
    """train or test."""
    path: Path | None
    """Absolute path of a plain file; None inside an archive."""
    stamp: str
    """Changes with the content: size and time of a file, checksum of a member of a .zip."""
    read: Callable[[], bytes] = field(repr=False, compare=False)
    """Returns the bytes of the file; thread-safe. Raises UnreadableImage."""


@dataclass(frozen=True)
class Source:
    name: str
    """Short name of letters, digits, dots and dashes, suitable as a folder name."""
    pictures: Sequence[SourcePicture]
    """Sorted by name."""
    layout: str = ""
    """Which folders were taken for splits, or left out; empty if the folders are labels."""

    def __len__(self) -> int:
        return len(self.pictures)


def with_test_split(source: Source, most: int, seed: int) -> Source:
    """The source, with a tenth of its pictures as the test split if it has none; at most `most`.

    A source of fewer than 100 pictures is returned as it is.
    """
    count = min(most, len(source) // 10)
    if count < LEAST_TEST or any(picture.split == "test" for picture in source.pictures):
        return source
    chosen = set(np.random.default_rng(seed).permutation(len(source))[:count].tolist())
    pictures = [replace(picture, split="test") if i in chosen else picture for i, picture in enumerate(source.pictures)]
    return replace(source, pictures=pictures)


def open_source(data: str, cache: Path = Path("data")) -> Source:
    """List the pictures of a source without decoding them. An existing path is preferred to the name of a set.

    data   path of a folder, .zip, .tar or .parquet, a pattern of .tar or .parquet files, hf:NAME, or one of NAMES
    cache  folder in which named sets are kept
    raises DataError
    """
    path = at_home(data)
    known = re.sub("[-_ ]", "", data.lower())
    if not data.strip():
        raise DataError("no data was given: name a folder, a .zip, .tar files, or one of " + ", ".join(NAMES))
    if os.path.isdir(path):
        pictures, said = _list_saved(path) or _list_folder(FolderListing(path))
    elif os.path.exists(path):
        if zipfile.is_zipfile(path) or path.lower().endswith(".zip"):
            pictures, said = _arrange(_list_zip(Path(path)))
        elif path.lower().endswith(".tar"):
            pictures, said = _list_shards([Path(path)])
        elif tables.is_parquet(path):
            pictures, said = _list_parquet([Path(path)], data)
        else:
            raise DataError(
                f"{data} is a file, but not a .zip, .tar or .parquet; give the folder that holds the pictures"
            )
    elif given := tables.parse(data):
        pictures, said = _list_given(given, data)
        path = given.name
    elif glob.has_magic(path) or len(_braces(path)) > 1:
        shards = _matches(path, data)
        kind = ".parquet" if tables.is_parquet(shards[0]) else ".tar"
        others = [shard for shard in shards if not (shard.is_file() and shard.name.lower().endswith(kind))]
        if others:
            raise DataError(
                f"{data} matches {others[0]}, which is not a {kind} file; for a folder of pictures give the folder"
            )
        pictures, said = _list_parquet(shards, data) if kind == ".parquet" else _list_shards(shards)
    elif known in NAMES:
        folder = Path(cache) / known
        make_once(folder, shapes.make if known == "shapes" else partial(_download, known))
        return Source(known, *_list_folder(FolderListing(folder)))
    else:
        nearest = difflib.get_close_matches(known, NAMES, n=3)
        names = f"nearest: {', '.join(nearest)}" if nearest else f"known: {', '.join(NAMES)}"
        raise DataError(f"there is no folder or file {data}, and no data set of that name ({names})")
    if not pictures:
        raise DataError(f"{data} holds no files")
    return Source(_short_name(path), pictures, said)


def _braces(pattern: str) -> list[str]:
    """{000..119} and {a,b} expanded, as shells and WebDataset do."""
    found = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if not found:
        return [pattern]
    first, last, words = found.groups()
    if words is None:
        width = len(first) if first.startswith("0") or len(first) == len(last) else 0
        inner = [f"{number:0{width}d}" for number in range(int(first), min(int(last), int(first) + MOST_SHARDS) + 1)]
    else:
        inner = words.split(",")
    return [path for word in inner for path in _braces(pattern[: found.start()] + word + pattern[found.end() :])]


def _matches(pattern: str, data: str) -> list[Path]:
    """The files that a pattern names. Folders that exist are taken by their name, even one called [1].

    data    the pattern, as it was given
    raises  DataError
    """
    parts, known = Path(pattern).parts, Path()
    for literal, part in enumerate(parts):  # noqa: B007
        if not (known / part).exists():
            break
        known /= part
    found = []
    for rest in _braces("/".join(parts[literal:])):
        matches = sorted(glob.glob(rest, root_dir=known, recursive=True))
        if not matches:
            path = str(known / rest)
            which = f"no file matches {data}" if path == pattern else f"{data} names {path}, which is not there"
            raise DataError(which)
        found += [known / match for match in matches]
    return found


def _short_name(path: str) -> str:
    """A folder name made from the last part of a path or glob that contains a name."""
    for part in reversed(Path(os.path.abspath(path)).parts):
        stem = re.sub(r"\.(zip|tar|parquet)$", "", part, flags=re.IGNORECASE)
        stem = stem if os.path.exists(path) else re.sub(r"\{[^{}]*\}", "", stem)
        if name := re.sub(r"[^\w.]+", "-", stem)[:40].strip("-."):
            return name
    return "pictures"


def make_once(folder: Path, make: Callable[[Path], None]) -> None:
    """Create `folder` with make(folder) unless it exists. It appears complete or not at all, even if the process dies.

    A second process that needs the same folder waits for the first. raises DataError when it cannot be written
    """
    if folder.is_dir():
        return
    work = folder.with_name(f".{folder.name}.part")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if folder.is_dir():
                return
            shutil.rmtree(work, ignore_errors=True)  # left by a process that was killed
            work.mkdir()
            try:
                make(work)
                work.rename(folder)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise DataError(f"the disk is full: {folder} could not be written") from error
        raise DataError(f"{folder} cannot be written: {error.strerror or error}") from error


class _SourceFile(NamedTuple):
    inside: tuple[str, ...]  # parts of its path inside the source
    stamp: str
    read: Callable[[], bytes]
    path: Path | None = None


def _arrange(files: dict[str, _SourceFile]) -> tuple[list[SourcePicture], str]:
    """The pictures, sorted by name, with labels and splits, and what layout() says of the folders."""
    places, said = layout({file.inside[:-1] for file in files.values()})
    pictures = [
        SourcePicture(name, *places[file.inside[:-1]], file.path, file.stamp, file.read)
        for name, file in sorted(files.items())
        if file.inside[:-1] in places
    ]
    return pictures, said


def _only(kind: str, files: dict[str, _SourceFile]) -> list[Path]:
    """The .tar or .parquet files of a folder with nothing else, apart from notes about them; otherwise none."""
    others = [name for name in files if not name.lower().endswith((kind, *NOTES))]
    return [] if others else [file.path for name, file in files.items() if file.path and name.lower().endswith(kind)]


def list_again(listing: FolderListing, changed: Iterable[str] | None = None) -> Sequence[SourcePicture]:
    """The pictures of a folder; none if it is empty.

    changed  absolute paths: only the folders that hold them are listed again; None lists all
    raises   DataError
    """
    return _list_folder(listing, changed)[0]


def _list_folder(listing: FolderListing, changed: Iterable[str] | None = None) -> tuple[Sequence[SourcePicture], str]:
    try:
        if changed is None:
            listing.list()
        else:
            listing.list_again(changed)
    except OSError as error:
        raise DataError(f"{listing.root} cannot be read: {error.strerror}") from error
    files = {
        "/".join(inside): _SourceFile(inside, stamp, partial(read_file, path), path)
        for inside, stamp, path in listing.files()
    }
    if shards := _only(".tar", files):
        return _list_shards(shards)
    if parquet := _only(".parquet", files):
        return _list_parquet(parquet, str(listing.root))
    return _arrange(files)


def _list_zip(path: Path) -> dict[str, _SourceFile]:
    try:
        archive = zipfile.ZipFile(path)
    except Exception as error:  # damaged files raise many kinds of errors
        raise DataError(f"{path} cannot be read as a .zip: {_reason(error)}") from error
    lock, files = threading.Lock(), {}
    for member in archive.infolist():
        inside = _parts(member.filename)
        if inside and not any(map(is_hidden, inside)) and not member.is_dir():
            stamp = f"{member.file_size} {member.CRC:08x}"
            files["/".join(inside)] = _SourceFile(inside, stamp, partial(_read_member, archive, lock, member))
    return files


class PicturesOnAccess(Sequence[SourcePicture]):
    """Pictures that are created on access, from rows of numbers."""

    _rows: np.ndarray

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> SourcePicture: ...
    @overload
    def __getitem__(self, index: slice) -> list[SourcePicture]: ...
    def __getitem__(self, index: int | slice) -> SourcePicture | list[SourcePicture]:
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        return self._picture(self._rows[index].item())

    def _picture(self, row: tuple[int, ...]) -> SourcePicture:
        raise NotImplementedError


class ShardPictures(PicturesOnAccess):
    """The pictures of .tar shards. A million take about 70 MB."""

    ROW = np.dtype(
        [("shard", "i4"), ("kind", "i4"), ("name", "i8"), ("length", "i4"), ("offset", "i8"), ("size", "i8")]
    )

    def __init__(
        self,
        rows: np.ndarray,
        names: bytearray,
        shards: list[tuple[Path, str, str]],
        kinds: list[tuple[str | None, str]],
    ) -> None:
        """
        rows    (N,) ROW: indices into `shards`, `kinds` and `names`, and the place of the file's bytes in the shard
        names   names of all files inside their shards, concatenated
        shards  path, prefix of the names, and stamp of each shard
        kinds   pairs of label and split
        """
        self._rows, self._names, self._shards, self._kinds = rows, names, shards, kinds

    def _picture(self, row: tuple[int, ...]) -> SourcePicture:
        shard, kind, start, length, offset, size = row
        path, prefix, stamp = self._shards[shard]
        label, split = self._kinds[kind]
        name = prefix + self._names[start : start + length].decode("utf-8", "surrogateescape")
        read = partial(_read_range, path, offset, size)
        return SourcePicture(name, label, split, None, f"{size} {offset} {stamp}", read)


def _list_shards(shards: list[Path]) -> tuple[ShardPictures, str]:
    """The members of .tar files, and what layout() says of their folders. With several
    shards, names start with that of the shard."""
    above = Path(os.path.commonpath([shard.parent for shard in shards]))
    several = len(shards) > 1
    # The trailing slash makes the order of the shards that of the names of their pictures.
    shards = sorted(set(shards), key=lambda shard: f"{shard.relative_to(above).as_posix()}/")
    rows, names, facts, kinds = [], bytearray(), [], {}
    for shard in tqdm(shards, desc="listing shards", unit="shard", disable=not several):
        inside = shard.relative_to(above)
        folders = inside.parent.parts if several else ()
        try:
            stamp = os.stat(shard)
            members = _members(shard)
            labels = {
                _sample(name): _read_range(shard, offset, min(size, 1000)).decode(errors="replace").strip() or None
                for name, (offset, size) in members.items()
                if name.lower().endswith(".cls")
            }
        except (tarfile.TarError, OSError, ValueError) as error:
            raise DataError(f"{shard} cannot be read as a .tar: {_reason(error)}") from error

        def listed(
            members: dict = members, labels: dict = labels, folders: tuple = folders
        ) -> Iterator[tuple[int, ...]]:
            for name in sorted(members):
                parts = name.split("/")
                if name.lower().endswith(SIDECARS) or any(map(is_hidden, parts)):
                    continue
                kind = kinds.setdefault(((*folders, *parts[:-1]), labels.get(_sample(name))), len(kinds))
                encoded = name.encode("utf-8", "surrogateescape")
                yield len(facts), kind, len(names), len(encoded), *members[name]
                names.extend(encoded)

        rows.append(np.fromiter(listed(), ShardPictures.ROW))
        facts.append((shard, f"{inside.as_posix()}/" if several else "", f"{stamp.st_size} {stamp.st_mtime_ns}"))
    rows = np.concatenate(rows)
    places, said = layout({folder for folder, _ in kinds})
    rows = rows[np.array([folder in places for folder, _ in kinds], bool)[rows["kind"]]]
    by_folder = [places.get(folder, (None, "")) for folder, _ in kinds]
    labelled = [(own or label, split) for (_, own), (label, split) in zip(kinds, by_folder, strict=True)]
    return ShardPictures(rows, names, facts, labelled), said


class TablePictures(PicturesOnAccess):
    """The pictures of tables."""

    ROW = np.dtype([("table", "i4"), ("kind", "i4"), ("row", "i8"), ("number", "i8")])

    def __init__(
        self, rows: np.ndarray, listed: list[tables.Table], kinds: list[tuple[str | None, str]], digits: dict[str, int]
    ) -> None:
        """
        rows    (N,) ROW: indices into `listed` and `kinds`, the row in its table, and its number among those of all
                tables with the same prefix
        kinds   pairs of label and split
        digits  of the numbers, by prefix
        """
        self._rows, self._listed, self._kinds, self._digits = rows, listed, kinds, digits

    def _picture(self, row: tuple[int, ...]) -> SourcePicture:
        place, kind, place_in_table, number = row
        table, (label, split) = self._listed[place], self._kinds[kind]
        prefix, column = table.file.prefix, table.columns.image
        path = table.paths[place_in_table].as_py() if table.paths is not None else None
        name = f"{prefix}{number:0{self._digits[prefix]}d}{f'-{os.path.basename(path)}' if path else ''}"
        read = partial(_read_row, str(table.file.path), table.stamp, column, place_in_table)
        return SourcePicture(name, label, split, None, f"{column} {place_in_table} {table.stamp}", read)


def _list_given(given: tables.Given, data: str) -> tuple[TablePictures, str]:
    """What hf:NAME:SPLIT:COLUMN names."""
    if not given.name:
        raise DataError(f"{data} names no data set: give hf:NAME, hf:NAME:SPLIT or hf:NAME:SPLIT:COLUMN")
    if tables.is_parquet(given.name):
        paths = [Path(given.name)] if os.path.exists(given.name) else _matches(given.name, data)
        return _list_parquet(paths, data, given)
    if os.path.isdir(given.name) and (found := _list_saved(given.name, given)):
        return found
    try:
        return _list_tables(tables.hub_files(given), data, given)
    except TableProblem as problem:
        raise DataError(str(problem)) from problem


def _list_saved(folder: str, given: tables.Given | None = None) -> tuple[TablePictures, str] | None:
    """None unless it was written by save_to_disk."""
    try:
        files = tables.saved_files(Path(folder))
    except TableProblem as problem:
        raise DataError(str(problem)) from problem
    return _list_tables(files, folder, given) if files else None


def _list_parquet(paths: list[Path], data: str, given: tables.Given | None = None) -> tuple[TablePictures, str]:
    above = Path(os.path.commonpath([path.parent for path in paths]))
    return _list_tables(tables.parquet_files(paths, above), data, given)


def _list_tables(files: list[TableFile], data: str, given: tables.Given | None = None) -> tuple[TablePictures, str]:
    """The rows of tables, and what was taken for labels and splits. Names are those of a split or file, with the number
    of the row, and the name of the file that the row names."""
    listed, rows, kinds, counts = [], [], {}, Counter()
    try:
        for place, file in enumerate(tqdm(files, desc="listing tables", unit="file", disable=len(files) < 2)):
            table = tables.open_table(file, given.column if given else "", data)
            splits = table.splits or [None] * len(table)
            found = np.empty(len(table), TablePictures.ROW)
            found["table"], found["row"] = place, np.arange(len(table))
            found["number"] = found["row"] + counts[file.prefix]
            counts[file.prefix] += len(table)
            found["kind"] = [
                kinds.setdefault(((split,) if split else file.folder, label), len(kinds))
                for label, split in zip(table.labels, splits, strict=True)
            ]
            listed.append(table)
            rows.append(found)
        if given:
            tables.check_split(given, [folder[-1] if folder else None for folder, _ in kinds])
    except TableProblem as problem:
        raise DataError(str(problem)) from problem
    if given and given.split:
        places, said = {folder: (None, "train") for folder, _ in kinds if folder[-1:] == (given.split,)}, ""
    else:
        places, said = layout({folder for folder, _ in kinds})
    is_used = np.array([folder in places for folder, _ in kinds], bool)
    rows = np.concatenate(rows)
    rows = rows[is_used[rows["kind"]]]
    labelled = [(label, places.get(folder, (None, ""))[1]) for folder, label in kinds]
    columns = listed[0].columns
    labels = f"labels from the column {columns.label}" if columns.label else "no column of labels"
    if columns.other_labels:
        labels += f", not from {', '.join(columns.other_labels)}"
    said = "; ".join(filter(None, [f"pictures from the column {columns.image}", labels, said]))
    digits = {prefix: len(str(count)) for prefix, count in counts.items()}
    return TablePictures(rows, listed, labelled, digits), said


def _members(shard: Path) -> dict[str, tuple[int, int]]:
    """Offset and size of every file in a .tar, by its path; in all of several that were joined by `cat`.

    raises TarError, OSError
    """
    places, start = {}, 0
    with open(shard, "rb") as file:
        while start is not None:
            file.seek(start)
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for member in archive:
                    # tarfile would keep a kilobyte per member
                    archive.members.clear()  # pyrefly: ignore[missing-attribute]  # not in typeshed
                    name, target = ("/".join(_parts(path)) for path in (member.name, member.linkname))
                    if name and member.isreg():
                        places[name] = (member.offset_data, member.size)
                    elif name and member.islnk() and target in places:
                        places[name] = places[target]
                end = archive.offset
            start = _next_archive(file, end)
    return places


def _next_archive(file: BinaryIO, end: int) -> int | None:
    """Where another .tar begins after the end of one; None if nothing follows. raises TarError"""
    file.seek(end)
    at = end
    while block := file.read(TAR_BLOCK):
        if block.strip(b"\0"):
            # tarfile takes a damaged header for the end, but at the true end there are zeros or nothing
            if at == end:
                raise tarfile.ReadError("it is damaged in the middle")
            return at
        at += len(block)
    return None


def _sample(name: str) -> str:
    """Key of a WebDataset sample: the path up to the first dot of the file name."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def _parts(name: str) -> tuple[str, ...]:
    """Parts of a member's path. Some archivers on Windows write backslashes."""
    return tuple(part for part in name.replace("\\", "/").split("/") if part not in ("", ".", ".."))


def _check_size(size: int) -> None:
    if size > MAX_FILE_BYTES:
        raise UnreadableImage(f"is larger than {MAX_FILE_BYTES // 2**20} MiB")


def read_file(path: Path) -> bytes:
    """raises UnreadableImage"""
    return read_regular_file(path, MAX_FILE_BYTES)


def _read_member(archive: zipfile.ZipFile, lock: threading.Lock, member: zipfile.ZipInfo) -> bytes:
    _check_size(member.file_size)
    try:
        with lock:  # opening and closing are not thread-safe in ZipFile; reading is
            file = archive.open(member)
        try:
            # In pieces: ZipFile unpacks what it is asked for, however little the member claims to hold, and with the
            # methods that hardly anyone uses everything in so many packed bytes.
            step = 2**20 if member.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) else 2**12
            return b"".join(iter(partial(file.read, step), b""))
        finally:
            with lock:
                file.close()
    except Exception as error:  # damaged, encrypted, or an unknown compression method
        raise UnreadableImage(f"cannot be read from the .zip: {_reason(error)}") from error


def _read_range(path: Path, offset: int, size: int) -> bytes:
    _check_size(size)
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(size)
    except OSError as error:
        raise UnreadableImage(f"cannot be read: {_reason(error)}") from error


def _read_row(table: str, stamp: str, column: str, row: int) -> bytes:
    cell = tables.read_cell(table, stamp, column, row)
    if isinstance(cell, str):
        return read_file(Path(cell))
    _check_size(len(cell))
    return cell


def _reason(error: Exception) -> str:
    """A short reason, on one line."""
    text = getattr(error, "strerror", None) or getattr(error, "reason", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())


def _download(name: str, folder: Path) -> None:
    """Download a set of TORCHVISION and write it as PNG files. The next call resumes an interrupted download."""
    downloads = folder.with_name(f".{name}.download")
    class_name, *arguments = TORCHVISION[name]
    before = socket.getdefaulttimeout()
    try:
        dataset_class = getattr(importlib.import_module("torchvision.datasets"), class_name)
        if name == "svhn":
            importlib.import_module("scipy.io")  # otherwise torchvision would fail only after the download
        print(f"downloading {name} through torchvision")
        socket.setdefaulttimeout(30)
        train, test = (dataset_class(str(downloads), download=True, **chosen) for chosen in arguments)
    except ImportError as error:
        raise DataError(f"{name} cannot be read without the Python package {error.name}") from error
    except (OSError, RuntimeError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise
        raise DataError(f"{name} cannot be downloaded; is there a network? ({_reason(error)})") from error
    finally:
        socket.setdefaulttimeout(before)
    for split, dataset in (("train", train), ("test", test)):
        titles = [title if isinstance(title, str) else title[0] for title in getattr(dataset, "classes", ())]
        for i in tqdm(range(len(dataset)), desc=f"writing {name} ({split})", unit="img"):
            image, label = dataset[i]
            place = folder / split
            if label >= 0:  # STL-10 has pictures without label
                place /= re.sub(r"[^\w.-]+", "-", titles[label]) if titles else f"{label:02d}"
            place.mkdir(parents=True, exist_ok=True)
            image.save(place / f"{i:05d}.png", compress_level=1)
    shutil.rmtree(downloads, ignore_errors=True)
