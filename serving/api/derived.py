"""Routes of the results computed from a whole collection: its near-duplicates and its map.

A POST starts the computation, in a process of its own (serving/derived/task.py). A GET returns the newest result, how
much of the collection has changed since, and the progress of the current computation.
"""

import base64
from typing import Annotated, Any

from fastapi import Query
from fastapi.responses import Response

from serving.api.collections import ModelId, Name, match, refuse_two_limits
from serving.api.openapi import new_router
from serving.api.request import Ready, requested_encoder
from serving.api.response import json_response
from serving.collection.index import Index
from serving.collection.reembedding import Reembedding
from serving.derived import map
from serving.derived.automatic import is_automatic
from serving.derived.duplicates import group, is_too_much, looked_up
from serving.derived.task import Derived, Progress, Result
from serving.engine import Engine
from serving.errors import Malformed, documented
from serving.protocol.queries import ALIAS
from serving.protocol.replies import DerivedProgress, DerivedResult, Duplicates, Map

COLUMNS = {"x": "<f4", "y": "<f4", "group": "<i4", "label": "<i4"}
ERRORS = documented(400, 404, 409, 413, 429, 503)

router = new_router("/collections")


@router.get("/{name}/duplicates", response_model=Duplicates, responses=ERRORS)
async def duplicates(
    name: Name,
    engine: Ready,
    threshold: Annotated[
        float | None,
        Query(gt=0, le=1, description="Lowest cosine of near-duplicates, by default the collection's own."),
    ] = None,
    closer_than: Annotated[
        float | None,
        Query(
            ge=0,
            le=1,
            description="Instead of `threshold`: 0.999 returns pictures that are more alike than 99.9 % of random "
            "pairs of the collection's pictures.",
        ),
    ] = None,
    limit: Annotated[int, Query(ge=1, le=1000, description="Number of groups on a page.")] = 100,
    offset: Annotated[int, Query(ge=0, lt=2**32, description="Number of groups to skip.")] = 0,
    model: ModelId = ALIAS,
) -> Response:
    """Get groups of near-duplicates, and the progress of the comparison.

    The first picture of a group has the most pixels and can represent the others: each of them has at least the
    threshold's cosine similarity to it, and no two first pictures are that similar to each other. Without a threshold,
    nearly all of them are copies of the first one.
    """
    refuse_two_limits(threshold, closer_than)
    library = engine.library
    index = library.index(name, requested_encoder(model))
    if closer_than is not None:
        await library.describe(index)  # 404 if there is no such collection
        threshold = await library.read(index.random_pairs.cosine, closer_than)
    given = "threshold" if closer_than is None else "closer_than"
    answer = await library.read(_duplicates, index, threshold, limit, offset, given)
    if answer.count is None:
        await library.describe(index)  # 404 if there is no such collection
    return json_response(answer)


@router.post("/{name}/duplicates", status_code=202, response_model=DerivedProgress, responses=ERRORS)
async def compute_duplicates(
    name: Name,
    engine: Ready,
    threshold: Annotated[
        float | None,
        Query(
            gt=0,
            le=1,
            description="Lowest threshold that GET accepts afterwards, if it is lower than 0.9 or what the collection "
            "needs.",
        ),
    ] = None,
    model: ModelId = ALIAS,
) -> Response:
    """Start comparing all pictures of the collection; GET returns the progress. If a computation is already running, it
    is left to finish."""
    return await _start(engine, name, model, "duplicates", threshold=threshold)


@router.get("/{name}/map", response_model=Map, responses=ERRORS)
async def map_(
    name: Name,
    engine: Ready,
    places: Annotated[bool, Query(description="If false, all columns are empty.")] = True,
    model: ModelId = ALIAS,
) -> Response:
    """Get the map, where similar pictures are close together, and the progress of the next one.

    Pictures added since the map was computed are placed among their nearest neighbours.
    """
    library = engine.library
    index = library.index(name, requested_encoder(model))
    answer = await library.read(_map, index, places)
    if answer["count"] is None:
        await library.describe(index)  # 404 if there is no such collection
    return json_response(answer)


@router.post("/{name}/map", status_code=202, response_model=DerivedProgress, responses=ERRORS)
async def compute_map(
    name: Name,
    engine: Ready,
    seed: Annotated[int, Query(ge=0, lt=2**31, description="Seed of the random numbers.")] = 0,
    model: ModelId = ALIAS,
) -> Response:
    """Start computing a map of the collection; GET returns the progress. If a computation is already running, it is
    left to finish."""
    return await _start(engine, name, model, "map", seed=seed)


async def _start(engine: Engine, name: str, model: str, kind: str, **settings: float | None) -> Response:
    library = engine.library
    index = library.index(name, requested_encoder(model))
    await library.describe(index)  # 404 if there is no such collection
    progress = await library.read(lambda: Derived(index, kind).start(**settings))
    return json_response(DerivedProgress(**_progress(progress)), 202)


def _duplicates(index: Index, threshold: float | None, limit: int, offset: int, given: str) -> Duplicates:
    """threshold: None for the collection's own; given: the parameter that it comes from"""
    derived = Derived(index, "duplicates")
    progress = derived.progress()
    result = derived.result(progress)
    common = vars(_common(index, progress, result))
    pairs = index.random_pairs.known() if common["count"] is not None else None

    def rank(cosine: float) -> float | None:
        return None if pairs is None else pairs.closer_than(cosine)

    if result is None:
        common |= {"threshold": threshold, "own": None, "closer_than": None if threshold is None else rank(threshold)}
        return Duplicates(**common, least=None, total=None, too_many=False, exact=[], groups=[])
    least, own = float(result.arrays["least"]), float(result.arrays["own"])
    threshold = max(own, least) if threshold is None else threshold
    if threshold < least:
        compared = f"the pictures were compared from a cosine of {least:g} up, which is more than {threshold:.3f}"
        raise Malformed(f"{given}: {compared}; POST a lower threshold first", given)
    common |= {"threshold": threshold, "own": own, "closer_than": rank(threshold), "least": least}
    groups = group(result.arrays, threshold, index.ids() if result.gone else None)
    page, exact = [], []
    for found in looked_up(index, groups[offset : offset + limit], threshold):
        items = [(found.keep, 1.0), *((item, 1.0) for item in found.exact), *found.near]
        page.append([match(item, cosine, rank(cosine)) for item, cosine in items])
        exact.append(len(found.exact))
    too_many = is_too_much(groups, index.count())
    return Duplicates(**common, total=len(groups), too_many=too_many, exact=exact, groups=page)


def _map(index: Index, places: bool) -> dict[str, Any]:
    """Returns the JSON of a Map."""
    version = index.facts().version  # read first: if the table changes meanwhile, the next request computes again
    derived = Derived(index, "map")
    progress = derived.progress()
    result = derived.result(progress)
    columns = _places(index, result, (progress.made, version)) if result and places else map.EMPTY
    encoded = {name: base64.b64encode(columns[name].astype(kind).tobytes()).decode() for name, kind in COLUMNS.items()}
    texts = {"ids": columns["ids"].astype("U").tolist(), "labels": columns["labels"].tolist()}
    return vars(_common(index, progress, result)) | texts | encoded | {"unplaced": columns["unplaced"]}


_latest: dict[tuple[str, int], dict[str, Any]] = {}


def _places(index: Index, result: Result, key: tuple[str, int]) -> dict[str, Any]:
    """Cached per map and version of the table: placing each new picture takes a search."""
    if (columns := _latest.get(key)) is None:
        columns = map.current(index, result)
        _latest.clear()
        _latest[key] = columns
    return columns


def _common(index: Index, progress: Progress, result: Result | None) -> DerivedResult:
    facts: dict[str, Any] = dict.fromkeys(("count", "new", "gone", "made"))
    if result:
        facts = {"count": len(result.arrays["ids"]), "new": result.new, "gone": result.gone, "made": progress.made}
    facts |= {"automatic": is_automatic(index.count()), "missing": Reembedding(index).progress().missing}
    return DerivedResult(**_progress(progress), model=index.encoder_id, **facts)


def _progress(progress: Progress) -> dict[str, Any]:
    return {name: getattr(progress, name) for name in ("state", "stage", "share", "problem")}
