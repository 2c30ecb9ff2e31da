"""Runs the images of concurrent requests through the encoder in shared batches."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import NamedTuple

import numpy as np

from export.artifact import TooManyPixels, UnreadableImage
from serving.inference.decode import Upload, refusal
from serving.inference.encoder import MAX_BATCH
from serving.inference.lane import BatchResult, Lane, Problem

MIN_PART = 8  # images; requests are split into parts for several lanes, but not into smaller ones


class Encoded(NamedTuple):
    vectors: np.ndarray
    """float32 (n, d)"""
    decode_s: float
    """Time for decoding, if the lane decoded the images."""
    queue_s: float
    """Time waiting for a lane."""
    model_s: float
    """Time of the runs that these images were part of."""
    logits: np.ndarray
    """float32 (n, C); C is 0 if the encoder is no classifier."""


class _Part(NamedTuple):
    """Images of one request that go into the same batch."""

    images: np.ndarray | Sequence[Upload]  # uint8 (n, S, S, 3), or uploads for the lane to decode
    encoded: asyncio.Future[Encoded]
    since: float


class Batcher:
    """Gathers the images of concurrent requests into batches, and runs as many batches at once as there are lanes.

    It has no timer: a free lane takes the images that are waiting; while all lanes are busy, images wait for the next
    batch. Use it in one event loop only.
    """

    def __init__(
        self,
        lanes: Sequence[Lane],
        record_run: Callable[[int, float], None] = lambda images, seconds: None,
        max_batch: int = MAX_BATCH,
        dimension: int | None = None,
    ):
        """record_run  called after each run of the encoder, with its images and seconds
        dimension   d; the columns of a lane's output beyond it are logits
        """
        self.lanes = lanes
        self.max_batch = max_batch
        self._record_run, self._dimension = record_run, dimension
        self._free = list(lanes)
        self._running: set[asyncio.Task] = set()
        self._waiting: deque[_Part] = deque()

    @property
    def waiting(self) -> int:
        """Number of images that are not in a batch yet."""
        return sum(len(part.images) for part in self._waiting)

    async def __call__(self, images: np.ndarray | Sequence[Upload]) -> Encoded:
        """Encode uint8 (n, S, S, 3) or n uploads, n >= 1. Up to rounding, a row equals that of its image
        encoded alone.

        When cancelled it drops the images that are not in a batch yet. Raises Undecodable or TooManyPixels for the
        first upload that cannot be decoded.
        """
        most = min(self.max_batch, max(MIN_PART, -(-len(images) // len(self.lanes))))
        if len(images) <= most:
            return await self._enqueue(images)
        started = perf_counter()
        parts = [self._enqueue(images[i : i + most]) for i in range(0, len(images), most)]
        try:
            vectors, decode_s, _, model_s, logits = zip(*[await part for part in parts], strict=True)
        finally:
            for part in parts:
                if not part.cancel() and not part.cancelled():
                    part.exception()  # so that asyncio does not report it as never retrieved
        queue_s = perf_counter() - started - sum(decode_s) - sum(model_s)
        vectors, logits = np.concatenate(vectors), np.concatenate(logits)
        return Encoded(vectors, sum(decode_s), max(0.0, queue_s), sum(model_s), logits)

    def _enqueue(self, images: np.ndarray | Sequence[Upload]) -> asyncio.Future[Encoded]:
        loop = asyncio.get_running_loop()
        encoded = loop.create_future()
        if self._free and not self._waiting:
            loop.call_soon(self._start)  # after all requests that have arrived by now are queued
        self._waiting.append(_Part(images, encoded, perf_counter()))
        return encoded

    def _start(self) -> None:
        """Distribute the waiting images over the free lanes in equal batches."""
        share = max(MIN_PART, -(-self.waiting // max(1, len(self._free))))
        while self._free and (batch := self._next_batch(share)):
            task = asyncio.create_task(self._run(self._free.pop(), batch))
            self._running.add(task)  # the event loop holds only a weak reference
            task.add_done_callback(self._running.discard)

    async def _run(self, lane: Lane, batch: list[_Part]) -> None:
        """Run batch after batch, until nothing is waiting."""
        try:
            while batch:
                try:
                    result = await lane([_content(part.images) for part in batch])
                except Exception as error:
                    for part in batch:
                        if not part.encoded.done():
                            part.encoded.set_exception(error)
                else:
                    self._deliver(batch, result)
                batch = self._next_batch(self.max_batch)
        finally:
            self._free.append(lane)

    def _next_batch(self, most: int) -> list[_Part]:
        """Take the oldest parts that fit together. Drops parts whose request was cancelled."""
        batch, size, most = [], 0, min(most, self.max_batch)
        while self._waiting and (not size or size + len(self._waiting[0].images) <= most):
            part = self._waiting.popleft()
            if not part.encoded.done():
                batch.append(part)
                size += len(part.images)
        return batch

    def _deliver(self, batch: list[_Part], result: BatchResult) -> None:
        now, images = perf_counter(), 0
        for part, rows, decode_s in zip(batch, result.parts, result.decode_s, strict=True):
            if isinstance(rows, np.ndarray):
                images += len(rows)
            if part.encoded.done():
                continue
            if isinstance(rows, Problem):
                part.encoded.set_exception(_exception(part.images[rows.image], rows.error))
                continue
            queue_s = now - part.since - decode_s - result.model_s
            d = rows.shape[1] if self._dimension is None else self._dimension
            encoded = Encoded(rows[:, :d], decode_s, max(0.0, queue_s), result.model_s, rows[:, d:])
            part.encoded.set_result(encoded)
        if images:
            self._record_run(images, result.model_s)


def _exception(upload: Upload, error: UnreadableImage) -> Exception:
    """TooManyPixels is passed on unchanged: the caller can decode that image differently."""
    return error if isinstance(error, TooManyPixels) else refusal(upload, error)


def _content(images: np.ndarray | Sequence[Upload]) -> np.ndarray | list[bytes]:
    return images if isinstance(images, np.ndarray) else [upload.data for upload in images]
