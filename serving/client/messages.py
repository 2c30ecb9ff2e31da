"""What the client sends and reads: pictures as files and packs, answers as typed replies, errors as ServiceError."""

import base64
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote

import httpx
import numpy as np
from PIL import Image

from export.paths import local_path
from serving.protocol import replies
from serving.protocol.pack import MEDIA_TYPE, pack
from serving.protocol.replies import (
    Change,
    Classified,
    Curve,
    Curves,
    Duplicates,
    Embeddings,
    Followed,
    Guess,
    Invariance,
    Key,
    Map,
    Match,
    Matches,
    Matrix,
    MatrixPicture,
    Pair,
    Put,
    PutItem,
    Reembedding,
    ServiceError,
    Skipped,
    Undone,
)

COLLECTION = "pictures"  # equals serving.collection.index.DEFAULT, without importing LanceDB

ATTEMPTS = 4  # per request, while the service answers that it is busy
LONGEST_WAIT_S = 30.0  # between two attempts, whatever Retry-After says
PACK_IMAGES = 256  # the service's default limit; a pack that is refused as too large is sent in halves
PACK_BYTES = 2**24  # unless one picture is larger: some proxies accept no more

PNG_MODES = ("1", "L", "LA", "I;16", "P", "RGB", "RGBA")

Picture = str | PathLike | bytes | Image.Image
Example = str | Sequence[float] | np.ndarray  # id of an item, or a vector
Filter = Mapping[str, Any]
Facts = Mapping[str, Any]  # of one item: id, name, label, path, metadata
Setting = float | str | tuple[float, float]  # of an augmentation
Options = dict[str, Any]  # httpx's, for one request
PackReply = TypeVar("PackReply", Embeddings, Classified, Put)


# Requests -------------------------------------------------------------------------------------------------------------


class FilePart(NamedTuple):
    name: str
    data: bytes


def file_of(image: Picture) -> FilePart:
    """Raises OSError for a path that cannot be read."""
    if isinstance(image, bytes):
        return FilePart("image", image)
    if isinstance(image, Image.Image):
        buffer = io.BytesIO()
        (image if image.mode in PNG_MODES else image.convert("RGB")).save(buffer, "PNG")
        return FilePart("image.png", buffer.getvalue())
    path = local_path(Path(image))
    return FilePart(path.name, path.read_bytes())


def as_list(images: Picture | Iterable[Picture]) -> Iterable[Picture]:
    return [images] if isinstance(images, Picture) else images


def packs(images: Picture | Iterable[Picture]) -> Iterator[list[FilePart]]:
    """The pictures in packs that one request can hold. Reads a pack when it is needed, so only one is in memory."""
    files, size = [], 0
    for image in as_list(images):
        file = file_of(image)
        if files and (len(files) == PACK_IMAGES or size + len(file.data) > PACK_BYTES):
            yield files
            files, size = [], 0
        files.append(file)
        size += len(file.data)
    if files:
        yield files


def pack_body(files: list[FilePart], accept: str = "application/json") -> Options:
    return {
        "content": pack([file.data for file in files]),
        "headers": {"Accept": accept, "Content-Type": MEDIA_TYPE},
    }


def image_form(field: str, images: Iterable[Picture], fields: Mapping[str, Any]) -> Options:
    return {"files": [(field, file_of(image)) for image in images], "data": fields}


def example_values(examples: Sequence[Example]) -> list[str | list[float]]:
    return [example if isinstance(example, str) else np.asarray(example).tolist() for example in examples]


def collection_path(*parts: str) -> str:
    return "/".join(["/collections", *(quote(part, safe="") for part in parts)])


def auth_headers(api_key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def retry_after_s(response: httpx.Response) -> float | None:
    """Returns how long a busy service asks the client to wait; None if this answer is final."""
    seconds = response.headers.get("Retry-After", "")
    if response.status_code not in (429, 503) or not seconds.isdigit():
        return None
    return min(float(seconds), LONGEST_WAIT_S)


# Errors ---------------------------------------------------------------------------------------------------------------


def checked(response: httpx.Response) -> httpx.Response:
    """Raises ServiceError unless the status is 2xx."""
    if response.is_success:
        return response
    try:
        error = response.json()["error"]
        message, code, param = error["message"], error["code"], error.get("param")
    except (json.JSONDecodeError, KeyError, TypeError):  # for instance from a proxy
        message, code, param = f"{response.url} answered {response.status_code}", "unknown", None
    raise ServiceError(message, response.status_code, code, param)


def unreachable(url: httpx.URL, error: httpx.HTTPError) -> ServiceError:
    if isinstance(error, httpx.TimeoutException):
        return ServiceError(f"the service at {url} did not answer in time", code="timeout")
    return ServiceError(f"the service at {url} cannot be reached: {error}")


def is_too_large(error: ServiceError) -> bool:
    """Returns whether the whole request was too large, not just one of its images."""
    return error.status == 413 and not re.match(r"images\[", error.param or "")


def renumbered(error: ServiceError, files: list[FilePart], first: int) -> ServiceError:
    """Returns an error about images[i] or metadata[i] of a pack with the index and file name that the caller used.

    first  how many images were sent in the packs before
    """
    named = re.fullmatch(r"(images|metadata)\[(\d+)\](.*)", error.param or "")
    if not named or int(named[2]) >= len(files):
        return error
    param = f"{named[1]}[{first + int(named[2])}]{named[3]}"
    name = f" ({files[int(named[2])].name})"
    message = error.message.replace(named[0], param if name in error.message else f"{param}{name}", 1)
    return ServiceError(message, error.status, error.code, param)


# Answers --------------------------------------------------------------------------------------------------------------


def read_embeddings(response: httpx.Response) -> Embeddings:
    return Embeddings(response.headers["Twinview-Model"], np.load(io.BytesIO(response.content)))


def read_classified(response: httpx.Response) -> Classified:
    answer = response.json()
    return Classified(
        answer["model"], [[replies.parse(Guess, guess) for guess in row] for row in answer["predictions"]]
    )


def read_put(response: httpx.Response) -> Put:
    answer = response.json()
    return replies.parse(Put, answer | {"items": [replies.parse(PutItem, item) for item in answer["items"]]})


def read_matches(answer: dict[str, Any]) -> Matches:
    return replies.parse(Matches, answer | {"results": [replies.parse(Match, match) for match in answer["results"]]})


def read_undone(answer: dict[str, Any]) -> Undone:
    return replies.parse(Undone, answer | {"undone": replies.parse(Change, answer["undone"])})


def read_key(answer: dict[str, Any]) -> Key:
    return replies.parse(Key, answer | {"values": [tuple(pair) for pair in answer["values"]]})


def read_reembedding(answer: dict[str, Any]) -> Reembedding:
    first = [replies.parse(Skipped, one) for one in answer["first_skipped"]]
    return replies.parse(Reembedding, answer | {"first_skipped": first})


def read_map(answer: dict[str, Any]) -> Map:
    dtypes = {"x": "<f4", "y": "<f4", "group": "<i4", "label": "<i4"}
    columns = {name: np.frombuffer(base64.b64decode(answer[name]), dtype) for name, dtype in dtypes.items()}
    return replies.parse(Map, answer | columns)


def read_duplicates(answer: dict[str, Any]) -> Duplicates:
    groups = [[replies.parse(Match, match) for match in group] for group in answer["groups"]]
    return replies.parse(Duplicates, answer | {"groups": groups})


def read_pair(answer: dict[str, Any]) -> Pair:
    return replies.parse(Pair, answer | {"views": tuple(answer["views"])})


def read_matrix(answer: dict[str, Any]) -> Matrix:
    pictures = [
        replies.parse(MatrixPicture, picture | {"views": tuple(picture["views"])}) for picture in answer["pictures"]
    ]
    z = None if answer["z"] is None else np.asarray(answer["z"])
    return Matrix(answer["model"], pictures, np.asarray(answer["h"]), z)


def read_invariance(answer: dict[str, Any]) -> Invariance:
    picture, untrained = answer["picture"], answer["untrained"]
    strips = {strip["augmentation"]: strip["views"] for strip in picture["strips"]}
    typed = {
        "trained": _read_curves(Curves, answer["trained"]),
        "untrained": untrained and _read_curves(Curves, untrained),
        "picture": _read_curves(Followed, picture | {"strips": strips}),
    }
    return replies.parse(Invariance, answer | typed)


def _read_curves(kind: type[replies.R], answer: dict[str, Any]) -> replies.R:
    return replies.parse(kind, answer | {"curves": [replies.parse(Curve, curve) for curve in answer["curves"]]})
