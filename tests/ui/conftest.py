"""A client of no service: the same methods as serving.client.AsyncClient, over a few invented pictures."""

import asyncio

import pytest

from serving.client import Item, Items, Match, Matches, Pair, ServiceError


class FakeClient:
    """`asked` lists what was asked of it, in order. With `failure` set, everything fails with it."""

    def __init__(self, count: int = 100, failure: ServiceError | None = None):
        self.all = [Item(f"id{i}", f"pets/cat {i}.jpg", "cat", None) for i in range(count)]
        self.failure = failure
        self.asked: list[tuple] = []

    async def items(self, limit: int = 50, offset: int = 0) -> Items:
        self._ask("items", limit, offset)
        return Items(len(self.all), self.all[offset : offset + limit])

    async def search(self, image=None, *, positive=(), k: int = 12) -> Matches:
        self._ask("search", image, list(positive), k)
        found = [item for item in self.all if item.id not in positive][:k]
        return Matches("fake", [Match(**vars(item), similarity=1 - i / 8) for i, item in enumerate(found)])

    async def thumbnail(self, id: str, *, collection: str = "pictures") -> bytes:
        self._ask("thumbnail", id)
        return b"a thumbnail"

    async def views(self, image, pairs: int = 4, seed: int = 0, **settings) -> list[Pair]:
        self._ask("views", image, pairs, seed, settings)
        return [Pair(("data:image/png;base64,AA", "data:image/png;base64,BB"), i / 4) for i in range(pairs)]

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
