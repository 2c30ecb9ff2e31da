"""/mcp, used by the client of the package mcp."""

import asyncio
import base64
import json
import re
from pathlib import Path

import httpx
import pytest

from serving.access import WRITING, Access
from serving.api.tools import PATH, TOOLS
from tests.conftest import PATIENCE_S

COLLECTION, KEY = "/collections/pictures", {"Authorization": "Bearer r3ad"}


@pytest.fixture
def service(listen) -> str:
    """Address of a service in this process, with a key for reading."""
    port, _ = listen(access=Access.from_keys("web read r3ad"))
    return f"http://127.0.0.1:{port}"


def connect(service: str, work, mode: str = "auto", headers: dict[str, str] = KEY):
    """Returns the result of the coroutine function `work` for a client that is connected to the service.

    mode  "legacy" for the protocol before the version of 2026-07-28, as older programs use it
    """
    import httpx2  # with mcp.client takes a second
    from mcp.client.client import Client
    from mcp.client.streamable_http import streamable_http_client

    async def run():
        async with (
            httpx2.AsyncClient(headers=headers, timeout=PATIENCE_S) as http,
            Client(streamable_http_client(service + PATH, http_client=http), mode=mode) as client,
        ):
            return await work(client)

    return asyncio.run(run())


def call(service: str, *calls: tuple[str, dict], **options) -> list:
    """Returns the content of the answer to each call of a tool, and whether the tool failed."""

    async def work(client):
        answers = [await client.call_tool(name, arguments) for name, arguments in calls]
        return [(answer.content[0], answer.is_error) for answer in answers]

    return connect(service, work, **options)


def test_exactly_these_tools_are_listed_and_all_of_them_read(service):
    async def work(client):
        return (await client.list_tools()).tools

    listed = {tool.name: tool for tool in connect(service, work)}
    assert set(listed) == {
        *("collections", "models", "keys", "items", "item", "thumbnail", "original"),
        *("search", "duplicates", "odd", "drift"),
    }
    methods = {
        operation["operationId"]: method.upper()
        for operations in httpx.get(f"{service}/openapi.json", headers=KEY).json()["paths"].values()
        for method, operation in operations.items()
    }
    for name, tool in listed.items():
        assert methods[name] not in WRITING
        assert tool.annotations.read_only_hint
        assert tool.description == TOOLS[name]
        assert all(schema["description"] for schema in tool.input_schema["properties"].values())
    assert listed["thumbnail"].input_schema["required"] == ["id"]
    assert listed["search"].input_schema["properties"]["name"]["default"] == "pictures"
    assert {"positive", "negative", "k", "filter"} < set(listed["search"].input_schema["properties"])


def test_the_documents_settings_and_tools_are_those_of_the_service(service):
    text = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text()
    section = text.partition("## Language models")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.+?) \|", section, re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == set(TOOLS)
    [block] = re.findall(r"^```json\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    settings = json.loads(block)["mcpServers"]["twinview"]
    assert settings["url"] == "http://127.0.0.1:3000" + PATH
    headers = {name: value.replace("KEY", "r3ad") for name, value in settings["headers"].items()}
    [(content, failed)] = call(service, ("collections", {}), headers=headers)
    assert json.loads(content.text) == {"collections": []} and not failed


@pytest.mark.parametrize("mode", ["auto", "legacy"])
def test_a_tool_answers_what_its_route_answers(service, fill, mode):
    first, second, *_ = fill(25)
    search = {"positive": [first.id], "negative": [second.id], "k": 3, "filter": {"label": "a"}}
    page = {"limit": 2, "filter": json.dumps({"label": "b"})}
    routes = {  # with httpx's arguments
        "collections": ("GET", "/collections", {}),
        "models": ("GET", "/v1/models", {}),
        "keys": ("GET", f"{COLLECTION}/keys", {}),
        "items": ("GET", f"{COLLECTION}/items", {"params": page}),
        "item": ("GET", f"{COLLECTION}/items/{first.id}", {}),
        "search": ("POST", f"{COLLECTION}/search", {"json": search}),
        "duplicates": ("GET", f"{COLLECTION}/duplicates", {"params": {"threshold": 0.9}}),
        "odd": ("POST", f"{COLLECTION}/odd", {"json": {"k": 2}}),
        "drift": ("GET", f"{COLLECTION}/drift", {}),
    }
    arguments = {
        "items": {"limit": 2, "filter": {"label": "b"}},
        "item": {"id": first.id, "name": "pictures"},
        "search": search,
        "duplicates": {"threshold": 0.9, "closer_than": None},
        "odd": {"k": 2},
    }
    answers = call(service, *((name, arguments.get(name, {})) for name in routes), mode=mode)
    for (name, (method, path, options)), (content, failed) in zip(routes.items(), answers, strict=True):
        direct = httpx.request(method, service + path, headers=KEY, **options)
        assert (json.loads(content.text), failed) == (direct.json(), direct.is_error), name
        assert not failed, name
    [(picture, failed)] = call(service, ("thumbnail", {"id": first.id}), mode=mode)
    direct = httpx.get(f"{service}{COLLECTION}/items/{first.id}/thumbnail", headers=KEY)
    assert (picture.mime_type, base64.b64decode(picture.data), failed) == ("image/jpeg", direct.content, False)


def test_a_mistake_in_a_call_is_answered_in_a_sentence(service, fill):
    fill(1)
    mistakes = (
        ("item", {}, "id: is missing"),
        ("item", {"id": "none"}, "no item none is in the collection pictures"),
        ("item", {"id": ".."}, 'id: ".." is not an id: letters from a to z'),
        ("search", {"name": "../v1"}, 'name: "../v1" is not a name: letters from a to z'),
        ("items", {"limt": 3}, "limt: is not a parameter of GET /collections/{name}/items; did you mean limit?"),
        ("search", {"name": "cats", "positive": ["a"]}, "there is no collection cats"),
        ("search", {"query": "a red shirt"}, "query: is not a field here; known are positive"),
        ("original", {"id": "none"}, "no item none"),
        ("delete_items", {}, "there is no tool delete_items; there are collections, models, keys"),
    )
    answers = call(service, *((name, arguments) for name, arguments, _ in mistakes))
    for (content, failed), (*_, sentence) in zip(answers, mistakes, strict=True):
        assert failed and sentence in content.text, content.text


def test_the_rules_of_access_are_those_of_the_service(service, serve):
    async def work(client):
        return await client.list_tools()

    with pytest.raises(BaseException) as refused:  # a group of the client's errors
        connect(service, work, headers={})
    assert not isinstance(refused.value, AssertionError)
    ask = {"json": {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}}
    ask["headers"] = {"Accept": "application/json, text/event-stream"}
    http = serve()  # without keys
    assert "thumbnail" in http.post(PATH, **ask).text

    def refusal(post, **headers) -> tuple[int, str]:
        answer = post(PATH, json=ask["json"], headers=ask["headers"] | headers)
        return answer.status_code, answer.json()["error"]["message"]

    with httpx.Client(base_url=service, timeout=PATIENCE_S) as keyed:
        status, message = refusal(keyed.post)
        assert status == 401 and message.startswith("this service requires an API key")
        assert refusal(keyed.post, Authorization="Bearer no")[1] == "the API key is not one of this service's keys"
    for headers, sentence in (
        ({"Origin": "https://shop.example"}, "this request was sent for a page of https://shop.example; "),
        ({"Host": "shop.example"}, "this service has no API keys, so it refuses the host name shop.example; "),
        ({"X-Forwarded-For": "1.2.3.4"}, "this service has no API keys, and this request came through a proxy"),
    ):
        status, message = refusal(http.post, **headers)
        assert status == 403 and message.startswith(sentence)


def test_there_are_no_streams_and_no_sessions_and_requests_are_counted(http):
    for method in ("GET", "DELETE", "PUT"):
        answer = http.request(method, PATH)
        assert (answer.status_code, answer.json()["error"]["message"]) == (405, f"{PATH} does not accept {method}")
    http.post(PATH, json={})
    assert f'twinview_requests_total{{route="{PATH}",status="400"}} 1.0' in http.get("/metrics").text
