"""Images of concurrent requests go through the encoder together."""

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from time import perf_counter
from typing import NamedTuple

import numpy as np

from serving.decode import File
from serving.encoder import MAX_BATCH

LEAST_PART = 8  # images; a request is not cut finer to keep more lanes busy


class Encoded(NamedTuple):
    vectors: np.ndarray
    """float32 (n, d)"""
    decode_s: float
    """Spent in reading the files, where the batcher did it."""
    queue_s: float
    """Spent waiting for a turn."""
    model_s: float
    """Spent in the runs that the images were part of."""


class _Part(NamedTuple):
    """Images that go into one batch."""

    images: np.ndarray | Sequence[File]  # uint8 (n, S, S, 3), or files that are still to be read
    encoded: asyncio.Future  # of an Encoded
    since: float


class Batcher:
    """Gathers the images of concurrent requests into batches; as many run at a time as there are lanes.

    There is no timer: a lane that is free takes what waits, and what comes while all are busy gathers.
    """

    def __init__(
        self,
        encode: Callable[[np.ndarray], np.ndarray],
        threads: Executor,
        lanes: int = 1,
        read: Callable[[File], np.ndarray] | None = None,
        max_batch: int = MAX_BATCH,
    ):
        """encode  uint8 (n, S, S, 3) -> float32 (n, d), for any n from 1 to max_batch; from as many threads as lanes
        threads  where the lanes run
        read     a file -> uint8 (S, S, 3); what it raises goes to the file's request alone. None: files are not taken
        """
        self.encode = encode
        self.max_batch = max_batch
        self.read = read
        self._threads, self._lanes = threads, lanes
        self._lock = threading.Lock()
        self._waiting: deque[_Part] = deque()
        self._busy = 0  # lanes

    @property
    def waiting(self) -> int:
        """Images that are in no batch yet."""
        with self._lock:
            return sum(len(part.images) for part in self._waiting)

    async def __call__(self, images: np.ndarray | Sequence[File]) -> Encoded:
        """uint8 (n, S, S, 3) or n files, n >= 1. To rounding, a row is what its image would get alone.

        Cancelled, it leaves undone what is in no batch yet. raises what `read` does, of the first that it does it for.
        """
        most = min(self.max_batch, max(LEAST_PART, -(-len(images) // self._lanes)))
        if len(images) <= most:
            return await self._enqueue(images)
        started = perf_counter()
        parts = [self._enqueue(images[i : i + most]) for i in range(0, len(images), most)]
        try:
            vectors, decode_s, _, model_s = zip(*[await part for part in parts], strict=True)
        finally:
            for part in parts:
                if not part.cancel() and not part.cancelled():
                    part.exception()  # has been looked at, now
        waited_s = perf_counter() - started - sum(decode_s) - sum(model_s)
        return Encoded(np.concatenate(vectors), sum(decode_s), max(0.0, waited_s), sum(model_s))

    def _enqueue(self, images: np.ndarray | Sequence[File]) -> asyncio.Future:
        encoded = asyncio.get_running_loop().create_future()
        with self._lock:
            self._waiting.append(_Part(images, encoded, perf_counter()))
            free = self._busy < self._lanes
            self._busy += free
        if free:
            self._threads.submit(self._run)
        return encoded

    def _run(self) -> None:
        """One batch, in a lane's thread; what waits then takes its turn behind other batchers' on the same threads."""
        batch = self._next_batch()
        if not batch:
            return
        loop = batch[0].encoded.get_loop()
        loop.call_soon_threadsafe(_deliver, batch, self._encode(batch))
        self._threads.submit(self._run)

    def _next_batch(self) -> list[_Part]:
        """The oldest that fit together; those whose request has gone away are dropped. Without any the lane is free."""
        batch, size = [], 0
        with self._lock:
            while self._waiting and size + len(self._waiting[0].images) <= self.max_batch:
                part = self._waiting.popleft()
                if not part.encoded.done():
                    batch.append(part)
                    size += len(part.images)
            self._busy -= not batch
        return batch

    def _encode(self, batch: list[_Part]) -> list[Encoded | Exception]:
        """Of each part."""
        read = [self._pixels(part.images) for part in batch]
        pixels = [images for images, _ in read if isinstance(images, np.ndarray)]
        if not pixels:
            return [problem for problem, _ in read]
        started = perf_counter()
        try:
            vectors = self.encode(pixels[0] if len(pixels) == 1 else np.concatenate(pixels))
        except Exception as error:
            return [images if isinstance(images, Exception) else error for images, _ in read]
        model_s = perf_counter() - started
        answers, start = [], 0
        for part, (images, decode_s) in zip(batch, read, strict=True):
            if isinstance(images, Exception):
                answers.append(images)
                continue
            end = start + len(images)
            answers.append(Encoded(vectors[start:end], decode_s, started - part.since - decode_s, model_s))
            start = end
        return answers

    def _pixels(self, images: np.ndarray | Sequence[File]) -> tuple[np.ndarray | Exception, float]:
        """And the seconds that reading took."""
        if isinstance(images, np.ndarray):
            return images, 0.0
        started = perf_counter()
        try:
            pixels = np.stack([self.read(file) for file in images])
        except Exception as problem:
            return problem, 0.0
        return pixels, perf_counter() - started


def _deliver(batch: list[_Part], answers: list[Encoded | Exception]) -> None:
    for part, answer in zip(batch, answers, strict=True):
        if part.encoded.done():
            continue
        if isinstance(answer, Exception):
            part.encoded.set_exception(answer)
        else:
            part.encoded.set_result(answer)
