"""Faults around the service: malicious pictures, stops, kills, and encoders replaced under load."""

import gc
import io
import os
import random
import signal
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import httpx
import numpy as np
import pytest
from PIL import Image

from export.artifact import read_pixels
from serving.api.body_limit import BodyLimit
from serving.limits import Limits
from tests.conftest import PATIENCE_S
from tests.serving.running import Answer, Load

NPY = {"Accept": "application/x-npy"}
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")


@pytest.fixture(scope="module")
def expected(bundle, picture, means):
    """expected(seed, scale) -> the embedding of picture(seed), computed by numpy."""

    def row(seed: int, scale: float = 1 / 255) -> np.ndarray:
        return means(read_pixels(picture(seed), bundle.card.preprocessing)[None], scale)[0]

    return row


# Malicious pictures ---------------------------------------------------------------------------------------------------


def truncated(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def flipped(data: bytes, rng: random.Random) -> bytes:
    """Flip up to 16 bits, half of them in the first 64 bytes."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 16)):
        changed[rng.randrange(rng.choice((min(64, len(data)), len(data))))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def overwritten(data: bytes, rng: random.Random) -> bytes:
    """Replace a run of bytes by zeros, ones or noise."""
    start = rng.randrange(len(data))
    length = rng.randint(1, len(data))
    filling = rng.choice((b"\0" * length, b"\xff" * length, rng.randbytes(length)))
    return (data[:start] + filling + data[start + length :])[: len(data)]


def of_another_type(data: bytes, rng: random.Random) -> bytes:
    heads = (b"%PDF-1.7\n", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"PK\x03\x04", b"<svg xmlns='http://www.w3.org/2000/svg'/>")
    heads += (
        b"MZ",
        b"\x7fELF",
        b"<!doctype html>",
        b"\x93NUMPY\x01\0",
        b"\x80\x04.",
        b"RIFF",
        b"ftypavif",
        b"\xff\xd8",
    )
    return rng.choice(heads) + rng.choice((b"", data, rng.randbytes(200)))


def joined(data: bytes, rng: random.Random) -> bytes:
    """The head of one format on the body of another."""
    cut = rng.randrange(min(64, len(data)))
    return _encoded(rng.choice(FORMATS), rng)[:cut] + data[cut:]


def bomb(data: bytes, rng: random.Random) -> bytes:
    """Small files with many pixels, announced or real."""
    n = rng.choice((20_000, 65_535, 2**31 - 1))
    small = min(n, 65_535)
    png = bytearray(_encoded("PNG", rng))
    png[16:24] = struct.pack(">II", n, n)
    jpeg = bytearray(_encoded("JPEG", rng))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", small, small)
    gif = bytearray(_encoded("GIF", rng))
    gif[6:10] = struct.pack("<HH", small, small)
    bmp = bytearray(_encoded("BMP", rng))
    bmp[18:26] = struct.pack("<ii", n, rng.choice((n, -n)))
    real = io.BytesIO()
    Image.new("1", (3000, 3000)).save(real, "PNG", optimize=False)
    return rng.choice((bytes(png), bytes(jpeg), bytes(gif), bytes(bmp), f"P6 {n} {n} 255\n".encode(), real.getvalue()))


def nothing(data: bytes, rng: random.Random) -> bytes:
    return rng.choice((b"", b"\0" * rng.choice((1, 8, 4096, 2**20))))


def with_a_huge_header(data: bytes, rng: random.Random) -> bytes:
    """Text, profiles and announced lengths far beyond the picture."""
    jpeg, png = _encoded("JPEG", rng), _encoded("PNG", rng)
    segments = (b"\xff\xe1\xff\xff" + b"Exif\0\0" + rng.randbytes(65_527)) * rng.randint(1, 12)
    length = struct.pack(">I", rng.choice((2**20, 2**31 - 1, 2**32 - 1)))
    comment = b"# " + b"x" * 2**20 + b"\n"
    return rng.choice(
        (
            jpeg[:2] + segments + jpeg[2:],
            png[:33] + length + b"iCCP" + rng.randbytes(64) + png[33:],
            png[:33] + length + b"zTXt" + b"a\0\0" + png[33:],
            b"P6 " + comment * rng.randint(1, 3) + b"32 32 255\n" + b"\x80" * 3072,
            b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", 65_535) + rng.randbytes(12 * 2000),
        )
    )


MUTATIONS = (truncated, flipped, overwritten, of_another_type, joined, bomb, nothing, with_a_huge_header)


def _encoded(format: str, rng: random.Random) -> bytes:
    buffer = io.BytesIO()
    width, height = rng.randint(8, 64), rng.randint(8, 64)
    Image.frombytes("RGB", (width, height), rng.randbytes(width * height * 3)).save(buffer, format)
    return buffer.getvalue()


def mutated(count: int) -> Iterator[tuple[str, bytes]]:
    """The same pictures every time, each with the name of its mutation."""
    rng = random.Random(0)
    for i in range(count):
        mutation, format = MUTATIONS[i % len(MUTATIONS)], FORMATS[i // len(MUTATIONS) % len(FORMATS)]
        yield f"{mutation.__name__} {format} {i}", mutation(_encoded(format, rng), rng)


@pytest.mark.slow
def test_a_thousand_mutated_pictures_cause_no_internal_error_and_affect_no_other_picture(serve, picture, expected):
    http = serve(limits=Limits(pixels=4_000_000))
    good = {i: (picture(i), expected(i)) for i in range(16)}

    def ask(i: int, name: str, data: bytes) -> tuple[str, int]:
        bad = http.post("/embed", files=[("images", (name, data)), ("images", ("good.png", good[i % 16][0]))])
        if bad.status_code != 200:
            error = bad.json()["error"]
            assert error["param"] == "images[0]", (name, error)
            assert error["message"].startswith(f"images[0] ({name}) "), (name, error)
        answer = http.post("/embed", files={"images": ("good.png", good[i % 16][0])}, headers=NPY)
        assert answer.status_code == 200, name
        np.testing.assert_allclose(np.load(io.BytesIO(answer.content))[0], good[i % 16][1], atol=1e-5)
        return name.partition(" ")[0], bad.status_code

    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, i, name, data) for i, (name, data) in enumerate(mutated(1000))]
        statuses = Counter(future.result() for future in asked)
    assert {status for _, status in statuses} <= {200, 413, 422}, statuses
    for mutation in ("truncated", "nothing", "of_another_type"):
        assert statuses[mutation, 422] > 100, statuses
    assert statuses["bomb", 413] > 100, statuses
    assert statuses["flipped", 200] > 10, statuses  # some can still be decoded


# Stops, kills, replacements -------------------------------------------------------------------------------------------


def posting(address: str, picture, clients: int = 4) -> Load:
    """Clients that post pictures, one after the other; `number` says which."""
    files = [picture(i) for i in range(16)]

    def post(client: int, http: httpx.Client, call: int) -> httpx.Response:
        file = ("images", ("a.png", files[(client + call) % 16]))
        return http.post("/embed", files=[file], headers=NPY)

    return Load(address, [partial(post, client) for client in range(clients)])


def number(answer: Answer) -> int:
    """The number of the picture that was posted."""
    return (answer.client + answer.call) % 16


# No picture is opened before the file exists: a request that has come in stays until then.
HELD = """
import os, time
import PIL.Image
open_image = PIL.Image.open
def held(*arguments, **options):
    while not os.path.exists(os.environ["GO_ON"]):
        time.sleep(0.01)
    return open_image(*arguments, **options)
PIL.Image.open = held
"""


def refuses_connections(address: str) -> bool:
    try:
        httpx.get(f"{address}/livez", timeout=1)
    except httpx.TransportError:
        return True
    return False


@pytest.mark.slow
def test_two_replacements_of_the_encoder_under_load_fail_no_request(
    launch, make_bundle, picture, expected, tmp_path, wait_until
):
    scales = {
        make_bundle(tmp_path / str(n), scale).card.id: scale for n, scale in enumerate((1 / 255, 1 / 128, 1 / 64))
    }
    ids = list(scales)
    make_bundle(tmp_path / "place", scales[ids[0]])
    running = launch(tmp_path / "place")
    ready = f"{running.address}/readyz"
    with posting(running.address, picture) as load:
        load.wait_for(50, wait_until)
        for id in ids[1:]:
            make_bundle(tmp_path / "place", scales[id])
            wait_until(lambda id=id: httpx.get(ready).json()["model"] == id, f"{id} does not serve")
            load.wait_for(50, wait_until)
    assert load.failures == []
    seen = Counter()
    for answer in load.answers:
        assert answer.response.status_code == 200
        model = answer.response.headers["Twinview-Model"]
        vector = np.load(io.BytesIO(answer.response.content))[0]
        np.testing.assert_allclose(vector, expected(number(answer), scales[model]), rtol=1e-4, atol=1e-4)
        seen[model] += 1
    assert set(seen) == set(ids)


@pytest.mark.slow
def test_a_stop_under_load_answers_the_running_requests_and_then_ends(launch, picture, tmp_path, wait_until):
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "sitecustomize.py").write_text(HELD)
    go_on = tmp_path / "go on"
    running = launch(environment={"PYTHONPATH": str(tmp_path / "held"), "GO_ON": str(go_on)})
    answers = {}

    def ask(i: int) -> None:
        files = [("images", (f"{j}.png", picture(j))) for j in range(20)]
        answers[i] = httpx.post(f"{running.address}/embed", files=files, headers=NPY).status_code

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    metrics = f"{running.address}/metrics"
    wait_until(lambda: "twinview_images_at_once 120.0" in httpx.get(metrics).text, "the requests are not all in")
    running.process.send_signal(signal.SIGTERM)
    wait_until(lambda: refuses_connections(running.address), "the service does not stop listening")
    assert answers == {}
    go_on.touch()
    assert running.process.wait(PATIENCE_S) == 0
    for thread in threads:
        thread.join()
    assert answers == dict.fromkeys(range(6), 200)
    assert "Traceback" not in running.log.read_text()


@pytest.mark.slow
def test_a_worker_killed_under_load_is_restarted(launch, picture, expected, wait_until):
    running = launch()
    (killed,) = running.workers()
    with posting(running.address, picture) as load:
        load.wait_for(50, wait_until)
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: running.workers() and killed not in running.workers(), "the worker does not come back")
        load.wait_for(200, wait_until)
    assert running.process.poll() is None
    assert len(load.failures) <= 4 * 5  # the running requests, for a short time
    for answer in load.answers:
        assert answer.response.status_code == 200
        vector = np.load(io.BytesIO(answer.response.content))[0]
        np.testing.assert_allclose(vector, expected(number(answer)), atol=1e-5)


def test_a_busy_service_refuses_requests_before_their_images_are_sent(listen, picture):
    port, app = listen(limits=Limits(images_at_once=2))
    gate, body = app.state.engine._gate, picture(0)
    for path in ("/embed", "/v1/embeddings"):
        head = (
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as client:
            gate.in_flight = 2
            client.sendall(head.encode())
            answer = client.recv(2**16)
            assert answer.startswith(b"HTTP/1.1 429 ") and b"retry-after: 1\r\n" in answer
            gate.in_flight = 0
            client.sendall(body)  # which the service skips; the connection stays open
            client.sendall(
                f"POST /embed HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
            )
            assert client.recv(2**16).startswith(b"HTTP/1.1 200 ")


def body_limit(app) -> BodyLimit:
    layer = app.middleware_stack
    while not isinstance(layer, BodyLimit):
        layer = layer.app
    return layer


@pytest.mark.slow
def test_bodies_that_are_too_large_together_are_refused_while_they_arrive(listen, picture, wait_until):
    port, app = listen(limits=Limits(bytes_at_once=2**20))
    body = picture(0) + b"x" * 2**20  # alone it is not too large
    facts = f"Host: localhost\r\nContent-Type: image/png\r\nContent-Length: {len(body)}"
    head = f"POST /embed HTTP/1.1\r\n{facts}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as slow:
        slow.sendall(head + body[:-1])
        wait_until(lambda: body_limit(app).in_flight == len(body) - 1, "the large body does not arrive")
        for _ in range(2):
            refused = httpx.post(f"http://127.0.0.1:{port}/embed", content=picture(1))
            assert refused.status_code == 429 and refused.headers["Retry-After"] == "1"
            assert "1 MiB, the most it takes at once" in refused.json()["error"]["message"]
        slow.sendall(body[-1:])
        assert slow.recv(2**16).startswith(b"HTTP/1.1 200 ")
    for _ in range(20):
        assert httpx.post(f"http://127.0.0.1:{port}/embed", content=picture(1)).status_code == 200


def test_a_refused_body_is_given_back_without_collecting_garbage(listen, wait_until):
    port, _ = listen(limits=Limits(body_bytes=2**20))

    def kept() -> list:
        return [one for one in gc.get_objects() if type(one).__name__ == "_Upload"]

    gc.collect()
    before = kept()  # of other tests
    gc.disable()
    try:
        for path, kind in (("/embed", "image/png"), ("/collections/pictures/search", "application/json")):
            headers, body = {"Content-Type": kind}, iter([bytes(2**18)] * 5)
            assert httpx.post(f"http://127.0.0.1:{port}{path}", content=body, headers=headers).status_code == 413
        wait_until(lambda: not [one for one in kept() if one not in before], "refused bodies stay in memory")
    finally:
        gc.enable()


def test_uploads_that_fill_the_memory_for_a_minute_give_way_the_oldest_first(listen, picture, wait_until, monkeypatch):
    port, app = listen(limits=Limits(bytes_at_once=2**20))
    size = 2**19 - 100
    head = f"POST /embed HTTP/1.1\r\nHost: localhost\r\nContent-Length: {2**20}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as first:
        first.sendall(head + bytes(size))
        wait_until(lambda: body_limit(app).in_flight == size, "the first body does not arrive")
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as second:
            second.sendall(head + bytes(size))
            wait_until(lambda: body_limit(app).in_flight == 2 * size, "the second body does not arrive")
            for limit, left in ((60.0, 2 * size), (0.0, size)):
                monkeypatch.setattr("serving.api.body_limit.UPLOAD_S", limit)
                assert httpx.post(f"http://127.0.0.1:{port}/embed", content=bytes(1000)).status_code == 429
                wait_until(lambda left=left: body_limit(app).in_flight == left, "another upload was ended")
            assert first.recv(2**16).startswith(b"HTTP/1.1 429 ")
            assert httpx.post(f"http://127.0.0.1:{port}/embed", content=picture(1)).status_code == 200
            second.sendall(bytes(2**20 - size))
            assert second.recv(2**16).startswith(b"HTTP/1.1 422 ")  # read to its end, and no picture
