"""Where batches run: each lane is a process of its own on the CPU, a thread on a GPU.

In threads of one process, decoding and the handling of requests wait for Python's lock in turns. A lane's process has
a lock of its own. A picture that brings down a decoder brings down its lane: it is started again, and the pictures that
were with that one get their answers.

Between the service and a lane there is a socket. Either side sends frames: the lengths of head and body (4 bytes each,
big-endian), the head in JSON, the body as it is.

    batch    head: of each part {"rows": n}, n pictures of (S, S, 3) uint8, or {"files": [lengths]}
    answer   head: {"parts": [of each [decode_s], or [image, reason, too_many]], "model_s", "error"}
             body: float32 (rows, d) of the parts that have no problem, one after the other; of a classifier
             (rows, d + C), its logits last
"""

if __name__ == "__main__" and not __package__:
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import asyncio
import contextlib
import gc
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
from typing import NamedTuple, Protocol

import numpy as np
import orjson

from export.artifact import Bundle, BundleError, Preprocessing, TooManyPixels, UnreadableImage, load_bundle, read_pixels
from serving.inference.encoder import CPU, OnnxEncoder, has_accelerator

MOST = 16  # processes; of more cores each gets several
LENGTHS = struct.Struct("!II")


class Problem(NamedTuple):
    """Why a part has no vectors."""

    image: int
    """Of the part; the first that could not be read."""
    error: UnreadableImage


class Ran(NamedTuple):
    """What came of a batch."""

    parts: list[np.ndarray | Problem]
    """float32 (n, d) of each"""
    decode_s: list[float]
    """Of each, where the lane read its files."""
    model_s: float


Part = np.ndarray | Sequence[bytes]  # uint8 (n, S, S, 3), or n encoded images


class Lane(Protocol):
    """Runs one batch at a time."""

    async def __call__(self, parts: list[Part]) -> Ran:
        """raises whatever fails the batch as a whole"""

    def close(self) -> None: ...


class ThreadLane:
    def __init__(self, encode: Callable[[np.ndarray], np.ndarray], threads: Executor):
        """encode  uint8 (n, S, S, 3) -> float32 (n, d)"""
        self._encode, self._threads = encode, threads

    async def __call__(self, parts: list[np.ndarray]) -> Ran:
        return await asyncio.get_running_loop().run_in_executor(self._threads, run, parts, self._encode)

    def close(self) -> None:
        pass


class ProcessLane:
    """Made in any thread; from then on of the event loop of its first batch."""

    def __init__(self, bundle: Bundle, threads: int, max_pixels: int):
        """Start; `wait` for it.

        threads     of a run
        max_pixels  of a file; of more it raises TooManyPixels
        """
        self._bundle, self._width = bundle, bundle.card.outputs
        self._command = [sys.executable, __file__, str(bundle.folder), bundle.card.id, str(threads), str(max_pixels)]
        self._end = lambda: None
        self._start()

    def wait(self) -> None:
        """Until it can run. raises BundleError"""
        with self._socket.makefile("rb") as file:
            frame = receive(file)
        if frame is None:
            raise BundleError(f"{self._bundle.folder}: the process that was to run it has ended at once")
        if problem := frame[0]["error"]:
            raise BundleError(problem)

    async def __call__(self, parts: list[Part]) -> Ran:
        try:
            return await self._exchange(parts)
        except (OSError, EOFError):
            await asyncio.to_thread(self._start_again)
        ran = [await self._alone(part) for part in parts]
        return Ran([one.parts[0] for one in ran], [one.decode_s[0] for one in ran], sum(one.model_s for one in ran))

    def close(self) -> None:
        """In the event loop."""
        self._end()
        (self._connection.transport if self._connection else self._socket).close()

    async def _alone(self, part: Part) -> Ran:
        """Image by image, to find the one that ends the process."""
        ran = []
        for i in range(len(part)):
            try:
                ran.append(await self._exchange([part[i : i + 1]]))
            except (OSError, EOFError):
                await asyncio.to_thread(self._start_again)
                return Ran([Problem(i, UnreadableImage("brings its decoder down"))], [0.0], 0.0)
            if isinstance(ran[-1].parts[0], Problem):
                return Ran([ran[-1].parts[0]._replace(image=i)], [0.0], 0.0)
        vectors = np.concatenate([one.parts[0] for one in ran])
        return Ran([vectors], [sum(one.decode_s[0] for one in ran)], sum(one.model_s for one in ran))

    async def _exchange(self, parts: list[Part]) -> Ran:
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
        head, body = await self._connection.ask(frame(heads, *body))
        vectors = np.frombuffer(body, np.float32).reshape(-1, self._width)
        if head["error"]:
            raise RuntimeError(head["error"])
        answers, decode_s, start = [], [], 0
        for part, told in zip(parts, head["parts"], strict=True):
            if len(told) == 1:
                answers.append(vectors[start : start + len(part)])
                decode_s.append(told[0])
                start += len(part)
            else:
                image, reason, too_many = told
                answers.append(Problem(image, (TooManyPixels if too_many else UnreadableImage)(reason)))
                decode_s.append(0.0)
        return Ran(answers, decode_s, head["model_s"])

    def _start(self) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            command = [*self._command, str(theirs.fileno())]
            # It ends when it reads the end of the socket, which comes also when this process is killed.
            environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
            self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment)
        self._connection: _Connection | None = None
        self._end = weakref.finalize(self, _end, self.process)

    def _start_again(self) -> None:
        self._end()
        self._start()
        self.wait()


def _end(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()


class _Connection(asyncio.Protocol):
    """One question at a time. Closes itself when the other side does."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.transport = transport
        self._received = bytearray()
        self._answer: asyncio.Future | None = None

    async def ask(self, question: bytes) -> tuple[list | dict, bytes]:
        """Head and body. raises EOFError"""
        if self.transport.is_closing():
            raise EOFError
        self._answer = asyncio.get_running_loop().create_future()
        self.transport.write(question)
        return await self._answer

    def data_received(self, data: bytes) -> None:
        self._received += data
        if len(self._received) < LENGTHS.size:
            return
        head_bytes, body_bytes = LENGTHS.unpack_from(self._received)
        start, end = LENGTHS.size + head_bytes, LENGTHS.size + head_bytes + body_bytes
        if len(self._received) == end:
            received, self._received = bytes(self._received), bytearray()
            if not self._answer.done():
                self._answer.set_result((orjson.loads(received[LENGTHS.size : start]), received[start:]))

    def connection_lost(self, error: Exception | None) -> None:
        if self._answer and not self._answer.done():
            self._answer.set_exception(EOFError())


def open_lanes(bundle: Bundle, cores: int, max_pixels: int, threads: Executor) -> tuple[list[Lane], str]:
    """And ONNX Runtime's execution provider. raises BundleError"""
    if has_accelerator():
        encoder = OnnxEncoder(bundle, threads=1)
        if encoder.providers[0] != CPU:
            return [ThreadLane(encoder.rows, threads)], encoder.providers[0]
    count = min(cores, MOST)
    lanes = [ProcessLane(bundle, cores // count, max_pixels) for _ in range(count)]  # runs on a core each are fastest
    for lane in lanes:
        lane.wait()
    return lanes, CPU


def run(
    parts: Sequence[Part],
    encode: Callable[[np.ndarray], np.ndarray],
    read: Callable[[bytes], np.ndarray] | None = None,
) -> Ran:
    """A batch, in the caller's thread. read: an encoded image -> uint8 (S, S, 3); raises UnreadableImage."""
    answers: list = []
    decode_s = []
    for part in parts:
        started = perf_counter()
        answers.append(part if isinstance(part, np.ndarray) else _read(part, read))
        decode_s.append(perf_counter() - started if answers[-1] is not part else 0.0)
    pixels = [answer for answer in answers if isinstance(answer, np.ndarray)]
    if not pixels:
        return Ran(answers, decode_s, 0.0)
    started = perf_counter()
    vectors = encode(pixels[0] if len(pixels) == 1 else np.concatenate(pixels))
    model_s = perf_counter() - started
    start = 0
    for i, answer in enumerate(answers):
        if isinstance(answer, np.ndarray):
            answers[i] = vectors[start : start + len(answer)]
            start += len(answer)
    return Ran(answers, decode_s, model_s)


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
    with connection.makefile("rb", 2**20) as file:
        try:
            bundle = load_bundle(folder)
            if bundle.card.id != id:
                raise BundleError(f"{folder} holds {bundle.card.id} now, not {id}")
            encoder = OnnxEncoder(bundle, threads)
        except BundleError as error:
            connection.sendall(frame({"error": str(error)}))
            return
        connection.sendall(frame({"error": None}))
        gc.freeze()
        while batch := receive(file):
            connection.sendall(answer(*batch, encoder, bundle.card.preprocessing, max_pixels))


def answer(heads: list, body: bytes, encoder: OnnxEncoder, preprocessing: Preprocessing, max_pixels: int) -> bytes:
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
        ran = run(parts, encoder.rows, lambda data: read_pixels(data, preprocessing, max_pixels))
    except Exception as error:  # ONNX Runtime has a class of exception for each of its states
        return frame({"parts": [], "model_s": 0, "error": f"{type(error).__name__}: {error}"})
    told = [
        [answer.image, str(answer.error), isinstance(answer.error, TooManyPixels)]
        if isinstance(answer, Problem)
        else [decode_s]
        for answer, decode_s in zip(ran.parts, ran.decode_s, strict=True)
    ]
    vectors = [answer.tobytes() for answer in ran.parts if not isinstance(answer, Problem)]
    return frame({"parts": told, "model_s": ran.model_s, "error": None}, *vectors)


def frame(head: list | dict, *body: bytes) -> bytes:
    head = orjson.dumps(head)
    return b"".join([LENGTHS.pack(len(head), sum(map(len, body))), head, *body])


def receive(file) -> tuple[list | dict, bytes] | None:
    """Head and body; None at the end."""
    lengths = file.read(LENGTHS.size)
    if len(lengths) < LENGTHS.size:
        return None
    head_bytes, body_bytes = LENGTHS.unpack(lengths)
    return orjson.loads(file.read(head_bytes)), file.read(body_bytes)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; who talks to us ends us
    folder, id, threads, max_pixels, fd = sys.argv[1:]
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # nobody waits for the answer any more
        serve(Path(folder), id, int(threads), int(max_pixels), socket.socket(fileno=int(fd)))
