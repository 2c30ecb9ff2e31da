"""Attacks on a real service while others use it."""

import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
from PIL import Image

from tests.conftest import PATIENCE_S
from tests.hostile.files import encoded
from tests.serving.running import Load, Running

# Processor time, which other programs do not stretch: that of the worker until /livez is answered, and that of the
# whole service until a picture is, with two cores at work. Such files stopped everyone for 8 to 45 s. What the service
# uses until a client gets round to reading its answer counts too, so the best of TRIES on a busy machine.
LIVE_S, GOOD_S = 0.5, 2 * 2.0
TRIES = 3
Ask = Callable[[httpx.Client, int], httpx.Response]
MOST_MIB = 3072  # memory of the whole service
LEFT_MIB = 100  # more memory than before, when all is answered


class Others(Load):
    """Use the service as others do: ask whether it is alive, and embed a small picture and a photograph."""

    def __init__(self, service: Running):
        noise = np.random.default_rng(0).integers(0, 256, (375, 500, 3), np.uint8)
        small, photo = encoded(Image.new("RGB", (32, 32), "red"), "JPEG"), encoded(Image.fromarray(noise), "JPEG")
        assert len(photo) > 2**16
        self.live_s = self.small_s = self.photo_s = 0.0
        """Most processor time until an answer."""

        def timed(name: str, clock: Callable[[], float], ask: Callable[[httpx.Client], httpx.Response]) -> Ask:
            def call(http: httpx.Client, number: int) -> httpx.Response:
                before = clock()
                answer = ask(http)
                setattr(self, name, max(getattr(self, name), clock() - before))
                return answer

            return call

        asks = [
            timed("live_s", service.worker_cpu_s, lambda http: http.get("/livez")),
            timed("small_s", service.cpu_s, lambda http: http.post("/embed", content=small)),
            timed("photo_s", service.cpu_s, lambda http: http.post("/embed", content=photo)),
        ]
        super().__init__(service.address, asks)


class Memory:
    """Watches the service's memory until it is stopped."""

    def __init__(self, service: Running):
        self.peak_mib, self._service, self._stop = 0.0, service, threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "Memory":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.is_set():
            self.peak_mib = max(self.peak_mib, self._service.memory_mib())
            time.sleep(0.02)


def post(service: Running, body: bytes, media_type: str = "", path: str = "/embed", method: str = "POST") -> int:
    headers = {"Content-Type": media_type or "application/octet-stream"}
    url = f"{service.address}{path}"
    # Loading certificates would stall all clients of this process.
    with httpx.Client(timeout=PATIENCE_S, trust_env=False, verify=False) as http:
        return http.request(method, url, content=body, headers=headers).status_code


def statuses(service: Running, *parts: bytes) -> list[int]:
    """Send bytes as they are, and return the status of each answer until the connection is closed."""
    received = b""
    with socket.create_connection(("127.0.0.1", service.port), timeout=PATIENCE_S) as client:
        try:
            for part in parts:
                client.sendall(part)
            while part := client.recv(2**20):
                received += part
        except ConnectionError:  # it was closed while more was sent
            pass
    return [int(part[:3]) for part in received.split(b"HTTP/1.1 ")[1:]]


def besieged(
    service: Running, wait_until, asks: list[Callable[[], int | list[int]]], allowed: tuple[int, ...] = (200,)
) -> list:
    """Ask all at once while others use the service, check that they notice nothing, and return the statuses.

    allowed  statuses of the answers to others
    """
    for _ in range(TRIES):
        answers, within = _besieged_once(service, wait_until, asks, allowed)
        if within:
            break
    assert within, "others were held up each time"
    return answers


def _besieged_once(service: Running, wait_until, asks: list, allowed: tuple[int, ...]) -> tuple[list, bool]:
    """The statuses, and whether the times of others were within LIVE_S and GOOD_S."""
    workers, before = service.workers(), service.memory_mib()
    with Others(service) as load, Memory(service) as memory, ThreadPoolExecutor(len(asks)) as pool:
        answers = [call.result() for call in [pool.submit(ask) for ask in asks]]
    got = Counter(status for answer in answers for status in (answer if isinstance(answer, list) else [answer]))
    times = f"{load.live_s:.2f}, {load.small_s:.2f}, {load.photo_s:.2f} s"
    clock = ", ".join(f"{load.slowest(client):.2f}" for client in range(3))
    print(f"{dict(got)}: processor time for livez, small, photo {times}; by the clock {clock} s")
    print(f"at most {memory.peak_mib:.0f} MiB, {memory.peak_mib - before:.0f} more than before")
    assert not load.failures, load.failures
    assert {answer.response.status_code for answer in load.answers} <= {*allowed, 200}
    assert memory.peak_mib < MOST_MIB
    assert service.workers() == workers, "the service was restarted"
    assert all(status < 500 for status in got)
    wait_until(lambda: service.memory_mib() < before + LEFT_MIB, "memory is not given back")
    return answers, load.live_s < LIVE_S and max(load.small_s, load.photo_s) < GOOD_S
