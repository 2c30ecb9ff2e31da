"""What an encoder makes of augmented views: pairs of one picture, those of several against each other, and how far each
augmentation moves it. Views are drawn in threads, and encoded in the batches of everybody's pictures."""

import asyncio
import concurrent.futures
import hashlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from fastapi.concurrency import run_in_threadpool

from serving.collection.index import Item, unit
from serving.errors import Malformed, TooLarge
from serving.inference.decode import Decoder, File
from serving.inference.models import Model, Models
from serving.library import Library
from serving.limits import Gate
from serving.views.draw import draw_views
from serving.views.invariance import Compared, Followed, compare, follow
from serving.views.projection import head_of
from serving.views.sample import sample

TOGETHER = 16  # images of an examination that are in the batches at a time: others' wait no longer for these
DEADLINE_S = 60.0
KEPT = 8  # examined samples


@dataclass(frozen=True)
class Pairs:
    views: np.ndarray
    """uint8 (pairs, 2, S, S, 3)"""
    h: np.ndarray
    """Cosines (pairs,) of the two views' h."""
    z: np.ndarray | None
    """And of their z = g(h), where g is at hand."""


@dataclass(frozen=True)
class Matrix:
    model: str
    pictures: list[tuple[str, str | None]]
    """Name and id of N pictures; no id of what is not of the collection."""
    views: np.ndarray
    """uint8 (2N, S, S, 3); 2i and 2i + 1 are of picture i."""
    h: np.ndarray
    """Cosines (2N, 2N)."""
    z: np.ndarray | None


@dataclass(frozen=True)
class Examined:
    model: str
    picture: str
    """Name of the one that is followed."""
    pixels: np.ndarray
    """uint8 (S, S, 3), as the encoder sees it."""
    compared: Compared
    followed: Followed


class Studio:
    def __init__(self, models: Models, gate: Gate, decode: Decoder, library: Library):
        """gate  of the images that are embedded"""
        self._models, self._gate, self._decode, self._library = models, gate, decode, library
        self._drawing = asyncio.Lock()  # one core is enough to take from embedding
        self._examining = asyncio.Lock()
        self._compared: dict[tuple, Compared] = {}  # the next picture is held against the same sample

    async def pairs(self, image: File, pairs: int, seed: int, settings: dict[str, list[str]]) -> Pairs:
        """raises as Engine.embed, Malformed, NotOffered"""
        model = self._models.default
        with self._gate.admit(2 * pairs):
            pixels = await self._decode([image], model.card.preprocessing)
            views, h, z = await self._embedded_views(model, pixels, 2 * pairs, seed, settings)
        h, z = (one if one is None else one.reshape(pairs, 2, -1) for one in (h, z))
        cosines = [one if one is None else (one[:, 0] * one[:, 1]).sum(axis=1) for one in (h, z)]
        return Pairs(views.reshape(pairs, 2, *pixels.shape[1:]), *cosines)

    async def matrix(
        self, images: Sequence[File], collection: str, count: int, seed: int, settings: dict[str, list[str]]
    ) -> Matrix:
        """Two views of each of the images, and of pictures of the collection until there are `count`.

        raises as pairs, and IndexProblem
        """
        model = self._models.default
        with self._gate.admit(2 * max(count, len(images))):
            drawn = await self._sample(model, collection, count - len(images), seed, images)
            if len(images) + len(drawn) < 2:
                raise Malformed(
                    f"image: two pictures at least are held against each other, and {collection} has "
                    f"{'no other' if images else 'fewer'}; give more",
                    "image",
                )
            pixels = await self._decode([*images, *(file for _, file in drawn)], model.card.preprocessing)
            views, h, z = await self._embedded_views(model, pixels, 2, seed, settings)
        pictures = [(file.name, None) for file in images] + [(item.name, item.id) for item, _ in drawn]
        return Matrix(model.card.id, pictures, views, h @ h.T, z if z is None else z @ z.T)

    async def invariance(self, image: File | None, collection: str, count: int, seed: int) -> Examined:
        """Of `count` pictures of the collection, and of the image; without one, of the first of them.

        raises as matrix, and TooLarge where it takes longer than DEADLINE_S
        """
        model = self._models.default
        given = [image] if image else []
        with self._gate.admit(count + len(given)):
            drawn = await self._sample(model, collection, count, seed, given)
            if len(drawn) < 2:
                await self._library.about(model.index(collection))
                message = f"collection: at least two pictures are compared, and {collection} has fewer"
                raise Malformed(message, "collection")
            files = [*given, *(file for _, file in drawn)]
            pixels = await self._decode(files, model.card.preprocessing)
            async with self._examining:
                compared, followed = await self._examine(model, pixels[len(given) :], pixels[0], seed)
        return Examined(model.card.id, files[0].name, pixels[0], compared, followed)

    async def _embedded_views(
        self, model: Model, pixels: np.ndarray, each: int, seed: int, settings: dict[str, list[str]]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """The views, and h and z of each, of unit length."""
        async with self._drawing:
            views = await run_in_threadpool(draw_views, pixels, each, seed, settings)
            head = await run_in_threadpool(head_of, model.folder, model.card)
        h = (await model.batch(views)).vectors
        return views, unit(h), unit(head(h)) if head else None

    async def _sample(
        self, model: Model, name: str, count: int, seed: int, without: Sequence[File]
    ) -> list[tuple[Item, File]]:
        if count < 1:
            return []
        return await self._library.read(sample, model.index(name), count, seed, [file.data for file in without])

    async def _examine(self, model: Model, pixels: np.ndarray, one: np.ndarray, seed: int) -> tuple[Compared, Followed]:
        """In threads, which ask this loop to encode, and end soon after the request is cancelled."""
        over = threading.Event()
        encode, cancel = _from_thread(model, over)

        def go_on() -> None:
            if over.is_set():
                raise concurrent.futures.CancelledError

        key = (model.card.id, seed, hashlib.sha256(pixels).digest())
        try:
            async with asyncio.timeout(DEADLINE_S):
                if key not in self._compared:
                    compared = await run_in_threadpool(compare, encode, pixels, seed, model.card, go_on)
                    self._compared = dict([*self._compared.items(), (key, compared)][-KEPT:])
                compared = self._compared[key]
                return compared, await run_in_threadpool(follow, encode, one, compared.trained.others, seed, go_on)
        except TimeoutError:
            message = f"count: {len(pixels)} pictures take this encoder longer than {DEADLINE_S:g} s; ask for fewer"
            raise TooLarge(message, "count") from None
        finally:
            over.set()
            cancel()


def _from_thread(model: Model, over: threading.Event) -> tuple[Callable[[np.ndarray], np.ndarray], Callable[[], None]]:
    """`encode` for a thread, to be waited for there; and what ends its waiting, for this loop."""
    loop, waiting = asyncio.get_running_loop(), [concurrent.futures.Future()]

    async def run(pixels: np.ndarray) -> np.ndarray:
        parts = [pixels[i : i + TOGETHER] for i in range(0, len(pixels), TOGETHER)]
        return np.concatenate([(await model.batch(part)).vectors for part in parts])

    def encode(pixels: np.ndarray) -> np.ndarray:
        waiting[0] = asyncio.run_coroutine_threadsafe(run(pixels), loop)
        if over.is_set():
            waiting[0].cancel()
        return waiting[0].result()

    return encode, lambda: waiting[0].cancel()
