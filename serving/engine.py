"""What answers the requests: decoder, batcher, encoder and index, put together."""

import asyncio
from pathlib import Path

import numpy as np
from fastapi.concurrency import run_in_threadpool

from serving.decode import Decoder, File
from serving.encoder import Batcher, Encoder, find_bundle
from serving.errors import Malformed, NotFound
from serving.index import Index, Item, unit
from serving.limits import Gate, Limits, cores
from serving.metrics import Metrics
from serving.views import draw_views


class Engine:
    def __init__(self, encoder: str | None, index: Path, limits: Limits, metrics: Metrics):
        """Load, warm up, open. encoder: as find_bundle's `chosen`. raises BundleError."""
        model = Encoder(find_bundle(encoder))
        self.card = model.card
        self.index = Index(index, self.card.id, self.card.dimension)
        self._decode = Decoder(self.card.preprocessing, cores(), limits.pixels)
        self._batch = Batcher(metrics.measured(model))
        self._gate = Gate(limits.images_at_once)
        self._drawing = asyncio.Lock()
        metrics.inside.set_function(lambda: self._gate.inside)

    async def embed(self, files: list[File]) -> np.ndarray:
        """h of n >= 1 images, float32 (n, d). raises Busy, Undecodable, TooLarge."""
        with self._gate.admit(len(files)):
            return await self._batch(await self._decode(files))

    async def search(
        self, k: int, image: File | None = None, vector: list[float] | None = None, id: str | None = None
    ) -> list[tuple[Item, float]]:
        """The k nearest to one of the three, with their cosine. raises as embed, Malformed, NotFound, IndexProblem."""
        if [image, vector, id].count(None) != 2:
            raise Malformed("give one of image, vector and id to search by")
        if image is not None:
            query = (await self.embed([image]))[0]
        elif vector is not None:
            query = np.asarray(vector, np.float32)
            if query.shape != (self.card.dimension,):
                expected = f"{self.card.id} gives {self.card.dimension}"
                raise Malformed(f"vector has {len(vector)} numbers; {expected}", "vector")
            if not np.linalg.norm(query) > 0:
                raise Malformed("vector is zero and points nowhere", "vector")
        else:
            known = await run_in_threadpool(self.index.get, id)
            if known is None:
                raise NotFound(f"no item {id} is in the index", "id")
            query = known[1]
        return await run_in_threadpool(self.index.search, query, k, without=id)

    async def views(
        self, image: File, pairs: int, seed: int, settings: dict[str, list[str]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Pairs of augmented views, uint8 (pairs, 2, S, S, 3), and the cosines (pairs,) of their embeddings.

        raises as embed, and Malformed, NotOffered
        """
        with self._gate.admit(2 * pairs):
            pixels = (await self._decode([image]))[0]
            async with self._drawing:  # torch takes all cores for one drawing
                views = await run_in_threadpool(draw_views, pixels, pairs, seed, settings)
            vectors = unit(await self._batch(views)).reshape(pairs, 2, -1)
        return views.reshape(pairs, 2, *pixels.shape), (vectors[:, 0] * vectors[:, 1]).sum(axis=1)

    def close(self) -> None:
        self._decode.close()
        self._batch.close()
