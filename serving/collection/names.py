"""The names of collections, and their aliases.

    INDEX/names.json    {"stored": {name: the name in paths}, "aliases": {alias: the name in paths}}

A collection that was never renamed has the same name in paths, and is not listed there. Renaming and switching an alias
replace this one file: they move nothing, happen at once, and do not disturb others that read or write the collection.
"""

import json
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from serving.collection.problems import BadName, IndexProblem
from serving.collection.store import FileStore
from serving.protocol.shown import shown

NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
FILE = "names.json"
WAIT_S = 10.0  # for another process that changes names

_known: dict[str, tuple[float, object, "Names"]] = {}
"""By place: when it was read, what identifies the file, and its content."""


@dataclass(frozen=True)
class Names:
    stored: dict[str, str] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)

    def resolve(self, name: str) -> tuple[str, str]:
        """Returns the name of a collection, or of the one that an alias stands for, and its name in paths."""
        if name in self.aliases:
            return self.shown(self.aliases[name]), self.aliases[name]
        return name, self.stored.get(name, name)

    def shown(self, stored: str) -> str:
        """Returns the name of the collection that has this name in paths."""
        return next((name for name, path in self.stored.items() if path == stored), stored)

    def aliases_of(self, stored: str) -> list[str]:
        return sorted(alias for alias, path in self.aliases.items() if path == stored)


def refuse_bad_name(name: str) -> None:
    """Raises BadName."""
    if not NAME.fullmatch(name):
        raise BadName(f"{shown(name)} is not a collection's name: letters, digits, _ and -, at most 64.")


def names_of(store: FileStore, recent: bool = False) -> Names:
    """Returns the names, those of a moment ago in an object store. Raises IndexProblem.

    recent  whatever was read last is new enough; then this takes no time
    """
    at, mark, names = _known.get(store.uri, (0.0, None, Names()))
    if mark is not None and recent and store.local is None:
        return names
    if store.local is not None:
        now = _mark(store)
        if mark is not None and now == mark:
            return names
    elif mark is not None and time.monotonic() - at < store.consistency_s:
        return names
    else:
        now = "read"
    names = read_names(store)
    _known[store.uri] = (time.monotonic(), now, names)
    return names


def rename(store: FileStore, name: str, new: str, exists: bool) -> None:
    """Give a collection another name. Raises BadName, IndexProblem.

    exists  whether a collection of the new name is there
    """
    refuse_bad_name(new)
    with _changing(store) as names:
        refuse_alias(names, name)
        if new in names.aliases or exists:
            kind = "an alias" if new in names.aliases else "a collection"
            raise BadName(f"There is {kind} {new} already.")
        _, stored = names.resolve(name)
        names.stored[new] = stored
        names.stored[name] = f"{name[:50]}-{secrets.token_hex(4)}"  # for another collection of that name


def set_alias(store: FileStore, alias: str, name: str, exists: bool) -> None:
    """Let an alias stand for a collection, and for no other any more. Raises BadName, IndexProblem.

    exists  whether a collection of the alias's name is there
    """
    refuse_bad_name(alias)
    with _changing(store) as names:
        if exists and alias not in names.aliases:
            raise BadName(f"There is a collection {alias} already.")
        names.aliases[alias] = names.resolve(name)[1]


def delete_alias(store: FileStore, alias: str) -> None:
    """Raises BadName when there is no such alias, IndexProblem."""
    with _changing(store) as names:
        if names.aliases.pop(alias, None) is None:
            raise BadName(f"There is no alias {alias}.")


def refuse_alias(names: Names, name: str) -> None:
    """Raises BadName for an alias, where a collection is to be named."""
    if name in names.aliases:
        raise BadName(f"{name} is an alias of {names.resolve(name)[0]}; name the collection itself.")


@contextmanager
def _changing(store: FileStore) -> Iterator[Names]:
    """Yields the names to change, and writes them if nothing is raised. One process at a time does this."""
    until = time.monotonic() + WAIT_S
    while True:
        with store.lease("names") as held:
            if held:
                names = read_names(store)
                yield names
                content = {"stored": {name: path for name, path in names.stored.items() if name != path}}
                store.write(FILE, json.dumps(content | {"aliases": names.aliases}, indent=2).encode())
                _known.pop(store.uri, None)
                return
        if time.monotonic() > until:
            raise IndexProblem(f"The names of the collections in {store.uri} are being changed by another process.")
        time.sleep(0.05)


def read_names(store: FileStore) -> Names:
    """Returns the newest names. Raises IndexProblem."""
    content = store.read(FILE) if store.exists() else None
    try:
        return Names(**json.loads(content or b"{}"))
    except (ValueError, TypeError) as error:
        raise IndexProblem(f"{store.uri}/{FILE} is damaged; write it again, or delete it.") from error


def _mark(store: FileStore) -> tuple[int, ...]:
    """Identifies the content of the file in a folder; () if there is none."""
    try:
        facts = (store.local / FILE).stat() if store.local else None
    except (FileNotFoundError, NotADirectoryError):
        return ()
    return (facts.st_ino, facts.st_mtime_ns, facts.st_size) if facts else ()
