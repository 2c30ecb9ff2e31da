"""Routes of the collections and their items. serving/library.py does the work."""

import errno
import hashlib
import json
from typing import Annotated

import numpy as np
from fastapi import Path, Query, Request
from fastapi.responses import Response
from starlette.datastructures import UploadFile

from serving import errors
from serving.api.openapi import form, images_body, inline_schema, new_router, query_parameters
from serving.api.request import JSON, URLENCODED, CancelOnDisconnect, Ready, binary, requested_encoder, validated
from serving.api.response import json_response
from serving.api.upload import FORM, media_type, read_file, read_images
from serving.collection.index import WrongEncoder
from serving.collection.problems import BadItem, IndexProblem, TooFewItems, UnknownKey
from serving.errors import DiskFull, Malformed, NotFound, NotReady, Refusal, TooLarge, UnsupportedType, documented
from serving.inference.decode import Upload
from serving.protocol import queries
from serving.protocol.filters import Filter, FilterProblem
from serving.protocol.queries import (
    ALIAS,
    Ids,
    ItemFacts,
    ItemFactsForm,
    ItemFactsQuery,
    SearchForm,
    SearchQuery,
    VectorRows,
)
from serving.protocol.replies import (
    Collection,
    Collections,
    Deleted,
    Item,
    Items,
    ItemWithVector,
    Keys,
    Match,
    Matches,
    Put,
    PutItem,
)

CACHE_FOREVER = "private, max-age=31536000, immutable"
REVALIDATE = "private, no-cache"

router = new_router("/collections")

Name = Annotated[str, Path(pattern=queries.NAME, description="Name of the collection.")]
ItemId = Annotated[str, Path(pattern=queries.ID, description="Id of the item.")]
ModelId = Annotated[str, Query(description=queries.MODEL)]


# Collections ----------------------------------------------------------------------------------------------------------


@router.get("", response_model=Collections, responses=documented(429, 503))
async def collections(engine: Ready) -> Response:
    """List the collections. One that several encoders have embedded is listed once for each of them."""
    return json_response(Collections(await engine.library.describe_all()))


@router.get("/{name}", response_model=Collection, responses=documented(400, 404, 409, 429, 503))
async def collection(name: Name, engine: Ready, model: ModelId = ALIAS) -> Response:
    """Get a collection as one encoder has embedded it."""
    index = engine.library.index(name, requested_encoder(model))
    return json_response(await engine.library.describe(index))


@router.get("/{name}/keys", response_model=Keys, responses=documented(400, 404, 409, 429, 503))
async def keys(name: Name, engine: Ready, model: ModelId = ALIAS) -> Response:
    """List the keys that items can be filtered by, each with its most common values: the label and the metadata.

    Items can also be filtered by name, path and size, which are not listed.
    """
    library = engine.library
    index = library.index(name, requested_encoder(model))
    summary = await library.read(index.summary)
    if not summary:
        await library.describe(index)  # 404 if there is no such collection
    return json_response(Keys(summary))


# Adding and deleting items --------------------------------------------------------------------------------------------


@router.put(
    "/{name}/items",
    openapi_extra={
        "parameters": query_parameters(ItemFactsQuery),
        "requestBody": {
            "required": True,
            "content": images_body(ItemFactsForm) | {JSON: {"schema": inline_schema(VectorRows)}},
        },
    },
    response_model=Put,
    responses=documented(400, 404, 409, 413, 415, 422, 429, 503, 507),
)
async def put_items(request: Request, name: Name, engine: Ready) -> Response:
    """Add items, or replace those with the same ids. When this returns, either all items are stored durably or none.

    Send pictures in the same way as to /embed: they are embedded, and a thumbnail of each is stored. To describe them,
    use query parameters if the body is a single picture; in a form, the field `metadata` is a JSON list with one object
    per image, {} for no description. Or send JSON with vectors that the same encoder has computed elsewhere. The first
    items create the collection.
    """
    library, limits = engine.library, request.app.state.limits
    if media_type(request) == JSON:
        rows = validated(VectorRows, await request.body())
        _check_count(len(rows.items), limits.rows, "items")
        async with CancelOnDisconnect(request):
            stored = await library.put_rows(name, rows.items, requested_encoder(rows.model))
    else:
        engine.refuse_when_full()
        query = validated(ItemFactsQuery, dict(request.query_params))
        uploads = await read_images(request, limits.images)
        facts = await _read_facts(request, query, uploads)
        async with CancelOnDisconnect(request):
            stored = await library.put(name, uploads, facts, requested_encoder(query.model))
        request.app.state.metrics.record_embedding(len(uploads), stored.times)
    request.state.facts = {"items": len(stored.ids), "model": stored.model}
    items = [PutItem(id, new) for id, new in zip(stored.ids, stored.new, strict=True)]
    return json_response(Put(stored.model, items))


async def _read_facts(request: Request, query: ItemFactsQuery, uploads: list[Upload]) -> list[ItemFacts]:
    """Returns the facts that the request gives about each image. Raises Malformed."""
    facts = query.model_dump(exclude={"model"}, exclude_none=True)
    if facts:
        field = next(iter(facts))
        if media_type(request) == FORM:
            raise Malformed(f"{field}: describe the images of a form in its field metadata", field)
        if len(uploads) > 1:
            raise Malformed(f"{field}: describes one image, and the request has {len(uploads)}", field)
    if media_type(request) != FORM:
        return [ItemFacts(**facts) for _ in uploads]
    fields = await request.form()  # already parsed by read_images
    metadata = validated(ItemFactsForm, {"metadata": text} if (text := fields.get("metadata")) else {}).metadata
    if metadata is None:
        return [ItemFacts() for _ in uploads]
    if len(metadata) != len(uploads):
        raise Malformed(f"metadata: describes {len(metadata)} images, and the request has {len(uploads)}", "metadata")
    return metadata


@router.delete(
    "/{name}/items",
    openapi_extra={"requestBody": {"content": {JSON: {"schema": inline_schema(Ids)}}}},
    response_model=Deleted,
    responses=documented(400, 404, 409, 413, 415, 429, 503, 507),
)
async def delete_items(
    request: Request,
    name: Name,
    engine: Ready,
    id: Annotated[list[str] | None, Query(description="Id of an item, instead of a body; can be repeated.")] = None,
    model: ModelId = ALIAS,
) -> Response:
    """Delete items by their ids, which are in the body or in the query. Returns the ids of those that existed."""
    body = await request.body()
    if body and id:
        raise Malformed("id: send the ids in the body or in the query, not in both", "id")
    if body and media_type(request) not in (JSON, ""):
        raise UnsupportedType(f"send the ids as {JSON}, not as {media_type(request)[:100]}")
    ids = validated(Ids, body if body else {"ids": id or []}).ids
    _check_count(len(ids), request.app.state.limits.rows, "ids")
    async with CancelOnDisconnect(request):
        deleted = await engine.library.delete(name, ids, requested_encoder(model))
    return json_response(Deleted(deleted))


@router.delete("/{name}/items/{id}", response_model=Deleted, responses=documented(400, 404, 409, 429, 503, 507))
async def delete_item(name: Name, id: ItemId, engine: Ready, model: ModelId = ALIAS) -> Response:
    """Delete an item."""
    if not await engine.library.delete(name, [id], requested_encoder(model)):
        raise _no_item(id, name)
    return json_response(Deleted([id]))


def _check_count(count: int, most: int, field: str) -> None:
    if count > most:
        raise TooLarge(f"{field}: the request has {count}, and at most {most} are allowed", field)


# Reading items --------------------------------------------------------------------------------------------------------


@router.get("/{name}/items", response_model=Items, responses=documented(400, 404, 409, 429, 503))
async def items(
    name: Name,
    engine: Ready,
    limit: Annotated[int, Query(ge=1, le=1000, description="Number of items on a page.")] = 50,
    offset: Annotated[int, Query(ge=0, lt=2**32, description="Number of items to skip.")] = 0,
    filter: Annotated[str | None, Query(description="A filter as JSON, written like the `filter` of a search.")] = None,
    model: ModelId = ALIAS,
) -> Response:
    """List the items of a collection that match the filter, a page at a time."""
    library, where = engine.library, _parse_filter(_filter_json(filter))
    index = library.index(name, requested_encoder(model))
    count = await library.read(index.count, where)
    page = await library.read(index.page, limit, offset, where) if offset < count else []
    if not count:
        await library.describe(index)  # 404 if there is no such collection
    return json_response(Items(count, page))


@router.get("/{name}/items/{id}", response_model=ItemWithVector, responses=documented(400, 404, 409, 429, 503))
async def item(
    name: Name,
    id: ItemId,
    engine: Ready,
    vector: Annotated[bool, Query(description="Also return its vector, scaled to unit length.")] = False,
    model: ModelId = ALIAS,
) -> Response:
    """Get an item."""
    index = engine.library.index(name, requested_encoder(model))
    row = await engine.library.read(index.get, id)
    if row is None:
        raise _no_item(id, name)
    item, unit_vector = row
    return json_response(ItemWithVector(**vars(item), vector=unit_vector.astype(np.float64)) if vector else item)


@router.get(
    "/{name}/items/{id}/thumbnail",
    response_class=Response,
    responses={
        200: {"content": binary("image/jpeg")},
        304: {"description": "The thumbnail has the ETag given in If-None-Match."},
        **documented(400, 404, 409, 429, 503),
    },
)
async def thumbnail(request: Request, name: Name, id: ItemId, engine: Ready, model: ModelId = ALIAS) -> Response:
    """Get an item's thumbnail, a JPEG of at most 256 px on its longest side."""
    index = engine.library.index(name, requested_encoder(model))
    jpeg = await engine.library.read(index.read_thumbnail, id)
    if jpeg is None:
        raise NotFound(f"no item {id} with a thumbnail is in the collection {name}", "id")
    tag = f'"{hashlib.sha256(jpeg).hexdigest()[:32]}"'
    is_content_hash = len(id) == 32 and set(id) <= set("0123456789abcdef")  # the picture of such an id never changes
    headers = {"ETag": tag, "Cache-Control": CACHE_FOREVER if is_content_hash else REVALIDATE}
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(jpeg, media_type="image/jpeg", headers=headers)


@router.get(
    "/{name}/items/{id}/original",
    response_class=Response,
    responses={200: {"content": binary("image/jpeg")}, **documented(400, 404, 409, 429, 503)},
)
async def original(request: Request, name: Name, id: ItemId, engine: Ready, model: ModelId = ALIAS) -> Response:
    """Get the picture that an item was made from, upright, as a JPEG of at most 2,048 px on its longer side.

    404 if the service cannot read its file, for instance because it came in an upload or from an archive, or if the
    file is no longer the one that was indexed.
    """
    async with CancelOnDisconnect(request):
        jpeg = await engine.library.original(name, id, requested_encoder(model))
    return Response(jpeg, media_type="image/jpeg", headers={"Cache-Control": CACHE_FOREVER})  # the id is its hash


# Searching ------------------------------------------------------------------------------------------------------------


@router.post(
    "/{name}/search",
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {JSON: {"schema": inline_schema(SearchQuery)}} | form("image", SearchForm, required=False),
        }
    },
    response_model=Matches,
    responses=documented(400, 404, 409, 413, 415, 422, 429, 503),
)
async def search(request: Request, name: Name, engine: Ready) -> Response:
    """Find the k items most similar to the positive examples and least similar to the negative ones, nearest first.

    An example is an image (in a form, a file in `image`), a vector, or the id of an item; items used as examples are
    not returned. The search vector is the mean direction of the positive examples minus that of the negative ones
    (Rocchio).
    """
    kind, images = media_type(request), []
    if kind == JSON:
        query = validated(SearchQuery, await request.body())
    elif kind in (FORM, URLENCODED, ""):
        engine.refuse_when_full()
        async with request.form(max_files=queries.MAX_EXAMPLES) as parts:
            uploads = parts.getlist("image")
            fields = {field: value for field, value in parts.items() if field != "image"}
            for i, upload in enumerate(uploads):
                images.append(await read_file("image" if len(uploads) == 1 else f"image[{i}]", upload))
            for field, value in fields.items():
                if isinstance(value, UploadFile):
                    raise Malformed(f"{field}: must not be a file; send files in the field image", field)
        query = validated(SearchForm, fields)
    else:
        raise UnsupportedType(f"send a search as {JSON} or {FORM}, not as {kind[:100]}")
    refuse_two_limits(query.threshold, query.closer_than)
    where, encoder = _parse_filter(query.filter), requested_encoder(query.model)
    async with CancelOnDisconnect(request):
        found = await engine.library.search(name, query, images, where, encoder)
    results = [match(item, cosine, closer_than) for item, cosine, closer_than in found.results]
    return json_response(Matches(found.model, results, found.threshold))


def match(item: Item, cosine: float, closer_than: float | None) -> Match:
    return Match(**vars(item), similarity=round(cosine, 6), closer_than=closer_than)


def refuse_two_limits(threshold: float | None, closer_than: float | None) -> None:
    """Raises Malformed if both are given."""
    if threshold is not None and closer_than is not None:
        raise Malformed("closer_than: give either threshold or closer_than, not both", "closer_than")


def _filter_json(text: str | None) -> dict[str, object] | None:
    if text is None:
        return None
    try:
        condition = json.loads(text)
    except (ValueError, RecursionError):
        condition = None
    if not isinstance(condition, dict):
        raise Malformed('filter: must be JSON such as {"label": "shirt"}', "filter")
    return condition


def _parse_filter(condition: dict[str, object] | None) -> Filter | None:
    if condition is None:
        return None
    try:
        return Filter.parse(condition)
    except FilterProblem as error:
        raise Malformed(f"filter: {error}", "filter") from error


def _no_item(id: str, name: str) -> NotFound:
    return NotFound(f"no item {id} is in the collection {name}", "id")


# Errors of the index --------------------------------------------------------------------------------------------------


def refusal(problem: IndexProblem) -> Refusal:
    """Returns the HTTP error for a problem of the index."""
    if isinstance(problem, WrongEncoder):
        return errors.Conflict(str(problem), "name")
    if isinstance(problem, UnknownKey):
        return Malformed(f"filter: {problem}", "filter")
    if isinstance(problem, TooFewItems):
        return Malformed(f"closer_than: {problem}", "closer_than")
    if isinstance(problem, BadItem):
        return Malformed(str(problem))
    return DiskFull(str(problem)) if _disk_is_full(problem) else NotReady(str(problem))


def _disk_is_full(problem: IndexProblem) -> bool:
    """LanceDB's errors have no errno, only a message."""
    cause = problem.__cause__
    if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return any(words in str(cause) for words in ("No space left on device", "Disk quota exceeded", "os error 28"))
