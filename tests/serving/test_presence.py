"""Clients that go away, over a real socket."""

import asyncio
import logging
import socket
import time

import httpx
import pytest

from serving.limits import Limits

WAIT_S = 10
ITEMS, SEARCH = "/collections/pictures/items", "/collections/pictures/search"


@pytest.fixture
def slow(listen, monkeypatch):
    """(port, what has happened to the work) of a service that never comes to the end of its work by itself."""
    port, app = listen()
    happened = []

    async def work(*_):
        happened.append("begun")
        try:
            await asyncio.sleep(WAIT_S)
            happened.append("done")
        except asyncio.CancelledError:
            happened.append("cancelled")
            raise

    engine = app.state.engine
    for part, method in (
        (engine, "embed"),
        (engine.studio, "pairs"),
        (engine.library, "search"),
        (engine.library, "put"),
    ):
        monkeypatch.setattr(part, method, work)
    return port, happened


def until(condition) -> None:
    deadline = time.monotonic() + WAIT_S / 2
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def form(data: bytes, field: str) -> tuple[str, bytes]:
    request = httpx.Request("POST", "http://a", files={field: ("a.png", data)})
    return request.headers["content-type"], request.read()


@pytest.mark.parametrize("path", ["/embed", "/v1/embeddings", SEARCH, ITEMS, "/views"])
def test_the_work_of_a_client_that_has_gone_is_cancelled(slow, picture, path, caplog):
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
        until(lambda: happened == ["begun"])
        time.sleep(0.1)
        assert happened == ["begun"]
    until(lambda: happened == ["begun", "cancelled"])
    route = path.replace("/pictures/", "/{name}/")
    counted = f'twinview_requests_total{{route="{route}",status="499"}} 1.0'
    until(lambda: counted in httpx.get(f"http://127.0.0.1:{port}/metrics").text)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_client_that_goes_while_it_sends_is_no_fault_of_the_service(slow, caplog):
    port, happened = slow
    for kind in ("image/png", "multipart/form-data; boundary=x"):
        with socket.create_connection(("127.0.0.1", port)) as client:
            head = f"POST /embed HTTP/1.1\r\nHost: a\r\nContent-Type: {kind}\r\nContent-Length: 1000\r\n\r\n--x\r\n"
            client.sendall(head.encode())
            time.sleep(0.1)
    counted = 'twinview_requests_total{route="/embed",status="499"} 2.0'
    until(lambda: counted in httpx.get(f"http://127.0.0.1:{port}/metrics").text)
    assert happened == []
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_what_waits_for_a_batch_is_dropped_from_it(listen, picture):
    """The encoder is held up with one picture; of the two that wait, one client goes: one of them is encoded."""
    port, app = listen(limits=Limits(threads=1))
    batch = app.state.engine._models.default.batch
    lane = batch.lanes[0]
    encode, sizes, go_on = lane.encode, [], []

    def held_up(pixels):
        sizes.append(len(pixels))
        until(lambda: go_on)
        return encode(pixels)

    lane.encode = held_up
    body = picture(0)
    head = f"POST /embed HTTP/1.1\r\nHost: a\r\nContent-Type: image/png\r\nContent-Length: {len(body)}\r\n\r\n"
    clients = []
    for waiting in (0, 1, 2):
        clients.append(socket.create_connection(("127.0.0.1", port)))
        clients[-1].sendall(head.encode() + body)
        until(lambda waiting=waiting: len(sizes) == 1 and batch.waiting == waiting)
    clients[1].close()
    counted = 'twinview_requests_total{route="/embed",status="499"} 1.0'
    until(lambda: counted in httpx.get(f"http://127.0.0.1:{port}/metrics").text)
    go_on.append(True)
    for client in (clients[0], clients[2]):
        assert client.recv(100).startswith(b"HTTP/1.1 200 OK")
        client.close()
    assert sizes == [1, 1]
