"""Routes of augmented views and their embeddings. serving/views does the work; it imports torch and
training's code at the first request, and answers 501 if they are not installed."""

from collections.abc import Collection, Sequence
from dataclasses import asdict
from typing import Annotated

import numpy as np
from fastapi import File, Form, Request, UploadFile
from fastapi.responses import Response

from serving.api.openapi import new_router
from serving.api.request import CancelOnDisconnect, Ready
from serving.api.response import json_response
from serving.api.upload import read_file, refuse_twice
from serving.collection.index import DEFAULT
from serving.errors import Malformed, TooLarge, documented
from serving.protocol import queries
from serving.protocol.replies import Invariance, Matrix, MatrixPicture, Pair, Pairs, Strip
from serving.views.draw import png_uri

MAX_PAIRS = 16
MAX_MATRIX = 12
MAX_SAMPLE = 64
ERRORS = documented(400, 404, 413, 422, 429, 501, 503)

router = new_router()

Seed = Annotated[int, Form(ge=0, lt=2**63, description="Seed of the random numbers.")]
CollectionName = Annotated[str, Form(pattern=queries.NAME, description="Collection to sample pictures from.")]


@router.post("/views", response_model=Pairs, responses=documented(400, 413, 422, 429, 501, 503))
async def views(
    request: Request,
    engine: Ready,
    image: UploadFile,
    pairs: Annotated[int, Form(ge=1, le=MAX_PAIRS, description="Number of pairs.")] = 4,
    seed: Seed = 0,
) -> Response:
    """Draw pairs of augmented views of an image, and compare their embeddings.

    Further form fields are settings of the augmentation: crop_area (twice: smallest and largest share of the area),
    crop_sampling, flip, jitter, strength, grey, blur.
    """
    settings = await _settings(request, ("image", "pairs", "seed"))
    file = await read_file("image", image)
    async with CancelOnDisconnect(request):
        drawn = await engine.views.pairs(file, pairs, seed, settings)
    z = [None] * pairs if drawn.z is None else _rounded(drawn.z).tolist()
    answer = [
        Pair((png_uri(first), png_uri(second)), h, projected)
        for (first, second), h, projected in zip(drawn.views, _rounded(drawn.h).tolist(), z, strict=True)
    ]
    return json_response(Pairs(answer))


@router.post("/matrix", response_model=Matrix, responses=ERRORS)
async def matrix(
    request: Request,
    engine: Ready,
    image: Annotated[Sequence[UploadFile], File(description=f"At most {MAX_MATRIX} images.")] = (),
    collection: CollectionName = DEFAULT,
    count: Annotated[int, Form(ge=2, le=MAX_MATRIX, description="Number of pictures.")] = 6,
    seed: Seed = 0,
) -> Response:
    """Draw two augmented views of each of a few pictures, and compare all views with each other, as NT-Xent does in a
    batch.

    The pictures are the uploaded images and, up to `count`, a random sample of the collection's thumbnails.
    Further form fields are settings of the augmentation, as for POST /views.
    """
    settings = await _settings(request, ("collection", "count", "seed"), several="image")
    if len(image) > MAX_MATRIX:
        raise TooLarge(f"image: the request has {len(image)}, and at most {MAX_MATRIX} are allowed", "image")
    files = [await read_file(f"image[{i}]", upload) for i, upload in enumerate(image)]
    async with CancelOnDisconnect(request):
        drawn = await engine.views.matrix(files, collection, count, seed, settings)
    pictures = [
        MatrixPicture(name, id, (png_uri(drawn.views[2 * i]), png_uri(drawn.views[2 * i + 1])))
        for i, (name, id) in enumerate(drawn.pictures)
    ]
    z = None if drawn.z is None else _rounded(drawn.z)
    return json_response(Matrix(drawn.model, pictures, _rounded(drawn.h), z))


@router.post("/invariance", response_model=Invariance, responses=ERRORS)
async def invariance(
    request: Request,
    engine: Ready,
    image: UploadFile | None = None,
    collection: CollectionName = DEFAULT,
    count: Annotated[int, Form(ge=2, le=MAX_SAMPLE, description="Number of pictures from the collection.")] = 16,
    seed: Seed = 0,
) -> Response:
    """Measure how far h moves as one augmentation grows stronger: the mean over a random sample of the collection's
    thumbnails, the same for an untrained encoder of the same architecture, and the curves of the uploaded image.

    Takes seconds; one request is answered at a time.
    """
    if unknown := await _settings(request, ("image", "collection", "count", "seed")):
        name = next(iter(unknown))
        raise Malformed(f"{name}: is not a field of this form", name)
    file = await read_file("image", image) if image else None
    async with CancelOnDisconnect(request):
        found = await engine.views.invariance(file, collection, count, seed)
    compared, followed = found.compared, found.followed
    strips = [Strip(name, [png_uri(view) for view in strip]) for name, strip in followed.strips.items()]
    return json_response(
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


async def _settings(request: Request, own: Collection[str], several: str = "") -> dict[str, list[str]]:
    """Returns the form fields that are not among the route's own parameters, each of which may be there once, and not
    `several`. Raises Malformed for a file."""
    form = await request.form()
    refuse_twice(name for name, _ in form.multi_items() if name in own)
    settings: dict[str, list[str]] = {}
    for name, value in form.multi_items():
        if name in own or name == several:
            continue
        if not isinstance(value, str):
            raise Malformed(f"{name}: must not be a file", name)
        settings.setdefault(name, []).append(value)
    return settings


def _rounded(cosines: np.ndarray) -> np.ndarray:
    return cosines.astype(np.float64).round(6)
