"""Routes of the collections and their items. serving/library.py and serving/searches.py do the work."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import numpy as np
from fastapi import Path, Query, Request
from fastapi.responses import Response
from starlette.datastructures import UploadFile

from serving import errors
from serving.api.openapi import form, images_body, inline_schema, new_router, query_parameters
from serving.api.request import (
    JSON,
    URLENCODED,
    CancelOnDisconnect,
    Ready,
    binary,
    check_count,
    json_body,
    requested_encoder,
    validated,
    validated_rows,
)
from serving.api.response import json_response
from serving.api.upload import FORM, media_type, read_file, read_images, refuse_twice
from serving.collection.index import WrongEncoder
from serving.collection.items import is_content_id
from serving.collection.problems import BadItem, BadName, IndexProblem, NothingToUndo, TooFewItems, UnknownKey
from serving.engine import Engine
from serving.errors import DiskFull, Malformed, NotFound, NotReady, Refusal, UnsupportedType, documented
from serving.inference.decode import Upload
from serving.protocol import queries
from serving.protocol.filters import Filter, FilterProblem
from serving.protocol.queries import (
    ALIAS,
    FilterText,
    Ids,
    ItemChanges,
    ItemFacts,
    ItemFactsForm,
    ItemFactsQuery,
    Searches,
    SearchForm,
    SearchQuery,
    VectorRows,
)
from serving.protocol.replies import (
    Changed,
    Changes,
    Collection,
    Collections,
    Deleted,
    Dropped,
    Item,
    Items,
    ItemWithVector,
    Keys,
    ManyMatches,
    Match,
    Matches,
    Put,
    PutItem,
    Undone,
    Verified,
)
from serving.searches import Found, Search

CACHE_FOREVER = "private, max-age=31536000, immutable"
REVALIDATE = "private, no-cache"
NOT_MODIFIED = {"description": "The picture has the ETag given in If-None-Match."}

router = new_router("/collections")

Name = Annotated[str, Path(pattern=queries.NAME, description="Name of the collection.")]
NEWEST = "newest"
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
    return json_response(await engine.library.describe(index, measured=True))


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


@router.put("/{name}", response_model=Collection, responses=documented(400, 404, 409, 429, 503, 507))
async def create_collection(name: Name, engine: Ready, model: ModelId = ALIAS) -> Response:
    """Create a collection without items, unless it exists. Adding the first items creates it too."""
    return json_response(await engine.library.create(name, requested_encoder(model)))


@router.delete("/{name}", response_model=Dropped, responses=documented(400, 404, 429, 503, 507))
async def delete_collection(name: Name, engine: Ready) -> Response:
    """Delete a collection with all that belongs to it, of all encoders. This cannot be undone."""
    return json_response(Dropped(name, await engine.library.drop(name)))


@router.get("/{name}/changes", response_model=Changes, responses=documented(400, 404, 409, 429, 503))
async def changes(name: Name, engine: Ready) -> Response:
    """List what was changed in a collection, the newest first, and which change would be undone next."""
    return json_response(Changes(await engine.library.changes(name)))


@router.delete("/{name}/changes/{change}", response_model=Undone, responses=documented(400, 404, 409, 429, 503, 507))
async def undo(
    name: Name,
    engine: Ready,
    change: Annotated[
        str,
        Path(
            pattern=queries.ID,
            description="Id of the change, which may also be an undo; or `newest`, the newest not undone yet.",
        ),
    ],
) -> Response:
    """Undo a change, for all encoders and with the items' files.

    A change is what one command or one request did. What others have changed in the same items since then stays.
    Requests that arrive at the same time can share a commit; they are then one change.
    """
    return json_response(await engine.library.undo(name, None if change == NEWEST else change))


@router.get("/{name}/problems", response_model=Verified, responses=documented(400, 404, 409, 429, 503))
async def verify(name: Name, engine: Ready, model: ModelId = ALIAS) -> Response:
    """Read the whole collection and say what is damaged. One check runs at a time."""
    library = engine.library
    return json_response(Verified(await library.verify(library.index(name, requested_encoder(model)))))


# Adding, changing and deleting items ----------------------------------------------------------------------------------


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

    Send pictures in the same way as to /embed: they are embedded, and stored with a thumbnail each. To describe them,
    use query parameters if the body is a single picture; in a form, the field `metadata` is a JSON list with one object
    per image, {} for no description. Or send JSON with vectors that the same encoder has computed elsewhere. The first
    items create the collection.

    An id that is there twice is refused. Of two pictures that are the same file and have no id the last counts, and
    `new` is false for it.
    """
    library, limits = engine.library, request.app.state.limits
    if media_type(request) == JSON:
        rows = await validated_rows(await json_body(request), limits.rows)
        async with CancelOnDisconnect(request):
            stored = await library.put_rows(name, rows.items, requested_encoder(rows.model))
    else:
        engine.refuse_when_full()
        query = validated(ItemFactsQuery, dict(request.query_params))
        uploads = await read_images(request, limits.images, ["metadata"])
        facts = await _read_facts(request, query, uploads)
        async with CancelOnDisconnect(request):
            stored = await library.put(name, uploads, facts, requested_encoder(query.model))
        request.app.state.metrics.record_embedding(len(uploads), stored.times)
    request.state.facts = {"items": len(stored.ids), "model": stored.model}
    items = [PutItem(id, new) for id, new in zip(stored.ids, stored.new, strict=True)]
    return json_response(Put(stored.model, items, stored.changes))


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


@router.patch(
    "/{name}/items",
    openapi_extra={"requestBody": {"required": True, "content": {JSON: {"schema": inline_schema(ItemChanges)}}}},
    response_model=Changed,
    responses=documented(400, 404, 409, 413, 415, 429, 503, 507),
)
async def change_items(request: Request, name: Name, engine: Ready) -> Response:
    """Change names, labels, paths and metadata of items, for all encoders. Their pictures and vectors stay."""
    items = validated(ItemChanges, await only_json(request)).items
    check_count(len(items), request.app.state.limits.rows, "items")
    async with CancelOnDisconnect(request):
        return json_response(await engine.library.change(name, items))


async def only_json(request: Request) -> bytes:
    if media_type(request) not in (JSON, ""):
        raise UnsupportedType(f"send the body as {JSON}, not as {media_type(request)[:100]}")
    return await json_body(request)


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
    """Delete items by their ids, which are in the body or in the query, from all encoders' tables. Returns the ids of
    those that existed."""
    body = await json_body(request)
    if body and id:
        raise Malformed("id: send the ids in the body or in the query, not in both", "id")
    if body and media_type(request) not in (JSON, ""):
        raise UnsupportedType(f"send the ids as {JSON}, not as {media_type(request)[:100]}")
    ids = validated(Ids, body if body else {"ids": id or []}).ids
    check_count(len(ids), request.app.state.limits.rows, "ids")
    async with CancelOnDisconnect(request):
        return json_response(await engine.library.delete(name, ids, requested_encoder(model)))


@router.delete("/{name}/items/{id}", response_model=Deleted, responses=documented(400, 404, 409, 429, 503, 507))
async def delete_item(name: Name, id: ItemId, engine: Ready, model: ModelId = ALIAS) -> Response:
    """Delete an item from all encoders' tables."""
    deleted = await engine.library.delete(name, [id], requested_encoder(model))
    if not deleted.deleted:
        raise _no_item(id, name)
    return json_response(deleted)


# Reading items --------------------------------------------------------------------------------------------------------


@router.get("/{name}/items", response_model=Items, responses=documented(400, 404, 409, 429, 503))
async def items(
    name: Name,
    engine: Ready,
    limit: Annotated[int, Query(ge=1, le=1000, description="Number of items on a page.")] = 50,
    offset: Annotated[int, Query(ge=0, lt=2**32, description="Number of items to skip.")] = 0,
    filter: Annotated[str | None, Query(description="A filter as JSON, written like the `filter` of a search.")] = None,
    after: Annotated[
        str | None,
        Query(
            pattern=queries.ID_OR_EMPTY,
            description="Instead of `offset`: the answer's `next`, at first an empty text. Pages are then in the order "
            "of the ids, and have each item once, whatever is added and deleted meanwhile.",
        ),
    ] = None,
    model: ModelId = ALIAS,
) -> Response:
    """List the items of a collection that match the filter, a page at a time."""
    if after is not None and offset:
        raise Malformed("after: give either after or offset, not both", "after")
    library, where = engine.library, _filter_in(filter)
    index = library.index(name, requested_encoder(model))
    count = await library.read(index.count, where)
    if not count:
        await library.describe(index)  # 404 if there is no such collection
    if after is not None:
        page = await library.read(index.page_after, after, limit, where)
        return json_response(Items(count, page, page[-1].id if len(page) == limit else None))
    page = await library.read(index.page, limit, offset, where) if offset < count else []
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
        304: NOT_MODIFIED,
        **documented(400, 404, 409, 429, 503),
    },
)
async def thumbnail(request: Request, name: Name, id: ItemId, engine: Ready, model: ModelId = ALIAS) -> Response:
    """Get an item's thumbnail, a JPEG of at most 256 px on its longest side."""
    index = engine.library.index(name, requested_encoder(model))
    jpeg = await engine.library.read(index.read_thumbnail, id)
    if jpeg is None:
        raise NotFound(f"no item {id} with a thumbnail is in the collection {name}", "id")
    return _jpeg(request, id, jpeg)


@router.get(
    "/{name}/items/{id}/original",
    response_class=Response,
    responses={200: {"content": binary("image/jpeg")}, 304: NOT_MODIFIED, **documented(400, 404, 409, 429, 503)},
)
async def original(request: Request, name: Name, id: ItemId, engine: Ready, model: ModelId = ALIAS) -> Response:
    """Get the picture that an item was made from, upright, as a JPEG of at most 2,048 px on its longer side.

    404 if the service cannot read its file, for instance because it came from an archive or was not kept, or if the
    file is no longer the one that was indexed.
    """
    async with CancelOnDisconnect(request):
        jpeg = await engine.library.original(name, id, requested_encoder(model))
    return _jpeg(request, id, jpeg)


def _jpeg(request: Request, id: str, jpeg: bytes) -> Response:
    """Returns an item's picture, or 304 if the client has it."""
    tag = f'"{hashlib.sha256(jpeg).hexdigest()[:32]}"'
    headers = {"ETag": tag, "Cache-Control": CACHE_FOREVER if is_content_id(id) else REVALIDATE}
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(jpeg, media_type="image/jpeg", headers=headers)


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
    responses=documented(400, 404, 409, 413, 415, 422, 429, 501, 503),
)
async def search(request: Request, name: Name, engine: Ready) -> Response:
    """Find the k items most similar to the positive examples and least similar to the negative ones, nearest first.

    An example is an image (in a form, a file in `image`), a vector, or the id of an item; items used as examples are
    not returned. With an encoder that reads text, `text` is a positive example too, or the only one. The search vector
    is the mean direction of the positive examples minus that of the negative ones (Rocchio).
    """
    kind, images = media_type(request), []
    if kind == JSON:
        query = validated(SearchQuery, await json_body(request))
    elif kind in (FORM, URLENCODED, ""):
        engine.refuse_when_full()
        async with request.form(max_files=queries.MAX_EXAMPLES) as parts:
            refuse_twice(field for field, _ in parts.multi_items() if field != "image")
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
    async with CancelOnDisconnect(request):
        [found] = await engine.searches.find([await _prepare(engine, name, query, images)])
    return json_response(_matches(found))


@router.post(
    "/{name}/searches",
    openapi_extra={"requestBody": {"required": True, "content": {JSON: {"schema": inline_schema(Searches)}}}},
    response_model=ManyMatches,
    responses=documented(400, 404, 409, 413, 415, 422, 429, 501, 503),
)
async def search_many(request: Request, name: Name, engine: Ready) -> Response:
    """Answer several searches by ids, vectors and text in one request. Those with the same filter and k are made
    together, which is faster than one request for each."""
    searches = validated(Searches, await only_json(request)).searches
    async with CancelOnDisconnect(request):
        prepared = []
        for i, query in enumerate(searches):
            with inside(f"searches[{i}]"):
                prepared.append(await _prepare(engine, name, query, []))
        try:
            found = await engine.searches.find(prepared)
        except IndexProblem:
            found = []
            for i, search in enumerate(prepared):  # to name the one that fails
                with inside(f"searches[{i}]"):
                    found += await engine.searches.find([search])
    return json_response(ManyMatches([_matches(one) for one in found]))


@contextmanager
def inside(part: str) -> Iterator[None]:
    """Makes errors about fields name this part of the request, in which the fields are: `searches[2].k` instead of `k`.
    Errors about the collection, or the state of the service, stay as they are."""
    try:
        yield
    except (Refusal, IndexProblem) as error:
        found = error if isinstance(error, Refusal) else refusal(error)
        if found.param in (None, "name"):
            raise
        message = found.detail if found.detail.startswith(found.param) else f"{found.param}: {found.detail}"
        raise type(found)(f"{part}.{message}", f"{part}.{found.param}") from error


async def _prepare(engine: Engine, name: str, query: SearchQuery, images: list[Upload]) -> Search:
    refuse_two_limits(query.threshold, query.closer_than)
    where, encoder = parse_filter(query.filter), requested_encoder(query.model)
    return await engine.searches.prepare(name, query, images, where, encoder)


def _matches(found: Found) -> Matches:
    results = [match(item, cosine, closer_than) for item, cosine, closer_than in found.results]
    return Matches(found.model, results, found.threshold, found.estimated)


def match(item: Item, cosine: float, closer_than: float | None) -> Match:
    return Match(**vars(item), similarity=round(cosine, 6), closer_than=closer_than)


def refuse_two_limits(threshold: float | None, closer_than: float | None) -> None:
    """Raises Malformed if both are given."""
    if threshold is not None and closer_than is not None:
        raise Malformed("closer_than: give either threshold or closer_than, not both", "closer_than")


def _filter_in(text: str | None) -> Filter | None:
    """Returns the filter of a query parameter. Raises Malformed."""
    return parse_filter(validated(FilterText, {} if text is None else {"filter": text}).filter)


def parse_filter(condition: dict[str, object] | None, field: str = "filter") -> Filter | None:
    """field  of the request, for messages. Raises Malformed."""
    if condition is None:
        return None
    try:
        return Filter.parse(condition)
    except FilterProblem as error:
        raise Malformed(f"{field}: {error}", field) from error


def _no_item(id: str, name: str) -> NotFound:
    return NotFound(f"no item {id} is in the collection {name}", "id")


# Errors of the index --------------------------------------------------------------------------------------------------


def refusal(problem: IndexProblem) -> Refusal:
    """Returns the HTTP error for a problem of the index."""
    if isinstance(problem, WrongEncoder):
        return errors.Conflict(str(problem), "name")
    if isinstance(problem, UnknownKey):
        return Malformed(f"filter: {problem}", "filter")
    if isinstance(problem, NothingToUndo):
        return NotFound(str(problem), "name")
    if isinstance(problem, TooFewItems):
        return Malformed(f"closer_than: {problem}", "closer_than")
    if isinstance(problem, BadItem):
        return Malformed(str(problem))
    if isinstance(problem, BadName):
        return Malformed(str(problem), "name")
    full = errors.disk_is_full(problem.__cause__)
    return DiskFull(str(problem)) if full else NotReady(str(problem))
