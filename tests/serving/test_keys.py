import asyncio
import hmac
import json
import logging
import socket

import httpx
import pytest
from fastapi.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from serving import access
from serving.access import Access, KeyProblem
from serving.app import create_app
from serving.client import Client, ServiceError

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
        assert http.get(path).status_code == (200 if path.startswith("/readyz?") else 401), path


def test_a_websocket_is_refused_too(http):
    with pytest.raises(WebSocketDisconnect) as refused, http.websocket_connect("/ui/ws"):
        pass
    assert refused.value.code == 1008


def test_all_keys_are_compared_whichever_is_right(monkeypatch):
    compared = []
    real = hmac.compare_digest
    monkeypatch.setattr(access.hmac, "compare_digest", lambda one, other: compared.append(other) or real(one, other))
    for key in (b"first", b"second", b"wrong"):
        compared.clear()
        LOCKED.admits(key)
        assert compared == list(LOCKED.digests)


def test_keys_come_from_the_environment_and_from_a_file(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# of the team\n\n third \n  # old: fourth\nfifth\n")
    access = Access.from_environment({"TWINVIEW_API_KEYS": "first, second,,", "TWINVIEW_API_KEYS_FILE": str(file)})
    assert access == Access.from_keys("first", "second", "third", "fifth")
    assert Access.from_environment({}) == Access.from_environment({"TWINVIEW_API_KEYS": ""}) == Access()
    assert Access.from_environment({"TWINVIEW_OPEN": "1"}).open
    assert not Access.from_environment({"TWINVIEW_OPEN": "0"}).open


def test_configured_keys_that_are_missing_are_an_error(tmp_path):
    (tmp_path / "empty").write_text("# nothing\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for environment, words in (
        ({"TWINVIEW_API_KEYS": " , "}, "TWINVIEW_API_KEYS is set and holds no key"),
        ({"TWINVIEW_API_KEYS_FILE": str(tmp_path / "empty")}, "TWINVIEW_API_KEYS_FILE is set and holds no key"),
        ({"TWINVIEW_API_KEYS_FILE": str(tmp_path / "nowhere")}, f"{tmp_path}/nowhere cannot be read"),
        ({"TWINVIEW_API_KEYS_FILE": str(tmp_path / "binary")}, f"{tmp_path}/binary cannot be read"),
    ):
        with pytest.raises(KeyProblem, match=words):
            Access.from_environment(environment)


def test_the_service_takes_its_keys_from_the_environment(bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("TWINVIEW_API_KEYS", "first")
    with TestClient(create_app(str(bundle.folder), tmp_path / "index")) as http:
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
        (("127.0.0.1", 3000), "demo.localhost", 200),
        (("127.0.0.1", 3000), "192.168.0.7:3000", 200),
        (("::1", 3000), "[::1]:3000", 200),
        (("::ffff:127.0.0.1", 3000), "[::1]", 200),
        (("/run/twinview.sock", None), "service", 200),
        (None, "service", 200),
        (("127.0.0.1", 3000), "evil.example:3000", 403),
        (("127.0.0.1", 3000), "127.0.0.1.evil.example", 403),
        (("10.0.0.5", 3000), "10.0.0.5:3000", 403),
        (("10.0.0.5", 3000), "127.0.0.1:3000", 403),
        (("2001:db8::1", 3000), "localhost", 403),
        (("::ffff:10.0.0.5", 3000), "localhost", 403),
    ],
)
def test_the_sockets_address_decides_and_host_names_that_others_can_register_are_refused(serve, server, host, status):
    scope = {"type": "http", "path": "/collections", "server": server, "headers": [(b"host", host.encode())]}
    refusal = Access().refusal(scope)
    assert (refusal.status if refusal else 200) == status
    assert Access(open=True).refusal(scope) is None


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
    assert running.process.wait(60) != 0
    text = running.log.read_text()
    assert f"TWINVIEW_API_KEYS_FILE: {tmp_path}/nowhere cannot be read" in text
    assert "s3cr3t" not in text
