"""Searches of collections: by pictures, ids, vectors or a text, several of them together."""

from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from serving.collection.index import Index, Item, unit
from serving.collection.upgrade import Upgrade
from serving.errors import Malformed, NotFound
from serving.inference.decode import Upload
from serving.inference.served import OPEN_COLLECTIONS, ServedEncoder, ServedEncoders
from serving.library import Library, vector_of
from serving.limits import Gate
from serving.protocol.filters import Filter
from serving.protocol.queries import SearchQuery

ROWS_FOUND = 10_000  # by searches that are answered together


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


class Searches:
    def __init__(
        self,
        library: Library,
        encoders: ServedEncoders,
        gate: Gate,
        embed: Callable[[list[Upload], ServedEncoder], Awaitable],
    ):
        """gate   admits texts to be embedded
        embed  embeds uploads with an encoder, behind the gate; returns an EmbeddedImages
        """
        self._library, self._encoders, self._gate, self._embed = library, encoders, gate, embed
        self._upgrade = lru_cache(OPEN_COLLECTIONS)(Upgrade)

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
        known = await self._library.read(upgrade.get_many, ids) if ids else {}
        if ids and not known:
            await self._library.describe(index)

        def vector(example: str | list[float], field: str) -> np.ndarray:
            if not isinstance(example, str):
                return vector_of(example, encoder, field)
            if example not in known:
                raise NotFound(f"no item {example} is in the collection {name}", field)
            return known[example][1]

        positive = [vector(example, f"positive[{i}]") for i, example in enumerate(query.positive)]
        negative = [vector(example, f"negative[{i}]") for i, example in enumerate(query.negative)]
        if images:
            embedded = (await self._embed(images, encoder)).vectors
            self._library.note_pictures(encoder, embedded, name)
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
            await self._library.describe(index)
            threshold = await self._library.read(index.random_pairs.cosine, query.closer_than) / scale
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
            for i, answer in zip(group, await self._library.read(_find, together), strict=True):
                if not answer.results:
                    await self._library.describe(searches[i].index)
                found[i] = answer
        return [answer for answer in found if answer is not None]


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
