"""From files to pixels, on threads of their own, before anything is batched: a broken file harms its own request only."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from export.artifact import MAX_PIXELS, Preprocessing, TooManyPixels, UnreadableImage, read_pixels
from serving.errors import TooLarge, Undecodable


class Decoder:
    """Pillow lets go of the interpreter while it decodes, so threads fill the cores."""

    def __init__(self, preprocessing: Preprocessing, threads: int, max_pixels: int = MAX_PIXELS):
        self.preprocessing = preprocessing
        self.max_pixels = max_pixels
        self._pool = ThreadPoolExecutor(threads, "decode")

    async def __call__(self, files: list[tuple[str, str, bytes]]) -> np.ndarray:
        """files    (field, name, bytes) of n >= 1 encoded images, for instance ("images[3]", "cat.txt", b"...")
        returns  uint8 (n, S, S, 3) RGB
        raises   Undecodable, TooLarge, naming the first image that cannot be read
        """
        loop = asyncio.get_running_loop()
        reading = [loop.run_in_executor(self._pool, self._read, data) for _, _, data in files]
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
