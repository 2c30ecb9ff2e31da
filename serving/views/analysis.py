"""Analyses of the embeddings of augmented views: pairs of views of a picture, all views of several pictures compared
with each other, and how far each augmentation moves h. Views are drawn in threads and encoded in the same batches as
the images of other requests."""

import asyncio
import concurrent.futures
import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from fastapi.concurrency import run_in_threadpool

from serving.collection.index import Item, unit
from serving.errors import Malformed, TooLarge
from serving.inference.decode import Decoder, Upload
from serving.inference.served import ServedEncoder, ServedEncoders
from serving.library import Library
from serving.limits import Gate
from serving.views.draw import draw_views
from serving.views.invariance import ComparedEncoders, FollowedPicture, compare_encoders, follow_picture
from serving.views.projection import projection_of
from serving.views.sample import sample

BATCH_IMAGES = 16  # in one batch of an invariance analysis; small, so that other requests wait only briefly
DEADLINE_S = 60.0  # for one invariance analysis
CACHED_COMPARISONS = 8


@dataclass(frozen=True)
class PairAnalysis:
    views: np.ndarray
    """uint8 (pairs, 2, S, S, 3)"""
    h: np.ndarray
    """Cosines (pairs,) of the two views' h."""
    z: np.ndarray | None
    """Cosines (pairs,) of their z = g(h); None without g."""


@dataclass(frozen=True)
class MatrixAnalysis:
    model: str
    pictures: list[tuple[str, str | None]]
    """Name and id of N pictures; the id is None for a picture that is not from the collection."""
    views: np.ndarray
    """uint8 (2N, S, S, 3); 2i and 2i + 1 are views of picture i."""
    h: np.ndarray
    """Cosines (2N, 2N) of the views' h."""
    z: np.ndarray | None
    """Cosines (2N, 2N) of their z = g(h); None without g."""


@dataclass(frozen=True)
class InvarianceAnalysis:
    model: str
    picture: str
    """Name of the picture that was followed."""
    pixels: np.ndarray
    """uint8 (S, S, 3), as the encoder sees it."""
    compared: ComparedEncoders
    followed: FollowedPicture


class ViewAnalysis:
    def __init__(self, encoders: ServedEncoders, gate: Gate, decode: Decoder, library: Library):
        """gate  counts the images that are being embedded"""
        self._encoders, self._gate, self._decode, self._library = encoders, gate, decode, library
        self._drawing = asyncio.Lock()  # one drawing at a time, so that embedding loses at most one core
        self._examining = asyncio.Lock()
        self._compared: dict[tuple[str, int, bytes], ComparedEncoders] = {}  # for pictures with the same sample

    async def pairs(self, image: Upload, pairs: int, seed: int, settings: dict[str, list[str]]) -> PairAnalysis:
        """raises as Engine.embed, Malformed, NotOffered"""
        encoder = self._encoders.default
        with self._gate.admit(2 * pairs):
            pixels = await self._decode([image], encoder.card.preprocessing)
            views, h, z = await self._embedded_views(encoder, pixels, 2 * pairs, seed, settings)
        z_cosines = None if z is None else _pair_cosines(z)
        return PairAnalysis(views.reshape(pairs, 2, *pixels.shape[1:]), _pair_cosines(h), z_cosines)

    async def matrix(
        self, images: Sequence[Upload], collection: str, count: int, seed: int, settings: dict[str, list[str]]
    ) -> MatrixAnalysis:
        """Two views of each image, and of pictures from the collection until there are `count` pictures.

        raises as pairs, and IndexProblem
        """
        encoder = self._encoders.default
        with self._gate.admit(2 * max(count, len(images))):
            drawn = await self._sample(encoder, collection, count - len(images), seed, images)
            if len(images) + len(drawn) < 2:
                raise Malformed(
                    f"image: at least two pictures are compared, and the collection {collection} has "
                    f"{'no other' if images else 'fewer'}; send more images",
                    "image",
                )
            pixels = await self._decode([*images, *(file for _, file in drawn)], encoder.card.preprocessing)
            views, h, z = await self._embedded_views(encoder, pixels, 2, seed, settings)
        pictures: list[tuple[str, str | None]] = [(file.name, None) for file in images]
        pictures += [(item.name, item.id) for item, _ in drawn]
        return MatrixAnalysis(encoder.card.id, pictures, views, h @ h.T, z if z is None else z @ z.T)

    async def invariance(self, image: Upload | None, collection: str, count: int, seed: int) -> InvarianceAnalysis:
        """The mean over `count` pictures of the collection; and the curves of one picture: the image, or else the first
        of the sample.

        raises as matrix, and TooLarge if it takes longer than DEADLINE_S
        """
        encoder = self._encoders.default
        images = [image] if image else []
        with self._gate.admit(count + len(images)):
            drawn = await self._sample(encoder, collection, count, seed, images)
            if len(drawn) < 2:
                await self._library.describe(encoder.index(collection))  # raises NotFound
                message = f"collection: at least two pictures are compared, and {collection} has fewer"
                raise Malformed(message, "collection")
            files = [*images, *(file for _, file in drawn)]
            pixels = await self._decode(files, encoder.card.preprocessing)
            async with self._examining:
                compared, followed = await self._examine(encoder, pixels[len(images) :], pixels[0], seed)
        return InvarianceAnalysis(encoder.card.id, files[0].name, pixels[0], compared, followed)

    async def _embedded_views(
        self, encoder: ServedEncoder, pixels: np.ndarray, each: int, seed: int, settings: dict[str, list[str]]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """The views, and h and z of each, of unit length."""
        async with self._drawing:
            views = await run_in_threadpool(draw_views, pixels, each, seed, settings)
            project = await run_in_threadpool(projection_of, encoder.folder, encoder.card)
        h = (await encoder.batch(views)).vectors
        return views, unit(h), unit(project(h)) if project else None

    async def _sample(
        self, encoder: ServedEncoder, name: str, count: int, seed: int, without: Sequence[Upload]
    ) -> list[tuple[Item, Upload]]:
        if count < 1:
            return []
        return await self._library.read(sample, encoder.index(name), count, seed, [file.data for file in without])

    async def _examine(
        self, encoder: ServedEncoder, pixels: np.ndarray, one: np.ndarray, seed: int
    ) -> tuple[ComparedEncoders, FollowedPicture]:
        """Runs in threads, which end soon after the request is cancelled."""
        encode = _EncodeFromThread(encoder)
        key = (encoder.card.id, seed, hashlib.sha256(pixels.data).digest())
        try:
            async with asyncio.timeout(DEADLINE_S):
                if key not in self._compared:
                    compared = await run_in_threadpool(
                        compare_encoders, encode, pixels, seed, encoder.card, encode.raise_if_cancelled
                    )
                    self._compared = dict([*self._compared.items(), (key, compared)][-CACHED_COMPARISONS:])
                compared = self._compared[key]
                followed = await run_in_threadpool(
                    follow_picture, encode, one, compared.trained.others, seed, encode.raise_if_cancelled
                )
                return compared, followed
        except TimeoutError:
            message = f"count: {len(pixels)} pictures take this encoder longer than {DEADLINE_S:g} s; ask for fewer"
            raise TooLarge(message, "count") from None
        finally:
            encode.cancel()


def _pair_cosines(vectors: np.ndarray) -> np.ndarray:
    """Cosines (p,) of the unit vectors (2p, d) of p pairs."""
    return (vectors[::2] * vectors[1::2]).sum(axis=1)


class _EncodeFromThread:
    """uint8 (n, S, S, 3) -> h (n, d): called by a thread, which waits until the event loop has run the batches."""

    def __init__(self, encoder: ServedEncoder):
        self._encoder, self._loop = encoder, asyncio.get_running_loop()
        self._cancelled = threading.Event()
        self._pending: concurrent.futures.Future[np.ndarray] | None = None

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        self._pending = asyncio.run_coroutine_threadsafe(self._encode(pixels), self._loop)
        if self._cancelled.is_set():
            self._pending.cancel()
        return self._pending.result()

    def raise_if_cancelled(self) -> None:
        if self._cancelled.is_set():
            raise concurrent.futures.CancelledError

    def cancel(self) -> None:
        """Called by the event loop."""
        self._cancelled.set()
        if self._pending:
            self._pending.cancel()

    async def _encode(self, pixels: np.ndarray) -> np.ndarray:
        parts = [pixels[i : i + BATCH_IMAGES] for i in range(0, len(pixels), BATCH_IMAGES)]
        return np.concatenate([(await self._encoder.batch(part)).vectors for part in parts])
