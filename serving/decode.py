"""From files to pixels, before anything is batched: a broken file harms no request but its own."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from export.artifact import MAX_PIXELS, Preprocessing, TooManyPixels, UnreadableImage, read_pixels
from serving.errors import TooLarge, Undecodable


class File(NamedTuple):
    """An encoded image of a request."""

    field: str
    """Where it stands, for instance images[3]."""
    name: str
    """As its owner calls it; may be empty."""
    data: bytes


class Decoder:
    """Pillow lets go of the interpreter while it decodes, so threads fill the cores."""

    def __init__(self, preprocessing: Preprocessing, threads: int, max_pixels: int = MAX_PIXELS):
        self.preprocessing = preprocessing
        self.max_pixels = max_pixels
        self._pool = ThreadPoolExecutor(threads, "decode")

    async def __call__(self, files: list[File]) -> np.ndarray:
        """n >= 1 files -> uint8 (n, S, S, 3) RGB. raises Undecodable or TooLarge, naming the first that fails."""
        loop = asyncio.get_running_loop()
        reading = [loop.run_in_executor(self._pool, self._read, file.data) for file in files]
        results = await asyncio.gather(*reading, return_exceptions=True)
        for (field, name, _), result in zip(files, results, strict=True):
            if isinstance(result, UnreadableImage):
                kind = TooLarge if isinstance(result, TooManyPixels) else Undecodable
                raise kind(f"{field} ({name}) {result}" if name else f"{field} {result}", param=field)
            if isinstance(result, BaseException):
                raise result
        return np.stack(results)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _read(self, data: bytes) -> np.ndarray:
        return read_pixels(data, self.preprocessing, self.max_pixels)
