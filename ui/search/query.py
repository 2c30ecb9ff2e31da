"""What is searched for: pictures to be like, and pictures to be unlike; and how."""

from dataclasses import dataclass

from serving.client import Match, ServiceError
from serving.client.calls import COLLECTION
from ui.search.conditions import parsed
from ui.search.picture import Chosen, read


@dataclass(frozen=True)
class Query:
    positive: tuple[Chosen, ...]
    """At least one; searched by is their mean."""
    negative: tuple[Chosen, ...] = ()

    @property
    def picture(self) -> Chosen:
        """The one that the other tabs look at."""
        return self.positive[0]

    @property
    def pictures(self) -> tuple[Chosen, ...]:
        return self.positive + self.negative

    def like(self, chosen: Chosen) -> "Query":
        return Query((*_without(self.positive, chosen), chosen), _without(self.negative, chosen))

    def unlike(self, chosen: Chosen) -> "Query":
        """The same where it is the only one to be like: nothing would be left."""
        positive = _without(self.positive, chosen)
        return Query(positive, (*_without(self.negative, chosen), chosen)) if positive else self

    def instead(self, chosen: Chosen) -> "Query":
        """The picture that is looked at replaced."""
        return Query((chosen, *self.positive[1:]), self.negative)

    def without(self, chosen: Chosen) -> "Query | None":
        """None where nothing is left to be like."""
        positive = _without(self.positive, chosen)
        return Query(positive, _without(self.negative, chosen)) if positive else None


def _without(pictures: tuple[Chosen, ...], chosen: Chosen) -> tuple[Chosen, ...]:
    return tuple(one for one in pictures if one != chosen)


@dataclass(frozen=True)
class Settings:
    k: int = 24
    least: float = 0.0
    """The least cosine; at 0 there is none."""
    where: tuple[str, ...] = ()
    """Conditions as they are typed: `price>=3`."""
    collection: str = COLLECTION
    encoder: str | None = None
    """Id of the encoder; None is the service's default."""
    beside: str | None = None
    """Of the one that it is compared with."""


async def nearest(client, query: Query, settings: Settings) -> list[Match]:
    """Nearest first. None where the collection is not there yet. raises ServiceError, UploadFailed, ConditionProblem"""
    where = parsed(settings.where)
    known = {one: one.id for one in query.pictures if _is_item(one, settings.collection)}
    images = [await read(client, one) for one in query.positive if one not in known]
    positive = [known[one] for one in query.positive if one in known]
    negative = [known[one] for one in query.negative if one in known]
    if strangers := [await read(client, one) for one in query.negative if one not in known]:
        negative += list((await client.embed(strangers, model=settings.encoder)).vectors)
    try:
        found = await client.search(
            images or None,
            positive=positive,
            negative=negative,
            k=settings.k,
            filter=where,
            threshold=settings.least or None,
            model=settings.encoder,
            collection=settings.collection,
        )
    except ServiceError as error:
        if error.status != 404 or known:
            raise
        return []
    return found.results


def _is_item(chosen: Chosen, collection: str) -> bool:
    """Whether its vector is there; that of a part of it is not."""
    return chosen.id is not None and chosen.box is None and chosen.collection == collection
