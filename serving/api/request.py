"""Shared by the routes: the engine, parsing the query, the requested encoder, and cancelling on disconnection."""

import asyncio
from codecs import BOM_UTF8
from types import TracebackType
from typing import Annotated, Any, TypeVar, get_args, get_origin

import orjson
from fastapi import Depends, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from export.suggest import did_you_mean
from serving import errors
from serving.api.upload import refuse_twice
from serving.engine import Engine
from serving.errors import Malformed, NotReady, TooLarge
from serving.mistakes import no_json
from serving.protocol.queries import ALIAS, VectorRows

JSON = "application/json"
URLENCODED = "application/x-www-form-urlencoded"

Q = TypeVar("Q", bound=BaseModel)


def engine_of(request: Request) -> Engine:
    """Returns the app's engine. Raises NotReady while no encoder has been loaded, and IndexProblem."""
    if request.app.state.engine is None:
        raise NotReady(request.app.state.problem)
    if "name" in request.path_params:  # of a collection, or an alias; this is in a thread
        request.app.state.engine.library.refresh_names()
    return request.app.state.engine


Ready = Annotated[Engine, Depends(engine_of)]


async def json_body(request: Request) -> bytes:
    """The body, without the byte-order mark that some programs put before JSON."""
    return (await request.body()).removeprefix(BOM_UTF8)


async def check_parameters(request: Request) -> None:
    """Raises Malformed for a query parameter that the route does not know, or that is there twice, and for a body where
    the route reads none: they would be ignored without a word."""
    route: APIRoute = request.scope["route"]
    if not route.include_in_schema:  # a page, which links may open with anything
        return
    if request.scope["query_string"]:
        _check_query(request, route)
    reads_body = route.body_field or "requestBody" in (route.openapi_extra or {})
    if not reads_body and (await request.body()).strip() not in (b"", b"{}"):
        raise Malformed(f"{request.method} {route.path} takes no body, only parameters in its address")


def _check_query(request: Request, route: APIRoute) -> None:
    known = [parameter["name"] for parameter in (route.openapi_extra or {}).get("parameters", ())]
    known += [field.alias for field in route.dependant.query_params]
    lists = {field.alias for field in route.dependant.query_params if _is_list(field.field_info.annotation)}
    for name in request.query_params:
        if name not in known:
            near = did_you_mean(name, known) or f"; known are {', '.join(known) or 'none'}"
            raise Malformed(f"{name}: is not a parameter of {request.method} {route.path}{near}", name)
    refuse_twice(name for name, _ in request.query_params.multi_items() if name not in lists)


def _is_list(annotation: Any) -> bool:
    return any(get_origin(part) is list for part in (annotation, *get_args(annotation)))


SMALL_JSON = 2**18  # bytes; parsed in some milliseconds
MOST_KEYS = 1024  # of one row, and of its metadata
MOST_TEXTS = 25_000  # keys and texts in a request's JSON: each wrong one takes time and memory to report


def validated(kind: type[Q], query: bytes | dict) -> Q:
    """Parse JSON (bytes) or texts of a form or query (dict) as the pydantic model `kind`. Raises Malformed, TooLarge.

    In JSON, "5" is no number and 1 is not true.

    This stops the whole service meanwhile, so lists of the models have `fail_fast`: they report their first error only.
    """
    if isinstance(query, bytes):
        refuse_many_texts(query)
    else:
        for value in query.values():
            if isinstance(value, str):
                refuse_many_texts(value.encode())
    try:
        if isinstance(query, bytes):
            return kind.model_validate_json(query, strict=True)
        return kind.model_validate(query)
    except ValidationError as error:
        raise errors.malformed(error.errors(), kind) from error


def refuse_many_texts(json: bytes) -> None:
    """Raises TooLarge."""
    if json.count(b'"') > 2 * MOST_TEXTS:
        raise TooLarge(f"the request's JSON has more than {MOST_TEXTS:,} keys and texts")


async def validated_rows(body: bytes, most: int) -> VectorRows:
    """Parse JSON as VectorRows of at most so many rows. Raises Malformed, TooLarge.

    A large body is parsed in a thread, one row at a time, so that others are answered meanwhile.
    """
    if len(body) <= SMALL_JSON:
        rows = validated(VectorRows, body)
        check_count(len(rows.items), most, "items")
        return rows
    return await run_in_threadpool(_validated_rows, body, most)


def check_count(count: int, most: int, field: str) -> None:
    """Raises TooLarge."""
    if count > most:
        raise TooLarge(f"{field}: the request has {count}, and at most {most} are allowed", field)


def _validated_rows(body: bytes, most: int) -> VectorRows:
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Malformed(f"the body: {no_json(error.msg, error.lineno, error.colno)}") from error
    if not isinstance(content, dict) or not isinstance(rows := content.get("items"), list) or not rows:
        raise Malformed("items: a list of items with their vectors is needed", "items")
    check_count(len(rows), most, "items")
    if len(content) > MOST_KEYS:
        raise Malformed(f"the request has more than {MOST_KEYS} keys")
    checked = []
    for i, row in enumerate(rows):
        metadata = row.get("metadata") if isinstance(row, dict) else None
        if max((len(part) for part in (row, metadata) if isinstance(part, dict)), default=0) > MOST_KEYS:
            raise Malformed(f"items[{i}]: has more than {MOST_KEYS} keys", f"items[{i}]")
        try:  # as the only row, so that errors are those of the whole
            query = VectorRows.model_validate({**content, "items": [row]}, strict=True)
        except ValidationError as error:
            found = [{**one, "loc": _moved(one["loc"], i)} for one in error.errors()]
            raise errors.malformed(found, VectorRows) from error
        checked += query.items
    return VectorRows.model_construct(model=content["model"], items=checked)


def _moved(location: tuple, row: int) -> tuple:
    return ("items", row, *location[2:]) if location[:1] == ("items",) and len(location) > 1 else location


def requested_encoder(model: str) -> str | None:
    """Returns the id of the encoder that a request's `model` names; None for the default. Raises Malformed."""
    if not model:
        raise Malformed("model: is empty; leave it out for the default encoder, or give an id from /v1/models", "model")
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
