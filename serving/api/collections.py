"""The routes of the collections. The work is library.py's."""

import errno
import hashlib
import json
from typing import Annotated

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.datastructures import UploadFile

from serving import errors
from serving.api import answers
from serving.api.request import JSON, URLENCODED, CancelOnDisconnect, Ready, binary, requested_encoder, validated
from serving.api.upload import BYTES, FORM, media_type, read_file, read_images
from serving.collection.index import Item, WrongEncoder
from serving.collection.table import BadItem, IndexProblem, UnknownKey
from serving.errors import DiskFull, Malformed, NotFound, NotReady, Refusal, TooLarge, UnsupportedType, documented
from serving.inference.decode import Upload
from serving.library import Stored
from serving.protocol import pack, queries
from serving.protocol.filters import Filter, FilterProblem
from serving.protocol.queries import ALIAS, Facts, FactsForm, FactsQuery, Ids, Rows, SearchForm, SearchQuery

FOREVER = "private, max-age=31536000, immutable"
ASK_AGAIN = "private, no-cache"


def _name(route: APIRoute) -> str:
    return route.name


router = APIRouter(prefix="/collections", generate_unique_id_function=_name)

Name = Annotated[str, Path(pattern=queries.NAME, description="Of the collection.")]
ItemId = Annotated[str, Path(pattern=queries.ID)]
ModelId = Annotated[str, Query(description=queries.MODEL)]
Where = Annotated[str | None, Query(description="JSON, as a search's `filter`.")]


def schema(model: type[BaseModel]) -> dict:
    """Of JSON Schema, whole: nothing refers to anywhere else."""
    whole = model.model_json_schema()
    named = whole.pop("$defs", {})

    def inlined(part):
        if isinstance(part, list):
            return [inlined(one) for one in part]
        if not isinstance(part, dict):
            return part
        if "$ref" in part:
            return inlined(named[part["$ref"].rpartition("/")[2]])
        return {key: inlined(value) for key, value in part.items() if key != "discriminator"}

    return inlined(whole)


def _form(model: type[BaseModel], files: str, required: bool) -> dict:
    """A form of files, and of the model's fields."""
    fields = schema(model)
    fields["properties"][files] = {"type": "array", "items": {"type": "string", "format": "binary"}}
    return {"schema": fields | {"required": [files]} if required else fields}


# All of them, and one -------------------------------------------------------------------------------------------------


@router.get("", response_model=answers.Collections, responses=documented(429, 503))
async def collections(engine: Ready) -> Response:
    """What there is, for every encoder."""
    facts = await engine.library.all()
    return JSONResponse({"collections": [vars(one) for one in facts]})


@router.get("/{name}", response_model=answers.Collection, responses=documented(400, 404, 409, 429, 503))
async def collection(name: Name, engine: Ready, model: ModelId = ALIAS) -> Response:
    """A collection, as one encoder has embedded it."""
    index = engine.library.index(name, requested_encoder(model))
    return JSONResponse(vars(await engine.library.about(index)))


@router.get("/{name}/keys", response_model=answers.Keys, responses=documented(400, 404, 409, 429, 503))
async def keys(name: Name, engine: Ready, model: ModelId = ALIAS) -> Response:
    """What its items can be filtered by beside name, path and size: label and metadata, with the commonest values."""
    library = engine.library
    index = library.index(name, requested_encoder(model))
    found = await library.read(index.summary)
    if not found:
        await library.about(index)
    return JSONResponse({"keys": [vars(key) for key in found]})


# What is put in and taken out -----------------------------------------------------------------------------------------

PUT = {
    "openapi_extra": {
        "parameters": [
            {"name": field, "in": "query", "schema": facts} for field, facts in schema(FactsQuery)["properties"].items()
        ],
        "requestBody": {
            "required": True,
            "content": {
                FORM: _form(FactsForm, "images", required=True),
                JSON: {"schema": schema(Rows)},
                **binary("image/*", BYTES, pack.MEDIA_TYPE),
            },
        },
    },
    "response_model": answers.Put,
    "responses": documented(400, 404, 409, 413, 415, 422, 429, 503, 507),
}


@router.put("/{name}/items", **PUT)
async def put_items(request: Request, name: Name, engine: Ready) -> Response:
    """Add items, or replace those of the same ids. They are durable when this answers, all or none.

    Pictures are embedded and given a thumbnail. They come as to /embed: a form's files in `images`, a picture as it is
    (with the facts of it in the query) or a pack. `metadata` is, beside a form's images, JSON: a list with the facts of
    each, {} where there are none. As JSON come vectors that the same encoder has made elsewhere. The first items that
    are put into a collection make it.
    """
    library, limits = engine.library, request.app.state.limits
    if media_type(request) == JSON:
        rows = validated(Rows, await request.body())
        _few(len(rows.items), limits.rows, "items")
        async with CancelOnDisconnect(request):
            stored = await library.put_rows(name, rows.items, requested_encoder(rows.model))
    else:
        engine.refuse_when_full()
        query = validated(FactsQuery, dict(request.query_params))
        files = await read_images(request, limits.images)
        facts = await _facts(request, query, files)
        async with CancelOnDisconnect(request):
            stored = await library.put(name, files, facts, requested_encoder(query.model))
        request.app.state.metrics.embedded(len(files), stored.times)
    request.state.facts = {"items": len(stored.ids), "model": stored.model}
    return JSONResponse(_stored(stored))


async def _facts(request: Request, query: FactsQuery, files: list[Upload]) -> list[Facts]:
    """Of each file. raises Malformed."""
    given = query.model_dump(exclude={"model"}, exclude_none=True)
    if media_type(request) != FORM:
        if given and len(files) > 1:
            raise Malformed(f"{next(iter(given))}: is of one image, and there are {len(files)}", next(iter(given)))
        return [Facts(**given) for _ in files]
    if given:
        raise Malformed(f"{next(iter(given))}: in a form this stands in its field metadata", next(iter(given)))
    fields = await request.form()  # which read_images has read
    facts = validated(FactsForm, {"metadata": text} if (text := fields.get("metadata")) else {}).metadata
    if facts is None:
        return [Facts() for _ in files]
    if len(facts) != len(files):
        raise Malformed(f"metadata is of {len(facts)} images, and there are {len(files)}", "metadata")
    return facts


def _stored(stored: Stored) -> dict:
    items = [{"id": id, "new": new} for id, new in zip(stored.ids, stored.new, strict=True)]
    return {"model": stored.model, "items": items}


DELETE = {
    "openapi_extra": {"requestBody": {"content": {JSON: {"schema": schema(Ids)}}}},
    "response_model": answers.Deleted,
    "responses": documented(400, 404, 409, 413, 415, 429, 503, 507),
}


@router.delete("/{name}/items", **DELETE)
async def delete_items(
    request: Request,
    name: Name,
    engine: Ready,
    id: Annotated[list[str] | None, Query(description="In place of a body; may be repeated.")] = None,
    model: ModelId = ALIAS,
) -> Response:
    """Take items out, by their ids in the body or in the query; says which of them were there."""
    body = await request.body()
    if body and id:
        raise Malformed("id: the ids stand in the body or in the query, not in both", "id")
    if body and media_type(request) not in (JSON, ""):
        raise UnsupportedType(f"ids come as {JSON}, not as {media_type(request)[:100]}")
    ids = validated(Ids, body if body else {"ids": id or []}).ids
    _few(len(ids), request.app.state.limits.rows, "ids")
    async with CancelOnDisconnect(request):
        deleted = await engine.library.delete(name, ids, requested_encoder(model))
    return JSONResponse({"deleted": deleted})


@router.delete("/{name}/items/{id}", response_model=answers.Deleted, responses=documented(400, 404, 409, 429, 503, 507))
async def delete_item(name: Name, id: ItemId, engine: Ready, model: ModelId = ALIAS) -> Response:
    """Take an item out."""
    if not await engine.library.delete(name, [id], requested_encoder(model)):
        raise _no_item(id, name)
    return JSONResponse({"deleted": [id]})


def _few(count: int, most: int, field: str) -> None:
    if count > most:
        raise TooLarge(f"{count} {field} in one request; at most {most} are taken", field)


# What is in it --------------------------------------------------------------------------------------------------------


@router.get("/{name}/items", response_model=answers.Items, responses=documented(400, 404, 409, 429, 503))
async def items(
    name: Name,
    engine: Ready,
    limit: Annotated[int, Query(ge=1, le=1000)] = 50,
    offset: Annotated[int, Query(ge=0, lt=2**32)] = 0,
    filter: Where = None,
    model: ModelId = ALIAS,
) -> Response:
    """The collection, or what of it holds to the filter, a page at a time."""
    library, where = engine.library, _where(_condition(filter))
    index = library.index(name, requested_encoder(model))
    count = await library.read(index.count, where)
    page = await library.read(index.page, limit, offset, where) if offset < count else []
    if not count:
        await library.about(index)
    return JSONResponse({"count": count, "items": [_public(item) for item in page]})


@router.get("/{name}/items/{id}", response_model=answers.OneItem, responses=documented(400, 404, 409, 429, 503))
async def item(name: Name, id: ItemId, engine: Ready, vector: bool = False, model: ModelId = ALIAS) -> Response:
    """An item, with its vector of unit length where it is asked for."""
    index = engine.library.index(name, requested_encoder(model))
    known = await engine.library.read(index.get, id)
    if known is None:
        raise _no_item(id, name)
    return JSONResponse(_public(known[0]) | ({"vector": known[1].tolist()} if vector else {}))


@router.get(
    "/{name}/items/{id}/thumbnail",
    response_class=Response,
    responses={
        200: {"content": binary("image/jpeg")},
        304: {"description": "It is what If-None-Match names."},
        **documented(400, 404, 409, 429, 503),
    },
)
async def thumbnail(request: Request, name: Name, id: ItemId, engine: Ready, model: ModelId = ALIAS) -> Response:
    """JPEG, at most 256 px on its longest side."""
    index = engine.library.index(name, requested_encoder(model))
    jpeg = await engine.library.read(index.read_thumbnail, id)
    if jpeg is None:
        raise NotFound(f"no item {id} with a thumbnail is in the collection {name}", "id")
    tag = f'"{hashlib.sha256(jpeg).hexdigest()[:32]}"'
    of_content = len(id) == 32 and set(id) <= set("0123456789abcdef")  # another picture has another id
    headers = {"ETag": tag, "Cache-Control": FOREVER if of_content else ASK_AGAIN}
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(jpeg, media_type="image/jpeg", headers=headers)


# What is alike --------------------------------------------------------------------------------------------------------

SEARCH = {
    "openapi_extra": {
        "requestBody": {
            "required": True,
            "content": {JSON: {"schema": schema(SearchQuery)}, FORM: _form(SearchForm, "image", required=False)},
        }
    },
    "response_model": answers.Matches,
    "responses": documented(400, 404, 409, 413, 415, 422, 429, 503),
}


@router.post("/{name}/search", **SEARCH)
async def search(request: Request, name: Name, engine: Ready) -> Response:
    """The k items most like what is given, and unlike what is given as `negative`; nearest first, with the cosine.

    Given are images (in a form, the files in `image`), vectors, and items by their ids; items that are given are left
    out of the results. Searched by is the mean direction of the positive minus that of the negative (Rocchio).
    """
    kind, images = media_type(request), []
    if kind == JSON:
        query = validated(SearchQuery, await request.body())
    elif kind in (FORM, URLENCODED, ""):
        engine.refuse_when_full()
        async with request.form(max_files=queries.MOST_EXAMPLES) as form:
            uploads = form.getlist("image")
            fields = {field: value for field, value in form.items() if field != "image"}
            for i, upload in enumerate(uploads):
                images.append(await read_file("image" if len(uploads) == 1 else f"image[{i}]", upload))
            for field, value in fields.items():
                if isinstance(value, UploadFile):
                    raise Malformed(f"{field}: is no file; files stand in image", field)
        query = validated(SearchForm, fields)
    else:
        raise UnsupportedType(f"a search comes as {JSON} or {FORM}, not as {kind[:100]}")
    async with CancelOnDisconnect(request):
        model, found = await engine.library.search(
            name, query, images, _where(query.filter), requested_encoder(query.model)
        )
    results = [{**_public(item), "similarity": round(similarity, 6)} for item, similarity in found]
    return JSONResponse({"model": model, "results": results})


def _condition(text: str | None) -> dict | None:
    if text is None:
        return None
    try:
        condition = json.loads(text)
    except (ValueError, RecursionError):
        condition = None
    if not isinstance(condition, dict):
        raise Malformed('filter: must be JSON such as {"label": "shirt"}', "filter")
    return condition


def _where(condition: dict | None) -> Filter | None:
    if condition is None:
        return None
    try:
        return Filter.parse(condition)
    except FilterProblem as error:
        raise Malformed(f"filter: {error}", "filter") from error


def _public(item: Item) -> dict:
    return vars(item)


def _no_item(id: str, name: str) -> NotFound:
    return NotFound(f"no item {id} is in the collection {name}", "id")


# What goes wrong beneath ----------------------------------------------------------------------------------------------


def refusal(problem: IndexProblem) -> Refusal:
    if isinstance(problem, WrongEncoder):
        return errors.Conflict(str(problem), "name")
    if isinstance(problem, UnknownKey):
        return Malformed(f"filter: {problem}", "filter")
    if isinstance(problem, BadItem):
        return Malformed(str(problem))
    return DiskFull(str(problem)) if _is_full(problem) else NotReady(str(problem))


def _is_full(problem: IndexProblem) -> bool:
    """LanceDB tells it in words."""
    cause = problem.__cause__
    if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return any(words in str(cause) for words in ("No space left on device", "Disk quota exceeded", "os error 28"))
