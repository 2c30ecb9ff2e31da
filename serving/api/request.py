"""Shared by the routes: the engine, parsing the query, the requested encoder, and cancelling on disconnection."""

import asyncio
from types import TracebackType
from typing import Annotated, TypeVar

from fastapi import Depends, Request
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from serving import errors
from serving.engine import Engine
from serving.errors import NotReady
from serving.protocol.queries import ALIAS

JSON = "application/json"
URLENCODED = "application/x-www-form-urlencoded"

Q = TypeVar("Q", bound=BaseModel)


def engine_of(request: Request) -> Engine:
    """Returns the app's engine. Raises NotReady while no encoder has been loaded."""
    if request.app.state.engine is None:
        raise NotReady(request.app.state.problem)
    return request.app.state.engine


Ready = Annotated[Engine, Depends(engine_of)]


def validated(kind: type[Q], query: bytes | dict) -> Q:
    """Parse JSON (bytes) or form fields (dict) as the pydantic model `kind`. Raises Malformed."""
    try:
        return kind.model_validate_json(query) if isinstance(query, bytes) else kind.model_validate(query)
    except ValidationError as error:
        raise errors.malformed(error.errors()) from error


def requested_encoder(model: str) -> str | None:
    """Returns the id of the encoder that a request's `model` names; None for the default."""
    return None if model == ALIAS else model


def binary(*types: str) -> dict:
    """Returns the OpenAPI `content` of a binary body of these media types."""
    return {type: {"schema": {"type": "string", "format": "binary"}} for type in types}


class CancelOnDisconnect:
    """Cancels the code inside the context when the client closes the connection, and raises ClientDisconnect.

        async with CancelOnDisconnect(request):
            embedded = await engine.embed(uploads)

    So images that still wait for a batch are dropped. Enter the context after reading the request's body.
    """

    def __init__(self, request: Request):
        self._receive = request.receive
        self._disconnected = False

    async def __aenter__(self) -> None:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("CancelOnDisconnect needs a task to cancel")
        self._task = task
        self._watch = asyncio.create_task(self._cancel_on_disconnect())

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watch.cancel()
        if self._disconnected:
            self._task.uncancel()
            if kind is asyncio.CancelledError:
                raise ClientDisconnect() from None

    async def _cancel_on_disconnect(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._disconnected = True
        self._task.cancel()
