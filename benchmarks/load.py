"""Generates load over HTTP, and measures rate, latency and CPU time of client and server.

Connections are kept alive and carry one request at a time. In a closed loop each connection sends a request as soon as
it has received an answer. In an open loop requests are due at a fixed rate, independent of earlier answers, on as many
connections as needed, and their latency counts from the time they were due.
"""

import asyncio
import bisect
import collections
import contextlib
import itertools
import random
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass

import httptools
import numpy as np
import psutil
import uvloop

from serving.limits import cores

PATIENCE_S = 60  # longest wait for the last answers
IDLE_S = 2.0  # connections idle for longer are not used again: the server may be closing them (uvicorn after 5 s)


@dataclass(frozen=True)
class Turn:
    """Result of some seconds of load, or of work."""

    images_per_s: float
    cpu_ms: float  # per image, of all processes of the server
    generator: float = 0.0  # share of all cores used by the load generator
    latencies_s: np.ndarray | None = None  # of answers with 200
    statuses: collections.Counter | None = None  # 0 for a lost connection


def post(path: str, content_type: str, body: bytes, accept: str) -> bytes:
    """The bytes of a POST request."""
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: {accept}\r\nContent-Type: {content_type}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def generate(
    port: int,
    server: int,
    requests: list[bytes],
    images: int,
    connections: int,
    seconds: float,
    rate: float | None = None,
    gaps: str = "even",
) -> Turn:
    """Send requests for some seconds. raises RuntimeError when a request fails in a closed loop

    server    process id; its children count, too
    requests  from `post`, sent in turn
    images    per request
    rate      requests per second in an open loop; None for a closed loop, measured after the first answers
    gaps      between requests of an open loop: even, or Poisson
    """
    load = Load(port, requests, again=rate is None)
    (start, before, own_before), (end, after, own_after) = uvloop.run(
        load.run(connections, seconds, rate, gaps, server)
    )
    span = end - start
    first, last = (bisect.bisect_right(load.times, moment) for moment in (start, end))
    if rate is None:
        if load.problem:
            raise RuntimeError(load.problem)
        # From one burst of answers to another, since answers come in batches.
        per_s = images * (last - first) / (load.times[last - 1] - load.times[first - 1])
    else:
        per_s = images * last / span
    return Turn(
        per_s,
        cpu_ms=1e3 * (after - before) / span / per_s,
        generator=(own_after - own_before) / span / cores(),
        latencies_s=np.array(load.latencies),
        statuses=load.statuses,
    )


class Load:
    def __init__(self, port: int, requests: list[bytes], again: bool) -> None:
        self.port, self.again = port, again
        self.requests = itertools.cycle(requests)
        self.idle: list[Connection] = []
        self.outstanding = 0
        self.times, self.latencies = array("d"), array("d")  # of answers with 200: time and latency
        self.statuses: collections.Counter[int] = collections.Counter()
        self.problem = ""

    async def run(self, connections: int, seconds: float, rate: float | None, gaps: str, server: int) -> tuple:
        """At the start and the end of the measurement: time, CPU seconds of the server, CPU seconds of this process."""

        def now() -> tuple[float, float, float]:
            return time.perf_counter(), cpu_s(server), time.process_time()

        for connection in [await self.connect() for _ in range(connections)]:
            if rate is None:
                connection.send(time.perf_counter())
            else:
                self.idle.append(connection)
        if rate is None:
            await self.answered(connections)
        start = now()
        if rate is None:
            enough = len(self.times) + connections
            await asyncio.sleep(seconds)
            await self.answered(enough)
        else:
            await self.send_at(rate, gaps, start[0], start[0] + seconds)
        end = now()
        self.again = False
        while self.outstanding and time.perf_counter() < end[0] + PATIENCE_S:
            await asyncio.sleep(0.01)
        return start, end

    async def answered(self, count: int) -> None:
        """Wait for this many answers with 200."""
        while len(self.times) < count and not self.problem:
            await asyncio.sleep(0.01)

    async def send_at(self, rate: float, gaps: str, due: float, end: float) -> None:
        chance = random.Random(0)
        gap: Callable[[], float] = (lambda: 1 / rate) if gaps == "even" else (lambda: chance.expovariate(rate))
        while (due := due + gap()) < end:
            if (early := due - time.perf_counter()) > 0:
                await asyncio.sleep(early)
            (self.idle_connection() or await self.connect()).send(due)

    def idle_connection(self) -> "Connection | None":
        """The connection that was used last, unless it has been idle for too long."""
        if self.idle and time.perf_counter() - self.idle[-1].idle_since < IDLE_S:
            return self.idle.pop()
        return None

    async def connect(self) -> "Connection":
        loop = asyncio.get_running_loop()
        return (await loop.create_connection(lambda: Connection(self), "127.0.0.1", self.port))[1]


class Connection(asyncio.Protocol):
    def __init__(self, load: Load) -> None:
        self.load = load
        self.parser = httptools.HttpResponseParser(self)  # calls on_body and on_message_complete
        self.due: float | None = None
        self.idle_since = time.perf_counter()
        self.body = b""

    def send(self, due: float) -> None:
        self.due = due
        self.load.outstanding += 1
        self.transport.write(next(self.load.requests))

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        self.body = body

    def on_message_complete(self) -> None:
        self.done(self.parser.get_status_code())
        if self.load.again:
            self.send(time.perf_counter())
        else:
            self.load.idle.append(self)

    def connection_lost(self, error: Exception | None) -> None:
        with contextlib.suppress(ValueError):
            self.load.idle.remove(self)
        if self.due is not None:
            self.done(0)

    def done(self, status: int) -> None:
        now = time.perf_counter()
        if status == 200:
            self.load.times.append(now)
            self.load.latencies.append(now - self.due)
        else:
            self.load.problem = self.load.problem or f"status {status}: {self.body[:300]!r}"
        self.load.statuses[status] += 1
        self.load.outstanding -= 1
        self.due, self.idle_since = None, now


def processes(pid: int) -> list[psutil.Process]:
    return [process := psutil.Process(pid), *process.children(recursive=True)]


def cpu_s(pid: int) -> float:
    return sum(times.user + times.system for times in (process.cpu_times() for process in processes(pid)))


def memory_mib(pid: int) -> float:
    return sum(process.memory_info().rss for process in processes(pid)) / 2**20
