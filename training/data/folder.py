"""Lists the files of a folder: whole at first, and then only the folders in which something has changed.

Symbolic links are followed, and each folder is listed once. Hidden entries and __MACOSX are left out. Entries that
cannot be read are listed too.
"""

import errno
import os
import stat
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

KERNEL_FILE_SYSTEMS = ("proc", "sysfs", "cgroup", "cgroup2", "debugfs", "tracefs")

Parts = tuple[str, ...]  # of a path inside the listed folder; () is that folder itself
Identity = tuple[int, int]  # device and inode


def is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


class ListedFile(NamedTuple):
    inside: Parts
    stamp: str
    """Size and time; "unreadable ..." for what cannot be read."""
    path: Path


@dataclass
class _Folder:
    identity: Identity
    files: list[ListedFile] = field(default_factory=list)
    folders: dict[Parts, Identity] = field(default_factory=dict)


class FolderListing:
    """Empty until `list`."""

    def __init__(self, root: str | os.PathLike[str]):
        self.root = Path(os.path.abspath(root))
        self._folders: dict[Parts, _Folder] = {}
        self._visited: set[Identity] = set()
        self._devices: set[int] = set()
        self._has_twins = False  # whether a folder was left out, because a link shows it under another name too

    def files(self) -> Iterator[ListedFile]:
        for folder in self._folders.values():
            yield from folder.files

    def list(self) -> None:
        """Raises OSError if the folder cannot be read."""
        self._folders, self._visited, self._has_twins, self._devices = {}, set(), False, _kernel_devices()
        facts = os.stat(self.root)
        if facts.st_dev in self._devices:
            raise OSError(errno.EINVAL, "it holds no files, but what the system shows of itself")
        self._walk((), _identity(facts))

    def list_again(self, changed: Iterable[str]) -> None:
        """List the folders that hold these absolute paths, which may be folders themselves, and new folders in them.

        raises  OSError if the folder cannot be read
        """
        found: dict[Parts, Identity] = {}
        for parts in sorted(self._holding(changed), key=len) if self._folders else ():
            if (before := self._folders.get(parts)) is None:
                continue  # dropped with a folder around it
            now = self._read(parts, before.identity)
            for inner in before.folders:
                if inner in self._folders and now.get(inner) != self._folders[inner].identity:
                    self._drop(inner)
            found |= {inner: identity for inner, identity in now.items() if inner not in self._folders}
        for parts, identity in found.items():
            self._walk(parts, identity)
        if self._has_twins or not self._folders:  # the change may have left only the other one of two twins
            self.list()

    def _holding(self, changed: Iterable[str]) -> set[Parts]:
        """Known folders: the innermost around each path, and the path itself if it is a folder."""
        found: set[Parts] = set()
        for path in changed:
            relative = os.path.relpath(path, self.root)
            parts = () if relative == os.curdir else tuple(relative.split(os.sep))
            if any(part == os.pardir or is_hidden(part) for part in parts):
                continue
            if parts in self._folders:
                found.add(parts)
            while parts[:-1] not in self._folders:
                parts = parts[:-1]
            found.add(parts[:-1])
        return found

    def _walk(self, parts: Parts, identity: Identity) -> None:
        waiting = deque([(parts, identity)])
        while waiting:
            parts, identity = waiting.popleft()
            if identity in self._visited:
                self._has_twins = True
            elif identity[0] not in self._devices:
                self._visited.add(identity)
                waiting += self._read(parts, identity).items()

    def _read(self, parts: Parts, identity: Identity) -> dict[Parts, Identity]:
        """List one folder, and return the folders in it."""
        folder, place = _Folder(identity), self.root.joinpath(*parts)
        try:
            entries = sorted(os.scandir(place), key=lambda entry: entry.name)
        except OSError:
            if not parts:
                raise
            folder.files.append(ListedFile(parts, "unreadable folder", place))
            entries = []
        for entry in entries:
            if is_hidden(entry.name):
                continue
            inside, path = (*parts, entry.name), place / entry.name
            try:
                facts = entry.stat()
            except OSError:  # a broken link
                folder.files.append(ListedFile(inside, "unreadable", path))
                continue
            if stat.S_ISDIR(facts.st_mode):
                folder.folders[inside] = _identity(facts)
            elif stat.S_ISREG(facts.st_mode):  # sockets and pipes are left out
                folder.files.append(ListedFile(inside, f"{facts.st_size} {facts.st_mtime_ns}", path))
        self._folders[parts] = folder
        return folder.folders

    def _drop(self, parts: Parts) -> None:
        """Forget a folder and all in it."""
        waiting = [parts]
        while waiting:
            if folder := self._folders.pop(waiting.pop(), None):
                self._visited.discard(folder.identity)
                waiting += folder.folders


def _identity(facts: os.stat_result) -> Identity:
    return facts.st_dev, facts.st_ino


def _kernel_devices() -> set[int]:
    """The devices of file systems like /proc, whose links lead from each process to the whole disk."""
    try:
        lines = Path("/proc/self/mountinfo").read_text(errors="replace").splitlines()
    except OSError:  # not Linux
        return set()
    mounts = [(line.split()[2], line.partition(" - ")[2].split()) for line in lines]
    return {os.makedev(*map(int, device.split(":"))) for device, (kind, *_) in mounts if kind in KERNEL_FILE_SYSTEMS}
