"""POST /embed and POST /v1/embeddings: images to vectors. serving/engine.py does the work.

/v1/embeddings has OpenAI's shape (https://platform.openai.com/docs/api-reference/embeddings), for images:

    {"input": ["data:image/png;base64,...", ...], "model": "twinview", "encoding_format": "base64"}
    {"object": "list", "data": [{"object": "embedding", "index": 0, "embedding": "..."}], "model": "...", "usage": ...}

Each input is a data URI, or the base64 of an image file; never a URL, since the service makes no requests
to other servers. A vector in base64 is little-endian float32. Usage counts images, where OpenAI counts tokens.
"""

import base64
import binascii
import io
import re
from functools import lru_cache
from typing import Annotated, Literal
from urllib.parse import unquote_to_bytes

import numpy as np
from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from pydantic import BeforeValidator, FailFast, Field
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.api.openapi import images_body, new_router, query_parameters
from serving.api.request import (
    JSON,
    CancelOnDisconnect,
    binary,
    check_parameters,
    engine_of,
    json_body,
    requested_encoder,
    validated,
)
from serving.api.response import json_response
from serving.api.upload import media_type, read_images
from serving.collection.index import unit
from serving.engine import EmbeddedImages, Engine
from serving.errors import Malformed, TooLarge, UnsupportedType, documented
from serving.inference.decode import Upload
from serving.limits import DEFAULT_LIMITS
from serving.protocol.queries import ALIAS, MODEL, Strict
from serving.protocol.replies import EmbedReply, OpenAIEmbeddings

NPY = "application/x-npy"
FROM_URLS = str.maketrans("-_", "+/")  # base64's alphabet for URLs (RFC 4648, section 5)
TIMING = {"Server-Timing": {"description": "Milliseconds: decode, queue, model.", "schema": {"type": "string"}}}

Encoding = Literal["float", "base64"]

router = new_router()


class EmbedQuery(Strict):
    normalize: bool = Field(False, description="Scale the vectors to unit length.")
    model: str = Field(ALIAS, description=MODEL)
    encoding_format: Encoding = Field("float", description="base64 encodes little-endian float32.")


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


class EmbeddingsQuery(Strict):
    input: Annotated[
        list[str],
        FailFast(),
        BeforeValidator(_listed, json_schema_input_type=str | list[str]),
        Field(min_length=1, description="Images: data URIs, or base64 of image files."),
    ]
    model: str = Field(ALIAS, description=MODEL)
    encoding_format: Encoding = "float"
    dimensions: int | None = Field(
        None, description="Length of the vectors: the encoder's, or a shorter one that it was trained for."
    )
    user: str | None = Field(None, description="Ignored.")
    modality: Literal["image"] = "image"
    normalize: bool = Field(False, description="Scale the vectors to unit length. OpenAI has no such field.")


@router.post(
    "/embed",
    openapi_extra={
        "parameters": query_parameters(EmbedQuery),
        "requestBody": {"required": True, "content": images_body()},
    },
    response_model=EmbedReply,
    responses={200: {"content": binary(NPY), "headers": TIMING}, **documented(400, 404, 413, 415, 422, 429, 503)},
)
async def embed(request: Request) -> Response:
    """Embed 1 to 256 images; the embeddings h are in the order of the images.

    Send a form with the image files in its field `images`, or one image file as the body, or a pack: image files
    each preceded by its length (4 bytes, big-endian). With `Accept: application/x-npy` the response is a
    float32 .npy file of shape (n, d), and its header `Twinview-Model` has the id of the encoder.
    """
    engine = engine_of(request)
    engine.refuse_when_full()  # before reading the body
    query = validated(EmbedQuery, dict(request.query_params)) if request.scope["query_string"] else EmbedQuery()
    uploads = await read_images(request, request.app.state.limits.images)
    embedded = await embed_uploads(request, engine, uploads, query.model)
    vectors, headers = _vectors(embedded, query.normalize), _timing(embedded)
    if NPY in request.headers.get("accept", ""):
        content = _npy_header(vectors.shape) + vectors.tobytes()
        return Response(content, media_type=NPY, headers={**headers, "Twinview-Model": embedded.model})
    rows = _encode(vectors, query.encoding_format)
    return json_response({"model": embedded.model, "dimension": vectors.shape[1], "embeddings": rows}, headers=headers)


@router.post(
    "/v1/embeddings",
    openapi_extra={
        "requestBody": {"required": True, "content": {JSON: {"schema": EmbeddingsQuery.model_json_schema()}}}
    },
    response_model=OpenAIEmbeddings,
    responses={200: {"headers": TIMING}, **documented(400, 404, 413, 415, 422, 429, 503)},
)
async def create_embeddings(request: Request) -> Response:
    """Embed images in the format of OpenAI's API, for its client and compatible ones."""
    engine = engine_of(request)
    engine.refuse_when_full()  # before reading the body
    if media_type(request) not in (JSON, ""):
        raise UnsupportedType(f"/v1/embeddings accepts {JSON}, not {media_type(request)[:100]}")
    query = validated(EmbeddingsQuery, await json_body(request))
    card = engine.card_of(requested_encoder(query.model))
    if query.dimensions not in (None, card.dimension, *card.shortened):
        others = f"or {', '.join(map(str, card.shortened))}" if card.shortened else "and cannot be shortened"
        raise Malformed(f"dimensions: the vectors of {card.id} have {card.dimension} {others}", "dimensions")
    uploads = _read_inputs(query.input, request.app.state.limits.images)
    embedded = await embed_uploads(request, engine, uploads, query.model)
    rows = _encode(_vectors(embedded, query.normalize, query.dimensions), query.encoding_format)
    reply = {
        "object": "list",
        "data": [{"object": "embedding", "index": i, "embedding": row} for i, row in enumerate(rows)],
        "model": embedded.model,
        "usage": {"prompt_tokens": len(rows), "total_tokens": len(rows)},
    }
    return json_response(reply, headers=_timing(embedded))


ROUTES = {route.path: route for route in router.routes if isinstance(route, APIRoute)}


class EmbedShortcut:
    """ASGI middleware, the innermost: answers the routes above, and passes all other requests on to FastAPI.

    FastAPI's router and its layers take 0.05 ms, a fifth of the time for embedding a small image. So FastAPI only
    documents these routes, and refuses other methods; it never calls them. Envelope answers the errors they raise.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = None
        if scope["type"] == "http" and scope["method"] == "POST":
            route = ROUTES.get(scope["path"].removeprefix(scope.get("root_path", "")))
        if route is None:
            return await self.app(scope, receive, send)
        scope["route"] = route  # for metrics and log
        request = Request(scope, receive)
        await check_parameters(request)
        response = await route.endpoint(request)
        await response(scope, receive, send)


async def embed_uploads(request: Request, engine: Engine, uploads: list[Upload], model: str) -> EmbeddedImages:
    """Embed with the encoder that the request names. Cancelled if the client disconnects; recorded in metrics and log.

    Raises as Engine.embed, and ClientDisconnect.
    """
    async with CancelOnDisconnect(request):
        embedded = await engine.embed(uploads, requested_encoder(model))
    record(request, len(uploads), embedded)
    return embedded


def record(request: Request, images: int, embedded: EmbeddedImages) -> None:
    """Record in metrics and log that a request of so many images was embedded."""
    request.app.state.metrics.record_embedding(images, embedded.times)
    request.state.facts = {"images": images, "model": embedded.model}


def _read_inputs(inputs: list[str], most: int) -> list[Upload]:
    """Raises TooLarge, and Malformed for an input that is not base64; decoding checks that it is an image."""
    if len(inputs) > most:
        raise TooLarge(f"{len(inputs)} images in one request; the most is {most}", "input")
    return [Upload(f"input[{i}]", "", _decode(text, f"input[{i}]")) for i, text in enumerate(inputs)]


def _decode(text: str, field: str) -> bytes:
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except ValueError:
        pass
    head, comma, data = text.strip().partition(",")
    if head[:5].lower() == "data:" and comma:
        content = unquote_to_bytes(data)
        if "base64" not in [part.strip().lower() for part in head.split(";")]:
            return content
        data = content.decode("latin-1")
    elif "://" in text[:64]:
        raise Malformed(f"{field} is a URL, which the service does not fetch; send a data URI or base64", field)
    else:
        data = text
    try:
        return _forgiving_base64(data)
    except ValueError as error:
        raise Malformed(f"{field} is neither a data URI nor base64", field) from error


def _forgiving_base64(text: str) -> bytes:
    """As browsers read it (https://infra.spec.whatwg.org/#forgiving-base64): with blanks and line breaks anywhere, and
    without padding. Also in the alphabet for URLs. Raises ValueError."""
    text = re.sub("[ \t\n\f\r]+", "", text)
    text = re.sub("={1,2}$", "", text) if len(text) % 4 == 0 else text
    padded = text + "=" * (-len(text) % 4)
    return binascii.a2b_base64(padded.translate(FROM_URLS), strict_mode=True)


def _vectors(embedded: EmbeddedImages, normalize: bool, length: int | None = None) -> np.ndarray:
    """length: how many of the first numbers of each"""
    vectors = embedded.vectors[:, :length]
    return unit(vectors) if normalize else vectors


def _encode(vectors: np.ndarray, encoding: Encoding) -> list[np.ndarray] | list[str]:
    """Returns each row of (n, d) float32 in a form that orjson can write."""
    if encoding == "float":
        return list(vectors)
    return [base64.b64encode(row.astype("<f4").tobytes()).decode() for row in vectors]


@lru_cache(DEFAULT_LIMITS.images)
def _npy_header(shape: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def _timing(embedded: EmbeddedImages) -> dict[str, str]:
    stages = [f"{stage};dur={seconds * 1000:.2f}" for stage, seconds in embedded.times.items()]
    return {"Server-Timing": ", ".join(stages)}
