"""Talks to the service: `Client` for scripts, `AsyncClient` for servers and pages, the same methods in both.

    client = Client("http://127.0.0.1:3000")
    client.search("cat.jpg", k=5).results[0].name

A picture is a path, encoded bytes, or a PIL image. Whatever the service refuses is raised as ServiceError, whose
text is the service's own sentence. When the service is busy it says for how long; both clients wait and try again
a few times.

`embed` takes any number of pictures and sends them in packs, a request at a time. All are embedded by one encoder, also
when the service takes up another meanwhile.
"""

import asyncio
import io
import json
import re
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar
from urllib.parse import quote

import httpx
import numpy as np
from PIL import Image

from serving.pack import MEDIA_TYPE, pack

ATTEMPTS = 4  # of a request, when the service says to come back later
LONGEST_WAIT_S = 30.0  # between two of them, whatever the service says

PACK_IMAGES = 256  # what a service takes by default; one that takes less is sent less
PACK_BYTES = 2**24  # without a larger picture: some proxies want no more

PNG_MODES = ("1", "L", "LA", "I;16", "P", "RGB", "RGBA")

Picture = str | PathLike | bytes | Image.Image
T = TypeVar("T")


class ServiceError(Exception):
    """What the service refused, or that it could not be reached (status 0)."""

    def __init__(self, message: str, status: int = 0, code: str = "unreachable", param: str | None = None):
        super().__init__(message)
        self.message, self.status, self.code, self.param = message, status, code, param


@dataclass(frozen=True)
class Embeddings:
    model: str
    vectors: np.ndarray  # (n, d) float32


@dataclass(frozen=True)
class Item:
    """A picture of the collection."""

    id: str
    name: str
    label: str | None
    path: str | None


@dataclass(frozen=True)
class Match(Item):
    similarity: float  # cosine, -1 to 1


@dataclass(frozen=True)
class Matches:
    model: str
    results: list[Match]  # nearest first


@dataclass(frozen=True)
class Items:
    count: int  # of the whole collection
    items: list[Item]


@dataclass(frozen=True)
class Pair:
    """Two augmented views of one picture."""

    views: tuple[str, str]  # PNG as data URIs
    similarity: float  # cosine of their embeddings


@dataclass(frozen=True)
class _Call(Generic[T]):
    """A request, and how its answer is read. `options` are httpx's."""

    method: str
    path: str
    read: Callable[[httpx.Response], T]
    options: dict[str, Any] = field(default_factory=dict)


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
        steps = _embed(images, normalize, model)
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

    def search(
        self,
        image: Picture | None = None,
        *,
        vector: Sequence[float] | np.ndarray | None = None,
        id: str | None = None,
        k: int = 12,
    ) -> Matches:
        """The k nearest to one of: a picture, a vector (d,), an item of the collection (itself left out)."""
        return self._send(_search(image, vector, id, k))

    def items(self, limit: int = 50, offset: int = 0) -> Items:
        return self._send(_items(limit, offset))

    def thumbnail(self, id: str) -> bytes:
        """JPEG, 256 px on its longest side."""
        return self._send(_thumbnail(id))

    def views(self, image: Picture, pairs: int = 4, seed: int = 0, **settings) -> list[Pair]:
        """Pairs of augmented views. settings: those of training.augment.AugmentSettings, its defaults where absent."""
        return self._send(_views(image, pairs, seed, settings))

    def models(self) -> list[dict]:
        """The model cards of the encoders that are served, the default first; none where there is none."""
        return self._send(_models())

    def ready(self) -> bool:
        return self._send(_ready())

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _send(self, call: _Call[T]) -> T:
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
        steps = _embed(images, normalize, model)
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

    async def search(
        self,
        image: Picture | None = None,
        *,
        vector: Sequence[float] | np.ndarray | None = None,
        id: str | None = None,
        k: int = 12,
    ) -> Matches:
        return await self._send(_search(image, vector, id, k))

    async def items(self, limit: int = 50, offset: int = 0) -> Items:
        return await self._send(_items(limit, offset))

    async def thumbnail(self, id: str) -> bytes:
        return await self._send(_thumbnail(id))

    async def views(self, image: Picture, pairs: int = 4, seed: int = 0, **settings) -> list[Pair]:
        return await self._send(_views(image, pairs, seed, settings))

    async def models(self) -> list[dict]:
        return await self._send(_models())

    async def ready(self) -> bool:
        return await self._send(_ready())

    async def aclose(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *_) -> None:
        await self.aclose()

    async def _send(self, call: _Call[T]) -> T:
        for attempt in range(ATTEMPTS):
            try:
                response = await self._http.request(call.method, call.path, **call.options)
            except httpx.HTTPError as error:
                raise _unreachable(self._http.base_url, error) from error
            wait_s = _wait_s(response, attempt)
            if wait_s is None:
                return call.read(response)
            await asyncio.sleep(wait_s)


# What both clients say ------------------------------------------------------------------------------------------------


class _File(NamedTuple):
    name: str
    data: bytes


def _embed(
    images: Picture | Iterable[Picture], normalize: bool, model: str | None
) -> Generator[_Call[Embeddings], Embeddings, Embeddings]:
    """Gives the requests to be sent, takes their answers or their ServiceErrors, and ends with all of it together."""
    single = isinstance(images, (str, PathLike, bytes, Image.Image))
    packs = _packs([images] if single else images)
    waiting: deque[list[_File]] = deque([next(packs, [])])  # of none, to hear what the service says to that
    answers, done = [], 0
    while waiting:
        files = waiting.popleft()
        try:
            answer = yield _pack(files, normalize, model)
        except ServiceError as error:
            too_many = error.status == 413 and not re.match(r"images\[", error.param or "")
            if not too_many or len(files) == 1:
                raise _renumbered(error, files, done) from None
            middle = len(files) // 2
            waiting.extendleft([files[middle:], files[:middle]])
            continue
        answers.append(answer)
        done += len(files)
        model = answer.model
        if not waiting and (following := next(packs, None)):
            waiting.append(following)
    return Embeddings(model, np.concatenate([answer.vectors for answer in answers]))


def _packs(images: Iterable[Picture]) -> Iterator[list[_File]]:
    """Read when they are wanted, so that a pack at a time is in memory."""
    files, size = [], 0
    for image in images:
        file = _File(*_file(image))
        if files and (len(files) == PACK_IMAGES or size + len(file.data) > PACK_BYTES):
            yield files
            files, size = [], 0
        files.append(file)
        size += len(file.data)
    if files:
        yield files


def _pack(files: list[_File], normalize: bool, model: str | None) -> _Call[Embeddings]:
    def read(response: httpx.Response) -> Embeddings:
        answer = _checked(response)
        return Embeddings(answer.headers["Twinview-Model"], np.load(io.BytesIO(answer.content)))

    options = {
        "content": pack([file.data for file in files]),
        "params": {"normalize": normalize} | ({"model": model} if model else {}),
        "headers": {"Accept": "application/x-npy", "Content-Type": MEDIA_TYPE},
    }
    return _Call("POST", "/embed", read, options)


def _renumbered(error: ServiceError, files: list[_File], before: int) -> ServiceError:
    """images[i] of a pack that came after `before` images, as the caller counts them, with the file's name."""
    named = re.fullmatch(r"images\[(\d+)\]", error.param or "")
    if not named or int(named[1]) >= len(files):
        return error
    i = int(named[1])
    param = f"images[{before + i}]"
    message = error.message.replace(error.param, f"{param} ({files[i].name})", 1)
    return ServiceError(message, error.status, error.code, param)


def _search(
    image: Picture | None, vector: Sequence[float] | np.ndarray | None, id: str | None, k: int
) -> _Call[Matches]:
    def read(response: httpx.Response) -> Matches:
        answer = _checked(response).json()
        return Matches(answer["model"], [Match(**match) for match in answer["results"]])

    if image is not None:
        options = {"files": {"image": _file(image)}, "data": {"k": k}}
    else:
        query = {"vector": None if vector is None else np.asarray(vector).tolist(), "id": id}
        options = {"json": {name: value for name, value in query.items() if value is not None} | {"k": k}}
    return _Call("POST", "/search", read, options)


def _items(limit: int, offset: int) -> _Call[Items]:
    def read(response: httpx.Response) -> Items:
        answer = _checked(response).json()
        return Items(answer["count"], [Item(**item) for item in answer["items"]])

    return _Call("GET", "/items", read, {"params": {"limit": limit, "offset": offset}})


def _thumbnail(id: str) -> _Call[bytes]:
    return _Call("GET", f"/items/{quote(id, safe='')}/thumbnail", lambda response: _checked(response).content)


def _views(image: Picture, pairs: int, seed: int, settings: dict) -> _Call[list[Pair]]:
    def read(response: httpx.Response) -> list[Pair]:
        return [Pair(tuple(pair["views"]), pair["similarity"]) for pair in _checked(response).json()["pairs"]]

    form = {"pairs": pairs, "seed": seed, **settings}
    return _Call("POST", "/views", read, {"files": {"image": _file(image)}, "data": form})


def _models() -> _Call[list[dict]]:
    return _Call("GET", "/v1/models", lambda response: _checked(response).json()["data"])


def _ready() -> _Call[bool]:
    return _Call("GET", "/readyz", lambda response: response.is_success)


def _headers(api_key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def _file(image: Picture) -> tuple[str, bytes]:
    """Name and bytes. raises OSError for a path that cannot be read."""
    if isinstance(image, bytes):
        return "image", image
    if isinstance(image, Image.Image):
        buffer = io.BytesIO()
        (image if image.mode in PNG_MODES else image.convert("RGB")).save(buffer, "PNG")
        return "image.png", buffer.getvalue()
    return Path(image).name, Path(image).read_bytes()


def _checked(response: httpx.Response) -> httpx.Response:
    if response.is_success:
        return response
    try:
        error = response.json()["error"]
        message, code, param = error["message"], error["code"], error.get("param")
    except (json.JSONDecodeError, KeyError, TypeError):  # somebody between us and the service answered
        message, code, param = f"{response.url} answered {response.status_code}", "unknown", None
    raise ServiceError(message, response.status_code, code, param)


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
