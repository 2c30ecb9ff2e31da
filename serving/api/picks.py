"""The routes that pick items to be labelled first, suggest labels, and list odd items."""

from fastapi import Request
from fastapi.responses import Response

from serving.api.collections import Name, only_json, parse_filter
from serving.api.openapi import inline_schema, new_router
from serving.api.request import JSON, CancelOnDisconnect, Ready, validated
from serving.api.response import json_response
from serving.errors import documented
from serving.protocol.queries import OddQuery, PickQuery, SuggestQuery
from serving.protocol.replies import Odd, Picked, Suggested

router = new_router("/collections")


@router.post(
    "/{name}/pick",
    openapi_extra={"requestBody": {"content": {JSON: {"schema": inline_schema(PickQuery)}}}},
    response_model=Picked,
    responses=documented(400, 404, 409, 413, 415, 429, 503),
)
async def pick(request: Request, name: Name, engine: Ready) -> Response:
    """Pick the items without a label that say most about all items, to be labelled first. Items like a labelled one are
    not picked. One request is answered at a time; 100,000 items take some seconds."""
    body = await only_json(request)
    query = validated(PickQuery, body or b"{}")
    async with CancelOnDisconnect(request):
        return json_response(await engine.library.pick(name, query, parse_filter(query.filter)))


@router.post(
    "/{name}/suggest",
    openapi_extra={"requestBody": {"content": {JSON: {"schema": inline_schema(SuggestQuery)}}}},
    response_model=Suggested,
    responses=documented(400, 404, 409, 413, 415, 429, 503),
)
async def suggest(request: Request, name: Name, engine: Ready) -> Response:
    """Suggest labels for items without one: those of the nearest items with a label, the surest first. Nothing is
    changed. One request is answered at a time."""
    body = await only_json(request)
    query = validated(SuggestQuery, body or b"{}")
    async with CancelOnDisconnect(request):
        return json_response(await engine.library.suggest(name, query, parse_filter(query.filter)))


@router.post(
    "/{name}/odd",
    openapi_extra={"requestBody": {"content": {JSON: {"schema": inline_schema(OddQuery)}}}},
    response_model=Odd,
    responses=documented(400, 404, 409, 413, 415, 429, 503),
)
async def odd(request: Request, name: Name, engine: Ready) -> Response:
    """List the odd items: outliers, labels that may be wrong, or broken pictures, the most odd first. Nothing is
    changed. One request is answered at a time. Comparing 100,000 items takes about two minutes on two cores."""
    body = await only_json(request)
    query = validated(OddQuery, body or b"{}")
    async with CancelOnDisconnect(request):
        return json_response(await engine.library.odd(name, query, parse_filter(query.filter)))
