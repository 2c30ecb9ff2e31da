"""Routes of the training runs, which serving/runs.py reads."""

from typing import Annotated

from fastapi import Query
from fastapi.responses import Response

from serving import runs as files
from serving.api.openapi import new_router
from serving.api.response import json_response
from serving.errors import NotFound, documented
from serving.protocol.replies import RunDetails, Runs

router = new_router()


@router.get("/runs", response_model=Runs, responses=documented(400))
def runs(limit: Annotated[int, Query(ge=1, le=500)] = 100) -> Response:
    """List the training runs in this service's folder of runs: pretraining, fine-tuning and distillation."""
    return json_response(files.list_runs(limit))


@router.get("/runs/{name:path}", response_model=RunDetails, responses=documented(404))
def run(name: str) -> Response:
    """Get one training run with its settings and curves."""
    if (details := files.read_run(name)) is None:
        raise NotFound(f"there is no run {name}; GET /runs lists the runs", "name")
    return json_response(details)
