"""Requests that never end, or whose header is too large, and answers that nobody reads, on a real socket."""

import re
import socket
import threading
from contextlib import ExitStack
from unittest.mock import Mock

import httpx
import pytest
import uvicorn
from uvicorn.server import ServerState

from serving import connection
from serving.access import Access
from serving.api.body_limit import BodyLimit
from serving.connection import IDLE_S, MOST_WAITING, READ_BYTES, READ_S, Connection
from serving.limits import Limits
from tests.conftest import PATIENCE_S

HOST = b"Host: localhost\r\n"


@pytest.fixture
def dial(listen):
    """dial(bytes, ...) -> a socket that has sent them. The service requires a key, which nobody sends."""
    port, _ = listen(access=Access.from_keys("secret"))
    opened = []

    def start(*parts: bytes) -> socket.socket:
        client = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)
        opened.append(client)
        for part in parts:
            client.sendall(part)
        return client

    yield start
    for client in opened:
        client.close()


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(connection, "TICK_S", 0.01)


def answer(client: socket.socket) -> bytes:
    """All that it gets until the connection is closed."""
    parts = []
    while part := client.recv(2**16):
        parts.append(part)
    return b"".join(parts)


def status(client: socket.socket) -> int:
    return int(answer(client).split()[1])


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\n" + HOST + b"X: " + b"x" * 2**16 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + HOST + b"X: " + b"x" * 2**19,
        b"GET / HTTP/1.1\r\n" + HOST + b"X: x\r\n" * 128 + b"\r\n",
        b"GET / HTTP/1.1\r\n" + b"X: " + (b"x" * 1000 + b"\r\nX: ") * 70,
        b"GET /" + b"x" * 2**16 + b" HTTP/1.1\r\n" + HOST + b"\r\n",
        b"GET /" + b"x" * 2**19,
    ],
    ids=["line", "endless line", "lines", "endless lines", "path", "endless path"],
)
def test_a_large_header_is_refused_before_the_key_is_asked_for(dial, head):
    got = answer(dial(head))
    assert got.startswith(b"HTTP/1.1 431 ") and b"connection: close\r\n" in got
    assert b'"code":"header_too_large"' in got


def test_a_header_just_below_the_limits_reaches_the_key_check(dial):
    lines = b"X: " + b"x" * 400 + b"\r\n"
    assert status(dial(b"GET / HTTP/1.1\r\n" + HOST + b"Connection: close\r\n" + lines * 126 + b"\r\n")) == 401


def test_lines_after_a_body_in_chunks_are_limited_too(dial):
    client = dial(b"POST /embed HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n")
    client.sendall(b"0\r\n" + (b"X: " + b"x" * 1000 + b"\r\n") * 70)
    assert answer(client).count(b"HTTP/1.1") == 1  # the answer to the request itself; then the end


def test_requests_that_wait_on_a_connection_are_limited(dial):
    request = b"GET /livez HTTP/1.1\r\n" + HOST + b"\r\n"
    last = b"GET /livez HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n"
    assert answer(dial(request * MOST_WAITING + last)).count(b"HTTP/1.1 ") == MOST_WAITING + 1
    assert answer(dial(request * (MOST_WAITING + 1) + last)).count(b"HTTP/1.1 ") <= 1


@pytest.mark.parametrize("part", [b"G", b"GET / HTTP/1.1\r\n" + HOST, b"GET / HTTP/1.1\r\n" + HOST + b"X: x"])
def test_half_a_header_is_ended(dial, impatient, part):
    assert status(dial(part)) == 408


def test_a_connection_without_a_request_is_closed(dial, impatient):
    assert answer(dial()) == b""
    assert answer(dial(b"\r\n" * 10)) == b""


def test_line_ends_do_not_keep_a_connection_open(dial, impatient):
    client = dial(b"GET /livez HTTP/1.1\r\n" + HOST + b"\r\n")
    assert client.recv(2**16).startswith(b"HTTP/1.1 200 ")
    client.sendall(b"\r\n")  # ends the wait for the next request
    assert b"HTTP/1.1" not in answer(client)


def test_stalled_uploads_are_ended_and_hold_nobody_up(listen, picture, wait_until, monkeypatch):
    monkeypatch.setattr(connection, "BODY_S", 10**9)
    port, app = listen(limits=Limits(bytes_at_once=16 * 2**20))

    def post() -> int:
        return httpx.post(f"http://127.0.0.1:{port}/embed", content=picture(1)).status_code

    assert post() == 200
    memory = app.middleware_stack
    while not isinstance(memory, BodyLimit):
        memory = memory.app
    head = b"POST /embed HTTP/1.1\r\n" + HOST + b"Content-Type: image/png\r\nContent-Length: %d\r\n\r\n" % (2**20)
    with ExitStack() as opened:
        uploads = [opened.enter_context(socket.create_connection(("127.0.0.1", port), 30)) for _ in range(16)]
        for upload in uploads:
            upload.sendall(head + bytes(2**20 - 1))
        wait_until(lambda: memory.in_flight == 16 * (2**20 - 1), "the uploads do not fill the memory")
        assert post() == 429
        monkeypatch.setattr(connection, "BODY_S", 10)
        monkeypatch.setattr(connection, "TICK_S", 0.01)
        for upload in uploads:
            assert status(upload) == 408
    assert post() == 200


def test_a_slow_upload_is_read_to_its_end(listen, picture, monkeypatch):
    monkeypatch.setattr(connection, "TICK_S", 0.01)
    monkeypatch.setattr(connection, "BODY_BYTES", 1)
    port, _ = listen()
    body = picture(1)
    head = b"POST /embed HTTP/1.1\r\n" + HOST + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as client:
        client.sendall(head)
        for byte in body:  # takes several periods
            client.sendall(bytes([byte]))
        assert status(client) == 200


def test_clients_that_never_read_their_answer_are_ended(listen, monkeypatch):
    monkeypatch.setattr(connection, "TICK_S", 0.01)
    lost, lose = threading.Event(), Connection.connection_lost

    def connection_lost(self, exc) -> None:
        lose(self, exc)
        lost.set()

    monkeypatch.setattr(Connection, "connection_lost", connection_lost)
    port, _ = listen()
    asset = b"GET /docs/assets/swagger-ui-bundle.js HTTP/1.1\r\n" + HOST + b"\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as client:
        client.sendall(asset * 20)  # more than the system keeps for a socket
        assert lost.wait(PATIENCE_S)


class Transport:
    """A socket's, whose client has `left` bytes to read."""

    def __init__(self):
        self.left, self.aborted = 0, False

    def get_write_buffer_size(self) -> int:
        return self.left

    def get_extra_info(self, name: str) -> None:
        return None

    def abort(self) -> None:
        self.aborted = True


class Loop:
    """Ticks when it is told."""

    def __init__(self):
        self.call = None

    def call_later(self, seconds: float, call) -> Mock:
        self.call = call
        return Mock()

    def tick(self, count: int) -> None:
        for _ in range(count):
            if call := self.call:
                self.call = None
                call()


def test_an_unused_connection_stays_open_for_longer_than_those_of_proxies():
    assert Connection(uvicorn.Config(lambda: None), ServerState(), {}, Loop()).timeout_keep_alive == IDLE_S > 60
    chosen = uvicorn.Config(lambda: None, timeout_keep_alive=7)
    assert Connection(chosen, ServerState(), {}, Loop()).timeout_keep_alive == 7


@pytest.fixture
def reader():
    """(connection, its transport, its loop), while an answer of 1 MiB waits to be read."""
    loop, transport = Loop(), Transport()
    made = Connection(uvicorn.Config(lambda: None), ServerState(), {}, loop)
    made.connection_made(transport)
    made._stop_waiting()
    transport.left = 2**20
    made.pause_writing()
    return made, transport, loop


def test_a_client_that_reads_slowly_is_not_ended(reader):
    _, transport, loop = reader
    while transport.left:
        transport.left -= READ_BYTES
        loop.tick(READ_S)
        assert not transport.aborted
    loop.tick(1)
    assert loop.call is None  # all is read


def test_a_client_that_reads_too_slowly_is_ended(reader):
    _, transport, loop = reader
    loop.tick(READ_S - 1)
    transport.left -= READ_BYTES - 1
    assert not transport.aborted
    loop.tick(1)
    assert transport.aborted


def test_what_the_service_writes_meanwhile_is_not_counted_against_the_client(reader):
    made, transport, loop = reader
    loop.tick(READ_S - 1)
    made.resume_writing()  # the client has read much, and more was written
    transport.left = 2**20
    loop.tick(1)
    assert not transport.aborted


def test_the_rest_of_a_finished_answer_is_watched_too(reader):
    made, transport, loop = reader
    transport.left = 0
    loop.tick(1)
    made.server_state, made.transport.is_closing = ServerState(), lambda: True
    transport.left = 100
    made.on_response_complete()
    loop.tick(READ_S)
    assert transport.aborted


def test_bytes_in_the_buffer_of_the_system_are_not_read_yet():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        transport = Transport()
        transport.get_extra_info = lambda name: ours
        made = Connection(uvicorn.Config(lambda: None), ServerState(), {}, Loop())
        made.transport = transport
        ours.sendall(b"x" * 1000)
        assert made._waiting_bytes() >= 1000
        theirs.recv(1000)
        assert made._waiting_bytes() == 0


HALF = b"POST /embed HTTP/1.1\r\n" + HOST + b"X-Request-Id: mine\r\n"


@pytest.mark.parametrize(
    ("parts", "status", "route"),
    [
        ([HALF + b"X: " + b"x" * 2**16 + b"\r\n\r\n"], 431, "other"),
        ([HALF + b"X: x"], 408, "other"),
        ([HALF + b"Content-Type: image/png\r\nContent-Length: 9\r\n\r\n1"], 408, "/embed"),
    ],
    ids=["431", "408 in the header", "408 in the body"],
)
def test_a_refused_request_has_an_id_and_is_counted_once(listen, impatient, wait_until, parts, status, route):
    port, app = listen()

    def counts() -> dict[tuple, float]:
        samples = [sample for metric in app.state.metrics.requests.collect() for sample in metric.samples]
        return {tuple(s.labels.values()): s.value for s in samples if s.name.endswith("_total")}

    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as client:
        for part in parts:
            client.sendall(part)
        got = answer(client)
    head = got.partition(b"\r\n\r\n")[0].lower()
    assert head.startswith(b"http/1.1 %d " % status)
    assert b"x-request-id: mine" in head and b"x-content-type-options: nosniff" in head
    wait_until(lambda: counts() == {(route, str(status)): 1.0}, "the request is not counted")


def test_a_refused_request_without_an_id_gets_one(dial, impatient):
    head = answer(dial(b"GET / HTTP/1.1\r\n" + HOST + b"X: x")).partition(b"\r\n\r\n")[0].lower()
    assert re.search(rb"x-request-id: [0-9a-f]{32}", head)
