"""Decodes uploads to pixels in threads. A broken file fails only its own request."""

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np

from export.artifact import MAX_PIXELS, Preprocessing, TooManyPixels, UnreadableImage, read_pixels
from serving.errors import Refusal, TooLarge, Undecodable

# Passing a file to a thread and back takes as long as decoding 32 x 32 pixels, so small files share a call.
FILES_PER_CALL = 8
BYTES_PER_CALL = 2**16

# Smaller images decode in milliseconds, so they may be decoded within a batch. A small file can contain many pixels.
SMALL_BYTES, SMALL_PIXELS = 2**16, 2**20

# Decoding takes up to 16 bytes of memory per pixel. Images larger than this are decoded one at a time.
LARGE_PIXELS = 2**25

T = TypeVar("T")


class Upload(NamedTuple):
    """An encoded image in a request."""

    field: str
    """Name of its position in the request, for instance images[3]."""
    name: str
    """The client's name for it; may be empty."""
    data: bytes


Read = Callable[[bytes, Preprocessing, int], T]
"""Decodes an image file of at most the given number of pixels. Raises UnreadableImage."""


class Decoder:
    """Threads use all cores for decoding, since Pillow releases Python's lock."""

    def __init__(self, threads: int, max_pixels: int = MAX_PIXELS):
        self.max_pixels = max_pixels
        self._pool = ThreadPoolExecutor(threads, "decode")
        self._large = threading.Lock()

    async def __call__(self, uploads: Sequence[Upload], preprocessing: Preprocessing) -> np.ndarray:
        """n >= 1 uploads -> uint8 (n, S, S, 3) RGB. Raises as `each`."""
        return np.stack(await self.each(uploads, preprocessing, read_pixels))

    async def each(self, uploads: Sequence[Upload], preprocessing: Preprocessing, read: Read[T]) -> list[T]:
        """Apply `read` to each upload. Raises Undecodable or TooLarge, naming the first upload that fails.

        When cancelled, or after a failure, uploads that no thread has begun are dropped.
        """
        loop = asyncio.get_running_loop()
        groups = list(_groups(uploads))
        calls = [loop.run_in_executor(self._pool, self._read_group, group, preprocessing, read) for group in groups]
        try:
            return [result for call in calls for result in await call]
        finally:
            for call in calls:
                if not call.cancel() and not call.cancelled():
                    call.exception()  # so that asyncio does not report it as never retrieved

    async def call(self, read: Callable[[int], T]) -> T:
        """Call `read` in a thread, with the most pixels that it may decode. Raises what it raises."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._limited, read)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _read_group(self, uploads: list[Upload], preprocessing: Preprocessing, read: Read[T]) -> list[T]:
        return [self._read(upload, preprocessing, read) for upload in uploads]

    def _read(self, upload: Upload, preprocessing: Preprocessing, read: Read[T]) -> T:
        try:
            return self._limited(lambda max_pixels: read(upload.data, preprocessing, max_pixels))
        except UnreadableImage as problem:
            raise refusal(upload, problem) from problem

    def _limited(self, read: Callable[[int], T]) -> T:
        try:
            return read(min(LARGE_PIXELS, self.max_pixels))
        except TooManyPixels:  # known from the header
            with self._large:
                return read(self.max_pixels)


def refusal(upload: Upload, problem: UnreadableImage) -> Refusal:
    """Returns the error response's exception, which names the upload."""
    kind = TooLarge if isinstance(problem, TooManyPixels) else Undecodable
    label = f"{upload.field} ({upload.name})" if upload.name else upload.field
    return kind(f"{label} {problem}", param=upload.field)


def _groups(uploads: Sequence[Upload]) -> Iterator[list[Upload]]:
    """Split into groups for one call each, in order: one large upload or several small ones."""
    group, size = [], 0
    for upload in uploads:
        if group and (len(group) == FILES_PER_CALL or size + len(upload.data) > BYTES_PER_CALL):
            yield group
            group, size = [], 0
        group.append(upload)
        size += len(upload.data)
    yield group
