"""Lanes run batches. On the CPU each is a process; for a GPU see device.py.

In threads of one process, decoding and request handling would wait for each other at Python's lock; a lane's process
has its own lock. It decodes small files of its batch itself (`decode.is_small`). A lane that ends, fails or hangs loses
its batch and is restarted, from a private copy of the graph that was checked when it was loaded.

    start    head: the model card. The answer's head: {"error"}
    batch    head: for each part {"rows": n}, n images (S, S, 3) uint8, or {"files": [lengths]}
    result   head: {"parts": [for each part [decode_s], or [image, reason, too_many]], "model_s", "error"}
             body: float32 (rows, d) of all parts without a problem, one after the other; from a classifier
             (rows, d + C), the logits last
"""

if __name__ == "__main__" and not __package__:
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import asyncio
import contextlib
import gc
import hashlib
import io
import mmap
import os
import signal
import socket
import sys
import tempfile
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import orjson

from export.artifact import Bundle, BundleError, ModelCard, Preprocessing, TooManyPixels, UnreadableImage, read_pixels
from serving.inference.encoder import CPU, OnnxEncoder
from serving.inference.process import DEATH_S, LENGTHS, LOOK_S, Ended, Process, Watch, cpu_s, make_frame, read_frame

MAX_PROCESSES = 16  # with more cores, each process has several
START_S = 600.0  # a process that is not ready by then has failed
# A batch that takes this many times the processor time of the start, which includes a batch, hangs.
LIMIT_STARTS, LEAST_LIMIT_S = 10, 10.0


class Problem(NamedTuple):
    """Why a part has no vectors."""

    image: int
    """Index within the part of the first image that could not be decoded."""
    error: UnreadableImage


class BatchResult(NamedTuple):
    parts: list[np.ndarray | Problem]
    """For each part float32 (n, d)."""
    decode_s: list[float]
    """For each part the time for decoding, if the lane decoded it."""
    model_s: float


Part = np.ndarray | Sequence[bytes]  # uint8 (n, S, S, 3), or n encoded images


class Lane(Protocol):
    """Runs one batch at a time."""

    @property
    def provider(self) -> str:
        """ONNX Runtime's execution provider."""
        ...

    @property
    def gpu_problem(self) -> str | None:
        """Why it runs on the CPU although there is a GPU."""
        ...

    async def __call__(self, parts: list[Part]) -> BatchResult:
        """Raises LaneLost."""

    async def restart(self) -> None:
        """After LaneLost. Raises the error because of which it cannot be restarted."""

    def close(self) -> None: ...


class LaneLost(Exception):
    """A lane has lost its batch, and needs a restart. The message says why."""


class PrivateCopy:
    """A graph in a file without a name, which nobody else can change, and which ends with this object or process."""

    def __init__(self, bundle: Bundle):
        """Raises BundleError if the graph is not the one of the card."""
        content = bundle.graph.read_bytes()
        if hashlib.sha256(content).hexdigest() != bundle.card.sha256:
            raise BundleError(f"{bundle.graph} has changed while it was loaded")
        with tempfile.TemporaryFile(prefix="twinview-") as file:
            file.write(content)
            file.flush()
            self.descriptor = os.dup(file.fileno())
            self._bytes = len(content)
        weakref.finalize(self, os.close, self.descriptor)

    def read(self) -> bytes:
        with mmap.mmap(self.descriptor, self._bytes, access=mmap.ACCESS_READ) as content:
            return bytes(content)


class ProcessLane:
    """Create it in any thread; after the first batch, use it only in that batch's event loop."""

    provider = CPU

    def __init__(
        self, card: ModelCard, graph: PrivateCopy, threads: int, max_work: int, gpu_problem: str | None = None
    ):
        """Start the process; `wait` until it is ready.

        threads      for one run
        max_work     most work of a file that it decodes; one with more is a Problem with TooManyPixels
        gpu_problem  why no GPU is used although there is one
        """
        self._card, self._graph, self.gpu_problem = card, graph, gpu_problem
        self._arguments = [str(threads), str(max_work), str(graph.descriptor)]
        self._start()

    def wait(self) -> None:
        """Wait until it can run batches. Raises BundleError."""
        try:
            head, _ = self.process.receive(START_S)
        except Ended as ended:
            raise BundleError(f"the process that should run {self._card.id} failed at its start ({ended})") from ended
        if problem := head["error"]:
            raise BundleError(problem)
        self.process.socket.settimeout(None)
        self._most_s = max(LEAST_LIMIT_S, LIMIT_STARTS * cpu_s(self.process.pid))

    async def __call__(self, parts: list[Part]) -> BatchResult:
        loop = asyncio.get_running_loop()
        watch, problem, timer = Watch(self.process.pid, self._most_s), None, asyncio.timeout(None)

        def look() -> None:
            nonlocal problem, next_look
            if problem := watch.look():
                timer.reschedule(loop.time())
            else:
                next_look = loop.call_later(LOOK_S, look)

        next_look = loop.call_later(LOOK_S, look)
        try:
            async with timer:
                return await self._exchange(parts)
        except TimeoutError:
            reason = f"the process that runs {self._card.id} has not answered: {problem}"
        except (OSError, EOFError):
            ended = await asyncio.to_thread(self.process.wait, DEATH_S)
            reason = f"the process that runs {self._card.id} has ended ({ended})"
        finally:
            next_look.cancel()
        self.close()
        raise LaneLost(reason)

    async def restart(self) -> None:
        """Raises BundleError, OSError."""
        self.close()
        self._start()
        await asyncio.to_thread(self.wait)

    def close(self) -> None:
        """Call it in the event loop."""
        if self._connection:
            self._connection.transport.abort()
        self.process.end()

    async def _exchange(self, parts: list[Part]) -> BatchResult:
        if self._connection is None:
            loop = asyncio.get_running_loop()
            _, self._connection = await loop.create_connection(_Connection, sock=self.process.socket)
        heads, body = [], []
        for part in parts:
            if isinstance(part, np.ndarray):
                heads.append({"rows": len(part)})
                body.append(part.tobytes())
            else:
                heads.append({"files": [len(data) for data in part]})
                body += part
        head, body = await self._connection.exchange(make_frame(heads, *body))
        if head["error"]:
            raise LaneLost(head["error"])
        vectors = np.frombuffer(body, np.float32).reshape(-1, self._card.outputs)
        results, decode_s, start = [], [], 0
        for part, fields in zip(parts, head["parts"], strict=True):
            if len(fields) == 1:
                results.append(vectors[start : start + len(part)])
                decode_s.append(fields[0])
                start += len(part)
            else:
                image, reason, too_many = fields
                results.append(Problem(image, (TooManyPixels if too_many else UnreadableImage)(reason)))
                decode_s.append(0.0)
        return BatchResult(results, decode_s, head["model_s"])

    def _start(self) -> None:
        self._connection = None
        self.process = Process(__file__, self._arguments, [self._graph.descriptor], CUDA_VISIBLE_DEVICES="")
        with contextlib.suppress(OSError):  # then it has ended, as `wait` will notice
            self.process.socket.sendall(make_frame(self._card.to_dict()))


class _Connection(asyncio.Protocol):
    """Exchanges one frame at a time. Closes itself when the other side does."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # a socket's is always one
        self._received = bytearray()
        self._answer: asyncio.Future | None = None

    async def exchange(self, frame: bytes) -> tuple[Any, bytes]:
        """Send a frame, and return the head and body of the answer. Raises EOFError."""
        if self.transport.is_closing():
            raise EOFError
        self._answer = asyncio.get_running_loop().create_future()
        self.transport.write(frame)
        return await self._answer

    def data_received(self, data: bytes) -> None:
        self._received += data
        if len(self._received) < LENGTHS.size:
            return
        head_bytes, body_bytes = LENGTHS.unpack_from(self._received)
        start, end = LENGTHS.size + head_bytes, LENGTHS.size + head_bytes + body_bytes
        if len(self._received) == end:
            received, self._received = bytes(self._received), bytearray()
            if self._answer and not self._answer.done():
                self._answer.set_result((orjson.loads(received[LENGTHS.size : start]), received[start:]))

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answer and not self._answer.done():
            self._answer.set_exception(EOFError())


def run_batch(
    parts: Sequence[Part],
    encode: Callable[[np.ndarray], np.ndarray],
    read: Callable[[bytes], np.ndarray] | None = None,
) -> BatchResult:
    """Decode and encode a batch in the caller's thread.

    encode  uint8 (n, S, S, 3) -> float32 (n, d)
    read    image file -> uint8 (S, S, 3); raises UnreadableImage
    """
    results: list[np.ndarray | Problem] = []
    decode_s = []
    for part in parts:
        if isinstance(part, np.ndarray):
            results.append(part)
            decode_s.append(0.0)
            continue
        if read is None:
            raise TypeError("a batch of image files needs `read`")
        started = perf_counter()
        results.append(_read(part, read))
        decode_s.append(perf_counter() - started)
    pixels = [result for result in results if isinstance(result, np.ndarray)]
    if not pixels:
        return BatchResult(results, decode_s, 0.0)
    started = perf_counter()
    vectors = encode(pixels[0] if len(pixels) == 1 else np.concatenate(pixels))
    model_s = perf_counter() - started
    start = 0
    for i, result in enumerate(results):
        if isinstance(result, np.ndarray):
            results[i] = vectors[start : start + len(result)]
            start += len(result)
    return BatchResult(results, decode_s, model_s)


def _read(files: Sequence[bytes], read: Callable[[bytes], np.ndarray]) -> np.ndarray | Problem:
    pixels = []
    for i, data in enumerate(files):
        try:
            pixels.append(read(data))
        except UnreadableImage as error:
            return Problem(i, error)
    return np.stack(pixels)


# In the lane's process ------------------------------------------------------------------------------------------------


def serve(graph: int, threads: int, max_work: int, connection: socket.socket) -> None:
    """Answer batches until the connection is closed. graph: a file descriptor"""
    with io.BufferedReader(connection.makefile("rb", 0), 2**20) as file:
        start = read_frame(file)
        if start is None:
            return
        try:
            card = ModelCard.from_dict(start[0])
            with mmap.mmap(graph, 0, access=mmap.ACCESS_READ) as content:
                encoder = OnnxEncoder(Bundle(Path(card.id), card), threads, bytes(content))
        except BundleError as error:
            connection.sendall(make_frame({"error": str(error)}))
            return
        connection.sendall(make_frame({"error": None}))
        gc.freeze()
        while batch := read_frame(file):
            connection.sendall(answer(*batch, encoder, card.preprocessing, max_work))


def answer(heads: list, body: bytes, encoder: OnnxEncoder, preprocessing: Preprocessing, max_work: int) -> bytes:
    """Returns the result's frame."""
    parts, start = [], 0
    shape = (preprocessing.size_px, preprocessing.size_px, 3)
    for head in heads:
        if "rows" in head:
            size = head["rows"] * shape[0] * shape[1] * shape[2]
            parts.append(np.frombuffer(body, np.uint8, size, start).reshape(-1, *shape))
            start += size
        else:
            files = []
            for size in head["files"]:
                files.append(body[start : start + size])
                start += size
            parts.append(files)
    try:
        batch = run_batch(parts, encoder.rows, lambda data: read_pixels(data, preprocessing, max_work=max_work))
    except Exception as error:  # ONNX Runtime's exceptions have no common base class
        return make_frame({"parts": [], "model_s": 0, "error": f"{type(error).__name__}: {error}"})
    fields = [
        [result.image, str(result.error), isinstance(result.error, TooManyPixels)]
        if isinstance(result, Problem)
        else [decode_s]
        for result, decode_s in zip(batch.parts, batch.decode_s, strict=True)
    ]
    vectors = [result.tobytes() for result in batch.parts if not isinstance(result, Problem)]
    return make_frame({"parts": fields, "model_s": batch.model_s, "error": None}, *vectors)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches this process too; the service ends it
    threads, max_work, graph, fd = map(int, sys.argv[1:])
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the service has ended
        serve(graph, threads, max_work, socket.socket(fileno=fd))
