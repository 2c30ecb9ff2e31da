"""What answers look like, for the OpenAPI document. They are written as plain dicts: to check them costs more than to
embed a small picture."""

from typing import Literal

from pydantic import BaseModel, Field


class Embedded(BaseModel):
    model: str
    dimension: int
    embeddings: list[list[float]] | list[str] = Field(description="In the order of the images.")


class Embedding(BaseModel):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str = Field(description="Numbers, or base64 of little-endian float32.")


class Usage(BaseModel):
    prompt_tokens: int = Field(description="The number of images.")
    total_tokens: int


class Embeddings(BaseModel):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: Usage


class Collection(BaseModel):
    name: str
    encoder: str = Field(description="Whose vectors these are.")
    others: list[str] = Field(description="Encoders that have embedded this collection too.")
    dimension: int
    count: int = Field(description="Items.")
    bytes: int = Field(description="On disk.")
    index: str = Field(description="How it is searched.")
    version: int = Field(description="Grows with every change.")


class Collections(BaseModel):
    collections: list[Collection]


class Key(BaseModel):
    key: str
    type: Literal["text", "truth", "whole", "number"]
    distinct: int = Field(description="Values that differ.")
    values: list[tuple[str | bool | int | float, int]] = Field(description="The commonest, and how many items have it.")
    least: float | None = Field(description="Of numbers.")
    median: float | None
    most: float | None


class Keys(BaseModel):
    keys: list[Key]


class Item(BaseModel):
    id: str
    name: str
    label: str | None
    path: str | None
    width: int = Field(description="Pixels, upright; 0 where there was no picture, only its vector.")
    height: int
    bytes: int = Field(description="Of its file.")
    metadata: dict[str, str | bool | int | float]


class OneItem(Item):
    vector: list[float] = Field([], description="Of unit length; where it was asked for.")


class Match(Item):
    similarity: float = Field(description="Cosine, -1 to 1.")


class Matches(BaseModel):
    model: str
    results: list[Match] = Field(description="Nearest first.")


class Items(BaseModel):
    count: int = Field(description="Of all that hold to the filter.")
    items: list[Item]


class PutItem(BaseModel):
    id: str
    new: bool = Field(description="Otherwise it has taken the place of one of the same id.")


class Put(BaseModel):
    model: str
    items: list[PutItem] = Field(description="In the order of the request.")


class Deleted(BaseModel):
    deleted: list[str] = Field(description="The ids that were there.")


class Pair(BaseModel):
    views: list[str] = Field(min_length=2, max_length=2, description="PNG as data URIs.")
    similarity: float = Field(description="Cosine of their embeddings.")
    projected: float | None = Field(description="Cosine of their z = g(h); null where g is not at hand.")


class Pairs(BaseModel):
    pairs: list[Pair]


class Model(BaseModel):
    """OpenAI's fields, and the model card's."""

    id: str
    object: Literal["model"]
    created: int = Field(description="When this service was started, in Unix seconds.")
    owned_by: str
    architecture: str
    dimension: int
    preprocessing: dict
    sha256: str = Field(description="Of the ONNX file.")
    training: dict
    figures: dict
    licence: str
    classes: list[str] = Field(description="What POST /classify tells apart; none of an encoder alone.")
    precision: str = Field(description="What it computes in: fp32, fp16, int8.")


class Models(BaseModel):
    object: Literal["list"]
    data: list[Model]


class Alive(BaseModel):
    status: Literal["alive"]


class Ready(BaseModel):
    status: Literal["ready"]
    model: str = Field(description="The default.")
    models: list[str]
    providers: list[str] = Field(description="ONNX Runtime's, the first that can do it does.")
