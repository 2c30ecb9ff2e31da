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
class Guess:
    label: str  # a class's name
    probability: float  # over all classes they sum to 1


@dataclass(frozen=True)
class Classified:
    model: str
    predictions: list[list[Guess]]  # of each picture, the likeliest class first


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
class Key:
    """What the items of a collection can be filtered by."""

    key: str
    type: str  # text, truth, whole, number
    distinct: int  # values that differ
    values: list[tuple[str | int | float | bool, int]]  # the commonest, and how many items have them
    least: float | None = None  # of numbers
    median: float | None = None
    most: float | None = None


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
class Computing:
    """How far a computation over a whole collection is."""

    state: str  # none, computing, done, failed
    stage: str
    share: float  # of the stage, 0 to 1
    problem: str | None  # why it failed


@dataclass(frozen=True)
class Overview(Computing):
    """And what of it is there: the newest result stays until there is another. All None where there is none."""

    model: str
    count: int | None  # pictures that it is of
    new: int | None  # that have come since
    gone: int | None  # that were taken out since
    made: str | None  # its mark


@dataclass(frozen=True)
class Duplicates(Overview):
    least: float | None  # threshold; any from there on is answered
    total: int | None  # groups at this threshold
    groups: list[list[Match]]  # the largest first; the first of a group can stay for the others


@dataclass(frozen=True)
class Map(Overview):
    """Columns of n pictures."""

    ids: list[str]
    x: np.ndarray  # (n,) float32, -1 to 1
    y: np.ndarray  # (n,) float32, in the same scale
    group: np.ndarray  # (n,) int32: what looks alike, 0 the largest
    label: np.ndarray  # (n,) int32, a number of labels, -1 where a picture has none
    labels: list[str]
    unplaced: int  # new pictures that have no place before the next map


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
    projected: float | None = None  # cosine of their z = g(h), where the service has g


@dataclass(frozen=True)
class OfMatrix:
    """A picture with the two views of it that are compared."""

    name: str
    id: str | None  # of its item, where it is of the collection
    views: tuple[str, str]  # PNG as data URIs


@dataclass(frozen=True)
class Matrix:
    """N pictures; of the rows and columns of the cosines 2i and 2i + 1 are the views of picture i."""

    model: str
    pictures: list[OfMatrix]
    h: np.ndarray = field(compare=False)  # (2N, 2N) float64
    z: np.ndarray | None = field(compare=False)  # of z = g(h), where the service has g

    @property
    def cosines(self) -> np.ndarray:
        """What the loss compares, z; without it h."""
        return self.h if self.z is None else self.z

    def log_weights(self, temperature: float) -> np.ndarray:
        """(2N, 2N): in row i the log of the softmax over k != i of sim(i, k) / tau; -inf on the diagonal."""
        logits = self.cosines / temperature
        np.fill_diagonal(logits, -np.inf)
        logits -= logits.max(axis=1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))

    def loss(self, temperature: float) -> float:
        """NT-Xent (Chen et al. 2020, arXiv:2002.05709, Eq. 1), the mean over all 2N views, in nats."""
        rows = np.arange(len(self.cosines))
        return float(-self.log_weights(temperature)[rows, rows ^ 1].mean())


@dataclass(frozen=True)
class Curve:
    """How h moves as one augmentation grows."""

    augmentation: str
    unit: str
    strengths: list[float]
    cosines: list[float]  # mean cosine of h of a picture and of its view
    moved: list[float]  # 0 where h stays, 1 where it might be another picture's


@dataclass(frozen=True)
class Curves:
    pictures: int
    others: float  # mean cosine of two different pictures
    curves: list[Curve]


@dataclass(frozen=True)
class Followed:
    """One picture: the image that was asked about, or the first of the collection's."""

    name: str
    pixels: str  # as the encoder sees it; PNG as a data URI
    curves: list[Curve]
    strips: dict[str, list[str]]  # by augmentation, at each of its strengths


@dataclass(frozen=True)
class Invariance:
    model: str
    sentence: str  # what is noticed most and least
    trained: Curves
    untrained: Curves | None  # of the same architecture, where that is known
    picture: Followed


@dataclass(frozen=True)
class Run:
    """A training run beside the service."""

    name: str
    kind: str  # pretraining, fine-tuning, distillation
    state: str  # training, finished, stopped
    epoch: int  # done
    epochs: int  # in all
    data: str
    encoder: str  # its architecture; empty where it is that of `init`
    init: str  # what it started from, or was taught by; empty for nothing
    figures: dict[str, float] = field(hash=False)  # the last of knn, views_matched, held_out, accuracy; shares of 1
    changed: float  # when it last wrote something, in seconds since 1970


@dataclass(frozen=True)
class RunDetails(Run):
    settings: dict = field(hash=False)
    chance: float | None  # loss of a pretraining that has learnt nothing
    metrics: dict[str, list[float | None]] = field(hash=False)  # columns, a value an epoch


def of(kind: type[R], answer: dict) -> R:
    """What an older client does not know it passes over."""
    known = {one.name for one in fields(kind)}
    return kind(**{name: value for name, value in answer.items() if name in known})
