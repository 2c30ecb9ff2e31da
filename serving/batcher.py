"""Images of concurrent requests go through the encoder together."""

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from time import perf_counter
from typing import NamedTuple

import numpy as np

from serving.encoder import MAX_BATCH


class Encoded(NamedTuple):
    vectors: np.ndarray
    """float32 (n, d)"""
    queue_s: float
    """Spent waiting for a turn."""
    model_s: float
    """Spent in the batches that the images were part of."""


class _Part(NamedTuple):
    """Images that go into one batch."""

    pixels: np.ndarray  # uint8 (n, S, S, 3)
    encoded: asyncio.Future  # of an Encoded
    since: float


class Batcher:
    """Gathers the images of concurrent requests into batches; one runs at a time.

    There is no timer: while a batch runs the next one gathers, and a request that comes alone never waits.
    """

    def __init__(self, encode: Callable[[np.ndarray], np.ndarray], thread: Executor, max_batch: int = MAX_BATCH):
        """encode  uint8 (n, S, S, 3) -> float32 (n, d), for any n from 1 to max_batch
        thread  where it runs
        """
        self.encode = encode
        self.max_batch = max_batch
        self._thread = thread
        self._waiting: deque[_Part] = deque()
        self._running: asyncio.Task | None = None

    @property
    def waiting(self) -> int:
        """Images that are in no batch yet."""
        return sum(len(part.pixels) for part in list(self._waiting))

    async def __call__(self, pixels: np.ndarray) -> Encoded:
        """uint8 (n, S, S, 3), n >= 1. To rounding, a row is what its image would get alone.

        Cancelled, it leaves undone what is in no batch yet.
        """
        if len(pixels) <= self.max_batch:
            return await self._enqueue(pixels)
        parts = [pixels[i : i + self.max_batch] for i in range(0, len(pixels), self.max_batch)]
        started = perf_counter()
        vectors, _, model_s = zip(*await asyncio.gather(*map(self._enqueue, parts)), strict=True)
        waited_s = perf_counter() - started - sum(model_s)
        return Encoded(np.concatenate(vectors), max(0.0, waited_s), sum(model_s))

    def _enqueue(self, pixels: np.ndarray) -> asyncio.Future:
        encoded = asyncio.get_running_loop().create_future()
        self._waiting.append(_Part(pixels, encoded, perf_counter()))
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._run())
        return encoded

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while batch := self._next_batch():
            pixels = batch[0].pixels if len(batch) == 1 else np.concatenate([part.pixels for part in batch])
            try:
                vectors, began, ended = await loop.run_in_executor(self._thread, self._timed, pixels)
            except Exception as error:
                for part in batch:
                    if not part.encoded.done():
                        part.encoded.set_exception(error)
                continue
            start = 0
            for part in batch:
                end = start + len(part.pixels)
                if not part.encoded.done():
                    part.encoded.set_result(Encoded(vectors[start:end], began - part.since, ended - began))
                start = end

    def _timed(self, pixels: np.ndarray) -> tuple[np.ndarray, float, float]:
        began = perf_counter()
        return self.encode(pixels), began, perf_counter()

    def _next_batch(self) -> list[_Part]:
        """The oldest that fit together; those whose request has gone away are dropped."""
        batch, size = [], 0
        while self._waiting and size + len(self._waiting[0].pixels) <= self.max_batch:
            part = self._waiting.popleft()
            if not part.encoded.done():
                batch.append(part)
                size += len(part.pixels)
        return batch
