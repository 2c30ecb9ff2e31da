"""Which encoder is served, and running it: ONNX Runtime, one batch at a time."""

import asyncio
import ctypes
import sys
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime as ort

from export.artifact import Bundle, BundleError, load_bundle
from serving.limits import cores

MODEL = "twinview-encoder"  # its name in BentoML's model store
MAX_BATCH = 32
HOW_TO = "Make one with `python training/pretrain.py` and then `python export/to_onnx.py`"


class NoEncoder(BundleError):
    """There is none to serve. The message says how to make one."""


def find_bundle(chosen: str | None = None, runs: Path = Path("runs")) -> Bundle:
    """The encoder to serve: `chosen`, else the newest export below `runs`, else the model store's latest.

    chosen  a bundle's folder, or a tag of BentoML's model store
    raises  BundleError, NoEncoder
    """
    if chosen:
        folder = Path(chosen).expanduser()
        if folder.exists():
            return load_bundle(folder)
        stored = _in_store(chosen)
        if stored is None:
            raise NoEncoder(
                f"{chosen} is neither an encoder bundle's folder nor a tag of BentoML's model store. {HOW_TO}."
            )
        return load_bundle(stored)
    exports = sorted(runs.glob("*/encoder/model_card.json"), key=lambda card: card.stat().st_mtime)
    folder = exports[-1].parent if exports else _in_store(MODEL)
    if folder is None:
        raise NoEncoder(f"There is no encoder: nothing under {runs}/ and none in BentoML's model store. {HOW_TO}.")
    return load_bundle(folder)


def _in_store(tag: str) -> Path | None:
    import bentoml  # takes a second, and whoever serves from a folder needs none of it

    try:
        return Path(bentoml.models.get(tag).path)
    except (bentoml.exceptions.BentoMLException, ValueError):  # not there, or nothing that could be a tag
        return None


class Encoder:
    """f in ONNX Runtime, on a GPU where there is one. Calls come from one thread at a time."""

    def __init__(self, bundle: Bundle):
        """Load and warm up. raises BundleError for a graph that does not run."""
        self.card = bundle.card
        options = ort.SessionOptions()
        options.intra_op_num_threads = cores()
        options.log_severity_level = 3
        try:
            self._session = ort.InferenceSession(bundle.graph, options, providers=_providers())
            size = bundle.card.preprocessing.size_px
            for n in (1, MAX_BATCH):
                shape = self(np.zeros((n, size, size, 3), np.uint8)).shape
        except Exception as error:  # ONNX Runtime has a class of exception for each of its states
            raise BundleError(f"{bundle.graph} does not run: {error}") from error
        if shape != (MAX_BATCH, bundle.card.dimension):
            raise BundleError(f"{bundle.graph} gives {shape[1:]} numbers; its card says {bundle.card.dimension}")

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 (n, S, S, 3) -> h, float32 (n, d)."""
        return self._session.run(["embedding"], {"pixels": pixels})[0]


def _providers() -> list:
    if "CUDAExecutionProvider" not in ort.get_available_providers() or not _cuda_device():
        return ["CPUExecutionProvider"]
    ort.preload_dlls()  # finds CUDA and cuDNN where pip installed them
    # Every new batch size is tuned anew: by rule instead of by trying all algorithms.
    return [("CUDAExecutionProvider", {"cudnn_conv_algo_search": "HEURISTIC"}), "CPUExecutionProvider"]


def _cuda_device() -> bool:
    """Whether the driver knows a GPU. Asking ONNX Runtime instead prints its errors on machines without one."""
    count = ctypes.c_int(0)
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
    except OSError:
        return False


class Batcher:
    """Gathers the images of concurrent requests into batches; one runs at a time, on a thread of its own.

    There is no timer: while a batch runs the next one gathers, and a request that comes alone never waits.
    """

    def __init__(self, encode: Callable[[np.ndarray], np.ndarray], max_batch: int = MAX_BATCH):
        """encode  uint8 (n, S, S, 3) -> float32 (n, d), for any n from 1 to max_batch."""
        self.encode = encode
        self.max_batch = max_batch
        self._waiting: deque[tuple[np.ndarray, asyncio.Future]] = deque()
        self._thread = ThreadPoolExecutor(1, "encoder")
        self._running: asyncio.Task | None = None

    async def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 (n, S, S, 3) -> float32 (n, d). To rounding, a row is what its image would get alone."""
        parts = [pixels[i : i + self.max_batch] for i in range(0, len(pixels), self.max_batch)]
        return np.concatenate(await asyncio.gather(*map(self._enqueue, parts)))

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _enqueue(self, pixels: np.ndarray) -> asyncio.Future:
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((pixels, future))
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._run())
        return future

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while batch := self._next_batch():
            pixels = np.concatenate([part for part, _ in batch])
            try:
                vectors = await loop.run_in_executor(self._thread, self.encode, pixels)
            except Exception as error:
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            start = 0
            for part, future in batch:
                if not future.done():
                    future.set_result(vectors[start : start + len(part)])
                start += len(part)

    def _next_batch(self) -> list[tuple[np.ndarray, asyncio.Future]]:
        """The oldest that fit together; those whose request has gone away are dropped."""
        batch, size = [], 0
        while self._waiting and size + len(self._waiting[0][0]) <= self.max_batch:
            pixels, future = self._waiting.popleft()
            if not future.done():
                batch.append((pixels, future))
                size += len(pixels)
        return batch
