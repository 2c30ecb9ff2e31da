"""Routes for embedding a collection again with another encoder. serving/reembedder.py does the work."""

from typing import Annotated

from fastapi import Query, Request
from fastapi.responses import Response

from serving import errors
from serving.api.collections import ModelId, Name
from serving.api.openapi import new_router
from serving.api.request import Ready, requested_encoder
from serving.api.response import json_response
from serving.collection.index import Index
from serving.collection.reembedding import Progress
from serving.errors import documented
from serving.protocol import replies
from serving.protocol.queries import ALIAS

ERRORS = documented(400, 404, 429, 503, 507)

router = new_router("/collections")


@router.put("/{name}/reembedding", status_code=202, response_model=replies.Reembedding, responses=ERRORS)
async def reembed(
    request: Request,
    name: Name,
    engine: Ready,
    model: ModelId = ALIAS,
    without_skipped: Annotated[
        bool,
        Query(description="Also use the new encoder if some items have no original, or one that cannot be read."),
    ] = False,
) -> Response:
    """Embed the items of a collection again with another encoder, in the background; GET returns the progress.

    The pictures are those that were kept when they were uploaded, and files in folders that a command was given. Until
    every item is embedded, the collection uses the encoder that it has; if that is not served any more, searches
    estimate the vectors that are missing. If some items have to be skipped, the state becomes `incomplete`, and the
    collection keeps its encoder, unless a request says `without_skipped`. A call goes on where an earlier one was
    stopped.
    """
    work = await engine.library.reembedding(name, requested_encoder(model))
    progress = await engine.library.read(work.start, without_skipped)
    request.app.state.reembedder.wake()
    return json_response(_reply(work.index, progress), 202)


@router.get("/{name}/reembedding", response_model=replies.Reembedding, responses=ERRORS)
async def reembedding(name: Name, engine: Ready, model: ModelId = ALIAS) -> Response:
    """Get the progress of embedding a collection again with this encoder, by default with the service's default one."""
    work = await engine.library.reembedding(name, requested_encoder(model))
    return json_response(_reply(work.index, await engine.library.read(work.progress)))


@router.delete("/{name}/reembedding", response_model=replies.Reembedding, responses=ERRORS)
async def stop_reembedding(name: Name, engine: Ready, model: ModelId = ALIAS) -> Response:
    """Stop embedding a collection again. What is embedded by then is kept, so that it can go on later."""
    work = await engine.library.reembedding(name, requested_encoder(model))
    return json_response(_reply(work.index, await engine.library.read(work.cancel)))


def _reply(index: Index, progress: Progress) -> replies.Reembedding:
    return replies.Reembedding(
        model=index.encoder_id,
        state=progress.state,
        done=progress.done,
        total=progress.total,
        skipped=progress.skipped,
        first_skipped=list(progress.first_skipped),
        problem=None if progress.problem is None else errors.without_place(progress.problem, index.store.uri),
    )
