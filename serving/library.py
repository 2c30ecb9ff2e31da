"""The collections, as the service answers for them: what is put in, taken out and found.

Reading waits in threads of its own, and so does what is made of pictures that are put in: embedding goes on beside.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter
from typing import TypeVar

import numpy as np

from serving.collection.index import DEFAULT, Index, Item, collections, content_id, unit
from serving.collection.writes import Writer
from serving.errors import Malformed, NotFound
from serving.inference.decode import Decoder, Upload
from serving.inference.served import ServedEncoder, ServedEncoders
from serving.inference.thumbnail import read
from serving.limits import Gate, Limits
from serving.protocol import replies
from serving.protocol.filters import Filter
from serving.protocol.queries import ItemFacts, VectorRow, SearchQuery

READERS = 8  # LanceDB has threads of its own behind each

T = TypeVar("T")


@dataclass(frozen=True)
class Stored:
    """What a request has put in."""

    model: str
    ids: list[str]
    new: list[bool]
    times: dict[str, float]
    """Seconds, as engine.EmbeddedImages's; none of vectors that were ready."""


class Library:
    def __init__(
        self,
        models: ServedEncoders,
        gate: Gate,
        embed: Callable[[list[Upload], ServedEncoder], Awaitable],
        limits: Limits,
        threads: int,
    ):
        """gate   of the images that are embedded
        embed  as Engine does: it gives an EmbeddedImages
        """
        self._models, self._gate, self._embed = models, gate, embed
        self._decode = Decoder(max(1, threads // 2), limits.pixels)
        self._writer = Writer(limits.rows_at_once)
        self._reading = Gate(limits.reads_at_once, what="reads of collections")
        self._readers = ThreadPoolExecutor(READERS, "reads")

    def index(self, name: str, model: str | None = None) -> Index:
        """The collection of that name as an encoder that is served has embedded it, by default the default.
        raises NotFound."""
        return self._models.named(model).index(name)

    async def read(self, call: Callable[..., T], *arguments) -> T:
        """In a thread. raises Busy, IndexProblem."""
        with self._reading.admit(1):
            return await asyncio.get_running_loop().run_in_executor(self._readers, call, *arguments)

    async def all(self) -> list[replies.Collection]:
        """Of all collections. raises as read."""
        return await self.read(collections, self._models.default.index(DEFAULT).store.uri)

    async def about(self, index: Index) -> replies.Collection:
        """raises NotFound where there is no such collection, and as read."""
        facts = await self.read(index.facts)
        if not facts.version and not facts.others:
            raise NotFound(f"there is no collection {index.name}; it begins with the first items put into it", "name")
        return facts

    async def put(self, name: str, files: list[Upload], facts: list[ItemFacts], model: str | None = None) -> Stored:
        """Embed n >= 1 pictures and keep them, with a thumbnail each. raises as Engine.embed, IndexProblem."""
        chosen = self._models.named(model)
        with self._writer.room(len(files)):
            with self._gate.admit(len(files)):
                started = perf_counter()
                pictures = await self._decode.each(files, chosen.card.preprocessing, read)
                decode_s = perf_counter() - started
                encoded = await chosen.batch(np.stack([picture.pixels for picture in pictures]))
            items = [
                _item(fact, fact.id or content_id(file.data), file.name, picture.width, picture.height, len(file.data))
                for file, fact, picture in zip(files, facts, pictures, strict=True)
            ]
            thumbnails = {item.id: picture.thumbnail for item, picture in zip(items, pictures, strict=True)}
            new = await self._writer.upsert(chosen.index(name), items, encoded.vectors, thumbnails)
        times = {"decode": decode_s, "queue": encoded.queue_s, "model": encoded.model_s}
        return Stored(chosen.card.id, [item.id for item in items], new, times)

    async def put_rows(self, name: str, rows: Sequence[VectorRow], model: str) -> Stored:
        """Keep vectors that this encoder has made elsewhere. raises Malformed, NotFound, Busy, IndexProblem."""
        chosen = self._models.named(model)
        vectors = [_vector(row.vector, chosen, f"items[{i}].vector") for i, row in enumerate(rows)]
        items = [_item(row, row.id, "", 0, 0, 0) for row in rows]
        with self._writer.room(len(items)):
            new = await self._writer.upsert(chosen.index(name), items, np.stack(vectors), {})
        return Stored(chosen.card.id, [item.id for item in items], new, {})

    async def delete(self, name: str, ids: Sequence[str], model: str | None = None) -> list[str]:
        """Those that were there. raises NotFound, Busy, IndexProblem."""
        index = self.index(name, model)
        with self._writer.room(len(ids)):
            deleted = await self._writer.delete(index, ids)
        if not deleted:
            await self.about(index)
        return deleted

    async def search(
        self, name: str, query: SearchQuery, images: list[Upload], where: Filter | None, model: str | None
    ) -> tuple[str, list[tuple[Item, float]]]:
        """The encoder's id, and the k nearest to what the query and its images aim at, with their cosine.

        raises as Engine.embed, Malformed, IndexProblem
        """
        chosen = self._models.named(model)
        index = chosen.index(name)
        given = [*query.positive, *query.negative]
        if not (query.positive or images):
            raise Malformed("positive: give at least one image, id or vector to search by", "positive")
        ids = [one for one in given if isinstance(one, str)]
        known = await self.read(index.get_many, ids) if ids else {}
        if ids and not known:
            await self.about(index)

        def direction(one: str | list[float], field: str) -> np.ndarray:
            if not isinstance(one, str):
                return _vector(one, chosen, field)
            if one not in known:
                raise NotFound(f"no item {one} is in the collection {name}", field)
            return known[one][1]

        positive = [direction(one, f"positive[{i}]") for i, one in enumerate(query.positive)]
        negative = [direction(one, f"negative[{i}]") for i, one in enumerate(query.negative)]
        if images:
            positive += list((await self._embed(images, chosen)).vectors)
        aimed = aim(positive, negative)
        if not np.linalg.norm(aimed) > 1e-6:
            raise Malformed("what is given cancels out and points nowhere", "negative" if negative else "positive")
        results = await self.read(index.search, aimed, query.k, where, ids, query.threshold)
        if not results:
            await self.about(index)
        return chosen.card.id, results

    def close(self) -> None:
        self._writer.close()
        self._decode.close()
        self._readers.shutdown(wait=False, cancel_futures=True)


def aim(positive: Sequence[np.ndarray], negative: Sequence[np.ndarray] = ()) -> np.ndarray:
    """The vector (d,) to search by (Rocchio 1971, Relevance Feedback in Information Retrieval, in: The SMART Retrieval
    System, ed. Salton): mean of the relevant minus mean of the others, both at weight 1.

    Every vector counts by its direction, and so does each of the two means: many examples on one side weigh no more
    than a few on the other. There is no first query to add to; an image that is searched by is one of the positive.

    positive, negative  of (d,), positive at least one; of any length but 0
    """
    aimed = unit(unit(np.stack(positive)).mean(axis=0)[None])[0]
    if len(negative):
        aimed = aimed - unit(unit(np.stack(negative)).mean(axis=0)[None])[0]
    return aimed


def _vector(numbers: list[float], model: ServedEncoder, field: str) -> np.ndarray:
    """raises Malformed"""
    if len(numbers) != model.card.dimension:
        expected = f"{model.card.id} gives {model.card.dimension}"
        raise Malformed(f"{field} has {len(numbers)} numbers; {expected}", field)
    vector = np.asarray(numbers, np.float32)
    if not np.linalg.norm(vector) > 0:
        raise Malformed(f"{field} is zero and points nowhere", field)
    return vector


def _item(facts: ItemFacts, id: str, name: str, width: int, height: int, size: int) -> Item:
    name = facts.name if facts.name is not None else name or id
    return Item(id, name, facts.label, facts.path, width, height, size, dict(facts.metadata))
