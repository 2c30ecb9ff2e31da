"""POST /classify: which of a fine-tuned model's classes a picture shows. The work is engine.py's, as of /embed."""

from typing import Annotated

import numpy as np
from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, Field

from serving.api.request import CancelOnDisconnect, Ready, binary, requested_encoder
from serving.api.upload import BYTES, FORM, read_images
from serving.errors import NotFound, documented
from serving.protocol import pack
from serving.protocol.queries import ALIAS


class Guess(BaseModel):
    label: str = Field(description="A class's name.")
    probability: float = Field(description="0 to 1; over all classes they sum to 1.")


class Classified(BaseModel):
    model: str
    predictions: list[list[Guess]] = Field(description="Of each image, in their order, the likeliest class first.")


def _name(route: APIRoute) -> str:
    return route.name


router = APIRouter(generate_unique_id_function=_name)

IMAGES = {"type": "array", "items": {"type": "string", "format": "binary"}}
BODY = {
    "required": True,
    "content": {
        FORM: {"schema": {"type": "object", "properties": {"images": IMAGES}, "required": ["images"]}},
        **binary("image/*", BYTES, pack.MEDIA_TYPE),
    },
}


@router.post(
    "/classify",
    response_model=Classified,
    openapi_extra={"requestBody": BODY},
    responses=documented(400, 404, 413, 415, 422, 429, 503),
)
async def classify(
    request: Request,
    engine: Ready,
    k: Annotated[int, Query(ge=1, le=1000, description="Classes for each image; no more than there are.")] = 5,
    model: Annotated[str, Query(description=f"An id of /v1/models, or {ALIAS} for the default.")] = ALIAS,
) -> Response:
    """The k likeliest classes of each of 1 to 256 images, by a model that was fine-tuned. Images come as to /embed."""
    engine.refuse_when_full()
    card = engine.named(requested_encoder(model))
    _check(card.id, card.classes)  # before the body is read
    files = await read_images(request, request.app.state.limits.images)
    async with CancelOnDisconnect(request):
        embedded = await engine.embed(files, requested_encoder(model))
    request.app.state.metrics.embedded(len(files), embedded.times)
    request.state.facts = {"images": len(files), "model": embedded.model}
    _check(embedded.model, embedded.classes)  # another may have taken its place
    predictions = likeliest(embedded.logits, embedded.classes, k)
    return JSONResponse({"model": embedded.model, "predictions": predictions})


def _check(id: str, classes: list[str]) -> None:
    """raises NotFound"""
    if not classes:
        raise NotFound(
            f"{id} is an encoder and has no classes; fine-tune one: `python training/finetune.py --init RUN --data "
            "LABELLED_PICTURES`, then `python export/to_onnx.py` of the new run",
            "model",
        )


def likeliest(logits: np.ndarray, classes: list[str], k: int) -> list[list[dict]]:
    """(n, C) float, C names -> of each row its min(k, C) greatest by softmax, as dicts of a Guess."""
    wide = logits.astype(np.float64)
    weights = np.exp(wide - wide.max(axis=1, keepdims=True))
    probabilities = weights / weights.sum(axis=1, keepdims=True)
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :k]
    return [
        [{"label": classes[i], "probability": round(float(row[i]), 6)} for i in places]
        for row, places in zip(probabilities, order, strict=True)
    ]
