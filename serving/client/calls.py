"""What both clients say to the service: each request, and how its answer is read."""

import base64
import io
import json
import re
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar
from urllib.parse import quote

import httpx
import numpy as np
from PIL import Image

from serving.protocol import replies
from serving.protocol.pack import MEDIA_TYPE, pack
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
    Pair,
    Put,
    PutItem,
    Run,
    RunDetails,
    ServiceError,
)

COLLECTION = "pictures"  # serving.collection.index.DEFAULT, without what that module loads

PACK_IMAGES = 256  # what a service takes by default; one that takes less is sent less
PACK_BYTES = 2**24  # without a larger picture: some proxies want no more

PNG_MODES = ("1", "L", "LA", "I;16", "P", "RGB", "RGBA")

Picture = str | PathLike | bytes | Image.Image
Example = str | Sequence[float] | np.ndarray  # an item's id, or a vector
Filter = Mapping[str, Any]
Facts = Mapping[str, Any]  # of an item: id, name, label, path, metadata
T = TypeVar("T")


@dataclass(frozen=True)
class Call(Generic[T]):
    """A request, and how its answer is read. `options` are httpx's."""

    method: str
    path: str
    read: Callable[[httpx.Response], T]
    options: dict[str, Any] = field(default_factory=dict)


class _File(NamedTuple):
    name: str
    data: bytes


# Any number of pictures -----------------------------------------------------------------------------------------------

Steps = Generator[Call[T], T, T]
"""Gives the requests to be sent, takes their answers or their ServiceErrors, and ends with all of it together."""


def embed(images: Picture | Iterable[Picture], normalize: bool, model: str | None) -> Steps[Embeddings]:
    answers = yield from _in_packs(images, lambda files, _, model: _pack(files, normalize, model), model)
    return Embeddings(answers[0].model, np.concatenate([answer.vectors for answer in answers]))


def classify(images: Picture | Iterable[Picture], k: int, model: str | None) -> Steps[Classified]:
    answers = yield from _in_packs(images, lambda files, _, model: _classify(files, k, model), model)
    return Classified(answers[0].model, [guesses for answer in answers for guesses in answer.predictions])


def put_items(
    images: Picture | Iterable[Picture], facts: Sequence[Facts] | None, collection: str, model: str | None
) -> Steps[Put]:
    def send(files: list[_File], done: int, model: str | None) -> Call[Put]:
        some = None if facts is None else list(facts[done : done + len(files)])
        return _put(files, some, collection, model)

    answers = yield from _in_packs(images, send, model)
    stored = [item for answer in answers for item in answer.items]
    if facts is not None and len(facts) != len(stored):
        raise ValueError(f"facts are of {len(facts)} pictures, and there were {len(stored)}")
    return Put(answers[0].model, stored)


def _in_packs(
    images: Picture | Iterable[Picture], send: Callable[[list[_File], int, str | None], Call[T]], model: str | None
) -> Generator[Call[T], T, list[T]]:
    """send: files, how many came before, model -> the request. All go to the model of the first answer."""
    single = isinstance(images, (str, PathLike, bytes, Image.Image))
    packs = _packs([images] if single else images)
    waiting: deque[list[_File]] = deque([next(packs, [])])  # of none, to hear what the service says to that
    answers, done = [], 0
    while waiting:
        files = waiting.popleft()
        try:
            answer = yield send(files, done, model)
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
    return answers


def _packs(images: Iterable[Picture]) -> Iterator[list[_File]]:
    """Read when they are wanted, so that a pack at a time is in memory."""
    files, size = [], 0
    for image in images:
        file = _File(*file_of(image))
        if files and (len(files) == PACK_IMAGES or size + len(file.data) > PACK_BYTES):
            yield files
            files, size = [], 0
        files.append(file)
        size += len(file.data)
    if files:
        yield files


def _pack(files: list[_File], normalize: bool, model: str | None) -> Call[Embeddings]:
    def read(response: httpx.Response) -> Embeddings:
        answer = checked(response)
        return Embeddings(answer.headers["Twinview-Model"], np.load(io.BytesIO(answer.content)))

    options = {
        "content": pack([file.data for file in files]),
        "params": {"normalize": normalize} | ({"model": model} if model else {}),
        "headers": {"Accept": "application/x-npy", "Content-Type": MEDIA_TYPE},
    }
    return Call("POST", "/embed", read, options)


def _classify(files: list[_File], k: int, model: str | None) -> Call[Classified]:
    def read(response: httpx.Response) -> Classified:
        answer = checked(response).json()
        return Classified(answer["model"], [[replies.of(Guess, one) for one in row] for row in answer["predictions"]])

    options = {
        "content": pack([file.data for file in files]),
        "params": {"k": k} | ({"model": model} if model else {}),
        "headers": {"Content-Type": MEDIA_TYPE},
    }
    return Call("POST", "/classify", read, options)


def _renumbered(error: ServiceError, files: list[_File], before: int) -> ServiceError:
    """images[i] or metadata[i] of a pack that came after `before` images, as the caller counts them, with the file's
    name."""
    named = re.fullmatch(r"(images|metadata)\[(\d+)\](.*)", error.param or "")
    if not named or int(named[2]) >= len(files):
        return error
    param = f"{named[1]}[{before + int(named[2])}]{named[3]}"
    name = f" ({files[int(named[2])].name})"
    message = error.message.replace(error.param, param if name in error.message else f"{param}{name}", 1)
    return ServiceError(message, error.status, error.code, param)


def _put(files: list[_File], facts: list[Facts] | None, collection: str, model: str | None) -> Call[Put]:
    options = {
        "files": [("images", file) for file in files],
        "params": {"model": model} if model else {},
        "data": {} if facts is None else {"metadata": json.dumps(facts)},
    }
    return Call("PUT", _path(collection, "items"), _read_put, options)


def _read_put(response: httpx.Response) -> Put:
    answer = checked(response).json()
    return Put(answer["model"], [replies.of(PutItem, item) for item in answer["items"]])


# Collections ----------------------------------------------------------------------------------------------------------


def collections() -> Call[list[Collection]]:
    def read(response: httpx.Response) -> list[Collection]:
        return [replies.of(Collection, one) for one in checked(response).json()["collections"]]

    return Call("GET", "/collections", read)


def collection(name: str) -> Call[Collection]:
    return Call("GET", _path(name), lambda response: replies.of(Collection, checked(response).json()))


def keys(collection: str, model: str | None) -> Call[list[Key]]:
    def read(response: httpx.Response) -> list[Key]:
        found = [replies.of(Key, one) for one in checked(response).json()["keys"]]
        return [replace(key, values=[tuple(pair) for pair in key.values]) for key in found]

    return Call("GET", _path(collection, "keys"), read, {"params": {"model": model} if model else {}})


def put_vectors(
    ids: Sequence[str], vectors: np.ndarray, model: str, facts: Sequence[Facts] | None, collection: str
) -> Call[Put]:
    rows = [
        {**fact, "id": id, "vector": vector}
        for id, vector, fact in zip(ids, np.asarray(vectors).tolist(), facts or [{}] * len(ids), strict=True)
    ]
    return Call("PUT", _path(collection, "items"), _read_put, {"json": {"model": model, "items": rows}})


def delete_items(ids: Sequence[str], collection: str) -> Call[list[str]]:
    def read(response: httpx.Response) -> list[str]:
        return checked(response).json()["deleted"]

    return Call("DELETE", _path(collection, "items"), read, {"json": {"ids": list(ids)}})


def items(limit: int, offset: int, filter: Filter | None, collection: str, model: str | None) -> Call[Items]:
    def read(response: httpx.Response) -> Items:
        answer = checked(response).json()
        return Items(answer["count"], [replies.of(Item, item) for item in answer["items"]])

    params = {"limit": limit, "offset": offset} | ({} if filter is None else {"filter": json.dumps(filter)})
    params |= {"model": model} if model else {}
    return Call("GET", _path(collection, "items"), read, {"params": params})


def item(id: str, vector: bool, collection: str) -> Call[Item]:
    def read(response: httpx.Response) -> Item:
        answer = checked(response).json()
        if "vector" in answer:
            answer["vector"] = np.asarray(answer["vector"], np.float32)
        return replies.of(Item, answer)

    return Call("GET", _path(collection, "items", id), read, {"params": {"vector": vector}})


def thumbnail(id: str, collection: str) -> Call[bytes]:
    return Call("GET", _path(collection, "items", id, "thumbnail"), lambda response: checked(response).content)


def search(
    image: Picture | Sequence[Picture] | None,
    positive: Sequence[Example],
    negative: Sequence[Example],
    k: int,
    filter: Filter | None,
    threshold: float | None,
    model: str | None,
    collection: str,
) -> Call[Matches]:
    def read(response: httpx.Response) -> Matches:
        answer = checked(response).json()
        return Matches(answer["model"], [replies.of(Match, match) for match in answer["results"]])

    query = {"k": k, "filter": filter, "threshold": threshold, "model": model}
    query |= {"positive": _examples(positive), "negative": _examples(negative)}
    query = {name: value for name, value in query.items() if value not in (None, [])}
    if image is None:
        return Call("POST", _path(collection, "search"), read, {"json": query})
    images = [image] if isinstance(image, Picture) else image
    form = {name: json.dumps(value) if isinstance(value, (list, Mapping)) else value for name, value in query.items()}
    options = {"files": [("image", file_of(one)) for one in images], "data": form}
    return Call("POST", _path(collection, "search"), read, options)


def map_(places: bool, collection: str) -> Call[Map]:
    def read(response: httpx.Response) -> Map:
        answer = checked(response).json()
        kinds = {"x": "<f4", "y": "<f4", "group": "<i4", "label": "<i4"}
        columns = {name: np.frombuffer(base64.b64decode(answer[name]), kind) for name, kind in kinds.items()}
        return replies.of(Map, answer | columns)

    return Call("GET", _path(collection, "map"), read, {"params": {"places": places}})


def duplicates(threshold: float, limit: int, offset: int, collection: str) -> Call[Duplicates]:
    def read(response: httpx.Response) -> Duplicates:
        answer = checked(response).json()
        groups = [[replies.of(Match, one) for one in group] for group in answer["groups"]]
        return replies.of(Duplicates, answer | {"groups": groups})

    params = {"threshold": threshold, "limit": limit, "offset": offset}
    return Call("GET", _path(collection, "duplicates"), read, {"params": params})


def compute(kind: str, params: dict, collection: str) -> Call[Computing]:
    """kind: map, duplicates"""

    def read(response: httpx.Response) -> Computing:
        return replies.of(Computing, checked(response).json())

    return Call("POST", _path(collection, kind), read, {"params": params})


def _examples(given: Sequence[Example]) -> list[str | list[float]]:
    return [one if isinstance(one, str) else np.asarray(one).tolist() for one in given]


def _path(*parts: str) -> str:
    return "/".join(["/collections", *(quote(part, safe="") for part in parts)])


# The service itself ---------------------------------------------------------------------------------------------------


def views(image: Picture, pairs: int, seed: int, settings: dict) -> Call[list[Pair]]:
    def read(response: httpx.Response) -> list[Pair]:
        pairs = checked(response).json()["pairs"]
        return [replies.of(Pair, pair | {"views": tuple(pair["views"])}) for pair in pairs]

    form = {"pairs": pairs, "seed": seed, **settings}
    return Call("POST", "/views", read, {"files": {"image": file_of(image)}, "data": form})


def matrix(images: Sequence[Picture], count: int, seed: int, collection: str, settings: dict) -> Call[Matrix]:
    def read(response: httpx.Response) -> Matrix:
        answer = checked(response).json()
        pictures = [
            replies.of(OfMatrix, picture | {"views": tuple(picture["views"])}) for picture in answer["pictures"]
        ]
        h, z = (one if one is None else np.asarray(one) for one in (answer["h"], answer["z"]))
        return Matrix(answer["model"], pictures, h, z)

    form = {"count": count, "seed": seed, "collection": collection, **settings}
    return Call("POST", "/matrix", read, _form([("image", image) for image in images], form))


def invariance(image: Picture | None, count: int, seed: int, collection: str) -> Call[Invariance]:
    def read(response: httpx.Response) -> Invariance:
        answer = checked(response).json()
        of, picture = {}, answer["picture"]
        for which in ("trained", "untrained"):
            found = answer[which]
            of[which] = found and replies.of(Curves, found | {"curves": _curves(found)})
        strips = {strip["augmentation"]: strip["views"] for strip in picture["strips"]}
        of["picture"] = replies.of(Followed, picture | {"curves": _curves(picture), "strips": strips})
        return replies.of(Invariance, answer | of)

    form = {"count": count, "seed": seed, "collection": collection}
    return Call("POST", "/invariance", read, _form([] if image is None else [("image", image)], form))


def _curves(answer: dict) -> list[Curve]:
    return [replies.of(Curve, curve) for curve in answer["curves"]]


def _form(images: list[tuple[str, Picture]], fields: dict) -> dict:
    """httpx's options for a form, with or without files."""
    return {"files": [(field, file_of(image)) for field, image in images], "data": fields}


def runs(limit: int) -> Call[list[Run]]:
    def read(response: httpx.Response) -> list[Run]:
        return [replies.of(Run, one) for one in checked(response).json()["runs"]]

    return Call("GET", "/runs", read, {"params": {"limit": limit}})


def run(name: str) -> Call[RunDetails]:
    return Call("GET", f"/runs/{quote(name)}", lambda response: replies.of(RunDetails, checked(response).json()))


def models() -> Call[list[dict]]:
    return Call("GET", "/v1/models", lambda response: checked(response).json()["data"])


def ready() -> Call[bool]:
    return Call("GET", "/readyz", lambda response: response.is_success)


def file_of(image: Picture) -> tuple[str, bytes]:
    """Name and bytes. raises OSError for a path that cannot be read."""
    if isinstance(image, bytes):
        return "image", image
    if isinstance(image, Image.Image):
        buffer = io.BytesIO()
        (image if image.mode in PNG_MODES else image.convert("RGB")).save(buffer, "PNG")
        return "image.png", buffer.getvalue()
    return Path(image).name, Path(image).read_bytes()


def checked(response: httpx.Response) -> httpx.Response:
    if response.is_success:
        return response
    try:
        error = response.json()["error"]
        message, code, param = error["message"], error["code"], error.get("param")
    except (json.JSONDecodeError, KeyError, TypeError):  # somebody between us and the service answered
        message, code, param = f"{response.url} answered {response.status_code}", "unknown", None
    raise ServiceError(message, response.status_code, code, param)
