"""Requests that are made to stall, fill or confuse the service, sent to a real one while others use it."""

import json
import socket
from collections.abc import Callable

import pytest

from serving.limits import DEFAULT_LIMITS
from tests.conftest import PATIENCE_S
from tests.hostile.files import MIB
from tests.hostile.siege import besieged, post, statuses

HOST = b"Host: localhost\r\n"
GET = b"GET /livez HTTP/1.1\r\n" + HOST
EMBED = b"POST /embed HTTP/1.1\r\n" + HOST
ITEMS = "/collections/requests/items"
SEARCH = "/collections/requests/search"
FORM = "multipart/form-data; boundary=x"
FIELD = b'--x\r\nContent-Disposition: form-data; name="images"; filename="a.png"\r\n\r\nabc\r\n'

SENT: dict[str, tuple[bytes, ...]] = {
    "a header line of 32 MiB": (GET, b"X: ", *[b"x" * MIB] * 32),
    "a million header lines": (GET, *[b"X: x\r\n" * 10_000] * 100),
    "a path of 32 MiB": (b"GET /", *[b"x" * MIB] * 32),
    "lines after the chunks of a body": (
        EMBED + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n",
        *[b"X: x\r\n" * 10_000] * 100,
    ),
    "an extension of a chunk of 32 MiB": (EMBED + b"Transfer-Encoding: chunked\r\n\r\n1;", *[b"x" * MIB] * 32),
    "a body in chunks of 128 MiB": (
        EMBED + b"Transfer-Encoding: chunked\r\n\r\n",
        *[b"%x\r\n" % MIB + bytes(MIB) + b"\r\n"] * 128,
    ),
    "10,000 requests in one": ((GET + b"\r\n") * 10_000,),
    "ranges of a file": (
        b"GET /docs/assets/swagger-ui-bundle.js HTTP/1.1\r\n"
        + HOST
        + b"Range: bytes="
        + b"0-," * 20_000
        + b"0-\r\n\r\n",
    ),
    "bytes that are no request": (bytes(range(256)) * 1000,),
}
BODIES: dict[str, tuple[str, str, str, Callable[[], bytes]]] = {
    "20,000 metadata keys": (
        "PUT",
        ITEMS,
        "application/json",
        lambda: json.dumps(
            {"model": "m", "items": [{"id": "a", "vector": [1], "metadata": {f"k{i}": i for i in range(20_000)}}]}
        ).encode(),
    ),
    "nested lists": ("POST", SEARCH, "application/json", lambda: b"[" * 30 * MIB),
    "nested filters": (
        "POST",
        SEARCH,
        "application/json",
        lambda: b'{"positive": ["a"], "filter": ' + b'{"and": [' * MIB + b"]}" * MIB + b"}",
    ),
    "a long number": ("POST", SEARCH, "application/json", lambda: b'{"positive": [[' + b"1" * 8 * MIB + b"]]}"),
    "a million wrong numbers": (
        "POST",
        SEARCH,
        "application/json",
        lambda: b'{"positive": [[' + b'"",' * MIB + b"1]]}",
    ),
    "a million files": ("POST", "/embed", FORM, lambda: FIELD * 300_000 + b"--x--\r\n"),
    "a form that is cut off": ("PUT", ITEMS, FORM, lambda: FIELD * 2),
    "a form in undefined": ("PUT", ITEMS, f"{FORM}; charset=undefined", lambda: FIELD + b"--x--\r\n"),
    "a form without names": ("POST", "/embed", FORM, lambda: b"--x\r\nX: y\r\n\r\na\r\n" * 100_000 + b"--x--\r\n"),
    "a form with long headers": ("POST", "/embed", FORM, lambda: b"--x\r\nX: " + b"y" * 30 * MIB),
    "a pack of a million empty files": ("POST", "/embed", "application/x-twinview-pack", lambda: bytes(8 * MIB)),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", SENT)
def test_hostile_bytes_delay_nobody(service, wait_until, what):
    besieged(service, wait_until, [lambda: statuses(service, *SENT[what])] * 2)


@pytest.mark.slow
@pytest.mark.parametrize("what", BODIES)
def test_a_hostile_body_delays_nobody(service, wait_until, what):
    method, path, kind, body = BODIES[what]
    data = body()
    answers = besieged(service, wait_until, [lambda: post(service, data, kind, path, method)] * 2)
    assert all(400 <= status < 500 for status in answers)


def half_a_header(service) -> list[int]:
    clients = [socket.create_connection(("127.0.0.1", service.port), timeout=PATIENCE_S) for _ in range(100)]
    for client in clients:
        client.sendall(GET)
    got = [client.recv(2**16) for client in clients]
    for client in clients:
        client.close()
    return [int(answer.split()[1]) for answer in got]


@pytest.mark.slow
def test_a_hundred_halves_of_a_header_are_ended(service, wait_until):
    assert besieged(service, wait_until, [lambda: half_a_header(service)]) == [[408] * 100]


@pytest.mark.slow
def test_stalled_uploads_that_fill_the_memory_hold_others_up_for_a_short_time(service, wait_until):
    size = DEFAULT_LIMITS.body_bytes
    part = bytes(size - 1)

    def stall() -> list[int]:
        with socket.create_connection(("127.0.0.1", service.port), timeout=PATIENCE_S) as client:
            client.sendall(EMBED + b"Content-Length: %d\r\n\r\n" % size + part)
            return [int(client.recv(2**16).split()[1])]

    answers = besieged(service, wait_until, [stall] * 17, allowed=(200, 429))
    assert {status for [status] in answers} <= {408, 429} and [408] in answers
    assert post(service, b"x") == 422
