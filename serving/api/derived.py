"""The routes of what a collection looks like as a whole: its near-duplicates and its map.

Both are computed when a POST asks for it, by a process of its own (derived.py); the GET gives the newest result, how
much of the collection has changed since, and how far the next one is.
"""

import base64
from dataclasses import asdict
from typing import Annotated, Literal

import numpy as np
import orjson
from fastapi import APIRouter, Query
from fastapi.responses import Response
from pydantic import BaseModel, Field

from serving.api.answers import Item
from serving.api.collections import ModelId, Name
from serving.api.request import JSON, Ready, requested_encoder
from serving.collection.index import Index
from serving.derived import map
from serving.derived.duplicates import LEAST, group, looked_up
from serving.derived.task import Derived, Progress, Result
from serving.engine import Engine
from serving.errors import Malformed, documented
from serving.protocol.queries import ALIAS

router = APIRouter(prefix="/collections", generate_unique_id_function=lambda route: route.name)

PROGRESS = ("state", "stage", "share", "problem")
COLUMNS = {"x": "<f4", "y": "<f4", "group": "<i4", "label": "<i4"}
FAULTS = documented(400, 404, 409, 413, 429, 503)


class Computing(BaseModel):
    """What is known of a computation."""

    state: Literal["none", "computing", "done", "failed"] = Field(description="Of the last computation.")
    stage: str = Field(description="What it is at.")
    share: float = Field(description="Of the stage that is done, 0 to 1.")
    problem: str | None = Field(description="Why it failed.")


class Overview(Computing):
    model: str
    count: int | None = Field(description="Pictures that the newest result is of; null where there is none.")
    new: int | None = Field(description="Pictures that have come since.")
    gone: int | None = Field(description="Pictures that were taken out since.")
    made: str | None = Field(description="Mark of the newest result: another one, another mark.")


class Duplicate(Item):
    similarity: float = Field(description="Cosine to the first of its group.")


class Duplicates(Overview):
    least: float | None = Field(description="Threshold that it was computed for; any from there on is answered.")
    total: int | None = Field(description="Groups in the newest result at this threshold.")
    groups: list[list[Duplicate]] = Field(
        description="The largest first. The first of a group can stay for the others."
    )


class Map(Overview):
    """Columns, of which row i is one picture."""

    ids: list[str]
    x: str = Field(description="base64 of little-endian float32, -1 to 1.")
    y: str = Field(description="In the same scale.")
    group: str = Field(description="base64 of little-endian int32: a group of what looks alike, 0 the largest.")
    label: str = Field(description="base64 of little-endian int32: a number of labels, -1 where a picture has none.")
    labels: list[str]
    unplaced: int = Field(description="New pictures that have no place before the next map.")


@router.get("/{name}/duplicates", response_model=Duplicates, responses=FAULTS)
async def duplicates(
    name: Name,
    engine: Ready,
    threshold: Annotated[float, Query(gt=0, le=1, description="The least cosine.")] = 0.95,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    offset: Annotated[int, Query(ge=0, lt=2**32)] = 0,
    model: ModelId = ALIAS,
) -> Response:
    """Groups of pictures of which one can stay for all: its first, which has the most pixels. Every other has at least
    the threshold's cosine to it, and no two that stay are so near each other."""
    library = engine.library
    index = library.index(name, requested_encoder(model))
    answer = await library.read(_duplicates, index, threshold, limit, offset)
    if answer["count"] is None:
        await library.about(index)
    return _json(answer)


@router.post("/{name}/duplicates", status_code=202, response_model=Computing, responses=FAULTS)
async def compute_duplicates(
    name: Name,
    engine: Ready,
    threshold: Annotated[
        float, Query(gt=0, le=1, description="The least that GET can be asked for afterwards.")
    ] = LEAST,
    model: ModelId = ALIAS,
) -> Response:
    """Compare all pictures of the collection; GET says how far it is. One that is at it already goes on."""
    return await _start(engine, name, model, "duplicates", threshold=threshold)


@router.get("/{name}/map", response_model=Map, responses=FAULTS)
async def map_(
    name: Name,
    engine: Ready,
    places: Annotated[bool, Query(description="Without them the columns are empty: to ask how far it is.")] = True,
    model: ModelId = ALIAS,
) -> Response:
    """A place in the plane for each picture, those that look alike close together. Those that have come since the map
    was made stand among their nearest neighbours."""
    library = engine.library
    index = library.index(name, requested_encoder(model))
    answer = await library.read(_map, index, places)
    if answer["count"] is None:
        await library.about(index)
    return _json(answer)


@router.post("/{name}/map", status_code=202, response_model=Computing, responses=FAULTS)
async def compute_map(
    name: Name, engine: Ready, seed: Annotated[int, Query(ge=0, lt=2**31)] = 0, model: ModelId = ALIAS
) -> Response:
    """Make a map of the collection; GET says how far it is. One that is being made goes on."""
    return await _start(engine, name, model, "map", seed=seed)


async def _start(engine: Engine, name: str, model: str, kind: str, **settings) -> Response:
    library = engine.library
    index = library.index(name, requested_encoder(model))
    await library.about(index)
    progress = await library.read(lambda: Derived(index, kind).start(**settings))
    return _json(_shown(progress), 202)


def _duplicates(index: Index, threshold: float, limit: int, offset: int) -> dict:
    derived = Derived(index, "duplicates")
    progress = derived.progress()
    result = derived.result(progress)
    answer = _overview(index, progress, result) | {"least": None, "total": None, "groups": []}
    if result is None:
        return answer
    least = result.settings["threshold"]
    if threshold < least:
        raise Malformed(f"threshold: compared was from {least:g} on; POST a lower threshold first", "threshold")
    groups = group(result.arrays, threshold, index.ids() if result.gone else None)
    found = [
        [asdict(item) | {"similarity": round(cosine, 6)} for item, cosine in [(one.keep, 1.0), *one.others]]
        for one in looked_up(index, groups[offset : offset + limit], threshold)
    ]
    return answer | {"least": least, "total": len(groups), "groups": found}


def _map(index: Index, places: bool) -> dict:
    version = index.facts().version  # before anything is read: what comes in between is of the next
    derived = Derived(index, "map")
    progress = derived.progress()
    result = derived.result(progress)
    answer = _overview(index, progress, result)
    found = _places(index, result, (progress.made, version)) if result and places else map.NOTHING
    columns = {name: _base64(found[name], kind) for name, kind in COLUMNS.items()}
    texts = {"ids": found["ids"].astype("U").tolist(), "labels": found["labels"].tolist()}
    return answer | texts | columns | {"unplaced": found["unplaced"]}


_latest: dict[tuple[str, int], dict] = {}


def _places(index: Index, result: Result, key: tuple[str, int]) -> dict:
    """layout.today's, made once a version of the table: placing what is new takes a search each."""
    if (found := _latest.get(key)) is None:
        found = map.today(index, result)
        _latest.clear()
        _latest[key] = found
    return found


def _overview(index: Index, progress: Progress, result: Result | None) -> dict:
    facts = dict.fromkeys(("count", "new", "gone", "made"))
    if result:
        facts = {"count": len(result.arrays["ids"]), "new": result.new, "gone": result.gone, "made": progress.made}
    return _shown(progress) | {"model": index.encoder_id} | facts


def _shown(progress: Progress) -> dict:
    return {name: getattr(progress, name) for name in PROGRESS}


def _base64(column: np.ndarray, kind: str) -> str:
    return base64.b64encode(column.astype(kind).tobytes()).decode()


def _json(content: dict, status: int = 200) -> Response:
    return Response(orjson.dumps(content), status, media_type=JSON)
