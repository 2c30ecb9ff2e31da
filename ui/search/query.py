"""A search: the pictures and words that results should be like or unlike, and its settings."""

from dataclasses import dataclass, replace
from typing import TypeAlias

from serving.client import COLLECTION, AsyncClient, Matches, ServiceError
from serving.protocol.filters import parse_conditions
from ui.search.picture import Picture, read


@dataclass(frozen=True)
class Query:
    positive: tuple[Picture, ...]
    """At least one, unless there are words. The search uses the mean of their vectors."""
    negative: tuple[Picture, ...] = ()
    text: str = ""
    """Words for what results should show."""

    @property
    def picture(self) -> Picture | None:
        """The picture that the other tabs show; None for a search by words alone."""
        return self.positive[0] if self.positive else None

    @property
    def pictures(self) -> tuple[Picture, ...]:
        return self.positive + self.negative

    def like(self, picture: Picture) -> "Query":
        return Query((*_without(self.positive, picture), picture), _without(self.negative, picture), self.text)

    def unlike(self, picture: Picture) -> "Query":
        """The query unchanged if it has no other positive picture and no words."""
        query = Query(_without(self.positive, picture), (*_without(self.negative, picture), picture), self.text)
        return query._unless_empty() or self

    def replace_first(self, picture: Picture) -> "Query":
        """With the first picture replaced."""
        return replace(self, positive=(picture, *self.positive[1:]))

    def without(self, picture: Picture) -> "Query | None":
        """None if it has no other positive picture and no words."""
        query = Query(_without(self.positive, picture), _without(self.negative, picture), self.text)
        return query._unless_empty()

    def without_text(self) -> "Query | None":
        """None if it has no positive picture."""
        return replace(self, text="")._unless_empty()

    def _unless_empty(self) -> "Query | None":
        return self if self.positive or self.text else None


Trail: TypeAlias = tuple[Query, ...]  # the searches so far; the last is the current one


def _without(pictures: tuple[Picture, ...], picture: Picture) -> tuple[Picture, ...]:
    return tuple(other for other in pictures if other != picture)


@dataclass(frozen=True)
class SearchSettings:
    k: int = 24
    """Number of results."""
    min_similarity: float = 0.0
    """Lowest cosine of a result; 0 for no limit."""
    where: tuple[str, ...] = ()
    """Conditions as the user types them: `price>=3`."""
    collection: str = COLLECTION
    encoder: str | None = None
    """Id of the encoder; None for the service's default."""
    other_encoder: str | None = None
    """Id of an encoder whose results are shown for comparison."""
    closer_than: float = 0.0
    """Share of random pairs that results must be closer than, instead of `min_similarity`; 0 for no limit."""


async def nearest(client: AsyncClient, query: Query, settings: SearchSettings) -> Matches:
    """Nearest first; empty if the collection does not exist yet. The limit `closer_than` is ignored where there are no
    ranks: for negative pictures, for words, and in a small collection. Raises ServiceError, UploadFailed,
    FilterProblem."""
    where = parse_conditions(settings.where)
    ids = {p: p.id for p in query.pictures if p.id and p.box is None and p.collection == settings.collection}
    images = [await read(client, picture) for picture in query.positive if picture not in ids]
    positive = [ids[picture] for picture in query.positive if picture in ids]
    negative = [ids[picture] for picture in query.negative if picture in ids]
    if other_images := [await read(client, picture) for picture in query.negative if picture not in ids]:
        negative += list((await client.embed(other_images, model=settings.encoder)).vectors)
    try:
        return await client.search(
            images or None,
            positive=positive,
            negative=negative,
            text=query.text or None,
            k=settings.k,
            filter=where,
            threshold=settings.min_similarity or None,
            closer_than=None if negative or query.text or settings.min_similarity else settings.closer_than or None,
            model=settings.encoder,
            collection=settings.collection,
        )
    except ServiceError as error:
        if error.param == "closer_than" and settings.closer_than:
            return await nearest(client, query, replace(settings, closer_than=0.0))
        if error.status != 404 or ids:
            raise
        return Matches("", [])
