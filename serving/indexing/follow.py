"""Follows a folder: files that are added, changed or removed there are updated in the collection within seconds.

A notification from the operating system triggers a look at the folders around its paths. A look lists them and compares
the list with the previous one. The whole folder is looked at in the beginning, once a minute, and when there are very
many notifications: so lost ones do no harm. A file is read once it is the same in two looks, because then nobody is
writing it any more.

An item is deleted if its path is in the folder and no file of the folder has its content any more. If another file has
the same content, the item gets that file's name. A folder that cannot be read, for instance on a drive that was
removed, deletes nothing.
"""

import os
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from watchfiles import watch
from watchfiles._rust_notify import WatchfilesRustInternalError

from export.paths import valid_text
from serving.collection.index import Index, IndexProblem, Item
from serving.indexing.fill import BatchEncoder, Tally, fill, write_skipped
from serving.indexing.originals import Original, original
from serving.indexing.sync import inside
from training.data.folder import FolderListing
from training.data.sources import DataError, SourcePicture, list_again

SETTLED_S = 1.0  # between two looks
LOOK_ANYWAY_S = 60.0  # at the whole folder, without a notification: some network drives send none
MOST_CHANGED = 8192  # paths in one look; the system drops notifications when it has about twice as many
RETRY_S = 10.0  # after an error of the index
CHANGES_PER_MAINTENANCE = 64  # looks that changed something


class _SeenFile(NamedTuple):
    stamp: str
    """The picture's stamp when it was indexed; empty for one that is not indexed yet."""
    id: str | None
    """The id of its content; None if it could never be read."""
    path: str | None


def follow(
    folder: Path, encoder: BatchEncoder, index: Index, skipped: Path, stop: threading.Event | None = None
) -> None:
    """Runs until Ctrl-C or `stop`.

    skipped  where files that cannot be read as pictures are listed
    raises   DataError, IndexProblem. After the first pass an IndexProblem is printed and the look is tried again.
    """
    follower = Follower(folder, encoder, index, skipped)
    looked = looked_at_all = -LOOK_ANYWAY_S
    look_at_all, changed, changes = True, set[str](), 0
    try:
        for paths in _notifications(folder, stop):
            changed |= paths or set()
            overdue = time.monotonic() - looked_at_all >= LOOK_ANYWAY_S
            look_at_all = look_at_all or paths is None or overdue or len(changed) > MOST_CHANGED
            if not (look_at_all or changed) or time.monotonic() - looked < SETTLED_S:
                continue
            try:
                changes += follower.look(None if look_at_all else changed)
                if look_at_all:
                    looked_at_all = time.monotonic()
                look_at_all, changed = not follower.started, set(follower.unsettled)
                if changes >= CHANGES_PER_MAINTENANCE:
                    index.maintain()
                    changes = 0
            except IndexProblem as error:
                if not follower.started:
                    raise
                print(f"{error} This is tried again in {RETRY_S:g} s.", flush=True)
                time.sleep(RETRY_S)
            looked = time.monotonic()
    except KeyboardInterrupt:
        print(f"stopped following {folder}; run the same command again to resume")


def _notifications(folder: Path, stop: threading.Event | None) -> Iterator[set[str] | None]:
    """Yields the paths of which the system said that they changed, also if there are none; None if it is not known."""
    options: dict[str, Any] = {"watch_filter": None, "debounce": 500, "rust_timeout": 500, "yield_on_timeout": True}
    while True:
        try:
            for changes in watch(folder, **options, stop_event=stop):
                yield {path for _, path in changes}
            return
        except WatchfilesRustInternalError:  # for example of a name that is not UTF-8
            yield None
            time.sleep(SETTLED_S)


class Follower:
    """The files of the folder that were seen, and the changes that were made for them."""

    def __init__(self, folder: Path, encoder: BatchEncoder, index: Index, skipped: Path):
        self.started = False
        """Whether the collection has been brought up to date once."""
        self.unsettled: list[str] = []
        """Paths of files that changed and need another look soon."""
        self._folder = os.path.abspath(folder)
        self._encoder, self._index, self._skipped = encoder, index, skipped
        self._identity = _identity(self._folder)
        self._listing = FolderListing(folder)
        self._before: dict[str, SourcePicture] | None = None  # in the last look, by name
        self._files: dict[str, _SeenFile] = {}  # by name
        self._broken: dict[str, str] = {}  # reasons, by name

    def look(self, changed: Collection[str] | None = None) -> bool:
        """Returns whether anything was different. Raises DataError, IndexProblem.

        changed  absolute paths: only the folders around them are looked at; None looks at all
        """
        listing = {valid_text(picture.name): picture for picture in self._list(changed)}
        before, self._before = self._before, listing
        if before is None:
            return False
        fresh = {
            name: picture
            for name, picture in listing.items()
            if name not in self._files or self._files[name].stamp != picture.stamp
        }
        settled = {
            name: picture for name, picture in fresh.items() if name in before and before[name].stamp == picture.stamp
        }
        unreadable = tuple(f"{name}/" for name, picture in listing.items() if picture.stamp.startswith("unreadable"))
        missing = [name for name in self._files if name not in listing and not name.startswith(unreadable)]
        gone = [name for name in missing if name not in before]  # missing twice: by then a new name is settled
        waiting = [picture for name, picture in fresh.items() if name not in settled]
        waiting += [before[name] for name in missing if name in before]
        self.unsettled = [str(picture.path or self._folder) for picture in waiting]
        if self.started and not settled and not gone:
            return False
        self._update(listing, settled, gone, unreadable)
        return True

    def _list(self, changed: Collection[str] | None) -> Sequence[SourcePicture]:
        if _identity(self._folder) != self._identity:
            raise DataError(f"{self._folder} has been replaced by another folder; nothing was deleted from the index")
        of_shards = self._before and next(iter(self._before.values())).path is None
        return list_again(self._listing, None if of_shards else changed)

    def _update(
        self,
        listing: dict[str, SourcePicture],
        settled: dict[str, SourcePicture],
        gone: list[str],
        unreadable: tuple[str, ...],
    ) -> None:
        """Bring the collection up to date. If this fails half way, the next look repeats all of it."""
        tally, originals = Tally(), {name: original(picture) for name, picture in listing.items()}
        chosen = [originals[name] for name in settled]
        with self._index.one_change() as index:
            fill(chosen, len(chosen), self._encoder, index, tally, note_ids=True, quiet=self.started)
            files = {name: file for name, file in self._files.items() if name not in set(gone)}
            for name, picture in settled.items():
                id = tally.ids.get(name) or (files[name].id if name in files else None)
                files[name] = _SeenFile(picture.stamp, id, originals[name].path)
            if self.started:
                old = [self._files[name].id for name in (*gone, *settled) if name in self._files]
                items = list(self._index.get_many(id for id in old if id is not None).values())
            else:
                items = self._adopt(files, originals, unreadable)
            lost, moved = self._lost_and_moved(items, files, originals)
            if lost:
                index.delete(lost)
            if moved:
                index.upsert([item for item, _ in moved], np.stack([vector for _, vector in moved]))
        self._files = files
        self._list_broken(dict(tally.skipped), {*gone, *settled})
        if not self.started:
            self._index.maintain()
        what = f"{time.strftime('%H:%M:%S')}" if self.started else f"following {self._folder}"
        print(
            f"{what}: {tally}, renamed {len(moved):,}, removed {len(lost):,}; "
            f"{self._index.name} holds {self._index.count():,}",
            flush=True,
        )
        self.started = True

    def _adopt(
        self, files: dict[str, _SeenFile], originals: dict[str, Original], unreadable: tuple[str, ...]
    ) -> list[tuple[Item, np.ndarray]]:
        """Returns the items that were indexed from the folder earlier. Adds to `files` those whose file is not indexed
        yet or cannot be read, so that their items are kept."""
        names = {original.path: name for name, original in originals.items()}
        items = []
        for batch, vectors in self._index.scan():
            for item, vector in zip(batch, vectors, strict=True):
                inside = self._inside(item)
                if inside is None or inside.startswith(unreadable):
                    continue
                name = names.get(item.path)
                if name is not None and (name not in files or files[name].id is None):
                    files[name] = _SeenFile(files[name].stamp if name in files else "", item.id, item.path)
                items.append((item, vector))
        if items and not originals:
            print(f"{self._folder} is empty; its {len(items):,} items are kept, in case a drive is missing", flush=True)
            return []
        return items

    def _lost_and_moved(
        self, items: Iterable[tuple[Item, np.ndarray]], files: dict[str, _SeenFile], originals: dict[str, Original]
    ) -> tuple[list[str], list[tuple[Item, np.ndarray]]]:
        """Ids of items whose content no file has any more; items whose content only another file has, renamed to it."""
        names = {file.id: name for name, file in files.items() if name in originals}
        unchanged = {(file.id, file.path) for file in files.values()}
        all_ids = {file.id for file in files.values()}
        lost, moved = [], []
        for item, vector in items:
            if self._inside(item) is None or (item.id, item.path) in unchanged:
                continue
            if item.id in names:
                new = originals[names[item.id]]
                moved.append((replace(item, name=new.name, label=new.label, path=new.path), vector))
            elif item.id not in all_ids:
                lost.append(item.id)
        return lost, moved

    def _inside(self, item: Item) -> str | None:
        """The item's path relative to the folder; None if it is elsewhere."""
        return inside(item.path, self._folder)

    def _list_broken(self, new: dict[str, str], done: set[str]) -> None:
        broken = {name: reason for name, reason in self._broken.items() if name not in done} | new
        if broken != self._broken or not self.started:
            write_skipped(self._skipped, list(broken.items()))
        self._broken = broken


def _identity(folder: str) -> tuple[int, int]:
    try:
        status = os.stat(folder)
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({error.strerror}); nothing was deleted from the index") from error
    return status.st_dev, status.st_ino
