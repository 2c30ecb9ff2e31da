"""The routes that compare the items of a collection: which to label first, labels for others, odd items, what another
collection lacks, and a division into parts. None of them changes anything, and one request is answered at a time."""

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response

from serving.api.collections import Name, only_json, parse_filter
from serving.api.openapi import inline_schema, new_router
from serving.api.request import JSON, CancelOnDisconnect, Ready, validated
from serving.api.response import json_response
from serving.errors import documented
from serving.protocol.filters import Filter
from serving.protocol.queries import CoverageQuery, OddQuery, PickQuery, SplitQuery, SuggestQuery
from serving.protocol.replies import Coverage, Odd, Picked, Reply, Split, Suggested

router = new_router("/collections")

Q = TypeVar("Q", PickQuery, SuggestQuery, OddQuery, CoverageQuery, SplitQuery)


def route(name: str, query: type[Q], reply: type[Reply]) -> Callable[[Callable], Callable]:
    """Decorates the function of `POST /collections/{name}/NAME`, whose body may be empty."""
    return router.post(
        f"/{{name}}/{name}",
        openapi_extra={"requestBody": {"content": {JSON: {"schema": inline_schema(query)}}}},
        response_model=reply,
        responses=documented(400, 404, 409, 413, 415, 429, 503),
    )


async def answered(
    request: Request, name: str, kind: type[Q], find: Callable[[str, Q, Filter | None], Awaitable[Any]]
) -> Response:
    """Answers with find(name of the collection, query, its filter). Raises Refusal."""
    query = validated(kind, await only_json(request) or b"{}")
    async with CancelOnDisconnect(request):
        return json_response(await find(name, query, parse_filter(query.filter)))


@route("pick", PickQuery, Picked)
async def pick(request: Request, name: Name, engine: Ready) -> Response:
    """Pick the items without a label that say most about all items, to be labelled first. Items like a labelled one are
    not picked. One request is answered at a time; 100,000 items take some seconds."""
    return await answered(request, name, PickQuery, engine.comparisons.pick)


@route("suggest", SuggestQuery, Suggested)
async def suggest(request: Request, name: Name, engine: Ready) -> Response:
    """Suggest labels for items without one: those of the nearest items with a label, the surest first. Nothing is
    changed. One request is answered at a time."""
    return await answered(request, name, SuggestQuery, engine.comparisons.suggest)


@route("odd", OddQuery, Odd)
async def odd(request: Request, name: Name, engine: Ready) -> Response:
    """List the odd items: outliers, labels that may be wrong, or broken pictures, the most odd first. Nothing is
    changed. One request is answered at a time. Comparing 100,000 items takes about two minutes on two cores."""
    return await answered(request, name, OddQuery, engine.comparisons.odd)


@route("coverage", CoverageQuery, Coverage)
async def coverage(request: Request, name: Name, engine: Ready) -> Response:
    """List the items that another collection, or another part of this one, does not cover, the farthest first. An item
    is covered if it is as near to one of the others as that one's third-nearest neighbour is. Nothing is changed. One
    request is answered at a time."""

    async def find(name: str, query: CoverageQuery, where: Filter | None) -> Coverage:
        return await engine.comparisons.coverage(name, query, where, parse_filter(query.by_filter, "by_filter"))

    return await answered(request, name, CoverageQuery, find)


@route("split", SplitQuery, Split)
async def split(request: Request, name: Name, engine: Ready) -> Response:
    """Divide the items into parts such as train and test, with near-duplicates in the same part and about the same
    share of each label in every part. Nothing is changed: the answer has the ids of each part. The same items and seed
    give the same parts. One request is answered at a time. Near-duplicates are looked for first if they are not
    known."""
    return await answered(request, name, SplitQuery, engine.comparisons.split)
