"""/mcp: the routes that read collections, as tools of the Model Context Protocol, for programs with a language model.

A tool has the name of its route in the OpenAPI document, and the route's parameters. A call of a tool is a request to
that route within this process, so it has the same limits and messages; `serving/access.py` decides, as for every route,
who may send it. There are no sessions, so any worker can answer any request.
"""

import base64
import json
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import httpx
import mcp_types
from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool
from mcp.server import Server, ServerRequestContext
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from serving.access import internal
from serving.api.request import JSON
from serving.collection.index import DEFAULT
from serving.protocol.queries import PATTERNS
from serving.protocol.shown import shown

PATH = "/mcp"
INSTRUCTIONS = (
    "Twinview searches collections of pictures by similarity. Find an item by its name, label or metadata with the "
    "tool items, look at it with thumbnail, and give its id to search. Search by words only where the tool models "
    "lists an encoder whose text is not null. No tool changes anything."
)
TOOLS = {  # the names of the routes' functions, with a description for a language model
    "collections": "List the collections of pictures, each with its number of items.",
    "models": "List the encoders that are served, the default first.",
    "keys": "List what the items of a collection can be filtered by: the label and the metadata, each with its most "
    "common values.",
    "items": "List the items of a collection that match a filter, a page at a time.",
    "item": "Get what is known of an item: its name, label, size and metadata.",
    "thumbnail": "Look at an item's picture, a JPEG of at most 256 pixels on its longer side.",
    "original": "Look at an item's picture, a JPEG of at most 2,048 pixels on its longer side. Some items have none.",
    "search": "Find the items most similar to the positive examples and least similar to the negative ones, nearest "
    "first. An example is the id of an item, or words in text if the encoder reads text.",
    "duplicates": "List groups of near-duplicates. The first item of each group can represent the others.",
    "odd": "List the odd items of a collection, the most odd first: outliers, labels that may be wrong, or broken "
    "pictures.",
    "drift": "Ask whether the last pictures that the service received look like those of a collection.",
}


@dataclass(frozen=True)
class RouteTool:
    described: mcp_types.Tool
    method: str
    path: str
    in_path: Mapping[str, str]
    """Arguments with their patterns, as in queries.PATTERNS."""
    has_body: bool
    """Whether all other arguments are in a JSON body; else they are in the query."""

    @classmethod
    def of(cls, method: str, path: str, operation: Mapping[str, Any]) -> "RouteTool":
        """operation  of the OpenAPI document"""
        body = operation.get("requestBody", {}).get("content", {}).get(JSON, {}).get("schema")
        parameters = operation.get("parameters", [])
        properties = {one["name"]: one["schema"] for one in parameters} | (body or {}).get("properties", {})
        required = [one["name"] for one in parameters if one["required"] and one["name"] != "name"]
        if "name" in properties:
            properties["name"] = properties["name"] | {"default": DEFAULT}
        schema = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
        name = operation["operationId"]
        described = mcp_types.Tool(
            name=name,
            title=operation["summary"],
            description=TOOLS[name],
            input_schema=schema,
            annotations=mcp_types.ToolAnnotations(read_only_hint=True, open_world_hint=False),
        )
        in_path = {one["name"]: one["schema"]["pattern"] for one in parameters if one["in"] == "path"}
        return cls(described, method.upper(), path, in_path, body is not None)

    def request(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Returns httpx's arguments. Raises ValueError for an argument that cannot be in a path."""
        given = {"name": DEFAULT} if "name" in self.in_path else {}
        given |= {name: value for name, value in arguments.items() if value is not None}
        texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in given.items()}
        for name, pattern in self.in_path.items():
            if name not in given:
                raise ValueError(f"{name}: is missing")
            if not re.fullmatch(pattern, texts[name]):  # also "..", which would lead to another route
                raise ValueError(f"{name}: {shown(given[name])} is not {PATTERNS[pattern]}")
        rest = given.keys() - self.in_path.keys()
        url = self.path.format_map(texts)
        if self.has_body:
            return {"method": self.method, "url": url, "json": {name: given[name] for name in rest}}
        return {"method": self.method, "url": url, "params": {name: texts[name] for name in rest}}


class Tools:
    """ASGI app that answers at /mcp inside the context of `run`."""

    def __init__(self, app: FastAPI):
        self._app = app
        # There are no streams that a GET would open, and no sessions that a DELETE would end.
        self.route = Route(PATH, self, methods=["POST"], name="tools", include_in_schema=False)

    @cached_property
    def _tools(self) -> dict[str, RouteTool]:
        """Takes a moment at first: the OpenAPI document is made."""
        operations = {
            operation["operationId"]: (method, path, operation)
            for path, methods in self._app.openapi()["paths"].items()
            for method, operation in methods.items()
        }
        return {name: RouteTool.of(*operations[name]) for name in TOOLS}

    @asynccontextmanager
    async def run(self) -> AsyncIterator[None]:
        server = Server("twinview", instructions=INSTRUCTIONS, on_list_tools=self._list, on_call_tool=self._call)
        self._manager = StreamableHTTPSessionManager(server, json_response=True, stateless=True)
        transport = httpx.ASGITransport(internal(self._app), raise_app_exceptions=False)
        self._http = httpx.AsyncClient(transport=transport, base_url="http://service", timeout=None)
        async with self._http, self._manager.run():
            yield

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["route"] = self.route  # as FastAPI's routes do, for the metrics and the log
        await self._manager.handle_request(scope, receive, send)

    async def _list(self, context: ServerRequestContext, params: Any) -> mcp_types.ListToolsResult:
        known = await run_in_threadpool(getattr, self, "_tools")
        return mcp_types.ListToolsResult(tools=[tool.described for tool in known.values()])

    async def _call(
        self, context: ServerRequestContext, params: mcp_types.CallToolRequestParams
    ) -> mcp_types.CallToolResult:
        tool = (await run_in_threadpool(getattr, self, "_tools")).get(params.name)
        if tool is None:
            return _result(f"there is no tool {params.name[:100]}; there are {', '.join(TOOLS)}", failed=True)
        try:
            request = tool.request(params.arguments or {})
        except ValueError as error:
            return _result(str(error), failed=True)
        answer = await self._http.request(**request)
        if not answer.is_success:
            return _result(answer.json()["error"]["message"], failed=True)
        media_type = answer.headers["content-type"]
        if media_type == JSON:
            return _result(answer.text)
        picture = mcp_types.ImageContent(data=base64.b64encode(answer.content).decode(), mime_type=media_type)
        return mcp_types.CallToolResult(content=[picture])


def _result(text: str, failed: bool = False) -> mcp_types.CallToolResult:
    return mcp_types.CallToolResult(content=[mcp_types.TextContent(text=text)], is_error=failed)
