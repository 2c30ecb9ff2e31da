"""Lanes run batches: on the CPU each lane is a process, on a GPU a thread.

In threads of one process, decoding and request handling would wait for each other at Python's lock; a lane's process
has its own lock. An image that crashes its decoder ends only the lane's process: the lane is restarted, and the other
images of that batch are run again.

The service and a lane's process exchange frames over a socket. A frame is the lengths of head and body (4 bytes each,
big-endian), the head in JSON, and the body in bytes.

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
import io
import os
import signal
import socket
import struct
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from pathlib import Path
from time import perf_counter
from typing import Any, BinaryIO, NamedTuple, Protocol, cast

import numpy as np
import orjson

from export.artifact import Bundle, BundleError, Preprocessing, TooManyPixels, UnreadableImage, load_bundle, read_pixels
from serving.inference.encoder import CPU, OnnxEncoder, has_accelerator

MAX_PROCESSES = 16  # with more cores, each process has several
LENGTHS = struct.Struct("!II")


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

    async def __call__(self, parts: list[Part]) -> BatchResult:
        """Raises the error that made the whole batch fail."""

    def close(self) -> None: ...


class ThreadLane:
    def __init__(self, encode: Callable[[np.ndarray], np.ndarray], threads: Executor):
        """encode  uint8 (n, S, S, 3) -> float32 (n, d)"""
        self._encode, self._threads = encode, threads

    async def __call__(self, parts: list[Part]) -> BatchResult:
        """parts: pixels only"""
        return await asyncio.get_running_loop().run_in_executor(self._threads, run_batch, parts, self._encode)

    def close(self) -> None:
        pass


class ProcessLane:
    """Create it in any thread; after the first batch, use it only in that batch's event loop."""

    def __init__(self, bundle: Bundle, threads: int, max_pixels: int):
        """Start the process; `wait` until it is ready.

        threads     for one run
        max_pixels  largest image that it decodes; a larger one is a Problem with TooManyPixels
        """
        self._bundle, self._width = bundle, bundle.card.outputs
        self._command = [sys.executable, __file__, str(bundle.folder), bundle.card.id, str(threads), str(max_pixels)]
        self._end = lambda: None
        self._start()

    def wait(self) -> None:
        """Wait until it can run batches. Raises BundleError."""
        with self._socket.makefile("rb") as file:
            frame = read_frame(file)
        if frame is None:
            raise BundleError(f"{self._bundle.folder}: the process that should run it ended at its start")
        if problem := frame[0]["error"]:
            raise BundleError(problem)

    async def __call__(self, parts: list[Part]) -> BatchResult:
        try:
            return await self._exchange(parts)
        except (OSError, EOFError):
            await asyncio.to_thread(self._restart)
        results = [await self._image_by_image(part) for part in parts]
        return BatchResult(
            [result.parts[0] for result in results],
            [result.decode_s[0] for result in results],
            sum(result.model_s for result in results),
        )

    def close(self) -> None:
        """Call it in the event loop."""
        self._end()
        (self._connection.transport if self._connection else self._socket).close()

    async def _image_by_image(self, part: Part) -> BatchResult:
        """Run the images one at a time, to find the one that crashes the process."""
        vectors, decode_s, model_s = [], 0.0, 0.0
        for i in range(len(part)):
            try:
                result = await self._exchange([part[i : i + 1]])
            except (OSError, EOFError):
                await asyncio.to_thread(self._restart)
                return BatchResult([Problem(i, UnreadableImage("crashes its decoder"))], [0.0], 0.0)
            rows = result.parts[0]
            if isinstance(rows, Problem):
                return BatchResult([rows._replace(image=i)], [0.0], 0.0)
            vectors.append(rows)
            decode_s += result.decode_s[0]
            model_s += result.model_s
        return BatchResult([np.concatenate(vectors)], [decode_s], model_s)

    async def _exchange(self, parts: list[Part]) -> BatchResult:
        if self._connection is None:
            loop = asyncio.get_running_loop()
            _, self._connection = await loop.create_connection(_Connection, sock=self._socket)
        heads, body = [], []
        for part in parts:
            if isinstance(part, np.ndarray):
                heads.append({"rows": len(part)})
                body.append(part.tobytes())
            else:
                heads.append({"files": [len(data) for data in part]})
                body += part
        head, body = await self._connection.exchange(make_frame(heads, *body))
        vectors = np.frombuffer(body, np.float32).reshape(-1, self._width)
        if head["error"]:
            raise RuntimeError(head["error"])
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
        self._socket, theirs = socket.socketpair()
        with theirs:
            command = [*self._command, str(theirs.fileno())]
            # The process ends when the socket is closed, which also happens when this process is killed.
            environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
            self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment)
        self._connection: _Connection | None = None
        self._end = weakref.finalize(self, _end, self.process)

    def _restart(self) -> None:
        self._end()
        self._start()
        self.wait()


def _end(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()


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


def open_lanes(bundle: Bundle, cores: int, max_pixels: int, threads: Executor) -> tuple[Sequence[Lane], str]:
    """Returns the lanes and their execution provider of ONNX Runtime. Raises BundleError."""
    if has_accelerator():
        encoder = OnnxEncoder(bundle, threads=1)
        if encoder.providers[0] != CPU:
            return [ThreadLane(encoder.rows, threads)], encoder.providers[0]
    count = min(cores, MAX_PROCESSES)
    lanes = [ProcessLane(bundle, cores // count, max_pixels) for _ in range(count)]  # one core each: efficient
    for lane in lanes:
        lane.wait()
    return lanes, CPU


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


def serve(folder: Path, id: str, threads: int, max_pixels: int, connection: socket.socket) -> None:
    """Answer batches until the connection is closed."""
    with io.BufferedReader(connection.makefile("rb", 0), 2**20) as file:
        try:
            bundle = load_bundle(folder)
            if bundle.card.id != id:
                raise BundleError(f"{folder} now holds {bundle.card.id} instead of {id}")
            encoder = OnnxEncoder(bundle, threads)
        except BundleError as error:
            connection.sendall(make_frame({"error": str(error)}))
            return
        connection.sendall(make_frame({"error": None}))
        gc.freeze()
        while batch := read_frame(file):
            connection.sendall(answer(*batch, encoder, bundle.card.preprocessing, max_pixels))


def answer(heads: list, body: bytes, encoder: OnnxEncoder, preprocessing: Preprocessing, max_pixels: int) -> bytes:
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
        batch = run_batch(parts, encoder.rows, lambda data: read_pixels(data, preprocessing, max_pixels))
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


def make_frame(head: list | dict, *body: bytes) -> bytes:
    encoded = orjson.dumps(head)
    return b"".join([LENGTHS.pack(len(encoded), sum(map(len, body))), encoded, *body])


def read_frame(file: BinaryIO) -> tuple[Any, bytes] | None:
    """Returns head and body; None at the end."""
    lengths = file.read(LENGTHS.size)
    if len(lengths) < LENGTHS.size:
        return None
    head_bytes, body_bytes = LENGTHS.unpack(lengths)
    return orjson.loads(file.read(head_bytes)), file.read(body_bytes)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches this process too; the service ends it
    folder, id, threads, max_pixels, fd = sys.argv[1:]
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the service has ended
        serve(Path(folder), id, int(threads), int(max_pixels), socket.socket(fileno=int(fd)))
