"""What the clients give back: the service's answers, typed."""

from dataclasses import dataclass, field, fields
from typing import TypeVar

import numpy as np

R = TypeVar("R")


class ServiceError(Exception):
    """What the service refused, or that it could not be reached (status 0)."""

    def __init__(self, message: str, status: int = 0, code: str = "unreachable", param: str | None = None):
        super().__init__(message)
        self.message, self.status, self.code, self.param = message, status, code, param


@dataclass(frozen=True)
class Embeddings:
    model: str
    vectors: np.ndarray  # (n, d) float32


@dataclass(frozen=True)
class Collection:
    """As one encoder has embedded it."""

    name: str
    encoder: str
    others: list[str]  # encoders that have embedded it too
    dimension: int
    count: int
    bytes: int  # on disk
    index: str  # how it is searched
    version: int


@dataclass(frozen=True)
class Item:
    """A picture of a collection."""

    id: str
    name: str
    label: str | None
    path: str | None
    width: int = 0  # pixels, upright
    height: int = 0
    bytes: int = 0
    metadata: dict[str, str | int | float | bool] = field(default_factory=dict, hash=False)
    vector: np.ndarray | None = field(default=None, compare=False, repr=False)  # (d,) of unit length, if asked for


@dataclass(frozen=True)
class Match(Item):
    similarity: float = field(kw_only=True)  # cosine, -1 to 1


@dataclass(frozen=True)
class Matches:
    model: str
    results: list[Match]  # nearest first


@dataclass(frozen=True)
class Items:
    count: int  # of all that hold to the filter
    items: list[Item]


@dataclass(frozen=True)
class PutItem:
    id: str
    new: bool  # otherwise it has taken the place of one of the same id


@dataclass(frozen=True)
class Put:
    model: str
    items: list[PutItem]  # in the order of what was given


@dataclass(frozen=True)
class Pair:
    """Two augmented views of one picture."""

    views: tuple[str, str]  # PNG as data URIs
    similarity: float  # cosine of their embeddings


def of(kind: type[R], answer: dict) -> R:
    """What an older client does not know it passes over."""
    known = {one.name for one in fields(kind)}
    return kind(**{name: value for name, value in answer.items() if name in known})
