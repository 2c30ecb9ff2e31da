"""The route that puts items of one collection into another."""

from fastapi import Request
from fastapi.responses import Response

from serving.api.collections import Name, only_json
from serving.api.openapi import inline_schema, new_router
from serving.api.request import JSON, CancelOnDisconnect, Ready, check_count, validated
from serving.api.response import json_response
from serving.errors import documented
from serving.protocol.queries import Copies
from serving.protocol.replies import Copied

router = new_router("/collections")


@router.put(
    "/{name}/copies",
    openapi_extra={"requestBody": {"required": True, "content": {JSON: {"schema": inline_schema(Copies)}}}},
    response_model=Copied,
    responses=documented(400, 404, 409, 413, 415, 429, 503, 507),
)
async def copy_items(request: Request, name: Name, engine: Ready) -> Response:
    """Put items of another collection into this one, with their vectors, thumbnails and kept originals. They stay in
    the other one. The first items create the collection."""
    asked = validated(Copies, await only_json(request))
    check_count(len(asked.ids), request.app.state.limits.rows, "ids")
    async with CancelOnDisconnect(request):
        return json_response(await engine.library.copy(asked.collection, asked.ids, name))
