"""Routes of the names of collections: renaming, and aliases."""

from typing import Annotated

from fastapi import Path, Request
from fastapi.responses import Response

from serving.api.collections import Name, only_json
from serving.api.openapi import inline_schema, new_router
from serving.api.request import JSON, Ready, validated
from serving.api.response import json_response
from serving.errors import documented
from serving.protocol import queries
from serving.protocol.queries import AliasTarget, NewName
from serving.protocol.replies import Alias, Aliases, Collection

AliasName = Annotated[str, Path(pattern=queries.NAME, description="The alias.")]

router = new_router("")


@router.patch(
    "/collections/{name}",
    openapi_extra={"requestBody": {"required": True, "content": {JSON: {"schema": inline_schema(NewName)}}}},
    response_model=Collection,
    responses=documented(400, 404, 409, 415, 429, 503, 507),
)
async def rename_collection(request: Request, name: Name, engine: Ready) -> Response:
    """Give a collection another name, at once: nothing is copied. Its aliases stay."""
    new = validated(NewName, await only_json(request)).name
    return json_response(await engine.library.rename(name, new))


@router.get("/aliases", response_model=Aliases, responses=documented(429, 503))
async def aliases(engine: Ready) -> Response:
    """List the aliases, each with the collection that it stands for."""
    return json_response(Aliases(await engine.library.aliases()))


@router.put(
    "/aliases/{alias}",
    openapi_extra={"requestBody": {"required": True, "content": {JSON: {"schema": inline_schema(AliasTarget)}}}},
    response_model=Alias,
    responses=documented(400, 404, 415, 429, 503, 507),
)
async def set_alias(request: Request, alias: AliasName, engine: Ready) -> Response:
    """Let an alias stand for a collection in all routes, and no longer for the one before. Each request finds either
    the one or the other."""
    target = validated(AliasTarget, await only_json(request)).collection
    return json_response(await engine.library.set_alias(alias, target))


@router.delete("/aliases/{alias}", response_model=Aliases, responses=documented(400, 404, 429, 503, 507))
async def delete_alias(alias: AliasName, engine: Ready) -> Response:
    """Delete an alias. The collection stays. Returns the aliases that are left."""
    await engine.library.delete_alias(alias)
    return json_response(Aliases(await engine.library.aliases()))
