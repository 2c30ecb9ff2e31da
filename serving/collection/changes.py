"""The journal of a collection: which commits belong to one change.

    INDEX/changes/<name>/<change>.<writer>.json    a file for each process that writes a part of the change

A command, or a request that writes to the tables of several encoders, makes several commits. They are noted here, so
that undo.py takes all of them back together. A commit that is not noted is a change by itself.
"""

import json
import secrets
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

from serving.collection.problems import IndexProblem
from serving.collection.store import FileStore

FOLDER = "changes"
UNDO_S = 3600.0  # a change can be undone for so long after it has ended
KEPT_S = 86_400.0  # and if it ended within so long after it began

Kind = Literal["write", "reembed", "follow", "undo"]
"""`follow`: what others have added is embedded for a second encoder too. It belongs to the changes that it follows."""


@dataclass(frozen=True)
class Change:
    id: str
    kind: Kind = "write"
    at: float = 0.0
    """When it began, Unix seconds."""
    tables: dict[str, list[int]] = field(default_factory=dict)
    """The versions that it made, by the table's name."""
    added: int = 0
    changed: int = 0
    deleted: int = 0
    """Numbers of items."""
    undoes: str = ""
    """Of kind `undo`: the change that it took back."""
    open: bool = False
    """Whether its writer has not ended it. A writer that was killed never does."""

    def __add__(self, other: "Change") -> "Change":
        """The same change, of which the two are parts."""
        tables = {
            name: sorted({*self.tables.get(name, []), *other.tables.get(name, [])})
            for name in {**self.tables, **other.tables}
        }
        return replace(
            self,
            at=min(self.at, other.at),
            tables=tables,
            added=self.added + other.added,
            changed=self.changed + other.changed,
            deleted=self.deleted + other.deleted,
            open=self.open or other.open,
        )

    @property
    def encoders(self) -> list[str]:
        return [name.partition(".")[2] for name in self.tables]


def new_id() -> str:
    return f"{time.time_ns():x}-{secrets.token_hex(4)}"


def id_of_commit(table: str, version: int) -> str:
    """Returns the id of a change that is this single commit."""
    return f"{table.partition('.')[2]}.{version}"


class ChangeWriter:
    """Notes the commits of one change, by one writer."""

    def __init__(self, store: FileStore, stored: str, kind: Kind = "write", id: str | None = None, undoes: str = ""):
        """stored  the collection's name in paths
        id      of a change that others write to, too
        """
        id = id or new_id()
        self.change = Change(id, kind, time.time(), undoes=undoes)
        self._store, self._path = store, f"{FOLDER}/{stored}/{id}.{secrets.token_hex(4)}.json"

    def add(
        self, commits: Iterable[tuple[str, int]], added: int = 0, changed: int = 0, deleted: int = 0, open: bool = True
    ) -> None:
        """commits  the table and the version of each"""
        for table, version in commits:
            self.change += Change("", tables={table: [version]}, at=self.change.at)
        self.change += Change("", at=self.change.at, added=added, changed=changed, deleted=deleted)
        self._write(open)

    def end(self) -> None:
        """Note that it has ended: also an undo that changed nothing, since others had changed the same items."""
        if self.change.tables or self.change.undoes:
            self._write(open=False)

    def _write(self, open: bool) -> None:
        self.change = replace(self.change, open=open)
        self._store.write(self._path, json.dumps(asdict(self.change)).encode())


def noted_changes(store: FileStore, stored: str, paths: Iterable[str] | None = None) -> dict[str, Change]:
    """Returns the changes in the journal, or in these of its files, by id. Raises IndexProblem."""
    changes: dict[str, Change] = {}
    for path in sorted(store.list(f"{FOLDER}/{stored}") if paths is None else paths):
        if (content := store.read(path)) is None:
            continue  # swept meanwhile
        try:
            change = Change(**json.loads(content))
        except (ValueError, TypeError) as error:
            raise IndexProblem(f"{store.uri}/{path} is damaged; delete it.") from error
        changes[change.id] = changes[change.id] + change if change.id in changes else change
    return changes


def needed_since(store: FileStore, stored: str) -> float:
    """Returns when the oldest change began that can be undone, in Unix seconds: at least UNDO_S ago, at most KEPT_S.
    Raises IndexProblem."""
    now = time.time()
    recent = {path for path, _, at in store.entries(f"{FOLDER}/{stored}") if at > now - UNDO_S}
    began = [change.at for change in noted_changes(store, stored, recent).values()]
    return max(min([now - UNDO_S, *began]), now - KEPT_S)


def drop_changes(store: FileStore, stored: str) -> None:
    store.delete(list(store.list(f"{FOLDER}/{stored}")))


def sweep_changes(store: FileStore, stored: str) -> None:
    """Delete the records of changes that can no longer be undone."""
    store.sweep(f"{FOLDER}/{stored}", KEPT_S)
