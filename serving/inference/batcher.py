"""Runs the images of concurrent requests through the encoder in shared batches."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import NamedTuple

import numpy as np

from export.artifact import TooManyPixels, UnreadableImage
from serving.errors import NotReady
from serving.inference.decode import Upload, refusal
from serving.inference.encoder import MAX_BATCH
from serving.inference.lane import BatchResult, Lane, LaneLost, Problem
from serving.inference.turns import FairQueue

log = logging.getLogger("twinview")

RESTART_S = 1.0  # between attempts to restart a lane
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
    lost: bool = False
    """Whether a lane was lost with it before."""


class Batcher:
    """Gathers the images of concurrent requests into batches, and runs as many batches at once as there are lanes.

    It has no timer: a free lane takes the images that are waiting; while all lanes are busy, images wait for the next
    batch. Requests take turns, so that a small one does not wait for all of a large one. Use it in one event loop only.
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
        self._down = 0
        self._running: set[asyncio.Task] = set()
        self._waiting: FairQueue[_Part] = FairQueue()

    @property
    def waiting(self) -> int:
        """Number of images that are not in a batch yet."""
        return sum(len(part.images) for part in self._waiting)

    async def __call__(self, images: np.ndarray | Sequence[Upload]) -> Encoded:
        """Encode uint8 (n, S, S, 3) or n uploads, n >= 1. Up to rounding, a row equals that of its image
        encoded alone.

        When cancelled it drops the images that are not in a batch yet. Raises Undecodable or TooManyPixels for the
        first upload that cannot be decoded; LaneLost if a lane was lost while it decoded uploads, and NotReady if that
        happened twice with the same pixels, or if no lane can be restarted.
        """
        most = min(self.max_batch, max(MIN_PART, -(-len(images) // len(self.lanes))))
        if len(images) <= most:
            return await self._enqueue([images])[0]
        started = perf_counter()
        parts = self._enqueue([images[i : i + most] for i in range(0, len(images), most)])
        try:
            vectors, decode_s, _, model_s, logits = zip(*[await part for part in parts], strict=True)
        finally:
            for part in parts:
                if not part.cancel() and not part.cancelled():
                    part.exception()  # so that asyncio does not report it as never retrieved
        queue_s = perf_counter() - started - sum(decode_s) - sum(model_s)
        vectors, logits = np.concatenate(vectors), np.concatenate(logits)
        return Encoded(vectors, sum(decode_s), max(0.0, queue_s), sum(model_s), logits)

    def close(self) -> None:
        """Call it in the event loop."""
        for task in self._running:
            task.cancel()
        for lane in self.lanes:
            lane.close()

    def _enqueue(self, parts: Sequence[np.ndarray | Sequence[Upload]]) -> list[asyncio.Future[Encoded]]:
        """Queue the parts of one request."""
        loop, now = asyncio.get_running_loop(), perf_counter()
        if self._free and not self._waiting:
            loop.call_soon(self._start)  # after all requests that have arrived by now are queued
        queued = [_Part(images, loop.create_future(), now) for images in parts]
        self._waiting.put((part, len(part.images)) for part in queued)
        return [part.encoded for part in queued]

    def _start(self) -> None:
        """Distribute the waiting images over the free lanes in equal batches."""
        share = max(MIN_PART, -(-self.waiting // max(1, len(self._free))))
        while self._free and (batch := self._next_batch(min(share, self.max_batch))):
            task = asyncio.create_task(self._run(self._free.pop(), batch))
            self._running.add(task)  # the event loop holds only a weak reference
            task.add_done_callback(self._running.discard)

    async def _run(self, lane: Lane, batch: list[_Part]) -> None:
        """Run batch after batch, until nothing is waiting."""
        try:
            while batch:
                try:
                    self._deliver(batch, await lane([_content(part.images) for part in batch]))
                except LaneLost as lost:
                    log.warning("a batch is lost, and its lane restarts: %s", lost)
                    self._take_back(batch, lost)
                    await self._restart(lane)
                except Exception as error:
                    log.exception("a batch failed")
                    _fail(batch, error)
                batch = self._next_batch(self.max_batch)
        finally:
            self._free.append(lane)

    def _take_back(self, batch: list[_Part], lost: LaneLost) -> None:
        """Queue the parts of a lost batch once more. Uploads are left to the caller: one of them may be the cause."""
        for part in batch:
            if not isinstance(part.images, np.ndarray):
                _fail([part], lost)
            elif part.lost:
                _fail([part], NotReady(f"the encoder has failed: {lost}"))
            else:
                self._waiting.put([(part._replace(lost=True), len(part.images))])
        self._start()

    async def _restart(self, lane: Lane) -> None:
        """Try until it works. While no lane can be restarted, what waits is answered with the reason."""
        self._down += 1
        try:
            while True:
                try:
                    return await lane.restart()
                except Exception as error:
                    log.error("a lane cannot be restarted, and is tried again: %s", error)
                    if self._down == len(self.lanes):
                        _fail(self._next_batch(len(self._waiting) * self.max_batch), NotReady(f"{error}"))
                await asyncio.sleep(RESTART_S)
        finally:
            self._down -= 1

    def _next_batch(self, most: int) -> list[_Part]:
        """Take the oldest parts that fit together. Drops parts whose request was cancelled."""
        batch, size = [], 0
        while self._waiting and (not size or size + len(self._waiting.first().images) <= most):
            part = self._waiting.pop()
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


def _fail(batch: list[_Part], error: Exception) -> None:
    for part in batch:
        if not part.encoded.done():
            part.encoded.set_exception(error)


def _exception(upload: Upload, error: UnreadableImage) -> Exception:
    """TooManyPixels is passed on unchanged: the caller can decode that image differently."""
    return error if isinstance(error, TooManyPixels) else refusal(upload, error)


def _content(images: np.ndarray | Sequence[Upload]) -> np.ndarray | list[bytes]:
    return images if isinstance(images, np.ndarray) else [upload.data for upload in images]
