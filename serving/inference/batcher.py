"""Images of concurrent requests go through the encoder together."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import NamedTuple

import numpy as np

from export.artifact import TooManyPixels, UnreadableImage
from serving.inference.decode import Upload, refusal
from serving.inference.encoder import MAX_BATCH
from serving.inference.lane import Lane, Problem, Ran

LEAST_PART = 8  # images; a request is not cut finer to keep more lanes busy


class Encoded(NamedTuple):
    vectors: np.ndarray
    """float32 (n, d)"""
    decode_s: float
    """Spent in reading the files, where a lane did it."""
    queue_s: float
    """Spent waiting for a turn."""
    model_s: float
    """Spent in the runs that the images were part of."""
    logits: np.ndarray
    """float32 (n, C); C is 0 where there are no classes"""


class _Part(NamedTuple):
    """Images that go into one batch."""

    images: np.ndarray | Sequence[Upload]  # uint8 (n, S, S, 3), or files that are still to be read
    encoded: asyncio.Future  # of an Encoded
    since: float


class Batcher:
    """Gathers the images of concurrent requests into batches; as many run at a time as there are lanes. Lives in one
    event loop.

    There is no timer: a lane that is free takes what waits, and what comes while all are busy gathers.
    """

    def __init__(
        self,
        lanes: Sequence[Lane],
        ran: Callable[[int, float], None] = lambda images, seconds: None,
        max_batch: int = MAX_BATCH,
        dimension: int | None = None,
    ):
        """ran        is told of each run of the encoder
        dimension  d: what a lane gives beyond it are logits
        """
        self.lanes = lanes
        self.max_batch = max_batch
        self._ran, self._dimension = ran, dimension
        self._free = list(lanes)
        self._running: set[asyncio.Task] = set()
        self._waiting: deque[_Part] = deque()

    @property
    def waiting(self) -> int:
        """Images that are in no batch yet."""
        return sum(len(part.images) for part in self._waiting)

    async def __call__(self, images: np.ndarray | Sequence[Upload]) -> Encoded:
        """uint8 (n, S, S, 3) or n files, n >= 1. To rounding, a row is what its image would get alone.

        Cancelled, it leaves undone what is in no batch yet. raises Undecodable or TooManyPixels of the first file that
        cannot be read.
        """
        most = min(self.max_batch, max(LEAST_PART, -(-len(images) // len(self.lanes))))
        if len(images) <= most:
            return await self._enqueue(images)
        started = perf_counter()
        parts = [self._enqueue(images[i : i + most]) for i in range(0, len(images), most)]
        try:
            vectors, decode_s, _, model_s, logits = zip(*[await part for part in parts], strict=True)
        finally:
            for part in parts:
                if not part.cancel() and not part.cancelled():
                    part.exception()  # has been looked at, now
        waited_s = perf_counter() - started - sum(decode_s) - sum(model_s)
        vectors, logits = np.concatenate(vectors), np.concatenate(logits)
        return Encoded(vectors, sum(decode_s), max(0.0, waited_s), sum(model_s), logits)

    def _enqueue(self, images: np.ndarray | Sequence[Upload]) -> asyncio.Future:
        loop = asyncio.get_running_loop()
        encoded = loop.create_future()
        if self._free and not self._waiting:
            loop.call_soon(self._start)  # when all that has come in together is there
        self._waiting.append(_Part(images, encoded, perf_counter()))
        return encoded

    def _start(self) -> None:
        """What waits goes to the lanes that are free, in equal parts."""
        share = max(LEAST_PART, -(-self.waiting // max(1, len(self._free))))
        while self._free and (batch := self._next_batch(share)):
            task = asyncio.create_task(self._run(self._free.pop(), batch))
            self._running.add(task)  # the loop itself would not keep it
            task.add_done_callback(self._running.discard)

    async def _run(self, lane: Lane, batch: list[_Part]) -> None:
        """Batch after batch, until none waits."""
        try:
            while batch:
                try:
                    ran = await lane([_content(part.images) for part in batch])
                except Exception as error:
                    for part in batch:
                        if not part.encoded.done():
                            part.encoded.set_exception(error)
                else:
                    self._deliver(batch, ran)
                batch = self._next_batch(self.max_batch)
        finally:
            self._free.append(lane)

    def _next_batch(self, most: int) -> list[_Part]:
        """The oldest that fit together; those whose request has gone away are dropped."""
        batch, size, most = [], 0, min(most, self.max_batch)
        while self._waiting and (not size or size + len(self._waiting[0].images) <= most):
            part = self._waiting.popleft()
            if not part.encoded.done():
                batch.append(part)
                size += len(part.images)
        return batch

    def _deliver(self, batch: list[_Part], ran: Ran) -> None:
        now, images = perf_counter(), 0
        for part, answer, decode_s in zip(batch, ran.parts, ran.decode_s, strict=True):
            if isinstance(answer, np.ndarray):
                images += len(answer)
            if part.encoded.done():
                continue
            if isinstance(answer, Problem):
                part.encoded.set_exception(_told(part.images[answer.image], answer.error))
                continue
            waited_s = now - part.since - decode_s - ran.model_s
            d = answer.shape[1] if self._dimension is None else self._dimension
            encoded = Encoded(answer[:, :d], decode_s, max(0.0, waited_s), ran.model_s, answer[:, d:])
            part.encoded.set_result(encoded)
        if images:
            self._ran(images, ran.model_s)


def _told(file: Upload, error: UnreadableImage) -> Exception:
    """Whoever gets TooManyPixels may have it read elsewhere."""
    return error if isinstance(error, TooManyPixels) else refusal(file, error)


def _content(images: np.ndarray | Sequence[Upload]) -> np.ndarray | list[bytes]:
    return images if isinstance(images, np.ndarray) else [file.data for file in images]
