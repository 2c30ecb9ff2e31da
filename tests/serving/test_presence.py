"""Clients that disconnect, over a real socket."""

import asyncio
import logging
import socket
import threading
import time

import httpx
import pytest

from serving.limits import Limits
from tests.conftest import PATIENCE_S

ITEMS, SEARCH = "/collections/pictures/items", "/collections/pictures/search"
LIGHTLY = "/v1/embed/images/bytes"


@pytest.fixture
def slow(listen, monkeypatch):
    """(port, events) of a service whose work ends only when it is cancelled."""
    port, app = listen()
    happened = []

    async def work(*_):
        happened.append("begun")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            happened.append("cancelled")
            raise

    engine = app.state.engine
    for part, method in (
        (engine, "embed"),
        (engine, "embed_readable"),
        (engine.views, "pairs"),
        (engine.searches, "prepare"),
        (engine.library, "put"),
    ):
        monkeypatch.setattr(part, method, work)
    return port, happened


@pytest.fixture
def counts_as_disconnected(wait_until):
    """counts_as_disconnected(port, route, count) waits until this many requests of the route have the status 499."""

    def wait(port: int, route: str, count: int) -> None:
        line = f'twinview_requests_total{{route="{route}",status="499"}} {count}.0'
        metrics = f"http://127.0.0.1:{port}/metrics"
        wait_until(lambda: line in httpx.get(metrics).text, f"/metrics does not say {line}")

    return wait


def form(data: bytes, field: str) -> tuple[str, bytes]:
    request = httpx.Request("POST", "http://a", files={field: ("a.png", data)})
    return request.headers["content-type"], request.read()


@pytest.mark.parametrize("path", ["/embed", "/v1/embeddings", LIGHTLY, SEARCH, ITEMS, "/views"])
def test_work_is_cancelled_when_its_client_disconnects(slow, picture, path, caplog, wait_until, counts_as_disconnected):
    port, happened = slow
    kind, body = {
        "/embed": ("image/png", picture(0)),
        "/v1/embeddings": ("application/json", b'{"input": "aGVsbG8="}'),
        LIGHTLY: form(picture(0), "files"),
        SEARCH: ("application/json", b'{"positive": ["a"]}'),
        ITEMS: ("image/png", picture(0)),
        "/views": form(picture(0), "image"),
    }[path]
    method = "PUT" if path == ITEMS else "POST"
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(head.encode() + body)
        wait_until(lambda: happened, "the work has not begun")
        time.sleep(0.1)  # nothing is cancelled while the client is connected
        assert happened == ["begun"]
    wait_until(lambda: happened == ["begun", "cancelled"], "the work is not cancelled")
    counts_as_disconnected(port, path.replace("/pictures/", "/{name}/"), 1)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_client_that_disconnects_during_its_upload_causes_no_error(slow, caplog, counts_as_disconnected):
    port, happened = slow
    for kind in ("image/png", "multipart/form-data; boundary=x"):
        with socket.create_connection(("127.0.0.1", port)) as client:
            head = f"POST /embed HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: 1000\r\n"
            client.sendall(f"{head}Expect: 100-continue\r\n\r\n".encode())
            assert client.recv(100).startswith(b"HTTP/1.1 100 Continue")  # the service is reading the body
            client.sendall(b"--x\r\n")
    counts_as_disconnected(port, "/embed", 2)
    assert happened == []
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_images_waiting_for_a_batch_are_dropped_from_it(listen, picture, wait_until, counts_as_disconnected):
    """While the encoder is busy, one of two waiting clients disconnects: only the other's picture is encoded."""
    port, app = listen(limits=Limits(threads=1))
    batch = app.state.engine._encoders.default.batch
    lane = batch.lanes[0]
    encode, sizes, go_on = lane.encode, [], threading.Event()

    def held_up(pixels):
        sizes.append(len(pixels))
        assert go_on.wait(PATIENCE_S)
        return encode(pixels)

    lane.encode = held_up
    body = picture(0)
    head = f"POST /embed HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nContent-Length: {len(body)}\r\n\r\n"
    clients = []
    for waiting in (0, 1, 2):
        clients.append(socket.create_connection(("127.0.0.1", port)))
        clients[-1].sendall(head.encode() + body)
        wait_until(lambda waiting=waiting: len(sizes) == 1 and batch.waiting == waiting, f"{waiting} do not wait")
    clients[1].close()
    counts_as_disconnected(port, "/embed", 1)
    go_on.set()
    for client in (clients[0], clients[2]):
        assert client.recv(100).startswith(b"HTTP/1.1 200 OK")
        client.close()
    assert sizes == [1, 1]
