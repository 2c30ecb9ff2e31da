"""What answers the requests: decoder, encoders and their indexes, put together."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
from fastapi.concurrency import run_in_threadpool

from export.artifact import BundleError, ModelCard, TooManyPixels
from serving.decode import SMALL_BYTES, SMALL_PIXELS, Decoder, File
from serving.errors import Malformed, NotFound, NotReady
from serving.index import Index, Item, unit
from serving.limits import Gate, Limits, cores
from serving.metrics import Metrics
from serving.models import Model, Models
from serving.views import draw_views


@dataclass(frozen=True)
class Embedded:
    """What a request's images have become, and which encoder made it."""

    model: str
    """Its card's id."""
    vectors: np.ndarray
    """h, float32 (n, d)."""
    times: dict[str, float]
    """Seconds: decode (with the wait for a thread), queue (the wait for a batch), model."""


class Engine:
    def __init__(self, encoders: str | None, index: Path, limits: Limits, metrics: Metrics):
        """Load, warm up, open. encoders: as Models' `chosen`. raises BundleError."""
        threads = limits.threads or cores()
        self._decode = Decoder(threads, limits.pixels)
        self._models = Models(encoders, index, threads, min(SMALL_PIXELS, limits.pixels), metrics.encoded)
        self._gate = Gate(limits.images_at_once, limits.bytes_at_once)
        self._drawing = asyncio.Lock()
        metrics.levels = lambda: (self._gate.inside, self._models.waiting)

    @property
    def cards(self) -> list[ModelCard]:
        """Of the encoders that are served, the default first."""
        return self._models.cards

    @property
    def card(self) -> ModelCard:
        """The default's."""
        return self._models.default.card

    @property
    def index(self) -> Index:
        """The collection as the default encoder has embedded it."""
        return self._models.default.index

    @property
    def providers(self) -> list[str]:
        """ONNX Runtime's execution providers of the default encoder, the preferred first."""
        return [self._models.default.provider]

    def refuse_when_full(self) -> None:
        """raises Busy where no image would be admitted."""
        self._gate.check()

    async def embed(self, files: list[File], model: str | None = None) -> Embedded:
        """n >= 1 images by the encoder of that id, or by the default. raises NotFound, Busy, Undecodable, TooLarge."""
        return await self._embed(files, self._models.named(model))

    async def search(
        self, k: int, image: File | None = None, vector: list[float] | None = None, id: str | None = None
    ) -> tuple[str, list[tuple[Item, float]]]:
        """The encoder's id, and the k nearest to one of the three, with their cosine.

        raises as embed, Malformed, NotFound, IndexProblem
        """
        model = self._models.default
        if [image, vector, id].count(None) != 2:
            raise Malformed("give one of image, vector and id to search by")
        if image is not None:
            query = (await self._embed([image], model)).vectors[0]
        elif vector is not None:
            query = np.asarray(vector, np.float32)
            if query.shape != (model.card.dimension,):
                expected = f"{model.card.id} gives {model.card.dimension}"
                raise Malformed(f"vector has {len(vector)} numbers; {expected}", "vector")
            if not np.linalg.norm(query) > 0:
                raise Malformed("vector is zero and points nowhere", "vector")
        else:
            known = await run_in_threadpool(model.index.get, id)
            if known is None:
                raise NotFound(f"no item {id} is in the index", "id")
            query = known[1]
        return model.card.id, await run_in_threadpool(model.index.search, query, k, without=id)

    async def views(
        self, image: File, pairs: int, seed: int, settings: dict[str, list[str]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Pairs of augmented views, uint8 (pairs, 2, S, S, 3), and the cosines (pairs,) of their embeddings.

        raises as embed, and Malformed, NotOffered
        """
        model = self._models.default
        with self._gate.admit(2 * pairs, len(image.data)):
            pixels = (await self._decode([image], model.card.preprocessing))[0]
            async with self._drawing:  # torch takes all cores for one drawing
                views = await run_in_threadpool(draw_views, pixels, pairs, seed, settings)
            vectors = unit((await model.batch(views)).vectors).reshape(pairs, 2, -1)
        return views.reshape(pairs, 2, *pixels.shape), (vectors[:, 0] * vectors[:, 1]).sum(axis=1)

    def close(self) -> None:
        self._models.close()
        self._decode.close()

    async def _embed(self, files: list[File], model: Model) -> Embedded:
        """To its end with one encoder, also when another takes its place meanwhile."""
        with self._gate.admit(len(files), sum(len(file.data) for file in files)), _started():
            encoded = None
            if model.reads_files and all(len(file.data) <= SMALL_BYTES for file in files):
                with suppress(TooManyPixels):
                    encoded = await model.batch(files)  # decoded where it is encoded: another thread would cost more
                    decode_s = encoded.decode_s
            if encoded is None:
                started = perf_counter()
                pixels = await self._decode(files, model.card.preprocessing)
                decode_s = perf_counter() - started
                encoded = await model.batch(pixels)
        times = {"decode": decode_s, "queue": encoded.queue_s, "model": encoded.model_s}
        return Embedded(model.card.id, encoded.vectors, times)


@contextmanager
def _started() -> Iterator[None]:
    """A lane that has to be started again may find another encoder in place of its own."""
    try:
        yield
    except BundleError as error:
        raise NotReady(str(error)) from error
