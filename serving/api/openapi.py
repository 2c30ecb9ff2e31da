"""The OpenAPI document, and the parts that several routes share: operation names, query parameters, request bodies."""

from typing import Any

from fastapi import APIRouter, Depends, FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import BaseModel

from serving.access import OPEN_PATHS, Access
from serving.api.groups import GROUPS
from serving.api.request import binary, check_parameters
from serving.api.upload import BYTES, FORM
from serving.protocol import pack

FILES = {"type": "array", "items": {"type": "string", "format": "binary"}}


def new_router(prefix: str = "") -> APIRouter:
    """Returns a router that refuses unknown and repeated query parameters. The operation ids, which generated clients
    use, are the names of the routes' functions."""

    def operation_id(route: APIRoute) -> str:
        return route.name

    checks = [Depends(check_parameters)]
    return APIRouter(prefix=prefix, generate_unique_id_function=operation_id, dependencies=checks)


def inline_schema(model: type[BaseModel]) -> dict[str, Any]:
    """JSON Schema without references: FastAPI does not add definitions for `openapi_extra`."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})

    def inline(part: Any) -> Any:
        if isinstance(part, list):
            return [inline(element) for element in part]
        if not isinstance(part, dict):
            return part
        if "$ref" in part:
            return inline(definitions[part["$ref"].rpartition("/")[2]])
        return {key: inline(value) for key, value in part.items() if key != "discriminator"}

    return inline(schema)


def query_parameters(model: type[BaseModel]) -> list[dict[str, Any]]:
    properties = inline_schema(model)["properties"]
    return [{"name": name, "in": "query", "schema": _without_null(schema)} for name, schema in properties.items()]


def _without_null(schema: dict[str, Any]) -> dict[str, Any]:
    """Texts of a query or a form are never null."""
    kinds = [kind for kind in schema.get("anyOf", ()) if kind != {"type": "null"}]
    if len(kinds) != 1:
        return schema
    return {key: value for key, value in schema.items() if key != "anyOf"} | kinds[0]


def form(files: str, model: type[BaseModel] | None = None, required: bool = True) -> dict[str, Any]:
    """A form with files in the field `files`, and the fields of `model`."""
    schema = inline_schema(model) if model else {"type": "object", "properties": {}}
    schema["properties"] = {name: _without_null(field) for name, field in schema["properties"].items()}
    schema["properties"][files] = FILES
    return {FORM: {"schema": schema | {"required": [files]} if required else schema}}


def images_body(model: type[BaseModel] | None = None) -> dict[str, Any]:
    """The `content` of a body that upload.read_images reads; in a form with the fields of `model`."""
    return form("images", model) | binary("image/*", BYTES, pack.MEDIA_TYPE)


def _group(schema: dict[str, Any]) -> None:
    """Put the operations into groups, with their summaries, in the order of GROUPS."""
    schema["tags"] = [{"name": group} for group in GROUPS]
    places = {name: (group, summary) for group, names in GROUPS.items() for name, summary in names.items()}
    order = list(places)
    for path in schema["paths"].values():
        for operation in path.values():
            group, operation["summary"] = places[operation["operationId"]]
            operation["tags"] = [group]

    def place(entry: tuple[str, dict]) -> int:
        return min(order.index(operation["operationId"]) for operation in entry[1].values())

    schema["paths"] = dict(sorted(schema["paths"].items(), key=place))


def document(app: FastAPI, access: Access) -> dict[str, Any]:
    """FastAPI's document of the app, with the ways to send an API key. Built once, at the first request for it. FastAPI
    adds the public path."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        schema["components"]["securitySchemes"] = {
            "key": {"type": "http", "scheme": "bearer"},
            "password": {"type": "http", "scheme": "basic", "description": "The password is the API key."},
        }
        schema["security"] = [{"key": []}, {"password": []}] if access.keys else [{}, {"key": []}]
        _group(schema)
        for path in OPEN_PATHS:
            schema["paths"][path]["get"]["security"] = []
        app.openapi_schema = schema
    return app.openapi_schema
