"""Clients that go away, over a real socket."""

import asyncio
import logging
import socket
import threading
import time

import httpx
import pytest

from serving.limits import Limits

ITEMS, SEARCH = "/collections/pictures/items", "/collections/pictures/search"


@pytest.fixture
def slow(listen, monkeypatch):
    """(port, what has happened to the work) of a service that never comes to the end of its work by itself."""
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
        (engine.views, "pairs"),
        (engine.library, "search"),
        (engine.library, "put"),
    ):
        monkeypatch.setattr(part, method, work)
    return port, happened


@pytest.fixture
def counts_as_gone(wait_until):
    """counts_as_gone(port, route, count) waits until so many of the route's requests have the status 499."""

    def wait(port: int, route: str, count: int) -> None:
        line = f'twinview_requests_total{{route="{route}",status="499"}} {count}.0'
        metrics = f"http://127.0.0.1:{port}/metrics"
        wait_until(lambda: line in httpx.get(metrics).text, f"/metrics does not say {line}")

    return wait


def form(data: bytes, field: str) -> tuple[str, bytes]:
    request = httpx.Request("POST", "http://a", files={field: ("a.png", data)})
    return request.headers["content-type"], request.read()


@pytest.mark.parametrize("path", ["/embed", "/v1/embeddings", SEARCH, ITEMS, "/views"])
def test_the_work_of_a_client_that_has_gone_is_cancelled(slow, picture, path, caplog, wait_until, counts_as_gone):
    port, happened = slow
    kind, body = {
        "/embed": ("image/png", picture(0)),
        "/v1/embeddings": ("application/json", b'{"input": "aGVsbG8="}'),
        SEARCH: ("application/json", b'{"positive": ["a"]}'),
        ITEMS: ("image/png", picture(0)),
        "/views": form(picture(0), "image"),
    }[path]
    method = "PUT" if path == ITEMS else "POST"
    head = f"{method} {path} HTTP/1.1\r\nHost: a\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(head.encode() + body)
        wait_until(lambda: happened, "the work has not begun")
        time.sleep(0.1)  # while the client is there nothing is cancelled
        assert happened == ["begun"]
    wait_until(lambda: happened == ["begun", "cancelled"], "the work is not cancelled")
    counts_as_gone(port, path.replace("/pictures/", "/{name}/"), 1)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_client_that_goes_while_it_sends_is_no_fault_of_the_service(slow, caplog, counts_as_gone):
    port, happened = slow
    for kind in ("image/png", "multipart/form-data; boundary=x"):
        with socket.create_connection(("127.0.0.1", port)) as client:
            head = f"POST /embed HTTP/1.1\r\nHost: a\r\nContent-Type: {kind}\r\nContent-Length: 1000\r\n"
            client.sendall(f"{head}Expect: 100-continue\r\n\r\n".encode())
            assert client.recv(100).startswith(b"HTTP/1.1 100 Continue")  # the service is reading the body
            client.sendall(b"--x\r\n")
    counts_as_gone(port, "/embed", 2)
    assert happened == []
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_what_waits_for_a_batch_is_dropped_from_it(listen, picture, wait_until, counts_as_gone):
    """The encoder is held up with one picture; of the two that wait, one client goes: one of them is encoded."""
    port, app = listen(limits=Limits(threads=1))
    batch = app.state.engine._encoders.default.batch
    lane = batch.lanes[0]
    encode, sizes, go_on = lane.encode, [], threading.Event()

    def held_up(pixels):
        sizes.append(len(pixels))
        assert go_on.wait(60)
        return encode(pixels)

    lane.encode = held_up
    body = picture(0)
    head = f"POST /embed HTTP/1.1\r\nHost: a\r\nContent-Type: image/png\r\nContent-Length: {len(body)}\r\n\r\n"
    clients = []
    for waiting in (0, 1, 2):
        clients.append(socket.create_connection(("127.0.0.1", port)))
        clients[-1].sendall(head.encode() + body)
        wait_until(lambda waiting=waiting: len(sizes) == 1 and batch.waiting == waiting, f"{waiting} do not wait")
    clients[1].close()
    counts_as_gone(port, "/embed", 1)
    go_on.set()
    for client in (clients[0], clients[2]):
        assert client.recv(100).startswith(b"HTTP/1.1 200 OK")
        client.close()
    assert sizes == [1, 1]
