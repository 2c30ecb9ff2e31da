"""The routes of what an encoder makes of augmented views. The work is done in serving/views; all of it wants torch and training's
code, which are loaded when first asked for, and may be left out."""

from collections.abc import Collection
from dataclasses import asdict
from typing import Annotated

import numpy as np
import orjson
from fastapi import APIRouter, File, Form, Request, UploadFile
from fastapi.responses import Response
from pydantic import BaseModel, Field

from serving.api.answers import Pairs
from serving.api.request import JSON, CancelOnDisconnect, Ready
from serving.api.upload import read_file
from serving.collection.index import DEFAULT
from serving.errors import TooLarge, documented
from serving.protocol import queries
from serving.views.draw import png_uri

router = APIRouter(generate_unique_id_function=lambda route: route.name)

MAX_PAIRS = 16
MOST_OF_MATRIX = 12
MOST_EXAMINED = 64
FAULTS = documented(400, 404, 413, 422, 429, 501, 503)

Seed = Annotated[int, Form(ge=0, lt=2**63)]
OfCollection = Annotated[str, Form(pattern=queries.NAME, description="Its thumbnails are what is looked at.")]
Several = Annotated[list[UploadFile], File(description=f"At most {MOST_OF_MATRIX}.")]


class OfMatrix(BaseModel):
    name: str
    id: str | None = Field(description="Of its item, where it is of the collection.")
    views: list[str] = Field(min_length=2, max_length=2, description="PNG as data URIs.")


class Matrix(BaseModel):
    """Rows and columns 2i and 2i + 1 are the views of picture i: the positives lie beside the diagonal."""

    model: str
    pictures: list[OfMatrix]
    h: list[list[float]] = Field(description="Cosines of the views' h.")
    z: list[list[float]] | None = Field(description="Of z = g(h), which NT-Xent compares; null where g is not at hand.")


class Curve(BaseModel):
    augmentation: str
    unit: str
    strengths: list[float]
    cosines: list[float] = Field(description="Mean cosine of h of a picture and of its view, at each strength.")
    moved: list[float] = Field(description="0 where h stays, 1 where it might be another picture's.")


class Curves(BaseModel):
    pictures: int
    others: float = Field(description="Mean cosine of two different pictures: where `moved` is 1.")
    curves: list[Curve]


class Strip(BaseModel):
    augmentation: str
    views: list[str] = Field(description="PNG as data URIs, at each strength.")


class Picture(BaseModel):
    """The image, or the first of the pictures of the collection."""

    name: str
    pixels: str = Field(description="As the encoder sees it. PNG as a data URI.")
    curves: list[Curve]
    strips: list[Strip]


class Invariance(BaseModel):
    model: str
    sentence: str = Field(description="What is noticed most and least.")
    trained: Curves
    untrained: Curves | None = Field(description="Of the same architecture; null where that is not known.")
    picture: Picture


@router.post("/views", response_model=Pairs, responses=documented(400, 413, 422, 429, 501, 503))
async def views(
    request: Request,
    engine: Ready,
    image: UploadFile,
    pairs: Annotated[int, Form(ge=1, le=MAX_PAIRS)] = 4,
    seed: Seed = 0,
) -> Response:
    """Pairs of augmented views of an image as PNG data URIs, with the cosine of their embeddings.

    Further form fields are the augmentation's settings: crop_area (twice: least and greatest share), crop_sampling,
    flip, jitter, strength, grey, blur.
    """
    settings = await _settings(request, ("image", "pairs", "seed"))
    file = await read_file("image", image)
    async with CancelOnDisconnect(request):
        drawn = await engine.views.pairs(file, pairs, seed, settings)
    z = [None] * pairs if drawn.z is None else _rounded(drawn.z)
    answer = [
        {"views": [png_uri(view) for view in pair], "similarity": h, "projected": projected}
        for pair, h, projected in zip(drawn.views, _rounded(drawn.h), z, strict=True)
    ]
    return _json({"pairs": answer})


@router.post("/matrix", response_model=Matrix, responses=FAULTS)
async def matrix(
    request: Request,
    engine: Ready,
    image: Several = (),
    collection: OfCollection = DEFAULT,
    count: Annotated[int, Form(ge=2, le=MOST_OF_MATRIX, description="Of pictures.")] = 6,
    seed: Seed = 0,
) -> Response:
    """Two augmented views of each of a few pictures, and the cosines of all with all: what NT-Xent sees of a batch.

    The pictures are the images that are sent, and then some of the collection, drawn by the seed, until there are
    `count`. Further form fields are the augmentation's settings, as of POST /views.
    """
    settings = await _settings(request, ("image", "collection", "count", "seed"))
    if len(image) > MOST_OF_MATRIX:
        raise TooLarge(f"more than {MOST_OF_MATRIX} images; no more are held against each other", "image")
    files = [await read_file(f"image[{i}]", one) for i, one in enumerate(image)]
    async with CancelOnDisconnect(request):
        drawn = await engine.views.matrix(files, collection, count, seed, settings)
    pictures = [
        {"name": name, "id": id, "views": [png_uri(view) for view in drawn.views[2 * i : 2 * i + 2]]}
        for i, (name, id) in enumerate(drawn.pictures)
    ]
    z = None if drawn.z is None else _rounded(drawn.z)
    return _json({"model": drawn.model, "pictures": pictures, "h": _rounded(drawn.h), "z": z})


@router.post("/invariance", response_model=Invariance, responses=FAULTS)
async def invariance(
    request: Request,
    engine: Ready,
    image: UploadFile | None = None,
    collection: OfCollection = DEFAULT,
    count: Annotated[int, Form(ge=2, le=MOST_EXAMINED, description="Pictures of the collection.")] = 16,
    seed: Seed = 0,
) -> Response:
    """How far h moves as one augmentation grows: mean over pictures of the collection, drawn by the seed, beside an
    untrained encoder of the same architecture; and the image alone. Takes seconds, and one is done at a time."""
    file = await read_file("image", image) if image else None
    async with CancelOnDisconnect(request):
        found = await engine.views.invariance(file, collection, count, seed)
    compared, followed = found.compared, found.followed
    strips = [
        {"augmentation": name, "views": [png_uri(view) for view in strip]} for name, strip in followed.strips.items()
    ]
    return _json(
        {
            "model": found.model,
            "sentence": compared.sentence,
            "trained": compared.trained.to_dict(),
            "untrained": compared.untrained and compared.untrained.to_dict(),
            "picture": {
                "name": found.picture,
                "pixels": png_uri(found.pixels),
                "curves": [asdict(curve) for curve in followed.curves],
                "strips": strips,
            },
        }
    )


async def _settings(request: Request, own: Collection[str]) -> dict[str, list[str]]:
    """The fields of the form that are not the route's own."""
    form = await request.form()
    return {name: form.getlist(name) for name in form if name not in own}


def _rounded(cosines: np.ndarray) -> list:
    return cosines.astype(np.float64).round(6).tolist()


def _json(content: dict) -> Response:
    return Response(orjson.dumps(content), media_type=JSON)
