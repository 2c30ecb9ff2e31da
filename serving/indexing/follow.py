"""A folder followed: what is new, changed or gone there is so in the collection within seconds.

What the system reports says only that it is time to look. A look lists the folder and compares it with the look before,
so nothing depends on reports being complete, and a start does the same as everything that follows it. A file is taken
once two looks have found it alike: then nobody is writing it any more.

An item is deleted when its path is in the folder and no file of the folder has its content any longer. Where another
file has, the item gets that one's name. A folder that cannot be read, as of a drive that was taken away, deletes
nothing.
"""

import os
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from watchfiles import watch

from serving.collection.index import Index, IndexProblem, Item
from serving.indexing.fill import Tally, Work, fill, write_skipped
from serving.indexing.originals import Original, original, text
from training.data.sources import DataError, Picture, open_source

SETTLED_S = 1.0  # between two looks
UNASKED_S = 60.0  # until a look without a report: some network drives make none
RETRY_S = 10.0  # after a problem of the index
LOOKS_A_MAINTENANCE = 64  # of those that changed something


class _File(NamedTuple):
    stamp: str
    """When it was taken; empty for one that is still to be."""
    id: str | None
    """Of its content; None where that could never be read."""
    path: str


def follow(folder: Path, work: Work, index: Index, skipped: Path, stop: threading.Event | None = None) -> None:
    """Until Ctrl-C or `stop`.

    skipped  where files that are no pictures are listed
    raises   DataError, IndexProblem. What the index has for problems later than at first is told, and tried again.
    """
    follower = Follower(folder, work, index, skipped)
    looked, due, changes = -UNASKED_S, True, 0
    how = {"watch_filter": None, "debounce": 500, "rust_timeout": 500, "yield_on_timeout": True, "stop_event": stop}
    try:
        for reports in watch(folder, **how):
            due = due or bool(reports)
            if time.monotonic() - looked < (SETTLED_S if due else UNASKED_S):
                continue
            try:
                changes += follower.look()
                due = follower.unsettled
                if changes >= LOOKS_A_MAINTENANCE:
                    index.maintain()
                    changes = 0
            except IndexProblem as error:
                if not follower.started:
                    raise
                print(f"{error} It is tried again.", flush=True)
                time.sleep(RETRY_S)
            looked = time.monotonic()
    except KeyboardInterrupt:
        print(f"stopped following {folder}; the same command goes on from here")


class Follower:
    """What was found in the folder, and has been done about it."""

    def __init__(self, folder: Path, work: Work, index: Index, skipped: Path):
        self.started = False
        """Whether the collection has been what the folder is."""
        self.unsettled = True
        """Whether there are files to look at again soon."""
        self._folder = os.path.abspath(folder)
        self._work, self._index, self._skipped = work, index, skipped
        self._place = _place(self._folder)
        self._before: dict[str, str] | None = None  # stamps of the last look, by name
        self._files: dict[str, _File] = {}  # by name
        self._broken: dict[str, str] = {}  # reasons, by name

    def look(self) -> bool:
        """Whether anything was different. raises DataError, IndexProblem"""
        listing = {text(picture.name): picture for picture in self._list()}
        before, self._before = self._before, {name: picture.stamp for name, picture in listing.items()}
        if before is None:
            return False
        fresh = {
            n: picture
            for n, picture in listing.items()
            if n not in self._files or self._files[n].stamp != picture.stamp
        }
        settled = {name: picture for name, picture in fresh.items() if before.get(name) == picture.stamp}
        closed = tuple(f"{name}/" for name, picture in listing.items() if picture.stamp.startswith("unreadable"))
        missing = [name for name in self._files if name not in listing and not name.startswith(closed)]
        gone = [name for name in missing if name not in before]  # so a new name is settled when the old one goes
        self.unsettled = len(settled) + len(gone) < len(fresh) + len(missing)
        if self.started and not settled and not gone:
            return False
        self._take(listing, settled, gone, closed)
        return True

    def _list(self) -> Sequence[Picture]:
        if _place(self._folder) != self._place:
            raise DataError(f"{self._folder} is no longer the folder it was; nothing was deleted for that")
        try:
            return open_source(self._folder).pictures
        except DataError:
            if any(os.scandir(self._folder)) and not os.access(self._folder, os.R_OK | os.X_OK):
                raise
            return []  # it holds no files

    def _take(self, listing: dict[str, Picture], settled: dict[str, Picture], gone: list[str], closed: tuple) -> None:
        """Bring the collection to what was found. Where this fails half way, the next look does all of it again."""
        tally, originals = Tally(), {name: original(picture) for name, picture in listing.items()}
        chosen = [originals[name] for name in settled]
        fill(chosen, len(chosen), self._work, self._index, tally, note_ids=True, quiet=self.started)
        files = {name: file for name, file in self._files.items() if name not in set(gone)}
        for name, picture in settled.items():
            id = tally.ids.get(name) or (files[name].id if name in files else None)
            files[name] = _File(picture.stamp, id, originals[name].path)
        if self.started:
            left = {self._files[name].id for name in (*gone, *settled) if name in self._files} - {None}
            items = list(self._index.get_many(left).values())
        else:
            items = self._adopt(files, originals, closed)
        lost, moved = self._sort(items, files, originals)
        if lost:
            self._index.delete(lost)
        if moved:
            self._index.upsert([item for item, _ in moved], np.stack([vector for _, vector in moved]))
        self._files = files
        self._list_broken(dict(tally.skipped), {*gone, *settled})
        if not self.started:
            self._index.maintain()
        what = f"{time.strftime('%H:%M:%S')}" if self.started else f"following {self._folder}"
        print(
            f"{what}: {tally}, renamed {len(moved):,}, removed {len(lost):,}; the index holds {self._index.count():,}",
            flush=True,
        )
        self.started = True

    def _adopt(
        self, files: dict[str, _File], originals: dict[str, Original], closed: tuple
    ) -> list[tuple[Item, np.ndarray]]:
        """The folder's items of before. Files that are not taken yet or cannot be read keep theirs."""
        names = {original.path: name for name, original in originals.items()}
        items = []
        for some, vectors in self._index.scan():
            for item, vector in zip(some, vectors, strict=True):
                inside = self._inside(item)
                if inside is None or inside.startswith(closed):
                    continue
                name = names.get(item.path)
                if name is not None and (name not in files or files[name].id is None):
                    files[name] = _File(files[name].stamp if name in files else "", item.id, item.path)
                items.append((item, vector))
        if items and not originals:
            print(f"{self._folder} is empty; its {len(items):,} items are kept, in case a drive is missing", flush=True)
            return []
        return items

    def _sort(self, items: Iterable[tuple[Item, np.ndarray]], files: dict[str, _File], originals: dict[str, Original]):
        """Ids of items that no file has any longer; items that only another file has, with its name."""
        names = {file.id: name for name, file in files.items() if name in originals}
        held = {(file.id, file.path) for file in files.values()}
        all_ids = {file.id for file in files.values()}
        lost, moved = [], []
        for item, vector in items:
            if self._inside(item) is None or (item.id, item.path) in held:
                continue
            if item.id in names:
                new = originals[names[item.id]]
                moved.append((replace(item, name=new.name, label=new.label, path=new.path), vector))
            elif item.id not in all_ids:
                lost.append(item.id)
        return lost, moved

    def _inside(self, item: Item) -> str | None:
        """The path in the folder; None for what is elsewhere."""
        start = text(self._folder.rstrip(os.sep)) + os.sep
        return item.path[len(start) :] if item.path and item.path.startswith(start) else None

    def _list_broken(self, found: dict[str, str], done: set[str]) -> None:
        broken = {name: reason for name, reason in self._broken.items() if name not in done} | found
        if broken != self._broken or not self.started:
            write_skipped(self._skipped, list(broken.items()))
        self._broken = broken


def _place(folder: str) -> tuple[int, int]:
    try:
        facts = os.stat(folder)
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({error.strerror}); nothing was deleted for that") from error
    return facts.st_dev, facts.st_ino
