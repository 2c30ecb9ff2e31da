import asyncio
import hmac
import json
import logging
import re
import socket
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from fastapi.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from serving import access, keys
from serving.access import Access, AccessProblem
from serving.app import create_app
from serving.client import Client, ServiceError
from serving.keys import ApiKeys, KeyProblem
from serving.limits import SETTINGS, SettingProblem, refuse_misspelt
from tests.conftest import PATIENCE_S

ROOT = Path(__file__).parents[2]
LOCKED = Access.from_keys("first", "second", "schlüssel")


@pytest.fixture
def http(serve):
    return serve(access=LOCKED)


def basic(user: str, password: str) -> dict:
    return {"auth": (user, password)}


def bearer(key: str) -> dict:
    return {"headers": {"Authorization": f"Bearer {key}".encode()}}


@pytest.mark.parametrize(
    "given",
    [
        bearer("first"),
        bearer("second"),
        bearer("schlüssel"),
        {"headers": {"authorization": "bearer  first "}},
        basic("", "second"),
        basic("anybody", "first"),
        basic("me", "schlüssel"),
    ],
)
def test_every_key_is_accepted_as_a_bearer_token_or_as_a_password(http, given):
    assert http.get("/collections", **given).status_code == 200


@pytest.mark.parametrize(
    "given",
    [
        {},
        bearer(""),
        bearer("firs"),
        bearer("firstt"),
        bearer("first,second"),
        bearer("First"),
        basic("first", ""),
        basic("first", "wrong"),
        {"headers": {"Authorization": "first"}},
        {"headers": {"Authorization": "Token first"}},
        {"headers": {"Authorization": "Basic %%%"}},
        {"headers": {"Authorization": "Basic"}},
        {"params": {"api_key": "first"}},
    ],
)
def test_anything_else_is_refused_and_makes_a_browser_ask_for_the_key(http, given):
    answer = http.get("/collections", **given)
    assert answer.status_code == 401
    challenges = answer.headers.get_list("WWW-Authenticate")
    assert [challenge.split()[0] for challenge in challenges] == ["Bearer", "Basic"]
    assert answer.json()["error"]["code"] == "no_key"
    assert "first" not in answer.text


def test_only_liveness_and_readiness_need_no_key(http):
    assert http.get("/livez").status_code == http.get("/readyz").status_code == 200
    for path in (
        "/livez/",
        "/livez/../collections",
        "//livez",
        "/LIVEZ",
        "/readyz?x=/livez",
        "/metrics",
        "/ui/",
        "/docs",
    ):
        assert http.get(path).status_code == (400 if path.startswith("/readyz?") else 401), path


def test_a_websocket_is_refused_too(http):
    with pytest.raises(WebSocketDisconnect) as refused, http.websocket_connect("/ui/ws"):
        pass
    assert refused.value.code == 1008


def test_all_keys_are_compared_whichever_is_right(monkeypatch):
    compared = []
    real = hmac.compare_digest
    monkeypatch.setattr(keys.hmac, "compare_digest", lambda one, other: compared.append(other) or real(one, other))
    for secret in (b"first", b"second", b"wrong"):
        compared.clear()
        LOCKED.keys.find(secret)
        assert compared == [key.digest for key in LOCKED.keys]


def test_keys_come_from_the_environment_and_from_a_file(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# of the team\n\n third \n  # old: fourth\nfifth\n")
    access = Access.from_environment({"TWINVIEW_API_KEYS": "first, second,,", "TWINVIEW_API_KEYS_FILE": str(file)})
    assert list(access.keys) == list(ApiKeys(["first", "second", "third", "fifth"]))
    assert not Access.from_environment({}).keys and not Access.from_environment({"TWINVIEW_API_KEYS": ""}).keys
    assert Access.from_environment({"TWINVIEW_OPEN": "1"}).open
    assert not Access.from_environment({"TWINVIEW_OPEN": "0"}).open


def test_configured_keys_that_are_missing_are_an_error(tmp_path):
    (tmp_path / "empty").write_text("# nothing\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for environment, words in (
        ({"TWINVIEW_API_KEYS": " , "}, "TWINVIEW_API_KEYS is set and holds no key"),
        ({"TWINVIEW_API_KEYS_FILE": str(tmp_path / "empty")}, "TWINVIEW_API_KEYS_FILE: .*/empty holds no key"),
        ({"TWINVIEW_API_KEYS_FILE": str(tmp_path / "nowhere")}, f"{tmp_path}/nowhere cannot be read"),
        ({"TWINVIEW_API_KEYS_FILE": str(tmp_path / "binary")}, f"{tmp_path}/binary cannot be read"),
    ):
        with pytest.raises(AccessProblem, match=words):
            Access.from_environment(environment)


def test_a_key_has_a_name_and_may_be_for_reading_only():
    shown = [
        (key.name, key.may_write) for key in ApiKeys(["s3cr3t", "anna s3cr3t2", "", "web read s3cr3t3", "read s3cr3t4"])
    ]
    assert shown == [("key 1", True), ("anna", True), ("web", False), ("key 4", False)]
    for line in ("anna of shop s3cr3t", "read anna s3cr3t", "read read s3cr3t", "anna read", "read"):
        with pytest.raises(KeyProblem, match=r"^key 2 is not written as \[NAME\] \[read\] KEY$"):
            ApiKeys(["ours", line])


def test_a_key_for_reading_searches_and_changes_nothing(serve, fill, picture):
    items = fill(3)
    http = serve(access=Access.from_keys("web read s3cr3t", "anna 0ther"))
    reading, path = bearer("s3cr3t"), "/collections/pictures/items"
    for answer in (
        http.get(path, **reading),
        http.post("/collections/pictures/search", json={"positive": [items[0].id]}, **reading),
        http.post("/embed", content=picture(0), **reading),
    ):
        assert answer.status_code == 200, answer.text
    for method, url in (("PUT", path), ("DELETE", path), ("DELETE", f"{path}/{items[0].id}"), ("PATCH", path)):
        refused = http.request(method, url, json={"ids": [items[0].id]}, **reading)
        assert (refused.status_code, refused.json()["error"]["message"]) == (403, access.READ_ONLY)
    assert http.get(path, **reading).json()["count"] == 3
    assert http.delete(f"{path}/{items[0].id}", **bearer("0ther")).status_code == 200


def test_no_route_but_put_patch_and_delete_changes_items(http):
    """So a key for reading is a matter of the method."""
    changing = {"put_items", "change_items", "copy_items", "delete_items", "delete_item"}
    changing |= {"create_collection", "delete_collection", "undo", "reembed", "stop_reembedding"}
    changing |= {"rename_collection", "set_alias", "delete_alias"}
    routes = [route for route in http.app.routes if hasattr(route, "methods")]
    assert {route.name for route in routes if route.methods & set(access.WRITING)} == changing


def test_keys_are_read_again_when_their_file_changes(serve, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(keys, "LOOK_S", 0)
    file = tmp_path / "keys"
    file.write_text("anna first")
    http = serve(access=Access.from_environment({"TWINVIEW_API_KEYS_FILE": str(file)}))

    def admitted() -> list[str]:
        return [key for key in ("first", "second") if http.get("/collections", **bearer(key)).status_code == 200]

    assert admitted() == ["first"]
    file.write_text("bert second")
    assert admitted() == ["second"]
    file.write_text("too many words second")
    assert admitted() == ["second"], "a mistake is reported, and locks nobody out"
    assert "key 1 is not written as [NAME] [read] KEY; the keys that were there before stay valid" in caplog.text
    file.write_text("# all revoked")
    assert admitted() == []
    file.write_text("anna first")
    assert admitted() == ["first"]


def test_the_page_changes_items_only_for_visitors_whose_key_may(serve, fill):
    items = fill(2)
    http = serve(access=Access.from_keys("web read s3cr3t", "0ther"))

    async def ask(may_write: bool | None) -> int:
        access.MAY_WRITE.set(may_write)
        transport = httpx.ASGITransport(access.internal(http.app))
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as within:
            assert (await within.get("/collections")).status_code == 200
            return (await within.delete(f"/collections/pictures/items/{items[0].id}")).status_code

    assert [asyncio.run(ask(may_write)) for may_write in (False, None, True)] == [403, 403, 200]


def test_the_service_takes_its_keys_from_the_environment(bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("TWINVIEW_API_KEYS", "first")
    with TestClient(create_app(str(bundle.folder), tmp_path / "index"), "http://127.0.0.1") as http:
        assert http.get("/collections").status_code == 401
        assert http.get("/collections", **bearer("first")).status_code == 200


@pytest.mark.slow
def test_no_log_and_no_response_contains_a_key(serve, caplog, monkeypatch):
    caplog.set_level(logging.DEBUG)
    http = serve(access=Access.from_keys("s3cr3t-key"))

    async def fail(*_):
        raise RuntimeError

    monkeypatch.setattr(http.app.state.engine, "embed", fail)
    answers = []
    for key in ("s3cr3t-key", "s3cr3t-kez"):
        for path in ("/collections", "/nothing", "/openapi.json", "/metrics", "/v1/models"):
            answers.append(http.get(path, **bearer(key)))
        answers.append(http.post("/embed", content=b"x", **bearer(key)))
    assert {answer.status_code for answer in answers} == {200, 401, 404, 500}
    for text in (caplog.text, *(answer.text + str(answer.headers) for answer in answers)):
        assert "s3cr3t" not in text and "czNjcjN0" not in text


@pytest.mark.slow
def test_the_openapi_document_describes_the_keys(serve):
    document = serve(access=Access.from_keys("first")).get("/openapi.json", **bearer("first")).json()
    assert {scheme["scheme"] for scheme in document["components"]["securitySchemes"].values()} == {"bearer", "basic"}
    assert {} not in document["security"] and len(document["security"]) == 2
    assert document["paths"]["/livez"]["get"]["security"] == []
    assert {} in serve().get("/openapi.json").json()["security"]


# Without keys ---------------------------------------------------------------------------------------------------------


def outside_address() -> str | None:
    """An address of this machine other than loopback, if it has one. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
            address = probe.getsockname()[0]
        except OSError:
            return None
    return None if address.startswith("127.") else address


def test_without_keys_only_this_machine_is_answered_at_any_listening_address(listen, picture):
    port, _ = listen(host="0.0.0.0")
    with Client(f"http://127.0.0.1:{port}") as near:
        assert near.embed(picture(0)).vectors.shape == (1, 48)
    address = outside_address()
    if address is None:
        pytest.skip("this machine has no address but loopback")
    with Client(f"http://{address}:{port}") as far:
        with pytest.raises(ServiceError, match="set TWINVIEW_API_KEYS or TWINVIEW_API_KEYS_FILE, or TWINVIEW_OPEN=1"):
            far.embed(picture(0))
        assert far.ready()
    assert httpx.get(f"http://{address}:{port}/livez").status_code == 200


@pytest.mark.parametrize(
    ("server", "host", "status"),
    [
        (("127.0.0.1", 3000), "127.0.0.1:3000", 200),
        (("127.0.0.1", 3000), "localhost:3000", 200),
        (("127.0.0.1", 3000), "LOCALHOST", 200),
        (("127.0.0.1", 3000), "127.9.9.9:3000", 200),
        (("::1", 3000), "[::1]:3000", 200),
        (("::ffff:127.0.0.1", 3000), "[::1]", 200),
        (("/run/twinview.sock", None), "localhost", 403),
        (None, "localhost", 403),
        (("127.0.0.1", 3000), "", 403),
        (("127.0.0.1", 3000), "service", 403),
        (("127.0.0.1", 3000), "demo.localhost", 403),
        (("127.0.0.1", 3000), "192.168.0.7:3000", 403),
        (("127.0.0.1", 3000), "0.0.0.0:3000", 403),
        (("127.0.0.1", 3000), "evil.example:3000", 403),
        (("127.0.0.1", 3000), "127.0.0.1.evil.example", 403),
        (("10.0.0.5", 3000), "10.0.0.5:3000", 403),
        (("10.0.0.5", 3000), "127.0.0.1:3000", 403),
        (("2001:db8::1", 3000), "localhost", 403),
        (("::ffff:10.0.0.5", 3000), "localhost", 403),
    ],
)
def test_without_keys_a_request_must_arrive_at_and_name_a_loopback_address(server, host, status):
    scope = {"type": "http", "path": "/collections", "server": server, "headers": [(b"host", host.encode())]}
    refusal = Access().refusal(scope)
    assert (refusal.status if refusal else 200) == status
    assert Access(open=True).refusal(scope) is None


FORWARDED = [
    {"x-forwarded-for": "127.0.0.1"},
    {"x-forwarded-host": "localhost"},
    {"x-forwarded-proto": "https"},
    {"x-real-ip": "127.0.0.1"},
    {"forwarded": "for=127.0.0.1"},
    {"via": "1.1 proxy"},
]


@pytest.mark.parametrize("headers", FORWARDED)
def test_without_keys_what_a_proxy_passes_on_is_refused_and_with_keys_answered(http, serve, headers):
    assert http.get("/collections", headers=headers, **basic("", "first")).status_code == 200
    answer = serve().get("/collections", headers=headers)
    assert answer.status_code == 403
    assert "TWINVIEW_PROXY=1" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"x-forwarded-for": "127.0.0.1"}, 200),
        ({"x-forwarded-for": "9.9.9.9, 127.0.0.1:5000", "via": "1.1 proxy"}, 200),
        ({"x-forwarded-for": "[::1]:5000"}, 200),
        ({"x-forwarded-for": "127.0.0.1, 10.0.0.5"}, 403),
        ({"x-forwarded-for": "unknown"}, 403),
        ({"via": "1.1 proxy"}, 403),
        ({}, 200),
    ],
)
def test_a_trusted_proxy_says_who_its_client_is(serve, headers, status):
    trusting = Access(proxy=True)
    assert serve(access=trusting).get("/collections", headers=headers).status_code == status
    headers = [(b"host", b"localhost"), *((name.encode(), value.encode()) for name, value in headers.items())]
    socket = {"type": "http", "path": "/collections", "server": ("/run/twinview.sock", None), "headers": headers}
    assert (trusting.refusal(socket) is None) == (status == 200 and len(headers) > 1)
    assert trusting.refusal(socket | {"server": ("10.0.0.5", 3000)}).status == 403


def test_behind_a_real_proxy_requests_count_as_remote(listen):
    """nginx and Caddy add such headers; uvicorn replaces the client's address by them."""
    port, _ = listen()
    url = f"http://127.0.0.1:{port}/collections"
    assert httpx.get(url).status_code == 200
    assert httpx.get(url, headers={"X-Forwarded-For": "203.0.113.9", "X-Forwarded-Proto": "https"}).status_code == 403


# Pages of other sites -------------------------------------------------------------------------------------------------

BY_A_LINK = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "http://127.0.0.1:81"},
        {"Origin": "http://localhost"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1", "Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {**BY_A_LINK, "Origin": "https://evil.example"},
        {**BY_A_LINK, "Sec-Fetch-Dest": "iframe"},
        {**BY_A_LINK, "Sec-Fetch-Mode": "no-cors"},
    ],
)
def test_what_a_browser_sends_for_another_site_is_refused_everywhere_with_and_without_keys(http, serve, headers):
    for client, given in ((serve(), {}), (serve(access=Access(open=True)), {}), (http, basic("", "first"))):
        for path in ("/", "/ui/", "/docs", "/collections", "/livez", "/nothing"):
            answer = client.get(path, headers=headers, follow_redirects=False, **given)
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "closed"), path
        assert client.post("/embed", content=b"x", headers=headers, **given).status_code == 403
        assert client.options("/embed", headers={**headers, "Access-Control-Request-Method": "POST"}).status_code == 403
        assert not any(name.startswith("access-control") for name in answer.headers)
        with pytest.raises(WebSocketDisconnect), client.websocket_connect("/ui/ws", headers=headers):
            pass


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Origin": "http://127.0.0.1", "Sec-Fetch-Site": "same-origin"},
        {"Sec-Fetch-Site": "same-origin"},
        {"Sec-Fetch-Site": "none", "Sec-Fetch-Mode": "navigate"},
        {"Origin": "https://pics.example", "Host": "pics.example:443"},
        {"Origin": "https://pics.example:8443", "Host": "PICS.example:8443"},
    ],
)
def test_its_own_pages_and_programs_are_answered(http, headers):
    answer = http.get("/collections", headers=headers, **basic("", "first"))
    assert answer.status_code == 200
    assert not any(name.startswith("access-control") for name in answer.headers)


def test_a_link_on_another_site_opens_the_page_and_nothing_else(serve):
    http = serve()
    assert http.get("/docs", headers=BY_A_LINK).status_code == 200
    assert http.get("/", headers=BY_A_LINK, follow_redirects=False).status_code == 307
    for path in ("/collections", "/metrics", "/openapi.json", "/ui/config"):
        assert http.get(path, headers=BY_A_LINK).status_code == 403
    assert http.post("/docs", headers=BY_A_LINK).status_code == 403


def test_named_sites_may_use_the_service_from_their_pages(serve):
    access = replace(LOCKED, origins=("https://shop.example",))
    page, http = {"Origin": "https://shop.example", "Sec-Fetch-Site": "cross-site"}, serve(access=access)
    asked = http.options("/embed", headers={**page, "Access-Control-Request-Method": "PUT"})
    assert (asked.status_code, asked.headers["access-control-allow-origin"]) == (200, "https://shop.example")
    answer = http.get("/collections", headers=page | bearer("first")["headers"])
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "https://shop.example")
    assert "access-control-allow-credentials" not in answer.headers
    without = http.get("/collections", headers=page)
    assert (without.status_code, without.headers["access-control-allow-origin"]) == (401, "https://shop.example")
    assert http.get("/collections", headers={**page, "Origin": "https://evil.example"}).status_code == 403


def test_settings_that_are_not_understood_are_an_error():
    read = Access.from_environment
    assert read({"TWINVIEW_ORIGINS": "https://Shop.example/, http://a:80,"}).origins == (
        "https://shop.example",
        "http://a",
    )
    assert read({"TWINVIEW_PROXY": "1"}).proxy and not read({}).proxy
    for name, value in (
        ("TWINVIEW_ORIGINS", "*"),
        ("TWINVIEW_ORIGINS", "shop.example"),
        ("TWINVIEW_ORIGINS", "https://user@shop.example"),
        ("TWINVIEW_ORIGINS", "https://shop example"),
        ("TWINVIEW_ORIGINS", "https://shop.example:port"),
        ("TWINVIEW_ORIGINS", "https://shop.example/page"),
        ("TWINVIEW_OPEN", "maybe"),
        ("TWINVIEW_PROXY", "localhost"),
    ):
        with pytest.raises(AccessProblem, match=name):
            read({name: value})


@pytest.mark.parametrize(
    ("given", "meant"), [("API_KYES", "API_KEYS"), ("KEEP_ORIGINAL", "KEEP_ORIGINALS"), ("ENCODERS", "ENCODER")]
)
def test_a_misspelt_setting_is_an_error_that_names_the_right_one(given, meant):
    with pytest.raises(SettingProblem, match=f"no setting TWINVIEW_{given}; did you mean TWINVIEW_{meant}\\?"):
        refuse_misspelt({f"TWINVIEW_{given}": "1"})


def test_settings_and_the_variables_of_kubernetes_are_no_misspelt_ones():
    ports = ("SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_HTTP", "PORT", "PORT_3000_TCP", "PORT_3000_TCP_ADDR")
    refuse_misspelt({f"TWINVIEW_{name}": "1" for name in (*SETTINGS, *ports)} | {"PATH": "/bin"})


def test_all_settings_that_the_code_reads_are_known():
    files = [file for folder in ("serving", "export", "ui") for file in (ROOT / folder).rglob("*.py")]
    assert {name for file in files for name in re.findall(r"TWINVIEW_([A-Z_]+)", file.read_text())} == set(SETTINGS)


def test_an_app_in_this_process_is_answered(serve):
    assert serve().get("/collections").status_code == 200


def test_a_request_from_this_process_needs_no_key_and_clients_cannot_imitate_it(http):
    async def ask() -> int:
        transport = httpx.ASGITransport(access.internal(http.app))
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as within:
            return (await within.get("/collections")).status_code

    assert asyncio.run(ask()) == 200
    assert http.get("/collections", headers={access.INTERNAL: "True"}).status_code == 401


# As a user starts it --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_bentoml_serves_behind_keys_and_logs_json(launch, fill, picture, tmp_path, wait_until):
    fill(3)
    (tmp_path / "keys").write_text("# ours\ns3cr3t\n")
    running = launch(environment={"TWINVIEW_API_KEYS_FILE": str(tmp_path / "keys"), "TWINVIEW_LOG": "json"})
    assert httpx.get(f"{running.address}/readyz").status_code == 200
    for path in ("/ui/", "/collections", "/metrics"):
        assert httpx.get(f"{running.address}{path}").status_code == 401
        assert httpx.get(f"{running.address}{path}", auth=("", "s3cr3t")).status_code == 200
    with Client(running.address, api_key="s3cr3t") as client:
        assert client.embed(picture(0)).vectors.shape == (1, 48)
    wait_until(lambda: '"/embed"' in running.log.read_text(), "the request's line is not logged after its answer")
    text = running.log.read_text()
    lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    assert [line["status"] for line in lines if line.get("route") == "/collections"] == [200]
    assert [line.get("status") for line in lines].count(401) == 3
    assert [line["images"] for line in lines if line.get("route") == "/embed"] == [1]
    assert any(line["message"].startswith("serving ") for line in lines)
    assert "s3cr3t" not in text


@pytest.mark.slow
def test_bentoml_does_not_serve_if_the_keys_cannot_be_read(launch, tmp_path):
    running = launch(environment={"TWINVIEW_API_KEYS_FILE": str(tmp_path / "nowhere"), "TWINVIEW_API_KEYS": "s3cr3t"})
    assert running.process.wait(PATIENCE_S) != 0
    text = running.log.read_text()
    assert f"TWINVIEW_API_KEYS_FILE: {tmp_path}/nowhere cannot be read" in text
    assert "s3cr3t" not in text
