"""The collections as the service uses them: add, delete, search.

Reading collections has its own threads, so that it does not delay embedding.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache
from time import perf_counter
from typing import Any, TypeVar

import numpy as np

from export.artifact import UnreadableImage
from serving.collection.index import DEFAULT, Index, Item, collections, content_id, others_in_words, unit
from serving.collection.names import delete_alias, names_of, refuse_alias
from serving.collection.problems import IndexProblem, UnknownKey, WrongEncoder
from serving.collection.reembedding import NO_ORIGINAL, Embedded, Reembedding
from serving.collection.undo import Listed, changes, undo
from serving.collection.upgrade import Upgrade
from serving.collection.writes import CommitQueue
from serving.curation.coverage_items import NoneToCover, TooFewToCover, uncovered_items
from serving.curation.items import NoValues
from serving.curation.odd_items import FINDERS, CannotCompare
from serving.curation.split import WrongShares, as_one
from serving.curation.split_items import TooFewToDivide, split_items
from serving.curation.suggest import TooFewLabels, suggest_labels
from serving.drift import DriftWatch
from serving.errors import Busy, Conflict, Malformed, NotFound, TooLarge, Undecodable, without_place
from serving.inference.batcher import Encoded
from serving.inference.decode import Decoder, Upload
from serving.inference.original import original_file
from serving.inference.served import OPEN_COLLECTIONS, ServedEncoder, ServedEncoders
from serving.inference.thumbnail import DecodedPicture
from serving.limits import RETRY_AFTER_S, Gate, Limits, keeps_originals
from serving.protocol import replies
from serving.protocol.filters import Filter
from serving.protocol.queries import (
    CoverageQuery,
    ItemChange,
    ItemFacts,
    OddQuery,
    PickQuery,
    SearchQuery,
    SplitQuery,
    SuggestQuery,
    VectorRow,
)
from serving.protocol.shown import counted

ROWS_FOUND = 10_000  # by searches that are answered together
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


@dataclass(frozen=True)
class Search:
    """A search whose examples have become a direction."""

    index: Index
    upgrade: Upgrade
    """Searches the index, and what is not embedded again yet."""
    direction: np.ndarray  # (d,)
    scale: float
    """The mean cosine to the positive examples is the cosine to the direction times this."""
    k: int
    where: Filter | None
    without: tuple[str, ...]
    """Ids of the examples, which are no results."""
    threshold: float | None
    """Lowest cosine of a result."""
    ranked: bool
    """Whether its cosines can be ranked among random pairs of pictures: not with negative examples or text."""


@dataclass(frozen=True)
class Found:
    """The answer to a search."""

    model: str
    """Id of the encoder."""
    results: list[tuple[Item, float, float | None]]
    """Items with their cosine and its rank among random pairs, nearest first."""
    threshold: float | None
    """Lowest cosine of a result, None without a limit."""
    estimated: bool
    """Whether vectors of another encoder were searched, too."""


class Library:
    def __init__(
        self,
        encoders: ServedEncoders,
        gate: Gate,
        embed: Callable[[list[Upload], ServedEncoder], Awaitable],
        limits: Limits,
        decode: Decoder,
    ):
        """gate     admits images to be embedded
        embed    embeds uploads with an encoder, behind the gate; returns an EmbeddedImages
        decode   decodes pictures to be added, or to be looked at
        """
        self.store = encoders.default.index(DEFAULT).store
        self.drift = DriftWatch()
        self._encoders, self._gate, self._embed = encoders, gate, embed
        self._decode = decode
        self._most_bytes = limits.body_bytes  # of a file that is read here, as of one that is uploaded
        self._keeps_originals = keeps_originals()
        self._writer = CommitQueue(limits.rows_at_once)
        self._reading = Gate(limits.reads_at_once, "reads of collections")
        self._verifying = Gate(1, "check of a collection")
        self._picking = Gate(1, "comparison of items")
        self._readers = ThreadPoolExecutor(READERS, "reads")
        self._upgrade = lru_cache(OPEN_COLLECTIONS)(Upgrade)

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
        await self._refuse_missing(index)
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

    async def _refuse_missing(self, index: Index) -> None:
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
        await self._refuse_missing(index)
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
        vectors = [_vector(row.vector, encoder, f"items[{i}].vector") for i, row in enumerate(rows)]
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
        await self._refuse_missing(from_index)
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

    async def pick(self, name: str, query: PickQuery, where: Filter | None) -> replies.Picked:
        """Raises Malformed, NotFound, Busy, IndexProblem."""
        from serving.curation.pick_items import pick_items  # scikit-learn takes a second to load

        options = (query.k, query.method, where, query.balanced_by, query.labelled_too, query.seed)
        try:
            picked = await self._compare(name, pick_items, *options)
        except NoValues as error:
            raise _no_values("balanced_by", name, query.balanced_by) from error
        return replies.Picked(picked.items, picked.candidates)

    async def suggest(self, name: str, query: SuggestQuery, where: Filter | None) -> replies.Suggested:
        """Raises Malformed, NotFound, Busy, IndexProblem."""
        try:
            found = await self._compare(name, suggest_labels, query.k, where)
        except TooFewLabels as error:
            raise Malformed(f"{name} {error}", "name") from error
        items = [
            replies.SuggestedItem(**vars(item), suggested=label, share=share) for item, label, share in found.items
        ]
        return replies.Suggested(items, found.candidates)

    async def odd(self, name: str, query: OddQuery, where: Filter | None) -> replies.Odd:
        """Raises Malformed, NotFound, Busy, IndexProblem."""
        try:
            found = await self._compare(name, FINDERS[query.kind], query.k, where)
        except CannotCompare as error:
            raise Malformed(f"{name} {error}", "name") from error
        items = []
        for item, (*reason, value) in found.rows:
            items.append(replies.OddItem(**vars(item), reason=str(reason[0]) if reason else None, value=float(value)))
        return replies.Odd(items, found.odd, found.compared, found.left_out)

    async def coverage(
        self, name: str, query: CoverageQuery, where: Filter | None, by_where: Filter | None
    ) -> replies.Coverage:
        """Raises Malformed, NotFound, Busy, IndexProblem."""
        index, by = self.index(name), query.by or name
        await self._refuse_missing(index)
        other = self.index(by, index.encoder_id)
        if not await self.read(other.exists):
            raise NotFound(f"by: there is no collection {by}; {others_in_words(await self.describe_all())}", "by")
        if other.stored == index.stored and query.filter == query.by_filter:
            message = f"{name} is compared with itself; name another collection, or give filter and by_filter"
            raise Malformed(f"by: {message}", "by")
        try:
            await self.read(other.count, by_where)
        except WrongEncoder as error:
            raise Conflict(f"by: {error}", "by") from error
        except UnknownKey as error:
            raise Malformed(f"by_filter: {error}", "by_filter") from error
        try:
            found = await self._compare(name, uncovered_items, other, where, by_where)
        except NoneToCover as error:
            raise Malformed(f"filter: no item of {name} matches", "filter") from error
        except TooFewToCover as error:
            raise Malformed(f"by: {by}{' with by_filter' if by_where else ''} {error}", "by") from error
        items = [
            replies.UncoveredItem(**vars(item), similarity=cosine, nearest=near)
            for item, cosine, near in found.rows[: query.k]
        ]
        return replies.Coverage(items, len(found.rows), found.compared, found.by, found.both, found.share, found.usual)

    async def split(self, name: str, query: SplitQuery, where: Filter | None) -> replies.Split:
        """Raises Malformed, NotFound, Busy, IndexProblem."""
        shares = query.parts
        try:
            shares = as_one(shares)
            found = await self._compare(name, split_items, shares, where, query.group_by, query.threshold, query.seed)
        except WrongShares as error:
            raise Malformed(f"parts: {error}", "parts") from error
        except TooFewToDivide as error:
            count = counted(error.args[0], "item")
            with_ = " with this filter" if where else ""
            raise Malformed(f"parts: {name} has {count}{with_}, fewer than the {len(shares)} parts", "parts") from error
        except NoValues as error:
            raise _no_values("group_by", name, query.group_by) from error
        parts: dict[str, list[str]] = {part: [] for part in shares}
        for item, part in zip(found.items, found.parts, strict=True):
            parts[part].append(item.id)
        together = [[item.id for item in group] for group in found.copies]
        return replies.Split(parts, together, found.threshold, found.notes)

    async def _compare(self, name: str, compare: Callable[..., T], *options: object) -> T:
        """Returns compare(index of the collection, *options), for one request at a time. Raises NotFound, Busy, and
        what `compare` raises."""
        index = self.index(name)
        await self._refuse_missing(index)
        with self._picking.admit(1):
            return await self.read(compare, index, *options)

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
        await self._refuse_missing(index)
        return [_change(listed) for listed in await self.read(changes, index)]

    async def undo(self, name: str, id: str | None) -> replies.Undone:
        """Undo the newest change, or the one of this id. Raises NotFound, Busy, IndexProblem."""
        index = self.index(name)
        await self._refuse_missing(index)
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

    async def prepare(
        self,
        name: str,
        query: SearchQuery,
        images: list[Upload],
        where: Filter | None,
        model: str | None,
    ) -> Search:
        """Makes a direction of a query's examples.

        images  count as positive examples
        raises  Malformed, IndexProblem, and as Engine.embed
        """
        # A vector without the name of its encoder comes from /embed, so from the default one.
        vectors = any(not isinstance(example, str) for example in (*query.positive, *query.negative))
        encoder = self._encoders.get(model, "" if vectors else name)
        index = encoder.index(name)
        if not (query.positive or images or query.text is not None):
            raise Malformed("positive: give at least one image, id, vector or text to search by", "positive")
        ids = [example for example in (*query.positive, *query.negative) if isinstance(example, str)]
        upgrade = self._upgrade(index)
        known = await self.read(upgrade.get_many, ids) if ids else {}
        if ids and not known:
            await self.describe(index)

        def vector(example: str | list[float], field: str) -> np.ndarray:
            if not isinstance(example, str):
                return _vector(example, encoder, field)
            if example not in known:
                raise NotFound(f"no item {example} is in the collection {name}", field)
            return known[example][1]

        positive = [vector(example, f"positive[{i}]") for i, example in enumerate(query.positive)]
        negative = [vector(example, f"negative[{i}]") for i, example in enumerate(query.negative)]
        if images:
            embedded = (await self._embed(images, encoder)).vectors
            self.note_pictures(encoder, embedded, name)
            positive += list(embedded)
        if query.text is not None:
            positive.append(await self._read_text(query.text, encoder))
        direction = search_direction(positive, negative)
        if not np.linalg.norm(direction) > 1e-6:
            field = "negative" if negative else "positive"
            raise Malformed("the examples cancel out, so there is no direction to search in", field)
        scale = float(np.linalg.norm(unit(np.stack(positive)).mean(axis=0)))
        threshold = query.threshold
        ranked = not negative and query.text is None
        if query.closer_than is not None:
            if not ranked:
                what = "scores of a search with negative examples" if negative else "cosines of pictures and text"
                raise Malformed(f"closer_than: the {what} have no rank; give a threshold", "closer_than")
            await self.describe(index)
            threshold = await self.read(index.random_pairs.cosine, query.closer_than) / scale
        return Search(index, upgrade, direction, scale, query.k, where, tuple(ids), threshold, ranked)

    async def _read_text(self, text: str, encoder: ServedEncoder) -> np.ndarray:
        """Returns the vector (d,) of a text. Raises Malformed, Busy, NotOffered, NotReady."""
        if encoder.text is None:
            id = encoder.card.id
            raise Malformed(f"text: the encoder {id} reads no text; export one with a text tower (--text)", "text")
        if not text.strip():
            raise Malformed("text: is empty", "text")
        with self._gate.admit(1):
            return await encoder.text(text)

    async def find(self, searches: Sequence[Search]) -> list[Found]:
        """Returns the k items nearest to each direction. Those that differ in nothing else are searched together.
        Raises NotFound, Busy, IndexProblem."""
        found: list[Found | None] = [None] * len(searches)
        for group in _alike(searches):
            together = [searches[i] for i in group]
            for i, answer in zip(group, await self.read(_find, together), strict=True):
                if not answer.results:
                    await self.describe(searches[i].index)
                found[i] = answer
        return [answer for answer in found if answer is not None]

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


def _no_values(field: str, name: str, key: str | None) -> Malformed:
    return Malformed(f"{field}: no item of {name} has a value of {key}", field)


def _alike(searches: Sequence[Search]) -> Iterator[list[int]]:
    """Yields the positions of searches that one query of the table can answer, with at most ROWS_FOUND results."""
    groups: dict[tuple, list[int]] = {}
    for i, search in enumerate(searches):
        rows = search.k + len(set(search.without))
        groups.setdefault((id(search.index), repr(search.where), rows), []).append(i)
    for (_, _, rows), group in groups.items():
        at_once = max(1, ROWS_FOUND // rows)
        yield from (group[at : at + at_once] for at in range(0, len(group), at_once))


def _find(searches: Sequence[Search]) -> list[Found]:
    """searches: all alike"""
    index, answers = searches[0].index, []
    rows = searches[0].k + len(set(searches[0].without))
    directions = np.stack([search.direction for search in searches])
    pairs = None
    found, estimated = searches[0].upgrade.search_many(directions, rows, searches[0].where)
    for search, results in zip(searches, found, strict=True):
        kept = [(item, cosine) for item, cosine in results if item.id not in search.without][: search.k]
        if search.threshold is not None:
            kept = [(item, cosine) for item, cosine in kept if cosine >= search.threshold]
        if kept and search.ranked:
            pairs = pairs or index.random_pairs.known()
        ranks = pairs if search.ranked else None
        ranked = [(item, cosine, ranks.closer_than(cosine * search.scale) if ranks else None) for item, cosine in kept]
        answers.append(Found(index.encoder_id, ranked, search.threshold, estimated))
    return answers


def search_direction(positive: Sequence[np.ndarray], negative: Sequence[np.ndarray] = ()) -> np.ndarray:
    """The vector (d,) to search by (Rocchio 1971, Relevance Feedback in Information Retrieval, in: The SMART Retrieval
    System, ed. Salton): the mean of the relevant minus the mean of the non-relevant, both with weight 1.

    Vectors and the two means are scaled to unit length: many examples on one side weigh no more than a few on the
    other. Unlike Rocchio's, it has no original query vector: the images of the query are positive examples.

    positive, negative  vectors (d,) of any length but 0; at least one positive
    """
    direction = unit(unit(np.stack(positive)).mean(axis=0)[None])[0]
    if len(negative):
        direction = direction - unit(unit(np.stack(negative)).mean(axis=0)[None])[0]
    return direction


def _vector(numbers: list[float], encoder: ServedEncoder, field: str) -> np.ndarray:
    """Raises Malformed."""
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
