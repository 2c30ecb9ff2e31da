"""Talks to the service: `Client` for scripts, `AsyncClient` for servers and pages, the same methods in both.

    client = Client("http://127.0.0.1:3000")
    client.search("cat.jpg", k=5).results[0].name

A picture is a path, encoded bytes, or a PIL image. Whatever the service refuses is raised as ServiceError, whose
text is the service's own sentence. When the service is busy it says for how long; both clients wait and try again
a few times.

`embed`, `classify` and `put_items` take any number of pictures and send them in packs, a request at a time. All go to
one encoder, also when the service takes up another meanwhile.
"""

import asyncio
import time
from collections.abc import Iterable, Sequence

import httpx
import numpy as np

from serving.client import calls
from serving.client.calls import COLLECTION, Call, Example, Facts, Filter, Picture, Steps, T
from serving.protocol.replies import (
    Classified,
    Collection,
    Computing,
    Curve,
    Curves,
    Duplicates,
    Embeddings,
    Followed,
    Guess,
    Invariance,
    Item,
    Items,
    Key,
    Map,
    Match,
    Matches,
    Matrix,
    OfMatrix,
    Overview,
    Pair,
    Put,
    PutItem,
    Run,
    RunDetails,
    ServiceError,
)

__all__ = [
    "AsyncClient",
    "Classified",
    "Client",
    "Collection",
    "Computing",
    "Curve",
    "Curves",
    "Duplicates",
    "Embeddings",
    "Followed",
    "Guess",
    "Invariance",
    "Item",
    "Items",
    "Key",
    "Map",
    "Match",
    "Matches",
    "Matrix",
    "OfMatrix",
    "Overview",
    "Pair",
    "Put",
    "PutItem",
    "Run",
    "RunDetails",
    "ServiceError",
]

ATTEMPTS = 4  # of a request, when the service says to come back later
LONGEST_WAIT_S = 30.0  # between two of them, whatever the service says


class Client:
    """url        where the service listens, for instance http://127.0.0.1:3000
    api_key    sent as a bearer token
    timeout_s  for connecting and for each answer
    transport  an httpx transport, for instance one that calls an app in this process
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        timeout_s: float = 60.0,
        transport: httpx.BaseTransport | None = None,
    ):
        self._http = httpx.Client(base_url=url, headers=_headers(api_key), timeout=timeout_s, transport=transport)

    def embed(
        self, images: Picture | Iterable[Picture], normalize: bool = False, model: str | None = None
    ) -> Embeddings:
        """h of each image, in their order; of unit length with `normalize`. model: an id of `models`."""
        return self._walk(calls.embed(images, normalize, model))

    def classify(self, images: Picture | Iterable[Picture], k: int = 5, model: str | None = None) -> Classified:
        """The k likeliest classes of each image, in their order, by a model that was fine-tuned."""
        return self._walk(calls.classify(images, k, model))

    def search(
        self,
        image: Picture | Sequence[Picture] | None = None,
        *,
        positive: Sequence[Example] = (),
        negative: Sequence[Example] = (),
        k: int = 12,
        filter: Filter | None = None,
        threshold: float | None = None,
        model: str | None = None,
        collection: str = COLLECTION,
    ) -> Matches:
        """The k most like one or several pictures, and like the ids or vectors in `positive`, and unlike those in
        `negative`; items that are given are left out. filter: {"label": "shirt", "price": {"lt": 9}}. threshold: the
        least cosine."""
        call = calls.search(image, positive, negative, k, filter, threshold, model, collection)
        return self._send(call)

    def collections(self) -> list[Collection]:
        """Those there are, for every encoder."""
        return self._send(calls.collections())

    def collection(self, name: str = COLLECTION) -> Collection:
        return self._send(calls.collection(name))

    def keys(self, *, collection: str = COLLECTION, model: str | None = None) -> list[Key]:
        """What its items can be filtered by, with the commonest values of each key."""
        return self._send(calls.keys(collection, model))

    def put_items(
        self,
        images: Picture | Iterable[Picture],
        facts: Sequence[Facts] | None = None,
        *,
        collection: str = COLLECTION,
        model: str | None = None,
    ) -> Put:
        """Embed the pictures and keep them; durable once this returns. facts: of each of them, a dict with any of id,
        name, label, path, metadata. What fails after the first packs leaves those there."""
        return self._walk(calls.put_items(images, facts, collection, model))

    def put_vectors(
        self,
        ids: Sequence[str],
        vectors: np.ndarray,
        model: str,
        facts: Sequence[Facts] | None = None,
        *,
        collection: str = COLLECTION,
    ) -> Put:
        """Keep vectors (n, d) that the encoder `model` has made elsewhere, at most 1,000 at a time."""
        return self._send(calls.put_vectors(ids, vectors, model, facts, collection))

    def delete_items(self, ids: Sequence[str], *, collection: str = COLLECTION) -> list[str]:
        """Those of the ids that were there; at most 1,000 at a time."""
        return self._send(calls.delete_items(ids, collection))

    def items(
        self,
        limit: int = 50,
        offset: int = 0,
        filter: Filter | None = None,
        *,
        collection: str = COLLECTION,
        model: str | None = None,
    ) -> Items:
        return self._send(calls.items(limit, offset, filter, collection, model))

    def item(self, id: str, vector: bool = False, *, collection: str = COLLECTION) -> Item:
        """With its vector where that is asked for."""
        return self._send(calls.item(id, vector, collection))

    def thumbnail(self, id: str, *, collection: str = COLLECTION) -> bytes:
        """JPEG, 256 px on its longest side."""
        return self._send(calls.thumbnail(id, collection))

    def map(self, places: bool = True, *, collection: str = COLLECTION) -> Map:
        """The newest, and how far the next one is. Without `places` its columns are empty."""
        return self._send(calls.map_(places, collection))

    def compute_map(self, seed: int = 0, *, collection: str = COLLECTION) -> Computing:
        """Have one made; `map` says how far it is."""
        return self._send(calls.compute("map", {"seed": seed}, collection))

    def duplicates(
        self, threshold: float = 0.95, limit: int = 100, offset: int = 0, *, collection: str = COLLECTION
    ) -> Duplicates:
        """Groups of pictures with a cosine of at least `threshold` to the first of their group, largest first."""
        return self._send(calls.duplicates(threshold, limit, offset, collection))

    def compute_duplicates(self, threshold: float = 0.9, *, collection: str = COLLECTION) -> Computing:
        """Compare all with all; `duplicates` says how far that is, and can be asked for any threshold from this on."""
        return self._send(calls.compute("duplicates", {"threshold": threshold}, collection))

    def views(self, image: Picture, pairs: int = 4, seed: int = 0, **settings) -> list[Pair]:
        """Pairs of augmented views. settings: those of training.augment.AugmentSettings, its defaults where absent."""
        return self._send(calls.views(image, pairs, seed, settings))

    def matrix(
        self,
        images: Picture | Sequence[Picture] = (),
        count: int = 6,
        seed: int = 0,
        *,
        collection: str = COLLECTION,
        **settings,
    ) -> Matrix:
        """Two views of each of `count` pictures, and the cosines of all with all. The pictures are the images, and some
        of the collection to make up the number. settings: as of views."""
        given = [images] if isinstance(images, Picture) else images
        return self._send(calls.matrix(given, count, seed, collection, settings))

    def invariance(
        self, image: Picture | None = None, count: int = 16, seed: int = 0, *, collection: str = COLLECTION
    ) -> Invariance:
        """How far h moves as one augmentation grows: mean over `count` pictures of the collection, and of the image
        alone. Takes seconds."""
        return self._send(calls.invariance(image, count, seed, collection))

    def runs(self, limit: int = 100) -> list[Run]:
        """The training runs that the service can see, the newest first."""
        return self._send(calls.runs(limit))

    def run(self, name: str) -> RunDetails:
        """One of them with its settings and its curves."""
        return self._send(calls.run(name))

    def models(self) -> list[dict]:
        """The model cards of the encoders that are served, the default first; none where there is none."""
        return self._send(calls.models())

    def ready(self) -> bool:
        return self._send(calls.ready())

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _walk(self, steps: Steps[T]) -> T:
        try:
            call = next(steps)
            while True:
                try:
                    answer = self._send(call)
                except ServiceError as error:
                    call = steps.throw(error)
                else:
                    call = steps.send(answer)
        except StopIteration as done:
            return done.value

    def _send(self, call: Call[T]) -> T:
        for attempt in range(ATTEMPTS):
            try:
                response = self._http.request(call.method, call.path, **call.options)
            except httpx.HTTPError as error:
                raise _unreachable(self._http.base_url, error) from error
            wait_s = _wait_s(response, attempt)
            if wait_s is None:
                return call.read(response)
            time.sleep(wait_s)


class AsyncClient:
    """Client's methods, awaited."""

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        timeout_s: float = 60.0,
        transport: httpx.AsyncBaseTransport | None = None,
    ):
        self._http = httpx.AsyncClient(base_url=url, headers=_headers(api_key), timeout=timeout_s, transport=transport)

    async def embed(
        self, images: Picture | Iterable[Picture], normalize: bool = False, model: str | None = None
    ) -> Embeddings:
        return await self._walk(calls.embed(images, normalize, model))

    async def classify(self, images: Picture | Iterable[Picture], k: int = 5, model: str | None = None) -> Classified:
        return await self._walk(calls.classify(images, k, model))

    async def search(
        self,
        image: Picture | Sequence[Picture] | None = None,
        *,
        positive: Sequence[Example] = (),
        negative: Sequence[Example] = (),
        k: int = 12,
        filter: Filter | None = None,
        threshold: float | None = None,
        model: str | None = None,
        collection: str = COLLECTION,
    ) -> Matches:
        call = calls.search(image, positive, negative, k, filter, threshold, model, collection)
        return await self._send(call)

    async def collections(self) -> list[Collection]:
        return await self._send(calls.collections())

    async def collection(self, name: str = COLLECTION) -> Collection:
        return await self._send(calls.collection(name))

    async def keys(self, *, collection: str = COLLECTION, model: str | None = None) -> list[Key]:
        return await self._send(calls.keys(collection, model))

    async def put_items(
        self,
        images: Picture | Iterable[Picture],
        facts: Sequence[Facts] | None = None,
        *,
        collection: str = COLLECTION,
        model: str | None = None,
    ) -> Put:
        return await self._walk(calls.put_items(images, facts, collection, model))

    async def put_vectors(
        self,
        ids: Sequence[str],
        vectors: np.ndarray,
        model: str,
        facts: Sequence[Facts] | None = None,
        *,
        collection: str = COLLECTION,
    ) -> Put:
        return await self._send(calls.put_vectors(ids, vectors, model, facts, collection))

    async def delete_items(self, ids: Sequence[str], *, collection: str = COLLECTION) -> list[str]:
        return await self._send(calls.delete_items(ids, collection))

    async def items(
        self,
        limit: int = 50,
        offset: int = 0,
        filter: Filter | None = None,
        *,
        collection: str = COLLECTION,
        model: str | None = None,
    ) -> Items:
        return await self._send(calls.items(limit, offset, filter, collection, model))

    async def item(self, id: str, vector: bool = False, *, collection: str = COLLECTION) -> Item:
        return await self._send(calls.item(id, vector, collection))

    async def thumbnail(self, id: str, *, collection: str = COLLECTION) -> bytes:
        return await self._send(calls.thumbnail(id, collection))

    async def map(self, places: bool = True, *, collection: str = COLLECTION) -> Map:
        return await self._send(calls.map_(places, collection))

    async def compute_map(self, seed: int = 0, *, collection: str = COLLECTION) -> Computing:
        return await self._send(calls.compute("map", {"seed": seed}, collection))

    async def duplicates(
        self, threshold: float = 0.95, limit: int = 100, offset: int = 0, *, collection: str = COLLECTION
    ) -> Duplicates:
        return await self._send(calls.duplicates(threshold, limit, offset, collection))

    async def compute_duplicates(self, threshold: float = 0.9, *, collection: str = COLLECTION) -> Computing:
        return await self._send(calls.compute("duplicates", {"threshold": threshold}, collection))

    async def views(self, image: Picture, pairs: int = 4, seed: int = 0, **settings) -> list[Pair]:
        return await self._send(calls.views(image, pairs, seed, settings))

    async def matrix(
        self,
        images: Picture | Sequence[Picture] = (),
        count: int = 6,
        seed: int = 0,
        *,
        collection: str = COLLECTION,
        **settings,
    ) -> Matrix:
        given = [images] if isinstance(images, Picture) else images
        return await self._send(calls.matrix(given, count, seed, collection, settings))

    async def invariance(
        self, image: Picture | None = None, count: int = 16, seed: int = 0, *, collection: str = COLLECTION
    ) -> Invariance:
        return await self._send(calls.invariance(image, count, seed, collection))

    async def runs(self, limit: int = 100) -> list[Run]:
        return await self._send(calls.runs(limit))

    async def run(self, name: str) -> RunDetails:
        return await self._send(calls.run(name))

    async def models(self) -> list[dict]:
        return await self._send(calls.models())

    async def ready(self) -> bool:
        return await self._send(calls.ready())

    async def aclose(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *_) -> None:
        await self.aclose()

    async def _walk(self, steps: Steps[T]) -> T:
        try:
            call = next(steps)
            while True:
                try:
                    answer = await self._send(call)
                except ServiceError as error:
                    call = steps.throw(error)
                else:
                    call = steps.send(answer)
        except StopIteration as done:
            return done.value

    async def _send(self, call: Call[T]) -> T:
        for attempt in range(ATTEMPTS):
            try:
                response = await self._http.request(call.method, call.path, **call.options)
            except httpx.HTTPError as error:
                raise _unreachable(self._http.base_url, error) from error
            wait_s = _wait_s(response, attempt)
            if wait_s is None:
                return call.read(response)
            await asyncio.sleep(wait_s)


def _headers(api_key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def _wait_s(response: httpx.Response, attempt: int) -> float | None:
    """How long to wait before the next attempt; None where the answer stands."""
    after = response.headers.get("Retry-After", "")
    if response.status_code not in (429, 503) or not after.isdigit() or attempt == ATTEMPTS - 1:
        return None
    return min(float(after), LONGEST_WAIT_S)


def _unreachable(url: httpx.URL, error: httpx.HTTPError) -> ServiceError:
    if isinstance(error, httpx.TimeoutException):
        return ServiceError(f"the service at {url} did not answer in time", code="timeout")
    return ServiceError(f"the service at {url} cannot be reached: {error}")
