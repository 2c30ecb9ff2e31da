"""Where pictures come from: one argument, five kinds of source.

    a folder          nested or flat
    a .zip            of such a folder; read in place, never unpacked
    .tar shards       one .tar or a glob such as 'shards/*.tar', in the layout of WebDataset; read in place
    cifar10, ...      a name in TORCHVISION: downloaded once, kept as a folder of PNG files
    shapes            the built-in set of training/data/shapes.py, drawn once, kept as a folder

The layout tells label and split, and neither is needed. The first folder level is the label. Where that level has
only split folders (SPLITS), the next one is the label, and files beside the split folders are no pictures. A single
folder around all the others, as archives have, is looked through. In shards a sample's .cls file gives the label.

Nothing is filtered by suffix: what a file is shows when it is decoded. Hidden files and __MACOSX are left out.
"""

import difflib
import errno
import glob
import importlib
import os
import re
import shutil
import socket
import stat
import tarfile
import threading
import zipfile
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from export.artifact import UnreadableImage
from training.data import shapes

# Folder names that are splits. "val" belongs to "train" where there is a test folder, otherwise it is "test".
SPLITS = {"train": "train", "training": "train", "test": "test", "val": "val", "valid": "val", "validation": "val"}

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

SIDECARS = (".cls", ".json", ".txt")  # of a WebDataset sample: about the picture, not one
MAX_FILE_BYTES = 2**28  # a film in the folder must not fill the memory


class DataError(ValueError):
    """Data that cannot be used. The message is one sentence for the user, naming what they gave."""


@dataclass(frozen=True, slots=True)
class Picture:
    """One file of a source; whether it is a picture shows when it is decoded."""

    name: str
    """Path inside the source, '/'-separated: what the user recognises. No two in a source are equal."""
    label: str | None
    split: str
    """train or test."""
    path: Path | None
    """Absolute path, where it is a plain file."""
    stamp: str
    """Differs when the content does: size and time of a file, checksum of a zip's member."""
    read: Callable[[], bytes] = field(repr=False, compare=False)
    """The file's bytes; may be called from any thread. raises UnreadableImage."""


@dataclass(frozen=True)
class Source:
    name: str
    """Short, of letters, digits, dots and dashes: fit for a folder's name."""
    pictures: Sequence[Picture]
    """In the order of their names."""

    def __len__(self) -> int:
        return len(self.pictures)


def open_source(data: str, cache: Path = Path("data")) -> Source:
    """List the pictures of a source; none is decoded. What exists at the path `data` wins over a name.

    data   path of a folder, .zip or .tar, a glob of .tar files, or one of NAMES
    cache  folder where named sets are kept
    raises DataError
    """
    path = os.path.expanduser(data)
    known = re.sub("[-_ ]", "", data.lower())
    if not data.strip():
        raise DataError("no data was named: give a folder, a .zip, .tar files, or one of " + ", ".join(NAMES))
    if os.path.isdir(path):
        pictures = _arrange(_list_folder(Path(path)))
    elif os.path.exists(path):
        if zipfile.is_zipfile(path) or path.lower().endswith(".zip"):
            pictures = _arrange(_list_zip(Path(path)))
        elif path.lower().endswith(".tar"):
            pictures = _list_shards([Path(path)])
        else:
            raise DataError(f"{data} is a file, but no .zip or .tar; give the folder that holds the pictures")
    elif glob.has_magic(path):
        shards = [Path(match) for match in sorted(glob.glob(path, recursive=True))]
        if not shards:
            raise DataError(f"no file matches {data}")
        others = [shard for shard in shards if not (shard.is_file() and shard.name.lower().endswith(".tar"))]
        if others:
            raise DataError(
                f"{data} matches {others[0]}, which is no .tar file; for a folder of pictures give the folder"
            )
        pictures = _list_shards(shards)
    elif known in NAMES:
        folder = Path(cache) / known
        make_once(folder, shapes.make if known == "shapes" else partial(_download, known))
        return Source(known, _arrange(_list_folder(folder)))
    else:
        nearest = difflib.get_close_matches(known, NAMES, n=3)
        names = f"nearest: {', '.join(nearest)}" if nearest else f"known: {', '.join(NAMES)}"
        raise DataError(f"there is no folder or file {data}, and no data set of that name ({names})")
    if not pictures:
        raise DataError(f"{data} holds no files")
    return Source(_short_name(path), pictures)


def _short_name(path: str) -> str:
    """The last part of a path, or of a glob the last that names something, made fit for a folder's name."""
    for part in reversed(Path(os.path.abspath(path)).parts):
        stem = re.sub(r"\.(zip|tar)$", "", part, flags=re.IGNORECASE)
        if name := re.sub(r"[^\w.]+", "-", stem)[:40].strip("-."):
            return name
    return "pictures"


def make_once(folder: Path, make: Callable[[Path], None]) -> None:
    """Fill `folder` by `make(folder)` unless it exists. It appears whole or not at all, whenever the process dies.

    A second process that wants the same folder waits for the first. raises DataError where it cannot be written.
    """
    if folder.is_dir():
        return
    work = folder.with_name(f".{folder.name}.part")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if folder.is_dir():
                return
            shutil.rmtree(work, ignore_errors=True)  # what a killed process left
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
    inside: tuple[str, ...]  # parts of its path
    stamp: str
    read: Callable[[], bytes]
    path: Path | None = None


def _arrange(files: dict[str, _SourceFile]) -> list[Picture]:
    """Sorted by name, with labels and splits."""
    layout = _layout({file.inside[:-1] for file in files.values()})
    return [
        Picture(name, *layout[file.inside[:-1]], file.path, file.stamp, file.read)
        for name, file in sorted(files.items())
        if file.inside[:-1] in layout
    ]


def _layout(folders: set[tuple[str, ...]]) -> dict[tuple[str, ...], tuple[str | None, str]]:
    """Label and split of the files in each folder, by the layout of the whole; files beside splits have none.

    folders  parts of the path of each folder that holds a file; () for the source itself
    """
    depth = 0  # of the level that is looked at; above it there is a single folder each
    while True:
        level = {folder[depth] for folder in folders if len(folder) > depth}
        is_split = all(name.lower() in SPLITS for name in level)
        if is_split or len(level) != 1:
            break
        depth += 1
    splits = {name: SPLITS[name.lower()] for name in level} if is_split else {}
    at_label = depth + 1 if splits else depth
    validation = "train" if "test" in splits.values() else "test"
    layout = {}
    for folder in folders:
        split = "train"
        if splits:
            if len(folder) <= depth:
                continue
            split = splits[folder[depth]]
            split = validation if split == "val" else split
        layout[folder] = (folder[at_label] if len(folder) > at_label else None, split)
    return layout


def _list_folder(root: Path) -> dict[str, _SourceFile]:
    """Every file below, symbolic links followed, each folder once. What cannot be looked at is listed as well."""
    root = Path(os.path.abspath(root))
    files, seen, waiting = {}, set(), deque([(root, ())])

    def add(path: Path, inside: tuple[str, ...], stamp: str) -> None:
        files["/".join(inside)] = _SourceFile(inside, stamp, partial(read_file, path), path)

    while waiting:
        folder, above = waiting.popleft()
        try:
            facts = os.stat(folder)
            if (facts.st_dev, facts.st_ino) in seen:
                continue
            seen.add((facts.st_dev, facts.st_ino))
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            if not above:
                raise DataError(f"{root} cannot be read: {error.strerror}") from error
            add(folder, above, "unreadable folder")
            continue
        for entry in entries:
            if _hidden(entry.name):
                continue
            path, inside = folder / entry.name, (*above, entry.name)
            try:
                facts = entry.stat()
            except OSError:  # a link to nowhere
                add(path, inside, "unreadable")
                continue
            if stat.S_ISDIR(facts.st_mode):
                waiting.append((path, inside))
            elif stat.S_ISREG(facts.st_mode):  # sockets and pipes are left out
                add(path, inside, f"{facts.st_size} {facts.st_mtime_ns}")
    return files


def _list_zip(path: Path) -> dict[str, _SourceFile]:
    try:
        archive = zipfile.ZipFile(path)
    except Exception as error:  # the parser raises nearly anything on damaged files
        raise DataError(f"{path} cannot be read as a .zip: {_reason(error)}") from error
    lock, files = threading.Lock(), {}
    for member in archive.infolist():
        inside = _parts(member.filename)
        if inside and not any(map(_hidden, inside)) and not member.is_dir():
            stamp = f"{member.file_size} {member.CRC:08x}"
            files["/".join(inside)] = _SourceFile(inside, stamp, partial(_read_member, archive, lock, member))
    return files


class Members(Sequence[Picture]):
    """The pictures of .tar shards. Each is made when it is asked for: a million lie in some 70 MB."""

    ROW = np.dtype(
        [("shard", "i4"), ("kind", "i4"), ("name", "i8"), ("length", "i4"), ("offset", "i8"), ("size", "i8")]
    )

    def __init__(self, rows: np.ndarray, names: bytearray, shards: list[tuple], kinds: list[tuple]):
        """
        rows    (N,) ROW: places in `shards`, `kinds` and `names`, and where in the shard the file's bytes are
        names   of all files inside their shards, one after the other
        shards  path, what its files' names begin with, stamp
        kinds   label and split
        """
        self._rows, self._names, self._shards, self._kinds = rows, names, shards, kinds

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[at] for at in range(*i.indices(len(self)))]
        shard, kind, start, length, offset, size = self._rows[i].item()
        path, above, stamp = self._shards[shard]
        name = above + self._names[start : start + length].decode("utf-8", "surrogateescape")
        read = partial(_read_range, path, offset, size)
        return Picture(name, *self._kinds[kind], None, f"{size} {offset} {stamp}", read)


def _list_shards(shards: list[Path]) -> Members:
    """The members of .tar files. Names start with the shard's where there are several."""
    above = Path(os.path.commonpath([shard.parent for shard in shards]))
    several = len(shards) > 1
    shards = sorted(set(shards), key=lambda shard: f"{shard.relative_to(above).as_posix()}/")  # so are the names sorted
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

        def listed(members=members, labels=labels, folders=folders):
            for name in sorted(members):
                parts = name.split("/")
                if name.lower().endswith(SIDECARS) or any(map(_hidden, parts)):
                    continue
                kind = kinds.setdefault(((*folders, *parts[:-1]), labels.get(_sample(name))), len(kinds))
                encoded = name.encode("utf-8", "surrogateescape")
                yield len(facts), kind, len(names), len(encoded), *members[name]
                names.extend(encoded)

        rows.append(np.fromiter(listed(), Members.ROW))
        facts.append((shard, f"{inside.as_posix()}/" if several else "", f"{stamp.st_size} {stamp.st_mtime_ns}"))
    rows = np.concatenate(rows)
    layout = _layout({folder for folder, _ in kinds})
    rows = rows[np.array([folder in layout for folder, _ in kinds], bool)[rows["kind"]]]
    by_folder = [layout.get(folder, (None, "")) for folder, _ in kinds]
    kinds = [(own or label, split) for (_, own), (label, split) in zip(kinds, by_folder, strict=True)]
    return Members(rows, names, facts, kinds)


def _members(shard: Path) -> dict[str, tuple[int, int]]:
    """Path of every file in a .tar: offset and size of its bytes. raises TarError, OSError."""
    places = {}
    with tarfile.open(shard, "r:") as archive:
        for member in archive:
            archive.members.clear()  # tarfile would keep a kilobyte each
            name, target = ("/".join(_parts(path)) for path in (member.name, member.linkname))
            if name and member.isreg():
                places[name] = (member.offset_data, member.size)
            elif name and member.islnk() and target in places:
                places[name] = places[target]
        end = archive.offset
    # tarfile takes a damaged header for the end; at the true end there are zeros, or nothing
    if _read_range(shard, end, min(512, max(0, os.path.getsize(shard) - end))).strip(b"\0"):
        raise tarfile.ReadError("it is damaged in the middle")
    return places


def _sample(name: str) -> str:
    """WebDataset's key: the path up to the first dot of the file's name."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def _parts(name: str) -> tuple[str, ...]:
    """Of a member's name. Some archivers on Windows write backslashes."""
    return tuple(part for part in name.replace("\\", "/").split("/") if part not in ("", ".", ".."))


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def read_file(path: Path) -> bytes:
    """raises UnreadableImage"""
    try:
        if os.path.getsize(path) > MAX_FILE_BYTES:
            raise UnreadableImage(f"is larger than {MAX_FILE_BYTES // 2**20} MiB")
        return path.read_bytes()
    except OSError as error:
        raise UnreadableImage(f"cannot be read: {_reason(error)}") from error


def _read_member(archive: zipfile.ZipFile, lock: threading.Lock, member: zipfile.ZipInfo) -> bytes:
    if member.file_size > MAX_FILE_BYTES:
        raise UnreadableImage(f"is larger than {MAX_FILE_BYTES // 2**20} MiB")
    try:
        with lock:  # opening and closing count the archive's users, without a lock of their own; reading has one
            file = archive.open(member)
        try:
            return file.read()
        finally:
            with lock:
                file.close()
    except Exception as error:  # damaged, encrypted or packed by a method that is not known
        raise UnreadableImage(f"cannot be read from the .zip: {_reason(error)}") from error


def _read_range(path: Path, offset: int, size: int) -> bytes:
    if size > MAX_FILE_BYTES:
        raise UnreadableImage(f"is larger than {MAX_FILE_BYTES // 2**20} MiB")
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(size)
    except OSError as error:
        raise UnreadableImage(f"cannot be read: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """In a few words, on one line."""
    text = getattr(error, "strerror", None) or getattr(error, "reason", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())


def _download(name: str, folder: Path) -> None:
    """Fetch a set of TORCHVISION and write it as PNG files; an interrupted download is taken up by the next."""
    downloads = folder.with_name(f".{name}.download")
    class_name, *arguments = TORCHVISION[name]
    before = socket.getdefaulttimeout()
    try:
        dataset_class = getattr(importlib.import_module("torchvision.datasets"), class_name)
        if name == "svhn":
            importlib.import_module("scipy.io")  # torchvision would miss it only after the download
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
            if label >= 0:  # STL-10 has pictures without one
                place /= re.sub(r"[^\w.-]+", "-", titles[label]) if titles else f"{label:02d}"
            place.mkdir(parents=True, exist_ok=True)
            image.save(place / f"{i:05d}.png", compress_level=1)
    shutil.rmtree(downloads, ignore_errors=True)
