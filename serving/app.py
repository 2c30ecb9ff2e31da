"""The service's HTTP interface: what each route takes and gives. The work is engine.py's.

Every answer but a thumbnail, an .npy and the metrics is JSON; every error has the shape of errors.py.
"""

import asyncio
import gc
import importlib.util
import io
import logging
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import lru_cache
from pathlib import Path

import numpy as np
import prometheus_client
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.openapi.utils import get_openapi
from fastapi.responses import RedirectResponse, Response
from fastapi.routing import APIRoute
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from export.artifact import BundleError, ModelCard
from serving import errors
from serving.access import OPEN_PATHS, Access, RequireAccess
from serving.api import classify, collections, derived, embeddings, log, runs, views
from serving.api.embeddings import EmbeddingsQuery
from serving.api.envelope import Envelope
from serving.api.openapi import new_router
from serving.api.request import JSON, CancelOnDisconnect, Ready, binary, engine_of, requested_encoder, validated
from serving.api.response import json_response
from serving.api.upload import BYTES, FORM, media_type, read_images
from serving.collection.index import DEFAULT, IndexProblem, unit
from serving.engine import EmbeddedImages, Engine
from serving.errors import NotFound, UnsupportedType, documented
from serving.inference.decode import Upload
from serving.limits import USUAL, BodyLimit, Limits
from serving.metrics import Metrics
from serving.protocol import pack, replies

logger = logging.getLogger("twinview")

NPY = "application/x-npy"
LOOK_AGAIN_S = 2.0  # for an encoder where there was none, and at the gauges of the metrics


class Plain(APIRoute):
    """Its function takes the request and gives the answer, and FastAPI documents it. What FastAPI does with arguments
    and dependencies takes longer than to embed a small picture."""

    def get_route_handler(self) -> Callable:
        return self.endpoint


plain = new_router(route_class=Plain)
router = new_router()


def create_app(encoder: str | None, index: str | Path, limits: Limits = USUAL, access: Access | None = None) -> FastAPI:
    """encoder  as Engine's `encoders`; looked for when the app starts
    index    folder of the collections, or s3://bucket/prefix; need not exist
    access   who is answered; by default what the environment says. raises KeyProblem.
    """
    log.install(os.environ)
    access = Access.from_environment(os.environ) if access is None else access
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async def begin() -> bool:
            try:
                app.state.engine = await run_in_threadpool(Engine, encoder, index, app.state.limits, metrics)
            except BundleError as error:  # stay up and say so: a page that explains beats one that is gone
                problem = f"{str(error).rstrip('.')}. This service looks for one every {LOOK_AGAIN_S:g} s."
                if problem != app.state.problem:
                    app.state.problem = problem
                    logger.warning(problem)
                return False
            await _announce(app.state.engine)
            gc.collect()
            gc.freeze()  # what is loaded stays: looking through it again would stop requests for 100 ms
            return True

        async def look() -> None:
            while True:
                await asyncio.sleep(LOOK_AGAIN_S)
                if app.state.engine or await begin():
                    metrics.look()

        await begin()
        if not access.digests:
            who = "everybody is answered" if access.open else "only this machine is answered"
            logger.info("there are no API keys, so %s", who)
        looking = asyncio.create_task(look())
        yield
        looking.cancel()
        with suppress(asyncio.CancelledError):
            await looking
        gc.unfreeze()
        if app.state.engine:
            app.state.engine.close()

    app = FastAPI(
        title="Twinview",
        description="Embeddings of pictures, and pictures by likeness.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        middleware=[
            Middleware(Envelope, metrics=metrics),
            Middleware(RequireAccess, access=access),
            Middleware(BodyLimit, most=limits.body_bytes, at_once=limits.bytes_at_once),
            Middleware(Express),
        ],
    )
    app.state.engine, app.state.problem = None, "the service is starting"
    app.state.limits, app.state.metrics, app.state.started = limits, metrics, int(time.time())
    errors.install(app)
    # include_router would look through all of them twice
    rooms = (
        plain,
        collections.router,
        derived.router,
        classify.router,
        views.router,
        runs.router,
        router,
    )
    app.router.routes[:0] = [route for room in rooms for route in room.routes]
    app.mount("/docs/assets", StaticFiles(directory=_swagger()))
    app.openapi = lambda: _openapi(app, access)

    @app.exception_handler(IndexProblem)
    async def _(request: Request, error: IndexProblem) -> Response:
        return errors.answer(collections.refusal(error))

    return app


async def _announce(engine: Engine) -> None:
    """Also opens the usual collection, so that the first search need not. One that is damaged does not stop the
    encoder."""
    names, index = ", ".join(card.id for card in engine.cards), engine.library.index(DEFAULT)
    try:
        count = await run_in_threadpool(index.count)
        logger.info("serving %s on %s; %s pictures in %s", names, engine.providers[0], f"{count:,}", index.store.uri)
    except IndexProblem as error:
        logger.warning("serving %s on %s without a collection. %s", names, engine.providers[0], error)


# Embeddings -----------------------------------------------------------------------------------------------------------


class EmbedQuery(BaseModel):
    normalize: bool = Field(False, description="Vectors of unit length.")
    model: str = Field(embeddings.ALIAS, description=f"An id of /v1/models, or {embeddings.ALIAS} for the default.")
    encoding_format: embeddings.Form = Field("float", description="base64 is of little-endian float32.")


AS_IT_IS = EmbedQuery()


STAGES = {"Server-Timing": {"description": "Milliseconds in decode, queue and model.", "schema": {"type": "string"}}}
EMBED = {
    "openapi_extra": {
        "parameters": [
            {"name": name, "in": "query", "schema": facts}
            for name, facts in EmbedQuery.model_json_schema()["properties"].items()
        ],
        "requestBody": {
            "required": True,
            "content": {
                FORM: {
                    "schema": {
                        "type": "object",
                        "properties": {"images": {"type": "array", "items": {"type": "string", "format": "binary"}}},
                        "required": ["images"],
                    }
                },
                **binary("image/*", BYTES, pack.MEDIA_TYPE),
            },
        },
    },
    "response_model": replies.EmbedReply,
    "responses": {200: {"content": binary(NPY), "headers": STAGES}, **documented(400, 404, 413, 415, 422, 429, 503)},
}


@plain.post("/embed", **EMBED)
async def embed(request: Request) -> Response:
    """Embeddings h of 1 to 256 images, in their order.

    The body is a form with the files in its field `images`, or one image as it is, or a pack: each image behind its
    length in 4 bytes, big-endian. Asked for with `Accept: application/x-npy` the answer is a float32 .npy of (n, d),
    the model's id in the header `Twinview-Model`.
    """
    engine = engine_of(request)
    engine.refuse_when_full()  # before the body is read
    query = validated(EmbedQuery, dict(request.query_params)) if request.url.query else AS_IT_IS
    files = await read_images(request, request.app.state.limits.images)
    embedded = await _embed(request, engine, files, query.model)
    vectors = unit(embedded.vectors) if query.normalize else embedded.vectors
    headers = {"Server-Timing": _timing(embedded)}
    if NPY in request.headers.get("accept", ""):
        content = _npy_header(vectors.shape) + vectors.tobytes()
        return Response(content, media_type=NPY, headers={**headers, "Twinview-Model": embedded.model})
    rows = embeddings.write(vectors, query.encoding_format)
    return json_response({"model": embedded.model, "dimension": vectors.shape[1], "embeddings": rows}, headers=headers)


@lru_cache(USUAL.images)
def _npy_header(shape: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return buffer.getvalue()


class Express:
    """ASGI middleware, within all others: answers POST /embed as its route would, without the layers between."""

    route = plain.routes[-1]

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("root_path", "") + self.route.path
        if scope["type"] != "http" or scope["path"] != path or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        scope["route"] = self.route
        try:
            answer = await embed(Request(scope, receive))
        except HTTPException as error:
            answer = errors.answer(error)
        await answer(scope, receive, send)


EMBEDDINGS = {
    "openapi_extra": {
        "requestBody": {"required": True, "content": {JSON: {"schema": EmbeddingsQuery.model_json_schema()}}}
    },
    "response_model": replies.OpenAIEmbeddings,
    "responses": {200: {"headers": STAGES}, **documented(400, 404, 413, 415, 422, 429, 503)},
}


@plain.post("/v1/embeddings", **EMBEDDINGS)
async def create_embeddings(request: Request) -> Response:
    """Embeddings in OpenAI's shape: for its clients, and all that speak to them."""
    engine = engine_of(request)
    engine.refuse_when_full()
    if media_type(request) not in (JSON, ""):
        raise UnsupportedType(f"a query for embeddings comes as {JSON}, not as {media_type(request)[:100]}")
    query = validated(EmbeddingsQuery, await request.body())
    _check_dimensions(engine, query)
    files = embeddings.images_of(query, request.app.state.limits.images)
    embedded = await _embed(request, engine, files, query.model)
    vectors = unit(embedded.vectors) if query.normalize else embedded.vectors
    answer = embeddings.answer(embedded.model, vectors, query.encoding_format)
    return json_response(answer, headers={"Server-Timing": _timing(embedded)})


def _check_dimensions(engine: Engine, query: EmbeddingsQuery) -> None:
    for card in engine.cards:
        if (
            query.dimensions not in (None, card.dimension)
            and (requested_encoder(query.model) or engine.card.id) == card.id
        ):
            message = f"dimensions: {card.id} gives {card.dimension}, and nothing is cut off"
            raise errors.Malformed(message, "dimensions")


async def _embed(request: Request, engine: Engine, files: list[Upload], model: str) -> EmbeddedImages:
    async with CancelOnDisconnect(request):
        embedded = await engine.embed(files, requested_encoder(model))
    request.app.state.metrics.embedded(len(files), embedded.times)
    request.state.facts = {"images": len(files), "model": embedded.model}
    return embedded


def _timing(embedded: EmbeddedImages) -> str:
    return ", ".join([f"{stage};dur={seconds * 1000:.2f}" for stage, seconds in embedded.times.items()])


# The service itself ---------------------------------------------------------------------------------------------------


@router.get("/v1/models", response_model=replies.Models, responses=documented())
async def models(request: Request) -> Response:
    """The model cards of the encoders that are served, the default first."""
    engine = request.app.state.engine
    return json_response({"object": "list", "data": [_model(request, card) for card in engine.cards] if engine else []})


@router.get("/v1/models/{id}", response_model=replies.Model, responses=documented(404, 503))
async def model(request: Request, id: str, engine: Ready) -> Response:
    """The model card of one encoder."""
    for card in engine.cards:
        if card.id == (requested_encoder(id) or engine.card.id):
            return json_response(_model(request, card))
    raise NotFound(f"there is no model {id}; /v1/models lists what there is", "model")


def _model(request: Request, card: ModelCard) -> dict:
    shape = {"object": "model", "created": request.app.state.started, "owned_by": "twinview"}
    return {"id": card.id, **shape, **card.to_dict()}


@router.get("/livez", response_model=replies.Liveness)
async def livez() -> Response:
    return json_response({"status": "alive"})


@router.get("/readyz", response_model=replies.Readiness, responses=documented(503))
async def readyz(engine: Ready) -> Response:
    names = [card.id for card in engine.cards]
    return json_response({"status": "ready", "model": names[0], "models": names, "providers": engine.providers})


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **documented()},
)
async def metrics(request: Request) -> Response:
    """For Prometheus."""
    return Response(request.app.state.metrics.text(), media_type=prometheus_client.CONTENT_TYPE_LATEST)


@router.get("/", include_in_schema=False)
async def start(request: Request) -> Response:
    """The page where there is one."""
    has_page = any(getattr(route, "path", None) == "/ui" for route in request.app.routes)
    return RedirectResponse("/ui/" if has_page else "/docs")


@router.get("/docs", include_in_schema=False)
async def docs(request: Request) -> Response:
    return get_swagger_ui_html(
        openapi_url=request.app.openapi_url,
        title="Twinview",
        swagger_js_url="/docs/assets/swagger-ui-bundle.js",
        swagger_css_url="/docs/assets/swagger-ui.css",
        swagger_favicon_url="/docs/assets/favicon-light-32x32.png",
    )


def _swagger() -> Path:
    """BentoML's copy of Swagger UI: FastAPI's own page would fetch one from outside."""
    return Path(importlib.util.find_spec("bentoml").origin).parent / "_internal/server/static_content"


def _openapi(app: FastAPI, access: Access) -> dict:
    """FastAPI's document, with the keys."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        document["components"]["securitySchemes"] = {
            "key": {"type": "http", "scheme": "bearer"},
            "password": {"type": "http", "scheme": "basic", "description": "The key is the password."},
        }
        document["security"] = [{"key": []}, {"password": []}] if access.digests else [{}, {"key": []}]
        for path in OPEN_PATHS:
            document["paths"][path]["get"]["security"] = []
        app.openapi_schema = document
    return app.openapi_schema
