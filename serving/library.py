"""The collections as the service uses them: add, delete, search.

Reading collections and decoding pictures to be added each have their own threads, so neither delays embedding.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import TypeVar

import numpy as np

from export.artifact import UnreadableImage
from serving.collection.index import DEFAULT, Index, Item, collections, content_id, unit
from serving.collection.writes import CommitQueue
from serving.errors import Malformed, NotFound
from serving.inference.decode import Decoder, Upload
from serving.inference.original import large_original
from serving.inference.served import ServedEncoder, ServedEncoders
from serving.inference.thumbnail import read_picture
from serving.limits import Gate, Limits
from serving.protocol import replies
from serving.protocol.filters import Filter
from serving.protocol.queries import ItemFacts, SearchQuery, VectorRow

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
    times: dict[str, float]
    """Seconds, as in engine.EmbeddedImages; empty for vectors computed elsewhere."""


@dataclass(frozen=True)
class Found:
    """The answer to a search."""

    model: str
    """Id of the encoder."""
    results: list[tuple[Item, float, float | None]]
    """Items with their cosine and its rank among random pairs, nearest first."""
    threshold: float | None
    """Lowest cosine of a result, None without a limit."""


class Library:
    def __init__(
        self,
        encoders: ServedEncoders,
        gate: Gate,
        embed: Callable[[list[Upload], ServedEncoder], Awaitable],
        limits: Limits,
        threads: int,
    ):
        """gate     admits images to be embedded
        embed    embeds uploads with an encoder, behind the gate; returns an EmbeddedImages
        threads  half of this number decode pictures to be added
        """
        self._encoders, self._gate, self._embed = encoders, gate, embed
        self._decode = Decoder(max(1, threads // 2), limits.pixels)
        self._most_bytes = limits.body_bytes  # of a file that is read here, as of one that is uploaded
        self._writer = CommitQueue(limits.rows_at_once)
        self._reading = Gate(limits.reads_at_once, "reads of collections")
        self._readers = ThreadPoolExecutor(READERS, "reads")

    def index(self, name: str, model: str | None = None) -> Index:
        """Returns the collection's index for the encoder with id `model`, or for the default. Raises NotFound."""
        return self._encoders.get(model).index(name)

    async def read(self, call: Callable[..., T], *arguments: object) -> T:
        """Call in a thread for reading. Raises Busy, IndexProblem."""
        with self._reading.admit(1):
            return await asyncio.get_running_loop().run_in_executor(self._readers, call, *arguments)

    async def describe_all(self) -> list[replies.Collection]:
        """Describe all collections. Raises as `read`."""
        return await self.read(collections, self._encoders.default.index(DEFAULT).store.uri)

    async def describe(self, index: Index) -> replies.Collection:
        """Describe a collection. Raises NotFound when it does not exist, and as `read`."""
        facts = await self.read(index.facts)
        if not facts.version and not facts.others:
            raise NotFound(f"there is no collection {index.name}; adding the first items creates it", "name")
        return facts

    async def original(self, name: str, id: str, model: str | None = None) -> bytes:
        """The picture of an item, as `large_original` returns it. Raises NotFound, Busy, IndexProblem."""
        row = await self.read(self.index(name, model).get, id)
        if row is None:
            raise NotFound(f"no item {id} is in the collection {name}", "id")
        with self._gate.admit(1):
            try:
                return await self._decode.call(partial(large_original, row[0], self._most_bytes))
            except UnreadableImage as problem:  # one sentence for all reasons, so that it tells nothing about files
                message = f"the original of {id} cannot be read here, or has changed since it was indexed"
                raise NotFound(message, "id") from problem

    async def put(self, name: str, uploads: list[Upload], facts: list[ItemFacts], model: str | None = None) -> Stored:
        """Embed n >= 1 pictures and store them with their thumbnails. Raises as Engine.embed, and IndexProblem."""
        encoder = self._encoders.get(model)
        with self._writer.room(len(uploads)):
            with self._gate.admit(len(uploads)):
                started = perf_counter()
                pictures = await self._decode.each(uploads, encoder.card.preprocessing, read_picture)
                decode_s = perf_counter() - started
                encoded = await encoder.batch(np.stack([picture.pixels for picture in pictures]))
            items = [
                _item(fact, fact.id or content_id(file.data), file.name, picture.width, picture.height, len(file.data))
                for file, fact, picture in zip(uploads, facts, pictures, strict=True)
            ]
            thumbnails = {item.id: picture.thumbnail for item, picture in zip(items, pictures, strict=True)}
            new = await self._writer.upsert(encoder.index(name), items, encoded.vectors, thumbnails)
        times = {"decode": decode_s, "queue": encoded.queue_s, "model": encoded.model_s}
        return Stored(encoder.card.id, [item.id for item in items], new, times)

    async def put_rows(self, name: str, rows: Sequence[VectorRow], model: str | None) -> Stored:
        """Store vectors that this encoder has computed elsewhere. Raises Malformed, NotFound, Busy, IndexProblem."""
        encoder = self._encoders.get(model)
        vectors = [_vector(row.vector, encoder, f"items[{i}].vector") for i, row in enumerate(rows)]
        items = [_item(row, row.id, "", 0, 0, 0) for row in rows]
        with self._writer.room(len(items)):
            new = await self._writer.upsert(encoder.index(name), items, np.stack(vectors), {})
        return Stored(encoder.card.id, [item.id for item in items], new, {})

    async def delete(self, name: str, ids: Sequence[str], model: str | None = None) -> list[str]:
        """Returns the ids that existed. Raises NotFound, Busy, IndexProblem."""
        index = self.index(name, model)
        with self._writer.room(len(ids)):
            deleted = await self._writer.delete(index, ids)
        if not deleted:
            await self.describe(index)
        return deleted

    async def search(
        self, name: str, query: SearchQuery, images: list[Upload], where: Filter | None, model: str | None
    ) -> Found:
        """Returns the k items nearest to the query's direction.

        images  count as positive examples
        raises  Malformed, IndexProblem, and as Engine.embed
        """
        encoder = self._encoders.get(model)
        index = encoder.index(name)
        if not (query.positive or images):
            raise Malformed("positive: give at least one image, id or vector to search by", "positive")
        ids = [example for example in (*query.positive, *query.negative) if isinstance(example, str)]
        known = await self.read(index.get_many, ids) if ids else {}
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
            positive += list((await self._embed(images, encoder)).vectors)
        direction = search_direction(positive, negative)
        if not np.linalg.norm(direction) > 1e-6:
            field = "negative" if negative else "positive"
            raise Malformed("the examples cancel out, so there is no direction to search in", field)
        # The mean cosine to the positive examples is the cosine to their mean direction times this.
        scale = float(np.linalg.norm(unit(np.stack(positive)).mean(axis=0)))
        threshold = query.threshold
        if query.closer_than is not None:
            if negative:
                message = "closer_than: the scores of a search with negative examples have no rank; give a threshold"
                raise Malformed(message, "closer_than")
            await self.describe(index)
            threshold = await self.read(index.random_pairs.cosine, query.closer_than) / scale

        def find() -> list[tuple[Item, float, float | None]]:
            results = index.search(direction, query.k, where, ids, threshold)
            pairs = index.random_pairs.known() if results and not negative else None
            return [(item, cosine, pairs.closer_than(cosine * scale) if pairs else None) for item, cosine in results]

        results = await self.read(find)
        if not results:
            await self.describe(index)
        return Found(encoder.card.id, results, threshold)

    def close(self) -> None:
        self._writer.close()
        self._decode.close()
        self._readers.shutdown(wait=False, cancel_futures=True)


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
    if not np.linalg.norm(vector) > 0:
        raise Malformed(f"{field} is zero, which is no direction to search in", field)
    return vector


def _item(facts: ItemFacts, id: str, name: str, width: int, height: int, size: int) -> Item:
    name = facts.name if facts.name is not None else name or id
    return Item(id, name, facts.label, facts.path, width, height, size, dict(facts.metadata))
