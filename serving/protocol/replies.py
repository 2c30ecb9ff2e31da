"""The service's answers: the JSON shape of each route, and what the clients return.

The routes name these classes in the OpenAPI document, with the docstrings of the fields as descriptions. They write the
JSON as plain dicts, because building and checking objects takes longer than embedding a small picture.
"""

from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

import numpy as np
from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler, TypeAdapter
from pydantic_core import CoreSchema

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

R = TypeVar("R", bound="DataclassInstance")
Value = str | bool | int | float
KeyType = Literal["text", "truth", "whole", "number"]
RunKind = Literal["pretraining", "fine-tuning", "distillation"]
RunState = Literal["training", "finished", "stopped"]


class ServiceError(Exception):
    """The service refused a request, or could not be reached (status 0)."""

    def __init__(self, message: str, status: int = 0, code: str = "unreachable", param: str | None = None):
        super().__init__(message)
        self.message, self.status, self.code, self.param = message, status, code, param


class Reply:
    """Base of the answers, for their JSON Schema: every field is required, and its docstring is its description."""

    __pydantic_config__: ClassVar = {
        "use_attribute_docstrings": True,
        "json_schema_serialization_defaults_required": True,
    }

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Adds descriptions of inherited fields: pydantic only reads the docstrings of the class itself."""
        document = handler(schema)
        properties = handler.resolve_ref_schema(document)["properties"]
        for base in filter(is_dataclass, cls.__bases__):
            for name, inherited in TypeAdapter(base).json_schema()["properties"].items():
                if "description" in inherited:
                    properties[name].setdefault("description", inherited["description"])
        return document


@dataclass(frozen=True)
class Wire:
    """Annotates a field whose type in JSON differs from the type of the client's attribute."""

    type: Any

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return handler.generate_schema(self.type)


# Embeddings and classes -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Embeddings:
    """Embeddings as the clients return them, read from the service's .npy format."""

    model: str
    vectors: np.ndarray  # (n, d) float32


@dataclass(frozen=True)
class EmbedReply(Reply):
    model: str
    """Id of the encoder."""
    dimension: int
    """Length of each vector."""
    embeddings: list[list[float]] | list[str]
    """One vector per image, in the order of the images: numbers, or base64 of little-endian float32."""


@dataclass(frozen=True)
class OpenAIEmbedding(Reply):
    object: Literal["embedding"]
    index: int
    """Position of the image in the request."""
    embedding: list[float] | str
    """Numbers, or base64 of little-endian float32."""


@dataclass(frozen=True)
class OpenAIUsage(Reply):
    prompt_tokens: int
    """Number of images."""
    total_tokens: int
    """Number of images."""


@dataclass(frozen=True)
class OpenAIEmbeddings(Reply):
    object: Literal["list"]
    data: list[OpenAIEmbedding]
    model: str
    """Id of the encoder."""
    usage: OpenAIUsage


@dataclass(frozen=True)
class LightlyLimits(Reply):
    max_batch_size: int
    """Most images in one request."""
    max_request_bytes: int
    """Largest request body, in bytes."""


@dataclass(frozen=True)
class LightlyDescription(Reply):
    """The default encoder, in the words of LightlyStudio's protocol."""

    protocol_version: str
    space_key: str
    """Id of the encoder."""
    dimension: int
    """Length of each vector."""
    ready: bool
    """Whether the encoder answers."""
    capabilities: list[Literal["image_bytes"]]
    limits: LightlyLimits


@dataclass(frozen=True)
class LightlyEmbeddings(Reply):
    space_key: str
    """Id of the encoder."""
    dimension: int
    """Length of each vector."""
    kept_indices: list[int]
    """Positions in the request of the images that could be read."""
    embeddings: list[list[float]]
    """One vector of unit length for each of them."""


@dataclass(frozen=True)
class Guess(Reply):
    label: str
    """Name of the class."""
    probability: float
    """0 to 1; the probabilities of all classes sum to 1."""


@dataclass(frozen=True)
class Classified(Reply):
    model: str
    """Id of the model."""
    predictions: list[list[Guess]]
    """For each image, in the order of the request, its likeliest classes, the likeliest first."""


# Collections ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Collection(Reply):
    """A collection as one encoder has embedded it."""

    name: str
    encoder: str
    """Id of the encoder that made the vectors."""
    others: list[str]
    """Ids of other encoders that have embedded this collection too."""
    dimension: int
    """Length of each vector."""
    count: int
    """Number of items."""
    bytes: int
    """Size on disk in bytes, including old versions."""
    index: str
    """Type of the search index; `none` if a search compares all vectors."""
    version: int
    """Grows with every change."""
    originals: int = 0
    """Size in bytes of the pictures' files that are kept of uploads, for all encoders together."""
    aliases: list[str] = field(default_factory=list, hash=False)
    """Other names that stand for the collection."""


@dataclass(frozen=True)
class Collections(Reply):
    collections: list[Collection]


@dataclass(frozen=True)
class Alias(Reply):
    alias: str
    collection: str
    """Name of the collection that it stands for."""


@dataclass(frozen=True)
class Aliases(Reply):
    aliases: list[Alias]


@dataclass(frozen=True)
class Key(Reply):
    """A field that the items of a collection can be filtered by."""

    key: str
    type: KeyType
    """Type of its values: text, truth (true or false), whole (integer) or number (floating point)."""
    distinct: int
    """Number of distinct values."""
    values: list[tuple[Value, int]]
    """The most common values, each with the number of items that have it."""
    least: float | None = None
    """Smallest value; null for a key that is not numeric."""
    median: float | None = None
    """Median value; null for a key that is not numeric."""
    most: float | None = None
    """Largest value; null for a key that is not numeric."""


@dataclass(frozen=True)
class Keys(Reply):
    keys: list[Key]


@dataclass(frozen=True)
class Item(Reply):
    """A picture of a collection."""

    id: str
    name: str
    label: str | None
    path: str | None
    """Where the original file is."""
    width: int = 0
    """Width in pixels, after rotating the picture upright; 0 for an item that was added as a vector."""
    height: int = 0
    """Height in pixels, after rotating the picture upright; 0 for an item that was added as a vector."""
    bytes: int = 0
    """Size of the picture's file in bytes."""
    metadata: dict[str, Value] = field(default_factory=dict, hash=False)
    """Further values to filter by."""


@dataclass(frozen=True)
class Comparison(Reply):
    """What was found by comparing the items of a collection with each other or with those of another one."""

    missing: int = field(default=0, kw_only=True)
    """Number of items that are not in this answer, because they are still to be embedded again with the encoder whose
    vectors were compared."""


@dataclass(frozen=True)
class Picked(Comparison):
    items: list[Item]
    """The most useful first. All candidates, if they are fewer than asked for."""
    candidates: int
    """Number of items to pick from: those that match the filter and have no label."""


@dataclass(frozen=True)
class SuggestedItem(Item):
    suggested: str = field(kw_only=True)
    """The label that most of its nearest items with a label speak for."""
    share: float = field(kw_only=True)
    """Share of the votes for it, 0 to 1."""


@dataclass(frozen=True)
class Suggested(Comparison):
    items: list[SuggestedItem]
    """Those whose suggestions are surest first."""
    candidates: int
    """Number of items that match the filter and have no label."""


@dataclass(frozen=True)
class OddItem(Item):
    reason: str | None = field(kw_only=True)
    """Of `labels` the label that the nearest pictures speak for, of `broken` what is wrong: dark, over-exposed, empty
    or blurred. Null for outliers."""
    value: float = field(kw_only=True)
    """How odd it is. Of outliers the outlier factor, about 1 for ordinary pictures; of `labels` how many times as much
    the nearest pictures speak for the other label; of `broken` the measured value."""


@dataclass(frozen=True)
class Odd(Comparison):
    items: list[OddItem]
    """The most odd first."""
    odd: int
    """Number of odd items. Outliers are only sorted, so all items count."""
    compared: int
    """Number of items that were looked at."""
    left_out: int
    """Number of items that could not be looked at: for `labels` those without a label, for `broken` those without a
    thumbnail that can be read."""


@dataclass(frozen=True)
class UncoveredItem(Item):
    similarity: float = field(kw_only=True)
    """Cosine similarity to the nearest item of the other collection, -1 to 1."""
    nearest: Item = field(kw_only=True)
    """That item."""


@dataclass(frozen=True)
class Coverage(Comparison):
    items: list[UncoveredItem]
    """Those that the other collection does not cover, the farthest first."""
    uncovered: int
    """Number of items that are not covered; `items` are the first of them."""
    compared: int
    """Number of items of the collection that match the filter."""
    by: int
    """Number of items of the other collection that match `by_filter`."""
    both: int
    """Number of items that are in both, and so covered."""
    share: float
    """Share of the compared items that is covered, 0 to 1."""
    usual: float
    """For comparison, the share of the other collection's items that its other items cover, 0 to 1."""


@dataclass(frozen=True)
class Split(Comparison):
    parts: dict[str, list[str]] = field(hash=False)
    """The ids of each part, by its name."""
    together: list[list[str]]
    """Groups of near-duplicates by their ids, each in one part, the largest group first."""
    threshold: float
    """Lowest cosine similarity of near-duplicates."""
    notes: list[str]
    """A sentence for each part that is far from the size asked for, and for labels that are not in every part, with
    the reason."""


@dataclass(frozen=True)
class ItemWithVector(Item):
    vector: Annotated[np.ndarray | None, Wire(list[float]), Field(exclude_if=lambda vector: vector is None)] = field(
        default=None, compare=False, repr=False
    )
    """Embedding scaled to unit length; present if the request asks for it."""


@dataclass(frozen=True)
class Items(Reply):
    count: int
    """Number of items that match the filter, on all pages."""
    items: list[Item]
    next: str | None = None
    """With `after`: the value of `after` for the next page; null on the last page, and without `after`."""


@dataclass(frozen=True)
class Match(Item):
    similarity: float = field(kw_only=True)
    """Cosine similarity, -1 to 1: to the query, or among duplicates to the first picture of the group."""
    closer_than: float | None = field(default=None, kw_only=True)
    """What the similarity means in this collection: the share, 0 to 1, of random pairs of its pictures that are less
    alike. Null if the collection has fewer than 30 pictures, if this has not been measured yet, or if the search has
    negative examples or text. With several positive examples it is the rank of the mean similarity to them."""


@dataclass(frozen=True)
class Matches(Reply):
    model: str
    """Id of the encoder."""
    results: list[Match]
    """Most similar first."""
    threshold: float | None = None
    """Lowest cosine similarity of a result, also if the request gave `closer_than`; null if it gave no limit."""
    estimated: bool = False
    """Whether the collection is being embedded again, and vectors of items that only the old encoder has embedded were
    estimated: some results will differ at the end."""


@dataclass(frozen=True)
class ManyMatches(Reply):
    answers: list[Matches]
    """One for each search, in the order of the request."""


@dataclass(frozen=True)
class PutItem(Reply):
    id: str
    new: bool
    """False if it replaced an item with the same id."""


@dataclass(frozen=True)
class Put(Reply):
    model: str
    """Id of the encoder."""
    items: list[PutItem]
    """In the order of the request."""
    changes: list[str]
    """Id of the change, for undoing it; empty if there was nothing to write. Of several requests that a client sent for
    one call, all changes, the last first."""


@dataclass(frozen=True)
class Deleted(Reply):
    deleted: list[str]
    """Ids of the items that were deleted; ids that were not in the collection are left out."""
    changes: list[str]
    """Id of the change, for undoing it; empty if there was nothing to write. Of several requests that a client sent for
    one call, all changes, the last first."""


@dataclass(frozen=True)
class Changed(Reply):
    changed: list[str]
    """Ids of the items that were changed; ids that were not in the collection are left out."""
    changes: list[str]
    """Id of the change, for undoing it; empty if there was nothing to write. Of several requests that a client sent for
    one call, all changes, the last first."""


@dataclass(frozen=True)
class Copied(Reply):
    copied: list[str]
    """Ids of the items that were put into the collection; those that it had already are left out."""
    changes: list[str]
    """Id of the change, for undoing it; empty if there was nothing to write. Of several requests that a client sent for
    one call, all changes, the last first."""


@dataclass(frozen=True)
class Change(Reply):
    """What one command or request did to a collection, over the vectors of all encoders."""

    id: str
    text: str
    """What it did, in words, such as `added 1,000 items`."""
    at: str
    """When it began, as an ISO 8601 time with its zone."""
    added: int
    """Number of items; so are the next two."""
    changed: int
    deleted: int
    undone: bool
    """Whether it was undone."""
    next: bool
    """Whether it is the one that would be undone next."""


@dataclass(frozen=True)
class Changes(Reply):
    changes: list[Change]
    """Newest first, at most 100. Those of the last hour are kept."""


@dataclass(frozen=True)
class Undone(Reply):
    """A change that was undone."""

    undone: Change
    id: str
    """Id of this undo: undoing that brings the change back."""
    count: int
    """Number of items that the collection has now."""


@dataclass(frozen=True)
class Verified(Reply):
    problems: list[str]
    """A sentence for each kind of damage; empty if there is none."""


ReembeddingState = Literal["none", "waiting", "running", "stopped", "incomplete", "done", "failed"]


@dataclass(frozen=True)
class Skipped(Reply):
    """An item that could not be embedded again."""

    id: str
    name: str
    reason: str
    """Why, as the end of a sentence that starts with the item's name."""


@dataclass(frozen=True)
class Reembedding(Reply):
    """Progress of embedding a collection again with another encoder."""

    model: str
    """Id of the new encoder."""
    state: ReembeddingState
    """`none`: nobody has asked for it; `waiting`: a service that serves the encoder takes it up within seconds;
    `stopped`: cancelled, and it goes on where it was when it is started again; `incomplete`: all is embedded but the
    items that were skipped; `done`: the collection uses the new encoder, if that is the service's default."""
    done: int
    """Number of items that the new encoder has embedded."""
    total: int
    """Number of items that it is to embed."""
    skipped: int
    """Number of items that could not be embedded."""
    first_skipped: list[Skipped]
    """The first of them."""
    problem: str | None
    """Why it failed; null if it did not."""


@dataclass(frozen=True)
class Dropped(Reply):
    dropped: str
    """Name of the collection that was deleted."""
    count: int
    """Number of items that it had."""


@dataclass(frozen=True)
class Drift(Reply):
    """Whether new pictures look like those of a collection."""

    model: str
    """Id of the encoder."""
    pictures: int
    """Number of pictures that have come, at most `window`."""
    window: int
    """Number of the last pictures that are compared with the collection."""
    state: Literal["unknown", "alike", "different"]
    """unknown: too few pictures have come, or are in the collection."""
    distance: float | None
    """Maximum mean discrepancy beyond what chance gives, 0 (alike) to 1.41 (nothing in common)."""
    p_value: float | None
    """How likely it is that pictures like the collection's lie so far from it."""
    text: str
    """This in words."""


# Near-duplicates and the map ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DerivedProgress(Reply):
    """Progress of a computation over a whole collection."""

    state: Literal["none", "computing", "done", "failed"]
    """State of the latest computation."""
    stage: str
    """The current step."""
    share: float
    """Fraction of the current step that is done, 0 to 1."""
    problem: str | None
    """Why the computation failed."""


@dataclass(frozen=True)
class DerivedResult(DerivedProgress, Comparison):
    """The newest result, which is kept until the next computation is done, and the progress of that computation."""

    model: str
    """Id of the encoder."""
    automatic: bool
    """Whether the result is computed by itself, as of a small collection, as soon as nothing is being added any more.
    Otherwise, and after a failure, a POST computes it."""
    count: int | None
    """Number of pictures in the newest result; null if there is none."""
    new: int | None
    """Number of pictures added since."""
    gone: int | None
    """Number of pictures deleted since."""
    made: str | None
    """Identifies the newest result: it changes when a new result replaces it."""


@dataclass(frozen=True)
class Duplicates(DerivedResult):
    threshold: float | None
    """The requested threshold, also if the request gave `closer_than`; by default `own`."""
    own: float | None
    """The collection's own threshold: nearly all pairs from it on are copies. Null until the pictures are compared."""
    closer_than: float | None
    """The threshold as the share of random pairs of pictures that are less alike; null if that is not known."""
    least: float | None
    """Lowest threshold the newest result can answer."""
    total: int | None
    """Number of groups at the requested threshold."""
    too_many: bool
    """Whether more than a tenth of the collection are near-duplicates at this threshold. Then they are probably
    different pictures, and only exact copies should be removed."""
    exact: list[int]
    """For each group, how many pictures after the first are exact copies of it; they come first."""
    groups: list[list[Match]]
    """Largest group first. The first picture of a group can represent the others."""


@dataclass(frozen=True)
class Map(DerivedResult):
    """Positions of pictures in the plane, as columns: entry i of each column belongs to the same picture."""

    ids: list[str]
    x: Annotated[np.ndarray, Wire(str)]
    """Horizontal position, -1 to 1: base64 of little-endian float32."""
    y: Annotated[np.ndarray, Wire(str)]
    """Vertical position, on the same scale as x: base64 of little-endian float32."""
    group: Annotated[np.ndarray, Wire(str)]
    """Number of the group of similar pictures, 0 for the largest: base64 of little-endian int32."""
    label: Annotated[np.ndarray, Wire(str)]
    """Index into `labels`, -1 for a picture without a label: base64 of little-endian int32."""
    labels: list[str]
    unplaced: int
    """Number of new pictures without a position until the next map is computed."""


# Augmented views ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair(Reply):
    """Two augmented views of one picture."""

    views: tuple[str, str]
    """PNG images as data URIs."""
    similarity: float
    """Cosine similarity of their embeddings h."""
    projected: float | None = None
    """Cosine similarity of their projections z = g(h); null if the service has no projection head g."""


@dataclass(frozen=True)
class Pairs(Reply):
    pairs: list[Pair]


@dataclass(frozen=True)
class MatrixPicture(Reply):
    """A picture and the two views of it that are compared."""

    name: str
    id: str | None
    """Id of its item; null for an uploaded image."""
    views: tuple[str, str]
    """PNG images as data URIs."""


@dataclass(frozen=True)
class Matrix(Reply):
    """Cosine similarities of two views of each of N pictures. Rows and columns 2i and 2i + 1 are the views of picture
    i, so that the positive pairs are next to the diagonal."""

    model: str
    """Id of the encoder."""
    pictures: list[MatrixPicture]
    h: Annotated[np.ndarray, Wire(list[list[float]])] = field(compare=False)
    """Cosine similarities of the views' embeddings h, 2N x 2N."""
    z: Annotated[np.ndarray | None, Wire(list[list[float]] | None)] = field(compare=False)
    """Cosine similarities of their projections z = g(h), which NT-Xent compares, 2N x 2N; null if the service has no
    projection head g."""

    @property
    def cosines(self) -> np.ndarray:
        """(2N, 2N) of z, which the loss compares; of h without a projection head."""
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

    @property
    def chance(self) -> float:
        """The loss when all cosines are equal, which is the same at every temperature."""
        return replace(self, h=np.zeros_like(self.h), z=None).loss(1.0)


@dataclass(frozen=True)
class Curve(Reply):
    """How far h moves as one augmentation grows stronger."""

    augmentation: str
    unit: str
    """Unit of the strengths."""
    strengths: list[float]
    cosines: list[float]
    """At each strength, the mean cosine similarity of h of a picture and h of its view."""
    moved: list[float]
    """The same as a distance: 0 if h does not change, 1 if h moves as far as to a different picture."""


@dataclass(frozen=True)
class Curves(Reply):
    pictures: int
    """Number of pictures."""
    others: float
    """Mean cosine similarity of two different pictures; there `moved` is 1."""
    curves: list[Curve]


@dataclass(frozen=True)
class Strip(Reply):
    augmentation: str
    views: list[str]
    """The picture at each strength: PNG images as data URIs."""


@dataclass(frozen=True)
class Followed(Reply):
    """One picture: the uploaded image, or the first of the sample."""

    name: str
    pixels: str
    """The picture as the encoder sees it: a PNG image as a data URI."""
    curves: list[Curve]
    strips: Annotated[dict[str, list[str]], Wire(list[Strip])]
    """The picture under each augmentation."""


@dataclass(frozen=True)
class Invariance(Reply):
    model: str
    """Id of the encoder."""
    sentence: str
    """A sentence on the augmentations that change h most and least."""
    trained: Curves
    """Mean over the sample, for the encoder that is served."""
    untrained: Curves | None
    """The same for an untrained encoder of the same architecture; null if that is not known."""
    picture: Followed


# Training runs --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run(Reply):
    """A training run."""

    name: str
    """Path of its folder, relative to the runs folder."""
    kind: RunKind
    state: RunState
    epoch: int
    """Number of epochs done."""
    epochs: int
    """Number of epochs planned."""
    data: str
    """Name of the training data."""
    encoder: str
    """Architecture; empty if it is that of the encoder the run started from."""
    init: str
    """Name of the encoder it started from, or of its teacher; empty if there is none."""
    figures: dict[str, float] = field(hash=False)
    """Latest value of each quality measure, as a fraction of 1: knn, views_matched, held_out, accuracy."""
    changed: float
    """When the run last wrote a file, in Unix seconds."""


@dataclass(frozen=True)
class Runs(Reply):
    count: int
    """Number of all runs."""
    runs: list[Run]
    """The most recently changed first."""


@dataclass(frozen=True)
class RunDetails(Run):
    settings: dict[str, Any] = field(hash=False)
    """Contents of its config.json; paths are shortened to their last part."""
    chance: float | None
    """Loss of a pretraining that has learnt nothing, in nats; null if it is not known."""
    metrics: dict[str, list[float | None]] = field(hash=False)
    """Columns of its metrics.csv by name, one value per epoch; null where nothing was measured."""


# The service itself ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model(Reply):
    """OpenAI's description of a model, with the fields of the model card."""

    id: str
    object: Literal["model"]
    created: int
    """When this service was started, in Unix seconds."""
    owned_by: str
    architecture: str
    dimension: int
    """Length of an embedding."""
    preprocessing: dict[str, Any]
    sha256: str
    """SHA-256 of the ONNX file."""
    training: dict[str, Any]
    figures: dict[str, Any]
    licence: str
    classes: list[str]
    """Names of the classes that POST /classify distinguishes; empty for an encoder without a classifier."""
    precision: str
    """Arithmetic of the model: fp32, fp16 or int8."""
    text: dict[str, Any] | None
    """How the encoder reads text to search by: at most `length` tokens; null if it reads none."""


@dataclass(frozen=True)
class Models(Reply):
    object: Literal["list"]
    data: list[Model]


@dataclass(frozen=True)
class Liveness(Reply):
    status: Literal["alive"]


@dataclass(frozen=True)
class Readiness(Reply):
    status: Literal["ready"]
    model: str
    """Id of the default encoder."""
    models: list[str]
    """Ids of all encoders that are served."""
    providers: list[str]
    """ONNX Runtime's execution providers, in order of preference."""
    gpu_problem: str | None = None
    """Why an encoder runs on the CPU although there is a GPU."""


def parse(kind: type[R], answer: dict) -> R:
    """Returns an instance of `kind` from JSON; unknown fields are ignored, so that a newer service may add some."""
    known = {one.name for one in fields(kind)}
    return kind(**{name: value for name, value in answer.items() if name in known})
