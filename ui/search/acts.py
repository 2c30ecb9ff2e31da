"""What the page changes in a collection: it removes pictures, labels them, puts them into another collection, adds new
ones. Each is one change for the user, who can undo it, although the service may need several requests for it."""

import re
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from serving.access import MAY_WRITE, READ_ONLY
from serving.client import AsyncClient, Changed, ServiceError
from serving.protocol.queries import NAME
from serving.protocol.shown import counted
from ui.search import selection
from ui.search.choice import Choice
from ui.search.picture import from_path
from ui.search.query import SearchSettings

AT_ONCE = 1000  # ids in one request
REFUSED = (400, 413, 415, 422)  # the service's statuses for a picture that it cannot read
NO_NAME = "{name!r} cannot be the name of a collection: use letters, digits, - and _, for instance shoes-2."

Answer = dict[str, Any]
"""message   what happened, in words
ids       those that were changed
undo      what `undo` needs to take it back; None if nothing was changed
"""


async def chosen_ids(client: AsyncClient, data: dict[str, Any]) -> list[str]:
    """The ids that the browser has selected in one of three ways: by {ids}, by a {choice} on the map, or in a grid, by
    {all, chosen} with the {where, encoder} of what is shown. Raises ServiceError, FilterProblem, ValueError."""
    if "ids" in data:
        return [str(id) for id in data["ids"]]
    if "choice" in data:
        choice = Choice.parse(data["choice"])
        return choice.ids(await client.map(collection=choice.collection))
    if not data.get("all"):
        return [str(id) for id, _ in data["chosen"]]
    where = tuple(map(str, data.get("where") or ()))
    shown = SearchSettings(where=where, collection=data["collection"], encoder=data.get("encoder"))
    return [item.id for item, _ in await selection.selected_rows(client, data, shown, lambda done, of: None)]


async def remove(client: AsyncClient, ids: Sequence[str], collection: str) -> Answer:
    """Remove these from the collection. `ids` of the answer are no longer in it."""

    async def request(some: Sequence[str]) -> Changed:
        done = await client.delete_items(some, collection=collection)
        return Changed(done.deleted, done.changes)

    return await _in_parts(client, ids, collection, request, "{} removed; files were not touched.")


async def label(client: AsyncClient, ids: Sequence[str], text: str, collection: str) -> Answer:
    """text: empty removes the labels"""
    value = text.strip() or None

    async def request(some: Sequence[str]) -> Changed:
        return await client.change_items([{"id": id, "label": value} for id in some], collection=collection)

    words = f"{{}} labelled {_braced(value)}." if value else "The labels of {} were removed."
    return await _in_parts(client, ids, collection, request, words)


async def confirm(client: AsyncClient, labels: dict[str, Any], collection: str) -> Answer:
    """labels: that of each id"""

    async def request(some: Sequence[str]) -> Changed:
        return await client.change_items([{"id": id, "label": str(labels[id])} for id in some], collection=collection)

    return await _in_parts(client, list(labels), collection, request, "{} labelled as suggested.")


async def copy(client: AsyncClient, ids: Sequence[str], collection: str, target: str) -> Answer:
    """Put these into another collection too, which need not exist yet."""
    target = target.strip()
    if not re.fullmatch(NAME, target):
        return _refusal(NO_NAME.format(name=target))

    async def request(some: Sequence[str]) -> Changed:
        done = await client.copy_items(some, collection, collection=target)
        return Changed(done.copied, done.changes)

    return await _in_parts(client, ids, target, request, f"{{}} put into the collection {target}.")


async def add(client: AsyncClient, files: Sequence[dict[str, Any]], collection: str) -> Answer:
    """Add uploaded files. Of those that cannot be read the answer's `failed` has the names with the reasons.

    files  with the path of the upload, the name to store and perhaps a label
    """
    if MAY_WRITE.get() is False:
        return _refusal(READ_ONLY) | {"failed": []}
    failed: list[str] = []
    changes: list[str] = []
    message = ""

    async def put(some: Sequence[tuple[Path, dict[str, Any]]]) -> None:
        try:
            paths, facts = [file for file, _ in some], [about for _, about in some]
            stored = await client.put_items(paths, facts, collection=collection)
            changes[:0] = stored.changes
        except ServiceError as error:
            if error.status not in REFUSED:
                raise
            if len(some) == 1:
                failed.append(f"{some[0][1]['name']}: {_reason(error)}")
            else:
                for one in some:
                    await put([one])

    uploads = [(_uploaded(file["path"]), _facts(file)) for file in files]
    try:
        await put(uploads)
    except ServiceError as error:
        message = str(error)
    finally:
        for file, _ in uploads:
            file.unlink(missing_ok=True)
    return {"message": message, "failed": failed, "ids": [], "undo": _undo_of(collection, changes)}


def _uploaded(path: object) -> Path:
    """Raises UploadFailed."""
    file = from_path(path).file
    assert file is not None
    return file


def _facts(file: dict[str, Any]) -> dict[str, Any]:
    return {key: str(file[key]) for key in ("name", "label") if file.get(key)}


def _reason(error: ServiceError) -> str:
    """Why the service refuses a picture, without the words that name it: the page has its whole name."""
    return re.sub(r"^images\[0\](?: \([^)]*\))?:? ", "", str(error))


async def undo(client: AsyncClient, data: dict[str, Any]) -> Answer:
    """Take back a change. data: the `undo` of its answer, or of several, the last first"""
    if MAY_WRITE.get() is False:
        return _refusal(READ_ONLY)
    collection = str(data["collection"])
    count = 0
    try:
        for change in data["changes"]:
            count = (await client.undo(str(change), collection=collection)).count
    except ServiceError as error:
        return _refusal(str(error))
    return {"message": f"Undone: the collection {collection} has {counted(count)} now.", "ids": [], "undo": None}


async def _in_parts(
    client: AsyncClient,
    ids: Sequence[str],
    collection: str,
    request: Callable[[Sequence[str]], Awaitable[Changed]],
    words: str,
) -> Answer:
    """Change AT_ONCE items at a time.

    request  changes these
    words    say what has happened to {}
    """
    if MAY_WRITE.get() is False:
        return _refusal(READ_ONLY)
    done, total, problem = 0, 0, ""
    changes: list[str] = []
    try:
        for at in range(0, len(ids), AT_ONCE):
            answer = await request(ids[at : at + AT_ONCE])
            done, total = min(at + AT_ONCE, len(ids)), total + len(answer.changed)
            changes[:0] = answer.changes
    except ServiceError as error:
        problem = str(error)
    happened = words.format(counted(total)) if total or not problem else ""
    message = f"{happened} Then an error: {problem}" if happened and problem else happened or problem
    return {"message": message, "ids": list(ids[:done]), "undo": _undo_of(collection, changes)}


def _undo_of(collection: str, changes: list[str]) -> dict[str, Any] | None:
    return {"collection": collection, "changes": changes} if changes else None


def _refusal(message: str) -> Answer:
    return {"message": message, "ids": [], "undo": None}


def _braced(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")
