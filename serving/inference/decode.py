"""From files to pixels: a broken file harms no request but its own."""

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np

from export.artifact import MAX_PIXELS, Preprocessing, TooManyPixels, UnreadableImage, read_pixels
from serving.errors import Refusal, TooLarge, Undecodable

# Handing one file to a thread and back costs as much as decoding one of 32 x 32 pixels: small ones go together.
FILES_TOGETHER = 8
BYTES_TOGETHER = 2**16

# What is small takes milliseconds, so those who share a batch with it may wait for it. Few bytes can be many pixels.
SMALL_BYTES, SMALL_PIXELS = 2**16, 2**20

# An image takes up to 16 bytes a pixel while it is decoded. Of those larger than this there is one at a time.
LARGE_PIXELS = 2**25

T = TypeVar("T")


class Upload(NamedTuple):
    """An encoded image of a request."""

    field: str
    """Where it stands, for instance images[3]."""
    name: str
    """As its owner calls it; may be empty."""
    data: bytes


class Decoder:
    """Pillow lets go of the interpreter while it decodes, so threads fill the cores."""

    def __init__(self, threads: int, max_pixels: int = MAX_PIXELS):
        self.max_pixels = max_pixels
        self._pool = ThreadPoolExecutor(threads, "decode")
        self._large = threading.Lock()

    async def __call__(self, files: Sequence[Upload], preprocessing: Preprocessing) -> np.ndarray:
        """n >= 1 files -> uint8 (n, S, S, 3) RGB. raises as each."""
        return np.stack(await self.each(files, preprocessing, read_pixels))

    async def each(
        self, files: Sequence[Upload], preprocessing: Preprocessing, read: Callable[[bytes, Preprocessing, int], T]
    ) -> list[T]:
        """What `read` makes of each file's bytes, given the most pixels that it may have; `read` raises
        UnreadableImage. raises Undecodable or TooLarge, naming the first that fails.

        Cancelled, or failed, it leaves undone what no thread has begun.
        """
        loop = asyncio.get_running_loop()
        groups = list(_groups(files))
        reading = [loop.run_in_executor(self._pool, self._read, group, preprocessing, read) for group in groups]
        try:
            return [one for job in reading for one in await job]
        finally:
            for job in reading:
                if not job.cancel() and not job.cancelled():
                    job.exception()  # has been looked at, now

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _read(self, files: list[Upload], preprocessing: Preprocessing, read: Callable) -> list:
        return [self._read_one(file, preprocessing, read) for file in files]

    def _read_one(
        self, file: Upload, preprocessing: Preprocessing, read: Callable[[bytes, Preprocessing, int], T]
    ) -> T:
        try:
            try:
                return read(file.data, preprocessing, min(LARGE_PIXELS, self.max_pixels))
            except TooManyPixels:  # which the header has told
                with self._large:
                    return read(file.data, preprocessing, self.max_pixels)
        except UnreadableImage as problem:
            raise refusal(file, problem) from problem


def refusal(file: Upload, problem: UnreadableImage) -> Refusal:
    """It names the file."""
    kind = TooLarge if isinstance(problem, TooManyPixels) else Undecodable
    return kind(f"{file.field} ({file.name}) {problem}" if file.name else f"{file.field} {problem}", param=file.field)


def _groups(files: Sequence[Upload]) -> Iterator[list[Upload]]:
    """In order, each one file or several small ones."""
    group, size = [], 0
    for file in files:
        if group and (len(group) == FILES_TOGETHER or size + len(file.data) > BYTES_TOGETHER):
            yield group
            group, size = [], 0
        group.append(file)
        size += len(file.data)
    yield group
