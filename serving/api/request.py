"""What the routes want of a request: the engine that answers it, and its query, checked."""

from typing import Annotated, TypeVar

from fastapi import Depends, Request
from pydantic import BaseModel, ValidationError

from serving import errors
from serving.api import embeddings
from serving.engine import Engine
from serving.errors import NotReady

JSON = "application/json"
URLENCODED = "application/x-www-form-urlencoded"

Q = TypeVar("Q", bound=BaseModel)


def engine_of(request: Request) -> Engine:
    """raises NotReady where there is no encoder yet."""
    if request.app.state.engine is None:
        raise NotReady(request.app.state.problem)
    return request.app.state.engine


Ready = Annotated[Engine, Depends(engine_of)]


def validated(kind: type[Q], given: bytes | dict) -> Q:
    """An instance of the pydantic model `kind`, of JSON or of fields. raises Malformed."""
    try:
        return kind.model_validate_json(given) if isinstance(given, bytes) else kind.model_validate(given)
    except ValidationError as error:
        raise errors.malformed(error.errors()) from error


def chosen(model: str) -> str | None:
    """The id of an encoder; None for the default."""
    return None if model == embeddings.ALIAS else model


def binary(*types: str) -> dict:
    """For the OpenAPI document: what is sent as it is."""
    return {type: {"schema": {"type": "string", "format": "binary"}} for type in types}
