"""The collections as the service uses them: what is in them, and changes. searches.py and comparisons.py read them.

Reading collections has its own threads, so that it does not delay embedding.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from time import perf_counter
from typing import Any, TypeVar

import numpy as np

from export.artifact import UnreadableImage
from serving.collection.index import DEFAULT, Index, Item, collections, content_id, others_in_words
from serving.collection.names import delete_alias, names_of, refuse_alias
from serving.collection.problems import IndexProblem
from serving.collection.reembedding import NO_ORIGINAL, Embedded, Reembedding
from serving.collection.undo import Listed, changes, undo
from serving.collection.writes import CommitQueue
from serving.drift import DriftWatch
from serving.errors import Busy, Malformed, NotFound, TooLarge, Undecodable, without_place
from serving.inference.batcher import Encoded
from serving.inference.decode import Decoder, Upload
from serving.inference.original import original_file
from serving.inference.served import ServedEncoder, ServedEncoders
from serving.inference.thumbnail import DecodedPicture
from serving.limits import RETRY_AFTER_S, Gate, Limits, keeps_originals
from serving.protocol import replies
from serving.protocol.queries import ItemChange, ItemFacts, VectorRow

READERS = 8  # each uses further threads of LanceDB

T = TypeVar("T")


@dataclass(frozen=True)
class Stored:
    """The items that a request has stored."""

    model: str
    """Id of the encoder."""
    ids: list[str]
    new: list[bool]
    """False for an item that replaced one of the same id."""
    changes: list[str]
    """Id of the change."""
    times: dict[str, float]
    """Seconds, as in engine.EmbeddedImages; empty for vectors computed elsewhere."""


class Library:
    def __init__(
        self,
        encoders: ServedEncoders,
        gate: Gate,
        limits: Limits,
        decode: Decoder,
    ):
        """gate    admits images to be embedded
        decode  decodes pictures to be added, or to be looked at
        """
        self.store = encoders.default.index(DEFAULT).store
        self.drift = DriftWatch()
        self._encoders, self._gate = encoders, gate
        self._decode = decode
        self._most_bytes = limits.body_bytes  # of a file that is read here, as of one that is uploaded
        self._keeps_originals = keeps_originals()
        self._writer = CommitQueue(limits.rows_at_once)
        self._reading = Gate(limits.reads_at_once, "reads of collections")
        self._verifying = Gate(1, "check of a collection")
        self._readers = ThreadPoolExecutor(READERS, "reads")

    def index(self, name: str, model: str | None = None) -> Index:
        """Returns the collection's index for the encoder with id `model`, or for its default. Raises NotFound."""
        return self._encoders.get(model, name).index(name)

    async def read(self, call: Callable[..., T], *arguments: object) -> T:
        """Call in a thread for reading. Raises Busy, IndexProblem."""
        with self._reading.admit(1):
            return await asyncio.get_running_loop().run_in_executor(self._readers, call, *arguments)

    async def describe_all(self) -> list[replies.Collection]:
        """Describe all collections. Raises as `read`."""
        return await self.read(collections, self.store.uri)

    def refresh_names(self) -> None:
        """Read the names of collections again if they may have changed. Blocks. Raises IndexProblem."""
        names_of(self.store)

    async def rename(self, name: str, new: str) -> replies.Collection:
        """Raises NotFound, Busy, IndexProblem."""
        index = self.index(name)
        await self.refuse_missing(index)
        refuse_alias(names_of(self.store, recent=True), name)
        await self.read(index.rename, new)
        return await self.describe(self.index(new), measured=True)

    async def aliases(self) -> list[replies.Alias]:
        """Raises Busy, IndexProblem."""
        names = await self.read(names_of, self.store)
        return [replies.Alias(alias, names.shown(stored)) for alias, stored in sorted(names.aliases.items())]

    async def set_alias(self, alias: str, name: str) -> replies.Alias:
        """Raises NotFound, Busy, IndexProblem."""
        await self.read(self.refresh_names)
        index = self.index(name)
        if not await self.read(index.exists):
            there = others_in_words(await self.describe_all())
            raise NotFound(f"collection: there is no collection {name}; {there}", "collection")
        await self.read(index.set_alias, alias)
        return replies.Alias(alias, index.name)

    async def delete_alias(self, alias: str) -> None:
        """Raises NotFound, Busy, IndexProblem."""
        if alias not in (await self.read(names_of, self.store)).aliases:
            raise NotFound(f"there is no alias {alias}", "alias")
        await self.read(delete_alias, self.store, alias)

    async def refuse_missing(self, index: Index) -> None:
        """Raises NotFound."""
        if not await self.read(index.exists):
            raise _no_collection(index.name)

    async def describe(self, index: Index, measured: bool = False) -> replies.Collection:
        """Describe a collection. Raises NotFound when it does not exist, and as `read`.

        measured: as Index.facts
        """
        facts = await self.read(index.facts, measured)
        if not facts.version and not facts.others:
            raise _no_collection(index.name)
        return facts

    async def original(self, name: str, id: str, model: str | None = None) -> bytes:
        """The picture of an item as a JPEG file of at most 2,048 px. Raises NotFound, Busy, IndexProblem."""
        index = self.index(name, model)
        row = await self.read(index.get, id)
        if row is None:
            raise NotFound(f"no item {id} is in the collection {name}", "id")
        folders = await self.read(index.folders)
        with self._gate.admit(1):
            # One sentence for all reasons, so that it tells nothing about files.
            try:
                data = await self.read(original_file, index, row[0], folders, self._most_bytes)
                return await self._decode.large(Upload("id", "", data))
            except (UnreadableImage, Undecodable, TooLarge) as problem:
                message = f"the original of {id} cannot be read here, or has changed since it was indexed"
                raise NotFound(message, "id") from problem

    async def put(self, name: str, uploads: list[Upload], facts: list[ItemFacts], model: str | None = None) -> Stored:
        """Embed n >= 1 pictures and store them with their files. Raises as Engine.embed, and IndexProblem."""
        _refuse_twice([fact.id for fact in facts], "metadata")
        encoder = self._encoders.get(model, name)
        with self._writer.room(len(uploads)):
            pictures, encoded, decode_s = await self._embed_pictures(uploads, encoder)
            items = [
                _item(fact, fact.id or content_id(file.data), file.name, picture.width, picture.height, len(file.data))
                for file, fact, picture in zip(uploads, facts, pictures, strict=True)
            ]
            thumbnails = {item.id: picture.thumbnail for item, picture in zip(items, pictures, strict=True)}
            kept = zip(items, uploads, strict=True) if self._keeps_originals else ()
            originals = {item.id: file.data for item, file in kept}
            written = await self._writer.upsert(encoder.index(name), items, encoded.vectors, thumbnails, originals)
        self._note_encoder(name, encoder)
        self.note_pictures(encoder, encoded.vectors, name)
        times = {"decode": decode_s, "queue": encoded.queue_s, "model": encoded.model_s}
        return Stored(encoder.card.id, [item.id for item in items], written.answer, written.changes, times)

    async def _embed_pictures(
        self, uploads: list[Upload], encoder: ServedEncoder
    ) -> tuple[list[DecodedPicture], Encoded, float]:
        """Returns what a collection stores of each picture, their vectors, and the seconds for decoding. Raises as
        Engine.embed."""
        with self._gate.admit(len(uploads)):
            started = perf_counter()
            pictures = await self._decode.pictures(uploads, encoder.card.preprocessing)
            decode_s = perf_counter() - started
            encoded = await encoder.batch(np.stack([picture.pixels for picture in pictures]))
        return pictures, encoded, decode_s

    def note_pictures(self, encoder: ServedEncoder, vectors: np.ndarray, name: str = DEFAULT) -> None:
        """These pictures were sent for this collection; those sent for none count for the default one. What is sent is
        answered even if the collection cannot be read."""
        with suppress(IndexProblem):
            self.drift.note(encoder.index(name), vectors)

    def _note_encoder(self, name: str, encoder: ServedEncoder) -> None:
        """The collection may use this encoder from now on, since items were added with it."""
        if encoder is not self._encoders.get(None, name):
            self.recount()

    def recount(self) -> None:
        """Look soon whether a new encoder has completed a collection."""
        self._encoders.recount()

    def successor(self, name: str, model: str | None) -> tuple[Index, ServedEncoder]:
        """Returns the encoder that a collection is to be embedded again with, by default the service's default, and its
        index. Raises NotFound."""
        encoder = self._encoders.get(model)
        return encoder.index(name), encoder

    async def reembedding(self, name: str, model: str | None) -> Reembedding:
        """The work of embedding a collection again, with an encoder as `successor` chooses it. Raises NotFound, Busy,
        IndexProblem."""
        index, _ = self.successor(name, model)
        await self.refuse_missing(index)
        return Reembedding(index)

    async def embed_again(self, files: Sequence[bytes], encoder: ServedEncoder) -> list[Embedded | str]:
        """Embed the files of items, or say for each why not. Waits while the service is busy. Raises NotReady."""
        while True:
            try:
                uploads = [Upload("its file", "", data) for data in files]
                pictures, encoded, _ = await self._embed_pictures(uploads, encoder)
                break
            except Busy:
                await asyncio.sleep(RETRY_AFTER_S)
            except (Undecodable, TooLarge) as problem:
                if len(files) == 1:
                    return [f"cannot be embedded: {problem.detail}"]
                return [(await self.embed_again([data], encoder))[0] for data in files]
        return [
            Embedded(vector, picture.thumbnail, picture.width, picture.height, len(data))
            for data, picture, vector in zip(files, pictures, encoded.vectors, strict=True)
        ]

    def read_again(self, index: Index, folders: Sequence[str], item: Item) -> bytes | str:
        """Returns the file of an item's picture, or why there is none. Raises IndexProblem."""
        try:
            return original_file(index, item, folders, self._most_bytes)
        except UnreadableImage:
            return NO_ORIGINAL  # tells nothing about files

    async def put_rows(self, name: str, rows: Sequence[VectorRow], model: str | None) -> Stored:
        """Store vectors that this encoder has computed elsewhere. Raises Malformed, NotFound, Busy, IndexProblem."""
        _refuse_twice([row.id for row in rows], "items")
        encoder = self._encoders.get(model, name)
        vectors = [vector_of(row.vector, encoder, f"items[{i}].vector") for i, row in enumerate(rows)]
        index = encoder.index(name)
        with self._writer.room(len(rows)):
            known = await self.read(index.get_many, [row.id for row in rows])
            items = [_row_item(row, known[row.id][0] if row.id in known else None) for row in rows]
            written = await self._writer.upsert(index, items, np.stack(vectors), {})
        self._note_encoder(name, encoder)
        return Stored(encoder.card.id, [item.id for item in items], written.answer, written.changes, {})

    async def delete(self, name: str, ids: Sequence[str], model: str | None = None) -> replies.Deleted:
        """Raises NotFound, Busy, IndexProblem."""
        index = self.index(name, model)
        with self._writer.room(len(ids)):
            deleted = await self._writer.delete(index, ids)
        if not deleted.answer:
            await self.describe(index)
        return replies.Deleted(*deleted)

    async def change(self, name: str, changes: Sequence[ItemChange]) -> replies.Changed:
        """Change facts of items. Raises Malformed, NotFound, Busy, IndexProblem."""
        _refuse_twice([change.id for change in changes], "items")
        facts: dict[str, dict[str, Any]] = {}
        for change in changes:
            given = change.model_fields_set - {"id"} - ({"name"} if change.name is None else set())
            facts[change.id] = {field: getattr(change, field) for field in given}
        index = self.index(name)
        with self._writer.room(len(facts)):
            changed = await self._writer.change(index, facts)
        if not changed.answer:
            await self.describe(index)
        return replies.Changed(*changed)

    async def copy(self, source: str, ids: Sequence[str], name: str) -> replies.Copied:
        """Put items of the collection `source` into another one, with the vectors of the encoder that `source` uses.
        Items that it has already stay as they are. Raises NotFound, Busy, IndexProblem."""
        from_index, encoder = self.index(source), self._encoders.get(None, source)
        await self.refuse_missing(from_index)
        target = encoder.index(name)
        with self._writer.room(len(ids)):
            there = await self.read(target.known, list(ids))
            rows = await self.read(from_index.get_many, [id for id in ids if id not in there])
            new, made = [id for id in dict.fromkeys(ids) if id in rows], list[str]()
            if new:
                thumbnails = await self.read(_copy_files, from_index, target, new)
                items, vectors = zip(*(rows[id] for id in new), strict=True)
                made = (await self._writer.upsert(target, items, np.stack(vectors), thumbnails)).changes
        self._note_encoder(name, encoder)
        return replies.Copied(new, made)

    async def create(self, name: str, model: str | None) -> replies.Collection:
        """Raises NotFound, Busy, IndexProblem."""
        index = self.index(name, model)
        await self.read(index.create)
        self._note_encoder(name, self._encoders.get(model, name))
        return await self.describe(index, measured=True)

    async def drop(self, name: str) -> int:
        """Delete a collection. Returns how many items it had. Raises NotFound, Busy, IndexProblem."""
        index = self.index(name)
        if not await self.read(index.exists):
            raise NotFound(f"there is no collection {name}; {others_in_words(await self.describe_all())}", "name")
        refuse_alias(names_of(self.store, recent=True), name)
        count = await self.read(index.drop)
        self.drift.forget(index)
        return count

    async def changes(self, name: str) -> list[replies.Change]:
        """Returns the newest changes, the newest first. Raises NotFound, Busy, IndexProblem."""
        index = self.index(name)
        await self.refuse_missing(index)
        return [_change(listed) for listed in await self.read(changes, index)]

    async def undo(self, name: str, id: str | None) -> replies.Undone:
        """Undo the newest change, or the one of this id. Raises NotFound, Busy, IndexProblem."""
        index = self.index(name)
        await self.refuse_missing(index)
        listed, undone_by = await self.read(undo, index, id)
        if listed.change.kind in ("reembed", "undo"):
            self._encoders.look_back()
        tables = [facts for facts in await self.describe_all() if facts.name == index.name]
        return replies.Undone(_change(listed), undone_by, max((facts.count for facts in tables), default=0))

    async def verify(self, index: Index) -> list[str]:
        """Returns a sentence for each kind of damage. Raises NotFound, Busy, IndexProblem."""
        await self.describe(index)
        with self._verifying.admit(1):
            problems = await self.read(index.verify)
        return [without_place(problem, index.store.uri) for problem in problems]

    def close(self) -> None:
        self._writer.close()
        self._readers.shutdown(wait=False, cancel_futures=True)


def _copy_files(source: Index, target: Index, ids: Sequence[str]) -> dict[str, bytes]:
    """Copy the originals, and what is known of where others are. Returns the thumbnails."""
    target.add_folders(source.folders())
    for id in ids:  # one at a time, since they are large
        if (original := source.read_original(id)) is not None:
            target.store.write(target.files.path("originals", id), original)
    return {id: data for id in ids if (data := source.read_thumbnail(id)) is not None}


def _change(listed: Listed) -> replies.Change:
    change = listed.change
    at = datetime.fromtimestamp(change.at).astimezone().isoformat(timespec="seconds")
    counts = (change.added, change.changed, change.deleted)
    return replies.Change(change.id, listed.text, at, *counts, listed.undone, listed.next)


def _no_collection(name: str) -> NotFound:
    return NotFound(f"there is no collection {name}; adding the first items creates it", "name")


def vector_of(numbers: list[float], encoder: ServedEncoder, field: str) -> np.ndarray:
    """A vector (d,) that a request has given for this encoder. Raises Malformed."""
    if len(numbers) != encoder.card.dimension:
        message = f"{field} has {len(numbers)} numbers; the vectors of {encoder.card.id} have {encoder.card.dimension}"
        raise Malformed(message, field)
    vector = np.asarray(numbers, np.float32)
    if not vector.any():
        raise Malformed(f"{field} is zero, which is no direction to search in", field)
    return vector


def _refuse_twice(ids: Sequence[str | None], field: str) -> None:
    """Raises Malformed for an id that several elements of a list have: one would replace the other."""
    seen = set()
    for i, id in enumerate(ids):
        if id is not None and id in seen:
            raise Malformed(f"{field}[{i}].id: {id} is there twice", f"{field}[{i}].id")
        seen.add(id)


def _row_item(row: VectorRow, before: Item | None) -> Item:
    """The item of a vector. One that was there keeps its picture, and so the picture's size and path."""
    if before is None:
        return _item(row, row.id, "", 0, 0, 0)
    item = _item(row, row.id, "", before.width, before.height, before.bytes)
    return item if "path" in row.model_fields_set else replace(item, path=before.path)


def _item(facts: ItemFacts, id: str, name: str, width: int, height: int, size: int) -> Item:
    name = facts.name if facts.name is not None else name or id
    return Item(id, name, facts.label, facts.path, width, height, size, dict(facts.metadata))
