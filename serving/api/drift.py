"""The route that says whether new pictures look like those of a collection. serving/drift.py follows them."""

from fastapi.responses import Response

from serving.api.collections import ModelId, Name
from serving.api.openapi import new_router
from serving.api.request import Ready, requested_encoder
from serving.api.response import json_response
from serving.curation.drift import ALARM, WINDOW
from serving.drift import LEAST, Look
from serving.errors import documented
from serving.protocol.queries import ALIAS
from serving.protocol.replies import Drift

router = new_router("/collections")


@router.get("/{name}/drift", response_model=Drift, responses=documented(400, 404, 409, 429, 503))
async def drift(name: Name, engine: Ready, model: ModelId = ALIAS) -> Response:
    """Say whether the last 500 pictures that were sent look like those of the collection.

    Pictures count that were added to this collection or searched with in it; for the collection `pictures` also those
    that were embedded or classified. They are compared after every 100 new ones, at most once a minute. A service with
    several workers answers from the pictures of one of them.
    """
    library = engine.library
    index = library.index(name, requested_encoder(model))
    facts = await library.describe(index)
    return json_response(_reply(library.drift.look_of(index), facts.count))


def _reply(look: Look, count: int) -> Drift:
    if look.drift is None:
        text = f"{look.pictures:,} of the {WINDOW} pictures that are compared with the collection have come"
        if count < LEAST:
            text = f"The collection has {count:,} pictures; new ones are compared with it when it has {LEAST}"
        return Drift(look.model, look.pictures, WINDOW, "unknown", None, None, text)
    text = f"The last {WINDOW} pictures look like the collection"
    if look.drift.differs:
        text = f"The last {WINDOW} pictures differ from the collection (p < {ALARM:.7f})"
    state = "different" if look.drift.differs else "alike"
    return Drift(look.model, look.pictures, WINDOW, state, look.drift.distance, look.drift.p_value, text)
