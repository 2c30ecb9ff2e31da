"""The files of a collection's items: thumbnails, and the originals of pictures that were uploaded.

    INDEX/thumbnails/<name>/ab/<id>.jpg              in folders by the id's first two letters
    INDEX/originals/<name>/ab/<id>                   the file as it was uploaded, in whatever format
    INDEX/deleted/<name>/<picture>.<id>.jpg          of rows deleted or replaced lately, for `undo`; <picture> is that
    INDEX/deleted/<name>/<picture>.<id>.original     of the row's checksum, so that facts may change meanwhile

Both kinds are written before the row, and put aside after it is deleted. So a writer that is killed leaves files
without a row, which `sweep` removes. If it was replacing a picture, or undoing a deletion, the files of a row lie in
deleted/ under the row's picture, and `recover` brings them back.
"""

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.compute

from serving.collection.items import content_id, is_content_id, is_id, picture
from serving.collection.problems import IndexProblem
from serving.collection.store import FileStore
from serving.collection.table import LanceTable
from serving.protocol.shown import shown

compute: Any = pyarrow.compute  # makes its functions when it is imported, so type checkers do not know them

Kind = Literal["thumbnails", "originals"]
ENDS: dict[Kind, str] = {"thumbnails": ".jpg", "originals": ""}
ENDS_ASIDE: dict[Kind, str] = {"thumbnails": ".jpg", "originals": ".original"}
ASIDE = re.compile(r"([0-9a-f]{8})\.(.*)(\.jpg|\.original)")
UNKNOWN = 0  # in place of a checksum: of a file whose row is not there
INTERRUPTED_S = 600.0  # a writer takes less time from putting files aside to writing the row
SWEPT = "swept"  # in deleted/<name>: when it has been removed with the other old files, it is time to sweep again

Rows = Mapping[str, Sequence[int]]
"""By id, the checksums of its rows in the tables of all encoders."""


class Replaced(NamedTuple):
    """The files that were replaced."""

    changed: set[str]
    """Ids of items that had another picture before."""
    aside: dict[str, str]
    """Where they are, and where they were."""
    added: list[str]
    """Files of items that had none of this kind before."""


class ItemFiles:
    """The files of the collection `name`. Raises IndexProblem."""

    def __init__(self, store: FileStore, name: str, tables: Callable[[], list[LanceTable]]):
        """tables  returns the table of each encoder that has embedded the collection"""
        self.store, self.name, self._tables = store, name, tables
        self._deleted = f"deleted/{name}"
        self._measured = (0.0, 0.0, 0)  # when, in how many seconds, and the bytes of all originals

    def path(self, kind: Kind, id: str) -> str:
        """Returns where the store has this file, whether or not it exists."""
        if not is_id(id):
            raise IndexProblem(f"{shown(id)} is not an id: letters, digits, _, - and ., at most 128.")
        return f"{kind}/{self.name}/{id[:2]}/{id}{ENDS[kind]}"

    def read(self, kind: Kind, id: str) -> bytes | None:
        """Returns the file, None if there is none."""
        return self.store.read(self.path(kind, id)) if is_id(id) else None

    def ids(self, kind: Kind) -> set[str]:
        """Returns the ids that have such a file."""
        return {_id(path, kind) for path in self.store.list(f"{kind}/{self.name}")}

    def sizes(self, kind: Kind) -> dict[str, int]:
        """Returns the sizes in bytes of all files of a kind, by id."""
        return {_id(path, kind): size for path, size, _ in self.store.entries(f"{kind}/{self.name}")}

    def original_bytes(self) -> int:
        """Returns the size of all originals. They have to be listed for it, so if that takes long, it is an earlier
        size: from at most ten times as long ago."""
        at, took, size = self._measured
        started = time.monotonic()
        if not at or started - at > 10 * took:
            size = self.store.size(f"originals/{self.name}")
            self._measured = (started, time.monotonic() - started, size)
        return size

    def write(self, thumbnails: Mapping[str, bytes], originals: Mapping[str, bytes]) -> Replaced:
        """Write files by id, after putting aside those that they replace. If that fails, those are there again.

        originals  of some of the items that have a thumbnail
        """
        replaced = Replaced(set(), {}, [])
        for id, checksums in self._rows(thumbnails).items():
            old: dict[Kind, bytes | None] = {"thumbnails": self.read("thumbnails", id)}
            same = is_content_id(id) and (id not in originals or content_id(originals[id]) == id)
            if not same:
                old["originals"] = self.read("originals", id)
            other_file = old["thumbnails"] not in (None, thumbnails[id])
            if (original := old.get("originals")) is not None and id in originals:
                other_picture = original != originals[id]
            else:
                other_picture = other_file and not same
            if other_file or other_picture:
                copies = {kind: data for kind, data in old.items() if data is not None}
                self.store.write_many(
                    {self._aside(kind, id, sum): data for kind, data in copies.items() for sum in checksums}
                )
                replaced.aside.update({self._aside(kind, id, checksums[0]): self.path(kind, id) for kind in copies})
                replaced.added.extend(self.path(kind, id) for kind in old if kind not in copies)
            if other_picture:
                replaced.changed.add(id)
        try:
            self.store.delete([self.path("originals", id) for id in replaced.changed if id not in originals])
            self._write(thumbnails, originals)
        except IndexProblem:
            self.take_back(replaced)
            raise
        return replaced

    def take_back(self, replaced: Replaced) -> None:
        """Put the files back that were replaced, because the rows could not be written. This takes no space."""
        with suppress(IndexProblem):  # the first problem is the one to tell
            self.store.delete(replaced.added)
            self.store.move(replaced.aside)

    def keep_replaced(self, replaced: Replaced) -> None:
        """Keep the replaced files for `undo` now that the rows are written, except those of the same picture."""
        ids = {named[1] for path in replaced.aside if (named := _named_aside(path))}
        same = {self._aside(kind, id, sum) for id, sums in self._rows(ids).items() for sum in sums for kind in ENDS}
        self.store.delete(sorted(same))

    def restore(self, thumbnails: Mapping[str, bytes], originals: Mapping[str, bytes]) -> None:
        """Write those files again that another process has put aside meanwhile, because it was deleting an older row
        or sweeping."""
        aside = self._ids_aside() & set(thumbnails) if thumbnails else set()
        if not aside:
            return
        lost_thumbnails = {id: thumbnails[id] for id in aside if self.read("thumbnails", id) is None}
        lost_originals = {id: originals[id] for id in aside if id in originals and self.read("originals", id) is None}
        self._write(lost_thumbnails, lost_originals)

    def put_aside(self, rows: Rows) -> None:
        """Move files of deleted rows to deleted/, where `undo` finds them, except those of items that any table has."""
        used = self._used(rows)
        gone = {id: checksums for id, checksums in rows.items() if id not in used}
        copies = {}
        for id, checksums in gone.items():  # several if several encoders have embedded the item
            for kind in ENDS if checksums[1:] else ():
                if (data := self.read(kind, id)) is not None:
                    copies |= {self._aside(kind, id, checksum): data for checksum in checksums[1:]}
            self.store.write_many(copies)
            copies.clear()  # originals are large
        moves = {self.path(kind, id): self._aside(kind, id, sums[0]) for id, sums in gone.items() for kind in ENDS}
        self.store.move(moves)
        again = [self.path(kind, id) for id in self._used(gone) for kind in ENDS]  # added again meanwhile
        self.store.move({moves[path]: path for path in again if self.store.read(path) is None})

    def undo(self, before: Mapping[str, int], after: Mapping[str, int]) -> None:
        """Bring back the files that belong to the rows after an undo, and put aside those from before it.

        before, after  the checksums of all rows of the table
        """
        changed = {id for id in {**before, **after} if id not in before or id not in after}
        changed |= {id for id in set(before) & set(after) if picture(before[id]) != picture(after[id])}
        self.put_aside({id: [before[id]] for id in changed & set(before) if id not in after})
        aside = set(self.store.list(self._deleted))
        away, back = {}, {}
        for id in changed & set(after):
            sums = [after[id]] if id in before else [after[id], UNKNOWN]
            found = [(kind, old) for sum in sums for kind in ENDS if (old := self._aside(kind, id, sum)) in aside]
            kept = {self.path(kind, id): old for kind, old in reversed(found)}
            if kept and id in before:
                current = {self.path(kind, id): self._aside(kind, id, before[id]) for kind in ENDS}
                # The original of an id that is its hash is that of the version before, too.
                away |= {path: new for path, new in current.items() if path in kept or not is_content_id(id)}
            back |= {old: path for path, old in kept.items()}
        self.store.move(away)
        self.store.move(back)

    def recover(self) -> None:
        """Bring back the files of rows that are there, after a writer or an undo was killed before it had finished."""
        aside: dict[str, dict[int, dict[Kind, str]]] = {}  # by id and picture
        for path, _, at in self.store.entries(self._deleted):
            if at < time.time() - INTERRUPTED_S and (named := _named_aside(path)):
                seen, id, kind = named
                aside.setdefault(id, {}).setdefault(seen, {})[kind] = path
        rows, back = self._rows(aside, newest=True), {}
        for id, checksums in rows.items():
            # A table that has none of them has a newer picture, whose writer was killed before it told the others.
            if all(picture(checksum) != UNKNOWN and picture(checksum) in aside[id] for checksum in checksums):
                found = aside[id][picture(checksums[0])]
                if "originals" not in found and not is_content_id(id):
                    self._delete_if_of_other_size(id)
            else:
                unknown = aside[id].get(UNKNOWN, {})
                found = {kind: path for kind, path in unknown.items() if self.read(kind, id) is None}
            back |= {path: self.path(kind, id) for kind, path in found.items()}
        self.store.move(back)

    def _delete_if_of_other_size(self, id: str) -> None:
        """The original of an item that had none, written for a row that never came."""
        original = self.read("originals", id)
        for table in self._tables() if original is not None else ():
            if (row := table.get([id]).get(id)) and row[0].bytes != len(original or b""):
                self.store.delete([self.path("originals", id)])

    def sweep(self, older_s: float) -> None:
        """Recover files, then delete what was put aside longer ago than `older_s`. As often as that also put aside the
        files that no item of any encoder has: of writers that were killed before they wrote the row."""
        with self.store.lease(f"undo.{self.name}") as held:  # an undo writes rows first, and moves their files then
            if not held:
                return
            self.recover()
        self.store.sweep(self._deleted, older_s)
        if self.store.read(f"{self._deleted}/{SWEPT}") is not None:
            return
        for kind in ENDS:
            entries = self.store.entries(f"{kind}/{self.name}")
            old = pa.array([_id(path, kind) for path, _, at in entries if at < time.time() - older_s], pa.string())
            for table in self._tables() if len(old) else ():
                table.refresh()
                old = old.filter(compute.invert(compute.is_in(old, table.read(["id"])["id"])))
            self.put_aside({id: [UNKNOWN] for id in old.to_pylist() if is_id(id)})
        self.store.write(f"{self._deleted}/{SWEPT}", b"")

    def drop(self) -> None:
        """Delete all files."""
        for folder in (*(f"{kind}/{self.name}" for kind in ENDS), self._deleted):
            self.store.delete(list(self.store.list(folder)))

    def _write(self, thumbnails: Mapping[str, bytes], originals: Mapping[str, bytes]) -> None:
        files = {self.path("thumbnails", id): jpeg for id, jpeg in thumbnails.items()}
        self.store.write_many(files | {self.path("originals", id): data for id, data in originals.items()})

    def _rows(self, ids: Iterable[str], newest: bool = False) -> dict[str, list[int]]:
        """Returns the checksums of those of `ids` that a table has; `newest` as of now, if others write it too."""
        rows: dict[str, list[int]] = {}
        for table in self._tables() if ids else ():
            if newest:
                table.refresh()
            for id, checksum in table.checksums(ids).items():
                rows.setdefault(id, []).append(checksum)
        return rows

    def _used(self, ids: Iterable[str]) -> set[str]:
        """Returns those of `ids` that a table has."""
        used: set[str] = set()
        for table in self._tables() if ids else ():
            table.refresh()
            used |= table.known(ids)
        return used

    def _aside(self, kind: Kind, id: str, checksum: int) -> str:
        return f"{self._deleted}/{picture(checksum):08x}.{id}{ENDS_ASIDE[kind]}"

    def _ids_aside(self) -> set[str]:
        return {named[1] for path in self.store.list(self._deleted) if (named := _named_aside(path))}


def _named_aside(path: str) -> tuple[int, str, Kind] | None:
    """Returns the picture, the id and the kind of a file in deleted/."""
    if not (named := ASIDE.fullmatch(path.rpartition("/")[2])):
        return None
    return int(named[1], 16), named[2], next(kind for kind, end in ENDS_ASIDE.items() if end == named[3])


def _id(path: str, kind: Kind) -> str:
    return path.rpartition("/")[2].removesuffix(ENDS[kind])
