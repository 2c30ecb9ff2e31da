"""AsyncClient. `python serving/client/generate.py` writes sync_client.py, with Client, from this file."""

import asyncio
import json
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self
from urllib.parse import quote

import httpx
import numpy as np

from serving.client import messages
from serving.client.messages import (
    COLLECTION,
    Example,
    Facts,
    FilePart,
    Filter,
    Options,
    PackReply,
    Picture,
    Setting,
    collection_path,
)
from serving.protocol import replies
from serving.protocol.replies import (
    Classified,
    Collection,
    DerivedProgress,
    Duplicates,
    Embeddings,
    Invariance,
    Item,
    Items,
    ItemWithVector,
    Key,
    Map,
    Matches,
    Matrix,
    Pair,
    Put,
    Run,
    RunDetails,
    ServiceError,
)


class AsyncClient:
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
        transport: httpx.AsyncBaseTransport | None = None,
    ):
        headers = messages.auth_headers(api_key)
        self._http = httpx.AsyncClient(base_url=url, headers=headers, timeout=timeout_s, transport=transport)

    async def embed(
        self, images: Picture | Iterable[Picture], normalize: bool = False, model: str | None = None
    ) -> Embeddings:
        """Embed images: h of each, in their order; with `normalize`, of unit length. model: an id from `models`."""

        def options(files: list[FilePart], _: int) -> Options:
            return messages.pack_body(files, accept="application/x-npy") | {"params": {"normalize": normalize}}

        answers = await self._send_packs("POST", "/embed", images, model, options, messages.read_embeddings)
        return Embeddings(answers[0].model, np.concatenate([answer.vectors for answer in answers]))

    async def classify(self, images: Picture | Iterable[Picture], k: int = 5, model: str | None = None) -> Classified:
        """The k likeliest classes of each image, in their order, by a fine-tuned model."""

        def options(files: list[FilePart], _: int) -> Options:
            return messages.pack_body(files) | {"params": {"k": k}}

        answers = await self._send_packs("POST", "/classify", images, model, options, messages.read_classified)
        return Classified(answers[0].model, [guesses for answer in answers for guesses in answer.predictions])

    async def search(
        self,
        image: Picture | Sequence[Picture] | None = None,
        *,
        positive: Sequence[Example] = (),
        negative: Sequence[Example] = (),
        k: int = 12,
        filter: Filter | None = None,
        threshold: float | None = None,
        closer_than: float | None = None,
        model: str | None = None,
        collection: str = COLLECTION,
    ) -> Matches:
        """The k items most similar to the pictures and to the ids or vectors in `positive`, and least similar to those
        in `negative`. Items used as examples are not returned.

        filter       which items are searched, for instance {"label": "shirt", "price": {"lt": 9}}
        threshold    lowest cosine of a result
        closer_than  instead of it: 0.99 for results that are more alike to the query than 99 % of random pairs
        """
        query = {
            "k": k,
            "filter": filter,
            "threshold": threshold,
            "closer_than": closer_than,
            "model": model,
            "positive": messages.example_values(positive),
            "negative": messages.example_values(negative),
        }
        query = {name: value for name, value in query.items() if value not in (None, [])}
        if image is None:
            options = {"json": query}
        else:
            as_text = {n: json.dumps(v) if isinstance(v, (list, Mapping)) else v for n, v in query.items()}
            options = messages.image_form("image", messages.as_list(image), as_text)
        return messages.read_matches(await self._json("POST", collection_path(collection, "search"), **options))

    async def collections(self) -> list[Collection]:
        """All collections; one that several encoders have embedded is listed once for each of them."""
        answer = await self._json("GET", "/collections")
        return [replies.parse(Collection, collection) for collection in answer["collections"]]

    async def collection(self, name: str = COLLECTION) -> Collection:
        return replies.parse(Collection, await self._json("GET", collection_path(name)))

    async def keys(self, *, collection: str = COLLECTION, model: str | None = None) -> list[Key]:
        """The keys that items can be filtered by, each with its most frequent values."""
        answer = await self._json("GET", collection_path(collection, "keys"), params={"model": model})
        return [messages.read_key(key) for key in answer["keys"]]

    async def put_items(
        self,
        images: Picture | Iterable[Picture],
        facts: Sequence[Facts] | None = None,
        *,
        collection: str = COLLECTION,
        model: str | None = None,
    ) -> Put:
        """Embed the pictures and store them durably. After an error, the packs sent before it are stored.

        facts  for each picture a dict with any of id, name, label, path, metadata
        """

        def options(files: list[FilePart], first: int) -> Options:
            data = {} if facts is None else {"metadata": json.dumps(list(facts[first : first + len(files)]))}
            return {"files": [("images", file) for file in files], "data": data}

        path = collection_path(collection, "items")
        answers = await self._send_packs("PUT", path, images, model, options, messages.read_put)
        stored = [item for answer in answers for item in answer.items]
        if facts is not None and len(facts) != len(stored):
            raise ValueError(f"facts: {len(facts)} given for {len(stored)} images")
        return Put(answers[0].model, stored)

    async def put_vectors(
        self,
        ids: Sequence[str],
        vectors: np.ndarray,
        model: str,
        facts: Sequence[Facts] | None = None,
        *,
        collection: str = COLLECTION,
    ) -> Put:
        """Store vectors (n, d) that the encoder `model` has computed elsewhere, at most 1,000 in one call."""
        rows = [
            {**fact, "id": id, "vector": vector}
            for id, vector, fact in zip(ids, np.asarray(vectors).tolist(), facts or [{}] * len(ids), strict=True)
        ]
        response = await self._send("PUT", collection_path(collection, "items"), json={"model": model, "items": rows})
        return messages.read_put(messages.checked(response))

    async def delete_items(self, ids: Sequence[str], *, collection: str = COLLECTION) -> list[str]:
        """Delete at most 1,000 items. Returns the ids that existed."""
        answer = await self._json("DELETE", collection_path(collection, "items"), json={"ids": list(ids)})
        return answer["deleted"]

    async def items(
        self,
        limit: int = 50,
        offset: int = 0,
        filter: Filter | None = None,
        *,
        collection: str = COLLECTION,
        model: str | None = None,
    ) -> Items:
        params = {"limit": limit, "offset": offset, "model": model}
        params["filter"] = None if filter is None else json.dumps(filter)
        answer = await self._json("GET", collection_path(collection, "items"), params=params)
        return Items(answer["count"], [replies.parse(Item, item) for item in answer["items"]])

    async def item(self, id: str, vector: bool = False, *, collection: str = COLLECTION) -> ItemWithVector:
        """One item; with `vector`, also its vector (d,) float32 of unit length."""
        answer = await self._json("GET", collection_path(collection, "items", id), params={"vector": vector})
        if "vector" in answer:
            answer["vector"] = np.asarray(answer["vector"], np.float32)
        return replies.parse(ItemWithVector, answer)

    async def thumbnail(self, id: str, *, collection: str = COLLECTION) -> bytes:
        """A JPEG file, 256 px on its longest side."""
        response = await self._send("GET", collection_path(collection, "items", id, "thumbnail"))
        return messages.checked(response).content

    async def original(self, id: str, *, collection: str = COLLECTION, model: str | None = None) -> bytes:
        """A JPEG file of the picture itself, at most 2,048 px on its longer side. ServiceError 404 if the service
        cannot read the picture's file."""
        path = collection_path(collection, "items", id, "original")
        return messages.checked(await self._send("GET", path, params={"model": model})).content

    async def map(self, places: bool = True, *, collection: str = COLLECTION) -> Map:
        """The newest map, and the progress of the next one. Without `places` its columns are empty."""
        return messages.read_map(await self._json("GET", collection_path(collection, "map"), params={"places": places}))

    async def compute_map(self, seed: int = 0, *, collection: str = COLLECTION) -> DerivedProgress:
        """Start computing a map; `map` returns its progress."""
        answer = await self._json("POST", collection_path(collection, "map"), params={"seed": seed})
        return replies.parse(DerivedProgress, answer)

    async def duplicates(
        self,
        threshold: float | None = None,
        limit: int = 100,
        offset: int = 0,
        *,
        closer_than: float | None = None,
        collection: str = COLLECTION,
    ) -> Duplicates:
        """Groups of near-duplicates, the largest first. Each picture has at least the cosine `threshold`, by default
        0.95, to the first picture of its group; or give `closer_than`: 0.999 for more alike than 99.9 % of random
        pairs."""
        params = {"threshold": threshold, "closer_than": closer_than, "limit": limit, "offset": offset}
        return messages.read_duplicates(
            await self._json("GET", collection_path(collection, "duplicates"), params=params)
        )

    async def compute_duplicates(self, threshold: float = 0.9, *, collection: str = COLLECTION) -> DerivedProgress:
        """Start comparing all pictures with each other; `duplicates` returns the progress, and afterwards the groups at
        any threshold from this one up."""
        answer = await self._json("POST", collection_path(collection, "duplicates"), params={"threshold": threshold})
        return replies.parse(DerivedProgress, answer)

    async def views(self, image: Picture, pairs: int = 4, seed: int = 0, **settings: Setting) -> list[Pair]:
        """Pairs of augmented views. settings: fields of training.augment.AugmentSettings, its defaults if left out."""
        form = messages.image_form("image", [image], {"pairs": pairs, "seed": seed, **settings})
        return [messages.read_pair(pair) for pair in (await self._json("POST", "/views", **form))["pairs"]]

    async def matrix(
        self,
        images: Picture | Sequence[Picture] = (),
        count: int = 6,
        seed: int = 0,
        *,
        collection: str = COLLECTION,
        **settings: Setting,
    ) -> Matrix:
        """Two views of each of `count` pictures, and the cosines between all views. The pictures are the given images,
        and, up to `count`, pictures of the collection. settings: as in `views`."""
        fields = {"count": count, "seed": seed, "collection": collection, **settings}
        form = messages.image_form("image", messages.as_list(images), fields)
        return messages.read_matrix(await self._json("POST", "/matrix", **form))

    async def invariance(
        self, image: Picture | None = None, count: int = 16, seed: int = 0, *, collection: str = COLLECTION
    ) -> Invariance:
        """How far h moves as one augmentation grows stronger: the mean over `count` pictures of the collection, and the
        values for the image. Takes seconds."""
        fields = {"count": count, "seed": seed, "collection": collection}
        form = messages.image_form("image", [] if image is None else [image], fields)
        return messages.read_invariance(await self._json("POST", "/invariance", **form))

    async def runs(self, limit: int = 100) -> list[Run]:
        """The training runs in the service's runs folder, the newest first."""
        return [replies.parse(Run, run) for run in (await self._json("GET", "/runs", params={"limit": limit}))["runs"]]

    async def run(self, name: str) -> RunDetails:
        """One training run with its settings and its curves."""
        return replies.parse(RunDetails, await self._json("GET", f"/runs/{quote(name)}"))

    async def models(self) -> list[dict[str, Any]]:
        """The model cards of the encoders that are served, the default first; empty if there are none."""
        return (await self._json("GET", "/v1/models"))["data"]

    async def ready(self) -> bool:
        return (await self._send("GET", "/readyz")).is_success

    async def aclose(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def _send_packs(
        self,
        method: str,
        path: str,
        images: Picture | Iterable[Picture],
        model: str | None,
        options: Callable[[list[FilePart], int], Options],
        read: Callable[[httpx.Response], PackReply],
    ) -> list[PackReply]:
        """Send any number of images in packs, one request after the other. All use the model of the first answer,
        even if the service loads a newer one meanwhile.

        options  (the files of a pack, how many images came before them) -> httpx's options for the request
        read     the answer -> a reply with its `model`
        """
        unread = messages.packs(images)
        waiting = deque([next(unread, [])])  # without images, one empty request gets the service's own error
        answers: list[PackReply] = []
        first = 0
        while waiting:
            files = waiting.popleft()
            request = options(files, first)
            request["params"] = {**request.get("params", {}), "model": model}
            try:
                answer = read(messages.checked(await self._send(method, path, **request)))
            except ServiceError as error:
                if not messages.is_too_large(error) or len(files) == 1:
                    raise messages.renumbered(error, files, first) from None
                middle = len(files) // 2
                waiting.extendleft([files[middle:], files[:middle]])
                continue
            answers.append(answer)
            first += len(files)
            model = answer.model
            if not waiting and (files := next(unread, None)):
                waiting.append(files)
        return answers

    async def _json(self, method: str, path: str, **options: Any) -> Any:
        return messages.checked(await self._send(method, path, **options)).json()

    async def _send(
        self, method: str, path: str, params: Mapping[str, Any] | None = None, **options: Any
    ) -> httpx.Response:
        """Send a request, without the parameters that are None. While the service is busy, wait for as long as it says
        and try again."""
        params = {name: value for name, value in (params or {}).items() if value is not None}
        attempt = 1
        while True:
            try:
                response = await self._http.request(method, path, params=params, **options)
            except httpx.HTTPError as error:
                raise messages.unreachable(self._http.base_url, error) from error
            wait_s = messages.retry_after_s(response)
            if wait_s is None or attempt == messages.ATTEMPTS:
                return response
            await asyncio.sleep(wait_s)
            attempt += 1
