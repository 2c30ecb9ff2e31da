"""Lists the changes of a collection, and takes one back: over the tables of all encoders, with the items' files.

What others have changed in the same items since then stays as they left it.
"""

from collections.abc import Container
from dataclasses import dataclass

from serving.collection.changes import Change, ChangeWriter, id_of_commit, noted_changes
from serving.collection.index import Index
from serving.collection.problems import IndexProblem, NothingToUndo
from serving.collection.reembedding import Reembedding
from serving.collection.table import Cancelled, LanceTable

LISTED = 100  # newest changes


@dataclass(frozen=True)
class Listed:
    """A change of a collection, and what became of it."""

    change: Change
    text: str
    """What it did, in words."""
    undone: bool
    next: bool
    """Whether it would be undone next."""


def changes(index: Index) -> list[Listed]:
    """Returns the newest changes that are still known, the newest first. Raises IndexProblem."""
    with index._table.explained("read"):
        past = _Past(index)
        following = past.newest()
        if following and not past.is_kept(following):
            following = None
        return [
            Listed(change, past.text(change), change.id in past.undone, change is following)
            for change in past.changes[:LISTED]
            if change.kind != "follow"
        ]


def undo(index: Index, id: str | None = None) -> tuple[Listed, str]:
    """Take back the newest change that is neither undone nor an undo; or the one of this id, which may also be an undo.
    Returns it, and the id of the undo. Raises NothingToUndo, IndexProblem."""
    if not index.exists():
        raise NothingToUndo(f"There is no collection {index.name}; there is nothing to undo.")
    with index._table.explained("written"), index.store.lease(f"undo.{index.stored}") as held:
        if not held:
            raise IndexProblem(f"A change of {index.name} is just being undone; try again.")
        past = _Past(index)
        chosen = past.chosen(id)
        text = past.text(chosen)
        if not past.is_kept(chosen):
            raise NothingToUndo(
                f"{index.name} cannot be undone: {text}, and no version from before that is kept. A change can be "
                "undone for an hour after it has ended."
            )
        if chosen.open and _is_busy(index, chosen):
            raise IndexProblem(f"{index.name} is being filled: {text} so far. Stop that, or wait; then undo it.")
        if chosen.kind == "reembed":
            for table in chosen.tables:
                Reembedding(_of_table(index, past.tables[table])).take_back()
        writer = ChangeWriter(index.store, index.stored, "undo", undoes=chosen.id)
        for change, only in _steps(past, chosen):
            for name, versions in change.tables.items():
                _take_back(index, past.tables[name], versions, only, past.cancelled(name), writer)
        writer.end()
        return Listed(chosen, text, True, False), writer.change.id


class _Past:
    """The changes of a collection."""

    def __init__(self, index: Index):
        self._name = index.name
        self.tables: dict[str, LanceTable] = {table.name: table for table in index._all_tables()}
        noted = noted_changes(index.store, index.stored)
        self.kept: dict[str, set[int]] = {}
        """Versions that each table still has."""
        found = []
        known = {
            (name, version)
            for change in noted.values()
            for name, versions in change.tables.items()
            for version in versions
        }
        for name, table in self.tables.items():
            table.refresh()
            self.kept[name] = table.kept()
            single = 0
            for version, at, counts in table.history():
                if (name, version) not in known:
                    id = id_of_commit(name, version)
                    found.append(Change(id, "write", at.timestamp(), {name: [version]}, *counts()))
                    if (single := single + 1) == LISTED:
                        break
        ours = [change for change in noted.values() if any(map(self._is_known, change.tables.items()))]
        known_ids = {change.id for change in [*found, *ours]}
        for change in noted.values():  # undos without an effect of their own
            if not change.tables and change.undoes in known_ids:
                ours.append(change)
        self.changes = sorted([*found, *ours], key=lambda change: change.at, reverse=True)
        self.undone: set[str] = set()
        """Ids of changes that were taken back."""
        for change in self.changes:
            if change.undoes and not change.open and change.id not in self.undone:
                self.undone.add(change.undoes)
        self._by_id = {change.id: change for change in self.changes}

    def _is_known(self, entry: tuple[str, list[int]]) -> bool:
        name, versions = entry
        return bool(self.kept.get(name, set()) & set(versions))

    def cancelled(self, table: str) -> list[Cancelled]:
        """Returns the changes that were undone, as far as they made versions of this table."""
        found = []
        for undo in self.changes:
            undone = self._by_id.get(undo.undoes)
            if undone and not undo.open and undo.id not in self.undone and table in undone.tables:
                found.append(Cancelled({*undone.tables[table]}, {*undo.tables.get(table, [])}))
        return found

    def newest(self) -> Change | None:
        """Returns the change that would be undone next."""
        done = (change for change in self.changes if change.kind in ("write", "reembed"))
        return next((change for change in done if change.id not in self.undone), None)

    def chosen(self, id: str | None) -> Change:
        """Raises NothingToUndo."""
        if id is None:
            if (change := self.newest()) is None:
                raise NothingToUndo(
                    f"{self._name} cannot be undone: no change of the last hour is known that is not undone."
                )
            return change
        if (change := self._by_id.get(id)) is None:
            raise NothingToUndo(
                f"No change {id} of {self._name} is known. A change can be undone for an hour after it has ended."
            )
        if id in self.undone:
            raise NothingToUndo(f"The change {id} of {self._name} was undone already.")
        if not change.tables:
            raise NothingToUndo(f"{id} of {self._name} had no effect; there is nothing to take back.")
        return change

    def is_kept(self, change: Change) -> bool:
        """Whether the versions from before it are there."""
        return all(min(versions) - 1 in self.kept.get(name, ()) for name, versions in change.tables.items())

    def text(self, change: Change) -> str:
        if change.kind == "undo":
            verb, undone = "undid", self._by_id.get(change.undoes)
            while undone is not None and undone.kind == "undo":
                verb, undone = ("redid" if verb == "undid" else "undid"), self._by_id.get(undone.undoes)
            return f"{verb}: {self.text(undone)}" if undone else f"{verb} an earlier change"
        if change.kind == "reembed":
            return f"embedded {_items(change.added)} again with {', '.join(change.encoders)}"
        counts = {"added": change.added, "changed": change.changed, "deleted": change.deleted}
        done = [f"{verb} {_items(count)}" for verb, count in counts.items() if count]
        return ", ".join(done) or "changed no item"


def _steps(past: _Past, chosen: Change) -> list[tuple[Change, Container[str] | None]]:
    """Returns what to take back: first of the same items what was done for other encoders since."""
    follow = [c for c in past.changes if c.kind == "follow" and c.at >= chosen.at and past.is_kept(c)]
    ids: set[str] = set()
    if follow and chosen.kind == "write":
        for name, versions in chosen.tables.items():
            ids |= past.tables[name].touched(versions)
    return [*((change, ids) for change in follow if ids), (chosen, None)]


def _take_back(
    index: Index,
    table: LanceTable,
    versions: list[int],
    only: Container[str] | None,
    cancelled: list[Cancelled],
    writer: ChangeWriter,
) -> None:
    before, made = table.checksums(), list[int]()
    try:
        table.take_back(versions, only, cancelled, made)
    finally:
        if made:
            writer.add((table.name, version) for version in made)
    index.files.undo(before, table.checksums())


def _is_busy(index: Index, change: Change) -> bool:
    """Whether a process is writing it."""
    for name in change.tables:
        with index.store.lease(f"fill.{name}") as free:
            if not free:
                return True
    return False


def _of_table(index: Index, table: LanceTable) -> Index:
    encoder = table.name.partition(".")[2]
    return Index(index.store.uri, encoder, table.dimension, index.name, index.stored)


def _items(count: int) -> str:
    return f"{count:,} item{'' if count == 1 else 's'}"
