"""POST /classify: the classes a fine-tuned model sees in pictures. serving/engine.py does the work, as for /embed."""

from typing import Annotated

import numpy as np
from fastapi import Query, Request
from fastapi.responses import Response

from export.suggest import program
from serving.api.embed import embed_uploads
from serving.api.openapi import images_body, new_router
from serving.api.request import Ready, requested_encoder
from serving.api.response import json_response
from serving.api.upload import read_images
from serving.errors import NotFound, documented
from serving.protocol import queries
from serving.protocol.queries import ALIAS
from serving.protocol.replies import Classified, Guess

router = new_router()


@router.post(
    "/classify",
    response_model=Classified,
    openapi_extra={"requestBody": {"required": True, "content": images_body()}},
    responses=documented(400, 404, 413, 415, 422, 429, 503),
)
async def classify(
    request: Request,
    engine: Ready,
    k: Annotated[int, Query(ge=1, le=1000, description="Largest number of classes for each image.")] = 5,
    model: Annotated[str, Query(description=queries.MODEL)] = ALIAS,
) -> Response:
    """Get the k likeliest classes of each of 1 to 256 images, from a fine-tuned model.

    Send images in the same way as to /embed.
    """
    engine.refuse_when_full()
    card = engine.card_of(requested_encoder(model))
    _check_classes(card.id, card.classes)  # before reading the body
    uploads = await read_images(request, request.app.state.limits.images)
    embedded = await embed_uploads(request, engine, uploads, model)
    _check_classes(embedded.model, embedded.classes)  # again, since a newer export may have replaced the model
    return json_response(Classified(embedded.model, likeliest(embedded.logits, embedded.classes, k)))


def _check_classes(id: str, classes: list[str]) -> None:
    """Raises NotFound."""
    if not classes:
        raise NotFound(
            f"{id} is an encoder and has no classes; fine-tune one: `{program('training/finetune.py')} --init RUN "
            f"--data LABELLED_PICTURES`, then `{program('export/to_onnx.py')}` of the new run",
            "model",
        )


def likeliest(logits: np.ndarray, classes: list[str], k: int) -> list[list[Guess]]:
    """The min(k, C) most probable classes of each row, by softmax.

    logits   (n, C) float
    classes  C names
    """
    wide = logits.astype(np.float64)
    weights = np.exp(wide - wide.max(axis=1, keepdims=True))
    probabilities = weights / weights.sum(axis=1, keepdims=True)
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :k]
    return [
        [Guess(classes[i], round(float(row[i]), 6)) for i in best]
        for row, best in zip(probabilities, order, strict=True)
    ]
