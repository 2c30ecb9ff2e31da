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
from serving.protocol.hosts import is_loopback
from serving.protocol.queries import OddKind, PickMethod
from serving.protocol.replies import (
    Alias,
    Change,
    Changed,
    Classified,
    Collection,
    Copied,
    Coverage,
    Deleted,
    DerivedProgress,
    Drift,
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
    Odd,
    OddItem,
    Pair,
    Picked,
    Put,
    Reembedding,
    Run,
    RunDetails,
    ServiceError,
    Split,
    Suggested,
    SuggestedItem,
    UncoveredItem,
    Undone,
)


class AsyncClient:
    """url        where the service listens, for instance http://127.0.0.1:3000
    api_key    sent as a bearer token
    timeout_s  for connecting and for each answer
    transport  an httpx transport, for instance one that calls an app in this process

    A proxy that http_proxy names is not used for a service on this machine.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        timeout_s: float = 60.0,
        transport: httpx.AsyncBaseTransport | None = None,
    ):
        headers = messages.auth_headers(api_key)
        through_proxy = not is_loopback(httpx.URL(url).host)
        self._http = httpx.AsyncClient(
            base_url=url, headers=headers, timeout=timeout_s, transport=transport, trust_env=through_proxy
        )

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
        text: str | None = None,
        k: int = 12,
        filter: Filter | None = None,
        threshold: float | None = None,
        closer_than: float | None = None,
        model: str | None = None,
        collection: str = COLLECTION,
    ) -> Matches:
        """The k items most similar to the pictures and to the ids or vectors in `positive`, and least similar to those
        in `negative`. Items used as examples are not returned.

        text         words for what the pictures should show, if the encoder reads text: its card in `models` has `text`
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
            "text": text,
        }
        query = {name: value for name, value in query.items() if value not in (None, [])}
        if image is None:
            options = {"json": query}
        else:
            as_text = {n: json.dumps(v) if isinstance(v, (list, Mapping)) else v for n, v in query.items()}
            options = messages.image_form("image", messages.as_list(image), as_text)
        return messages.read_matches(await self._json("POST", collection_path(collection, "search"), **options))

    async def search_many(
        self, searches: Sequence[Mapping[str, Any]], *, collection: str = COLLECTION
    ) -> list[Matches]:
        """Several searches by ids, vectors and text in one request, at most 100. Each is a dict with any of positive,
        negative, text, k, filter, threshold, closer_than and model, as in `search`."""
        queries = [
            {**search, **{side: messages.example_values(search.get(side, ())) for side in ("positive", "negative")}}
            for search in searches
        ]
        answer = await self._json("POST", collection_path(collection, "searches"), json={"searches": queries})
        return [messages.read_matches(matches) for matches in answer["answers"]]

    async def collections(self) -> list[Collection]:
        """All collections; one that several encoders have embedded is listed once for each of them."""
        answer = await self._json("GET", "/collections")
        return [replies.parse(Collection, collection) for collection in answer["collections"]]

    async def collection(self, name: str = COLLECTION) -> Collection:
        return replies.parse(Collection, await self._json("GET", collection_path(name)))

    async def create_collection(self, name: str, *, model: str | None = None) -> Collection:
        """Create a collection without items, unless it exists."""
        return replies.parse(Collection, await self._json("PUT", collection_path(name), params={"model": model}))

    async def rename_collection(self, name: str, new: str) -> Collection:
        """Give a collection another name, at once. Its aliases stay."""
        return replies.parse(Collection, await self._json("PATCH", collection_path(name), json={"name": new}))

    async def aliases(self) -> list[Alias]:
        """The aliases, each with the name of its collection."""
        return [replies.parse(Alias, alias) for alias in (await self._json("GET", "/aliases"))["aliases"]]

    async def set_alias(self, alias: str, collection: str) -> Alias:
        """Let an alias stand for a collection, and no longer for the one before."""
        answer = await self._json("PUT", f"/aliases/{quote(alias, safe='')}", json={"collection": collection})
        return replies.parse(Alias, answer)

    async def delete_alias(self, alias: str) -> list[Alias]:
        """Delete an alias; its collection stays. Returns those that are left."""
        answer = await self._json("DELETE", f"/aliases/{quote(alias, safe='')}")
        return [replies.parse(Alias, alias) for alias in answer["aliases"]]

    async def delete_collection(self, name: str) -> int:
        """Delete a collection with all that belongs to it. This cannot be undone. Returns how many items it had."""
        return (await self._json("DELETE", collection_path(name)))["count"]

    async def reembed(
        self, *, without_skipped: bool = False, model: str | None = None, collection: str = COLLECTION
    ) -> Reembedding:
        """Embed a collection again with another encoder, by default the service's default one, in the background.
        `reembedding` returns the progress. The collection uses the new encoder as soon as it has every item.

        without_skipped  also use it if some items have no original, or one that cannot be read
        """
        params = {"model": model, "without_skipped": without_skipped}
        answer = await self._json("PUT", collection_path(collection, "reembedding"), params=params)
        return messages.read_reembedding(answer)

    async def reembedding(self, *, model: str | None = None, collection: str = COLLECTION) -> Reembedding:
        """The progress of embedding a collection again."""
        path = collection_path(collection, "reembedding")
        return messages.read_reembedding(await self._json("GET", path, params={"model": model}))

    async def stop_reembedding(self, *, model: str | None = None, collection: str = COLLECTION) -> Reembedding:
        """Stop embedding a collection again; `reembed` goes on where it was."""
        path = collection_path(collection, "reembedding")
        return messages.read_reembedding(await self._json("DELETE", path, params={"model": model}))

    async def changes(self, *, collection: str = COLLECTION) -> list[Change]:
        """What was changed in the last hour or longer, the newest first, and which change would be undone next."""
        answer = await self._json("GET", collection_path(collection, "changes"))
        return [replies.parse(Change, change) for change in answer["changes"]]

    async def undo(self, change: str | None = None, *, collection: str = COLLECTION) -> Undone:
        """Undo the newest change that is not undone yet, for all encoders; or the one of this id, which may also be an
        undo."""
        answer = await self._json("DELETE", collection_path(collection, "changes", change or "newest"))
        return messages.read_undone(answer)

    async def verify(self, *, collection: str = COLLECTION, model: str | None = None) -> list[str]:
        """A sentence for each kind of damage, empty if there is none. Reads the whole collection."""
        answer = await self._json("GET", collection_path(collection, "problems"), params={"model": model})
        return answer["problems"]

    async def keys(self, *, collection: str = COLLECTION, model: str | None = None) -> list[Key]:
        """The keys that items can be filtered by, each with its most frequent values."""
        answer = await self._json("GET", collection_path(collection, "keys"), params={"model": model})
        return [messages.read_key(key) for key in answer["keys"]]

    async def drift(self, *, collection: str = COLLECTION, model: str | None = None) -> Drift:
        """Whether the last pictures that were sent look like those of the collection."""
        answer = await self._json("GET", collection_path(collection, "drift"), params={"model": model})
        return replies.parse(Drift, answer)

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
        changes = [change for answer in reversed(answers) for change in answer.changes]
        return Put(answers[0].model, stored, changes)

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

    async def change_items(self, changes: Sequence[Facts], *, collection: str = COLLECTION) -> Changed:
        """Change facts of at most 1,000 items; their pictures and vectors stay.

        changes  for each item a dict with its id and any of name, label, path and metadata; None removes a value, and
                 keys of the metadata that are not there stay
        """
        path = collection_path(collection, "items")
        answer = await self._json("PATCH", path, json={"items": [dict(change) for change in changes]})
        return replies.parse(Changed, answer)

    async def copy_items(self, ids: Sequence[str], source: str, *, collection: str) -> Copied:
        """Put at most 1,000 items of the collection `source` into another collection too, which is created if it does
        not exist."""
        body = {"collection": source, "ids": list(ids)}
        return replies.parse(Copied, await self._json("PUT", collection_path(collection, "copies"), json=body))

    async def delete_items(self, ids: Sequence[str], *, collection: str = COLLECTION) -> Deleted:
        """Delete at most 1,000 items."""
        answer = await self._json("DELETE", collection_path(collection, "items"), json={"ids": list(ids)})
        return replies.parse(Deleted, answer)

    async def pick(
        self,
        k: int = 30,
        method: PickMethod = "central",
        filter: Filter | None = None,
        balanced_by: str | None = None,
        labelled_too: bool = False,
        seed: int = 0,
        *,
        collection: str = COLLECTION,
    ) -> Picked:
        """The k items without a label that say most about all items, to be labelled first, the most useful first.

        method        central: the middle of each of k clusters; typical: where items are densest in each cluster;
                      covering: those that have most others around them; diverse: as different as possible
        balanced_by   a metadata key, or label: as many of each of its values
        labelled_too  pick also items that have a label
        """
        body = {"k": k, "method": method, "filter": filter, "balanced_by": balanced_by, "labelled_too": labelled_too}
        answer = await self._json("POST", collection_path(collection, "pick"), json=body | {"seed": seed})
        return replies.parse(Picked, answer | {"items": [replies.parse(Item, item) for item in answer["items"]]})

    async def suggest(self, k: int = 30, filter: Filter | None = None, *, collection: str = COLLECTION) -> Suggested:
        """Labels for k items without one: those of their nearest items with a label, the surest first."""
        answer = await self._json("POST", collection_path(collection, "suggest"), json={"k": k, "filter": filter})
        items = [replies.parse(SuggestedItem, item) for item in answer["items"]]
        return replies.parse(Suggested, answer | {"items": items})

    async def odd(
        self, kind: OddKind = "outliers", k: int = 30, filter: Filter | None = None, *, collection: str = COLLECTION
    ) -> Odd:
        """At most k odd items, the most odd first: "outliers", "labels" that may be wrong, or "broken" pictures."""
        body = {"kind": kind, "k": k, "filter": filter}
        answer = await self._json("POST", collection_path(collection, "odd"), json=body)
        return replies.parse(Odd, answer | {"items": [replies.parse(OddItem, item) for item in answer["items"]]})

    async def coverage(
        self,
        by: str | None = None,
        k: int = 30,
        filter: Filter | None = None,
        by_filter: Filter | None = None,
        *,
        collection: str = COLLECTION,
    ) -> Coverage:
        """At most k items that another collection, or another part of this one, does not cover, the farthest first.

        by         the other collection; by default the same one, with another by_filter than filter
        filter     only these items
        by_filter  covered only by these items of the other
        """
        body = {"by": by, "k": k, "filter": filter, "by_filter": by_filter}
        answer = await self._json("POST", collection_path(collection, "coverage"), json=body)
        items = [
            replies.parse(UncoveredItem, item | {"nearest": replies.parse(Item, item["nearest"])})
            for item in answer["items"]
        ]
        return replies.parse(Coverage, answer | {"items": items})

    async def split(
        self,
        parts: Mapping[str, float] | None = None,
        group_by: str | None = None,
        filter: Filter | None = None,
        threshold: float | None = None,
        seed: int = 0,
        *,
        collection: str = COLLECTION,
    ) -> Split:
        """The ids of each part of a division into train, validation and test, or into other parts. Near-duplicates are
        in the same part. Nothing is changed.

        parts      each with its share of the items, for instance {"train": 0.8, "test": 0.2}
        group_by   a metadata key, or label: items with the same value of it are in the same part
        threshold  lowest cosine of near-duplicates, by default the collection's own
        """
        body = {"group_by": group_by, "filter": filter, "threshold": threshold, "seed": seed}
        body |= {} if parts is None else {"parts": dict(parts)}
        return replies.parse(Split, await self._json("POST", collection_path(collection, "split"), json=body))

    async def items(
        self,
        limit: int = 50,
        offset: int = 0,
        filter: Filter | None = None,
        *,
        after: str | None = None,
        collection: str = COLLECTION,
        model: str | None = None,
    ) -> Items:
        """A page of the items. after: instead of offset, the `next` of the page before, at first ""; then each item is
        on one page, whatever is written meanwhile."""
        params = {"limit": limit, "offset": offset, "after": after, "model": model}
        params["filter"] = None if filter is None else json.dumps(filter)
        answer = await self._json("GET", collection_path(collection, "items"), params=params)
        return Items(answer["count"], [replies.parse(Item, item) for item in answer["items"]], answer.get("next"))

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
        the collection's own, to the first picture of its group; or give `closer_than`: 0.999 for more alike than 99.9 %
        of random pairs."""
        params = {"threshold": threshold, "closer_than": closer_than, "limit": limit, "offset": offset}
        return messages.read_duplicates(
            await self._json("GET", collection_path(collection, "duplicates"), params=params)
        )

    async def compute_duplicates(
        self, threshold: float | None = None, *, collection: str = COLLECTION
    ) -> DerivedProgress:
        """Start comparing all pictures with each other; `duplicates` returns the progress, and afterwards the groups at
        any threshold from this one up, and from 0.9 or what the collection needs."""
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
