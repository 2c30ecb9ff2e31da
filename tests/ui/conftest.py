"""A client of no service: the same methods as serving.client.AsyncClient, over a few invented pictures."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from serving.client import (
    Collection,
    Curve,
    Curves,
    Drift,
    Embeddings,
    Followed,
    Invariance,
    Item,
    Items,
    Key,
    Match,
    Matches,
    Matrix,
    MatrixPicture,
    Odd,
    OddItem,
    Pair,
    Picked,
    ServiceError,
    Suggested,
    SuggestedItem,
)


class FakeClient:
    """`asked` lists what was asked of it, in order. With `failure` set, everything fails with it. `rank`: that of every
    result of a search without negative examples, and 0.97 is the cosine of every limit given as a rank."""

    rank: float | None = None
    estimated = False  # of the results of a search
    missing = 0  # items of a comparison that are still to be embedded again
    closed = False
    drifted = Drift("fake", 3, 500, "unknown", None, None, "3 of the 500 pictures have come")

    def __init__(self, count: int = 100, failure: ServiceError | None = None):
        self.all = [Item(f"id{i}", f"pets/cat {i}.jpg", "cat", None) for i in range(count)]
        self.failure = failure
        self.asked: list[tuple] = []

    async def aclose(self) -> None:
        self.closed = True

    async def items(self, limit=50, offset=0, filter=None, *, collection="pictures", model=None) -> Items:
        self._ask("items", limit, offset, filter, collection, model)
        ids = (filter or {}).get("id", {}).get("in")
        some = [item for item in self.all if ids is None or item.id in ids]
        return Items(len(some), some[offset : offset + limit])

    async def pick(self, k=30, method="central", filter=None, *, collection="pictures") -> Picked:
        self._ask("pick", k, filter, collection)
        return Picked(self.all[:k], min(9, len(self.all)), missing=self.missing)

    async def suggest(self, k=30, filter=None, *, collection="pictures") -> Suggested:
        self._ask("suggest", k, filter, collection)
        labels = [{"suggested": ('a"cat', "dog")[i % 2], "share": 1 - i / 10} for i in range(k)]
        items = [SuggestedItem(**vars(item), **label) for item, label in zip(self.all, labels, strict=False)]
        return Suggested(items, min(9, len(self.all)), missing=self.missing)

    async def odd(self, kind="outliers", k=30, filter=None, *, collection="pictures") -> Odd:
        self._ask("odd", kind, k, filter, collection)
        reason = {"outliers": None, "labels": "d<og", "broken": "blurred"}[kind]
        items = [OddItem(**vars(item), reason=reason, value=3.0) for item in self.all[:k]]
        return Odd(items, min(9, len(self.all)), len(self.all), 0, missing=self.missing)

    async def drift(self, *, collection="pictures", model=None) -> Drift:
        self._ask("drift", collection, model)
        return self.drifted

    async def item(self, id: str, *, collection: str = "pictures") -> Item:
        self._ask("item", id, collection)
        if found := [item for item in self.all if item.id == id]:
            return found[0]
        raise ServiceError(f"no item {id} is in the collection {collection}", 404, "not_found", "id")

    async def search(self, image=None, *, positive=(), negative=(), k: int = 12, model=None, **more) -> Matches:
        """The encoder "other" leaves out the nearest."""
        self._ask("search", image, list(positive), list(negative), k, model, more)
        rest = [item for item in self.all if item.id not in positive]
        found = rest[(1 if model == "other" else 0) :][:k]
        closer_than, limit = None if negative else self.rank, more.get("closer_than")
        if limit is not None and limit > (self.rank or 1):
            found = []
        facts = [vars(item) | {"similarity": 1 - i / 8, "closer_than": closer_than} for i, item in enumerate(found)]
        least = more.get("threshold") if limit is None else 0.97
        return Matches("fake", [Match(**one) for one in facts], least, self.estimated)

    async def embed(self, images, *, model=None) -> Embeddings:
        self._ask("embed", images, model)
        return Embeddings("fake", np.ones((len(images), 2), np.float32))

    async def collections(self) -> list[Collection]:
        self._ask("collections")
        return [Collection("pictures", "fake", [], 2, len(self.all), 0, "none", 1)]

    async def models(self) -> list[dict]:
        self._ask("models")
        return [{"id": "fake"}]

    async def keys(self, *, collection: str = "pictures", model=None) -> list[Key]:
        self._ask("keys", collection, model)
        return [Key("label", "text", 1, [("cat", len(self.all))])]

    async def thumbnail(self, id: str, *, collection: str = "pictures") -> bytes:
        self._ask("thumbnail", id)
        return b"a thumbnail"

    async def original(self, id: str, *, collection: str = "pictures", model=None) -> bytes:
        self._ask("original", id)
        return f"the original {id} {collection} {model}".encode()

    async def views(self, image, pairs: int = 4, seed: int = 0, **settings) -> list[Pair]:
        self._ask("views", image, pairs, seed, settings)
        return [Pair(("data:image/png;base64,AA", "data:image/png;base64,BB"), i / 4) for i in range(pairs)]

    async def matrix(self, images=(), count=6, seed=0, *, collection="pictures", **settings) -> Matrix:
        self._ask("matrix", list(images), count, seed, collection, settings)
        pictures = [MatrixPicture(f"pets/cat {i}.jpg", f"id{i}", (f"data:{i}A", f"data:{i}B")) for i in range(count)]
        h = np.eye(2 * count) * 0.5 + 0.25 * np.kron(np.eye(count), np.ones((2, 2))) + 0.25
        return Matrix("fake", pictures, h, None)

    async def invariance(self, image=None, count=16, seed=0, *, collection="pictures") -> Invariance:
        self._ask("invariance", image, count, seed, collection)
        crop = Curve("crop", "share cut away", [0.5, 1.0], [0.9, 0.6], [0.2, 0.8])
        hue = Curve("hue", "turns", [0.5], [0.4], [1.2])
        picture = Followed("pets/cat.jpg", "data:0", [crop, hue], {"crop": ["data:1", "data:2"], "hue": ["data:3"]})
        both = Curves(count, 0.5, [crop, hue])
        return Invariance("fake", "it notices <hue> most", both, replace(both, others=0.9), picture)

    def _ask(self, *what) -> None:
        self.asked.append(what)
        if self.failure:
            raise self.failure


@pytest.fixture
def fake():
    """fake(count=100, failure=None) -> a FakeClient."""
    return FakeClient


@pytest.fixture
def in_loop():
    """in_loop(make, *args) -> make(*args), called while a loop runs: Gradio makes one otherwise and never closes it."""

    async def call(make, *args):
        return make(*args)

    return lambda make, *args: asyncio.run(call(make, *args))


@pytest.fixture
def event():
    """event(**data) -> what Gradio hands a listener of an event that carries data."""
    import gradio as gr

    return lambda **data: gr.EventData(None, data)


@pytest.fixture
def uploads(tmp_path, monkeypatch):
    """The folder that Gradio keeps uploads in."""
    folder = tmp_path / "uploads"
    folder.mkdir()
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(folder))
    return folder
