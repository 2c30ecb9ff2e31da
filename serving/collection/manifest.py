"""What Lance's manifests say that LanceDB does not: a version's files, and what kind of change made it.

Lance's format (lance.org/format, protos/table.proto and transaction.proto): a table's version is a file in `_versions`,
named by the largest 64-bit number less the version, which ends with the place of its message and the letters LANC.
"""

import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from serving.collection.store import Store

LARGEST = 2**64 - 1
MAGIC = b"LANC"
UNFLUSHED_S = 60  # commits this long before the newest may not have been flushed when the power went
MOST_TORN = 16  # one a writer

# Operations of a transaction that change rows, by their field: append, delete, overwrite, restore, update, data
# replacement. The others index, compact, and add columns.
DATA_CHANGES = {100, 101, 102, 106, 108, 111}


@dataclass(frozen=True)
class Fragment:
    """Rows that were written together. `files` below the table's folder; `rows` with deleted ones."""

    number: int
    files: tuple[str, ...]
    rows: int


@dataclass(frozen=True)
class Manifest:
    fragments: tuple[Fragment, ...]
    transaction: str


def read(store: Store, root: str, version: int) -> Manifest:
    """Of `version` of the table in the folder `root`. raises ValueError where it is damaged or gone"""
    return parsed(store.read(f"{root}/_versions/{LARGEST - version:020}.manifest") or b"")


def parsed(content: bytes) -> Manifest:
    if len(content) < 20 or content[-4:] != MAGIC:
        raise ValueError("a manifest without its end")
    (start,) = struct.unpack("<Q", content[-16:-8])
    (length,) = struct.unpack_from("<I", content, start)
    fragments, transaction = [], ""
    for field, value in _fields(content[start + 4 : start + 4 + length]):
        if field == 2:
            fragments.append(_fragment(value))
        elif field == 12:
            transaction = value.decode()
    return Manifest(tuple(fragments), transaction)


def changes_rows(store: Store, root: str, version: int) -> bool:
    """Whether the version changed rows; True where it cannot be told."""
    try:
        transaction = store.read(f"{root}/_transactions/{read(store, root, version).transaction}")
        return not transaction or any(field in DATA_CHANGES for field, _ in _fields(transaction))
    except (ValueError, struct.error):
        return True


def recover(store: Store, root: str) -> None:
    """After a power cut the newest commits may be files without content, or name such files: put them aside, so that
    the commit before is the newest. Commits that were acknowledged are flushed and never of this kind."""
    if store.local is None:
        return
    while torn(store.local / root):
        with store.lease(f"recover.{root}") as held:  # or one could be put aside that another has just written anew
            if held:
                for path in torn(store.local / root):
                    path.replace(path.with_suffix(".torn"))
                return
        time.sleep(0.05)


def torn(root: Path) -> list[Path]:
    """Manifests newer than the newest sound one. None where that is old: then it is not a power cut that did it."""
    manifests = sorted(path for path in root.glob("_versions/*.manifest") if path.stem.isdigit())  # newest first
    found: list[Path] = []
    empty = None
    for path in manifests:
        if len(found) == MOST_TORN or path.stat().st_mtime < manifests[0].stat().st_mtime - UNFLUSHED_S:
            return []
        try:
            manifest = parsed(path.read_bytes())
        except (ValueError, struct.error):
            found.append(path)
            continue
        if empty is None:
            files = (file for folder in ("data", "_deletions") for file in root.glob(f"{folder}/*"))
            empty = {f"{file.parent.name}/{file.name}" for file in files if file.stat().st_size == 0}
        cut = path.stat().st_mtime < booted_at()  # else it is damage, and to be said
        if not (cut and any(file in empty for fragment in manifest.fragments for file in fragment.files)):
            return found
        found.append(path)
    return []


def booted_at() -> float:
    """When this machine was started, s."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)  # Linux's, which counts sleep
    return time.time() - (time.monotonic() if clock is None else time.clock_gettime(clock))


def _fragment(message: bytes) -> Fragment:
    number, rows, files, deleted = 0, 0, [], {}
    for field, value in _fields(message):
        if field == 1:
            number = value
        elif field == 2:
            files += [f"data/{inner.decode()}" for name, inner in _fields(value) if name == 1]
        elif field == 3:
            deleted = {"kind": 0, **{_DELETED[name]: inner for name, inner in _fields(value) if name in _DELETED}}
        elif field == 4:
            rows = value
    if deleted:
        name = f"{number}-{deleted['version']}-{deleted['id']}"
        files.append(f"_deletions/{name}.{'bin' if deleted['kind'] else 'arrow'}")
    return Fragment(number, tuple(files), rows)


_DELETED = {1: "kind", 2: "version", 3: "id"}  # the fields of DeletionFile


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field, value) of a protobuf message. raises ValueError"""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while at < len(message):
            byte = message[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value
        raise ValueError("a message without its end")

    while at < len(message):
        field, wire = divmod(varint(), 8)
        if wire == 0:
            yield field, varint()
            continue
        length = {1: lambda: 8, 2: varint, 5: lambda: 4}.get(wire)
        if length is None:
            raise ValueError("not a message")
        size = length()
        yield field, message[at : at + size]
        at += size
