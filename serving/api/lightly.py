"""GET /v1/describe and POST /v1/embed/images/bytes: the embedding protocol of LightlyStudio, for the default encoder.

The package lightly-studio-serve 0.1.2 defines it (its files protocol.py and server.py), and has a program that checks a
server. Version 1.0 has no choice of the encoder. Its clients read `/v1/describe` once, split their images by the limits
there, and split again after a 413. They find out by `space_key` that a server has another encoder than before.
Errors have this service's shape; the protocol prescribes their statuses only.
"""

from fastapi import Request
from fastapi.responses import Response

from serving.api.embed import record
from serving.api.openapi import form, new_router
from serving.api.request import CancelOnDisconnect, Ready, engine_of
from serving.api.response import json_response
from serving.api.upload import FORM, media_type, read_form
from serving.collection.index import unit
from serving.errors import NotReady, UnsupportedType, documented
from serving.protocol.replies import LightlyDescription, LightlyEmbeddings

VERSION = "1.0"
FILES = "files"  # field of the form

router = new_router()


@router.get("/v1/describe", response_model=LightlyDescription, responses=documented(503))
async def describe(request: Request, engine: Ready) -> Response:
    """Describe the default encoder, for LightlyStudio: its id, the length of its vectors, and the service's limits."""
    try:
        await engine.check()
    except NotReady:
        ready = False
    else:
        ready = True
    limits = request.app.state.limits
    reply = {
        "protocol_version": VERSION,
        "space_key": engine.card.id,
        "dimension": engine.card.dimension,
        "ready": ready,
        "capabilities": ["image_bytes"],
        "limits": {"max_batch_size": limits.images, "max_request_bytes": limits.body_bytes},
    }
    return json_response(reply)


@router.post(
    "/v1/embed/images/bytes",
    response_model=LightlyEmbeddings,
    openapi_extra={"requestBody": {"required": True, "content": form(FILES)}},
    responses=documented(400, 413, 415, 429, 503),
)
async def embed_image_bytes(request: Request) -> Response:
    """Embed 1 to 256 images, for LightlyStudio; the embeddings have unit length.

    Send a form with the image files in its field `files`. Files that cannot be read as images, or have too many pixels,
    are left out: `kept_indices` has the positions of the others.
    """
    engine = engine_of(request)
    engine.refuse_when_full()  # before reading the body
    if media_type(request) not in (FORM, ""):
        raise UnsupportedType(f"/v1/embed/images/bytes accepts {FORM}, not {media_type(request)[:100]}")
    uploads = await read_form(request, request.app.state.limits.images, FILES)
    async with CancelOnDisconnect(request):
        kept, embedded = await engine.embed_readable(uploads)
    record(request, len(kept), embedded)
    reply = {
        "space_key": embedded.model,
        "dimension": embedded.vectors.shape[1],
        "kept_indices": kept,
        "embeddings": list(unit(embedded.vectors)),
    }
    return json_response(reply)
