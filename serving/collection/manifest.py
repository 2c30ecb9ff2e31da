"""Reads Lance's manifests: the files of a version, and the kind of change that made it.

LanceDB's own API (0.40) gives neither: `list_versions` and `stats` have counts only, and `to_lance` needs pylance,
which is not a dependency. We need them to recover from a power cut, to name damaged files, and to undo changes of rows
but not maintenance. So this file has a minimal parser: it iterates over the fields of a protobuf message.

Lance's format (lance.org/format, protos/table.proto and transaction.proto): a version is a file in `_versions`, named
by the largest 64-bit number minus the version. It ends with the offset of its message and the letters LANC.
"""

import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from serving.collection.store import FileStore

LARGEST = 2**64 - 1
MAGIC = b"LANC"
UNFLUSHED_S = 60  # commits up to this long before the newest may not have been flushed when the power failed
MOST_TORN = 16  # most unfinished commits: one per writer

T = TypeVar("T", int, bytes)

# Fields of a transaction whose operations change rows: append, delete, overwrite, restore, update, data replacement.
# Other operations build indices, compact, and add columns.
DATA_CHANGES = {100, 101, 102, 106, 108, 111}


@dataclass(frozen=True)
class Fragment:
    """Rows that were written together."""

    number: int
    files: tuple[str, ...]
    """Paths below the table's folder."""
    rows: int
    """Including deleted ones."""


@dataclass(frozen=True)
class Manifest:
    fragments: tuple[Fragment, ...]
    transaction: str
    """Name of its file in `_transactions`."""


def read(store: FileStore, root: str, version: int) -> Manifest:
    """Returns the manifest of a version of the table in `root`. Raises ValueError if it is damaged or missing."""
    return parse(store.read(f"{root}/_versions/{LARGEST - version:020}.manifest") or b"")


def parse(content: bytes) -> Manifest:
    if len(content) < 20 or content[-4:] != MAGIC:
        raise ValueError("the manifest is not complete")
    (start,) = struct.unpack("<Q", content[-16:-8])
    (length,) = struct.unpack_from("<I", content, start)
    fragments, transaction = [], ""
    for field, value in _fields(content[start + 4 : start + 4 + length]):
        if field == 2:
            fragments.append(_fragment(_of_type(bytes, value)))
        elif field == 12:
            transaction = _of_type(bytes, value).decode()
    return Manifest(tuple(fragments), transaction)


def changes_rows(store: FileStore, root: str, version: int) -> bool:
    """Whether the version changed rows; True if that cannot be read."""
    try:
        transaction = store.read(f"{root}/_transactions/{read(store, root, version).transaction}")
        return not transaction or any(field in DATA_CHANGES for field, _ in _fields(transaction))
    except (ValueError, struct.error):
        return True


def recover(store: FileStore, root: str) -> None:
    """Rename the newest manifests to .torn if a power cut left them, or files that they list, empty. The commit before
    them is then the newest. Acknowledged commits are flushed, so they are never affected."""
    if store.local is None:
        return
    while torn(store.local / root):
        with store.lease(f"recover.{root}") as held:  # or a manifest just rewritten by another process could be renamed
            if held:
                for path in torn(store.local / root):
                    path.replace(path.with_suffix(".torn"))
                return
        time.sleep(0.05)


def torn(root: Path) -> list[Path]:
    """Returns the manifests newer than the newest complete one; none if that one is old: then the damage was not caused
    by a power cut."""
    manifests = sorted(path for path in root.glob("_versions/*.manifest") if path.stem.isdigit())  # newest first
    damaged: list[Path] = []
    empty = None
    for path in manifests:
        if len(damaged) == MOST_TORN or path.stat().st_mtime < manifests[0].stat().st_mtime - UNFLUSHED_S:
            return []
        try:
            manifest = parse(path.read_bytes())
        except (ValueError, struct.error):
            damaged.append(path)
            continue
        if empty is None:
            files = (file for folder in ("data", "_deletions") for file in root.glob(f"{folder}/*"))
            empty = {f"{file.parent.name}/{file.name}" for file in files if file.stat().st_size == 0}
        cut = path.stat().st_mtime < booted_at()  # otherwise it is damage to report
        if not (cut and any(file in empty for fragment in manifest.fragments for file in fragment.files)):
            return damaged
        damaged.append(path)
    return []


def booted_at() -> float:
    """Returns when this machine was started, in Unix seconds."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)  # on Linux; includes the time asleep
    return time.time() - (time.monotonic() if clock is None else time.clock_gettime(clock))


def _fragment(message: bytes) -> Fragment:
    number, rows, files = 0, 0, []
    deleted: dict[str, int | bytes] = {}
    for field, value in _fields(message):
        if field == 1:
            number = _of_type(int, value)
        elif field == 2:
            file = _fields(_of_type(bytes, value))
            files += [f"data/{_of_type(bytes, inner).decode()}" for name, inner in file if name == 1]
        elif field == 3:
            file = _fields(_of_type(bytes, value))
            deleted = {"kind": 0, "version": 0, "id": 0}  # protobuf leaves out zeros
            deleted |= {_DELETED[name]: inner for name, inner in file if name in _DELETED}
        elif field == 4:
            rows = _of_type(int, value)
    if deleted:
        name = f"{number}-{deleted['version']}-{deleted['id']}"
        files.append(f"_deletions/{name}.{'bin' if deleted['kind'] else 'arrow'}")
    return Fragment(number, tuple(files), rows)


_DELETED = {1: "kind", 2: "version", 3: "id"}  # the fields of DeletionFile


def _of_type(kind: type[T], value: int | bytes) -> T:
    """Returns the value of a field that must be a number or bytes. Raises ValueError if it is the other."""
    if not isinstance(value, kind):
        raise ValueError("this is not one of Lance's messages")
    return value


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yields (field, value) of a protobuf message. Raises ValueError if it is not one."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while at < len(message):
            byte = message[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value
        raise ValueError("the message is not complete")

    while at < len(message):
        field, wire = divmod(varint(), 8)
        if wire == 0:
            yield field, varint()
            continue
        length = {1: lambda: 8, 2: varint, 5: lambda: 4}.get(wire)
        if length is None:
            raise ValueError("this is not a protobuf message")
        size = length()
        yield field, message[at : at + size]
        at += size
