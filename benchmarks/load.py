"""Load over HTTP from a process of its own, and what it costs there and in the server.

Connections are kept alive and carry one request at a time. In a closed loop each asks again as soon as it is answered;
in an open one requests are due at a rate, whatever becomes of those before, on as many connections as that takes, and
their latency counts from when they were due.
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

PATIENCE_S = 60  # for the last answers
IDLE_S = 2.0  # a connection that was longer is left: servers close it (uvicorn after 5 s), and may while one asks


@dataclass(frozen=True)
class Turn:
    """What came of some seconds of load, or of work."""

    images_per_s: float
    cpu_ms: float  # an image; of all processes of the server
    generator: float = 0.0  # its share of all cores
    latencies_s: np.ndarray | None = None  # of answers with 200
    statuses: collections.Counter | None = None  # 0 for a connection that was lost


def post(path: str, content_type: str, body: bytes, accept: str) -> bytes:
    """A request as it goes over the wire."""
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
    """Ask for some seconds, in a closed loop after the first answers. raises RuntimeError where that meets an error.

    server    pid, whose children count too
    requests  as `post` gives them, in turn
    images    in each
    rate      of requests a second, in an open loop; None is a closed one
    gaps      between them: even, or Poisson
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
        # From a burst of answers to a burst of answers: they come a batch at a time.
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
    def __init__(self, port: int, requests: list[bytes], again: bool):
        self.port, self.again = port, again
        self.requests = itertools.cycle(requests)
        self.idle: list[Connection] = []
        self.outstanding = 0
        self.times, self.latencies = array("d"), array("d")  # of answers with 200: when, and after how long
        self.statuses: collections.Counter[int] = collections.Counter()
        self.problem = ""

    async def run(self, connections: int, seconds: float, rate: float | None, gaps: str, server: int) -> tuple:
        """Start and end, each as moment, server's CPU seconds, own CPU seconds."""

        def now() -> tuple[float, float, float]:
            return time.perf_counter(), cpu_s(server), time.process_time()

        for connection in [await self.connect() for _ in range(connections)]:
            if rate is None:
                connection.ask(time.perf_counter())
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
            await self.ask_at(rate, gaps, start[0], start[0] + seconds)
        end = now()
        self.again = False
        while self.outstanding and time.perf_counter() < end[0] + PATIENCE_S:
            await asyncio.sleep(0.01)
        return start, end

    async def answered(self, count: int) -> None:
        while len(self.times) < count and not self.problem:
            await asyncio.sleep(0.01)

    async def ask_at(self, rate: float, gaps: str, due: float, end: float) -> None:
        chance = random.Random(0)
        gap: Callable[[], float] = (lambda: 1 / rate) if gaps == "even" else (lambda: chance.expovariate(rate))
        while (due := due + gap()) < end:
            if (early := due - time.perf_counter()) > 0:
                await asyncio.sleep(early)
            (self.fresh() or await self.connect()).ask(due)

    def fresh(self) -> "Connection | None":
        """The one that was used last; the others are older still."""
        if self.idle and time.perf_counter() - self.idle[-1].since < IDLE_S:
            return self.idle.pop()
        return None

    async def connect(self) -> "Connection":
        loop = asyncio.get_running_loop()
        return (await loop.create_connection(lambda: Connection(self), "127.0.0.1", self.port))[1]


class Connection(asyncio.Protocol):
    def __init__(self, load: Load):
        self.load = load
        self.parser = httptools.HttpResponseParser(self)  # calls on_body and on_message_complete
        self.due: float | None = None
        self.since = time.perf_counter()  # it has been idle
        self.body = b""

    def ask(self, due: float) -> None:
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
            self.ask(time.perf_counter())
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
        self.due, self.since = None, now


def processes(pid: int) -> list[psutil.Process]:
    return [process := psutil.Process(pid), *process.children(recursive=True)]


def cpu_s(pid: int) -> float:
    return sum(times.user + times.system for times in (process.cpu_times() for process in processes(pid)))


def memory_mib(pid: int) -> float:
    return sum(process.memory_info().rss for process in processes(pid)) / 2**20
