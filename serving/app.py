"""The service's HTTP interface. Every route is a few lines: the work is in the modules that it names.

A request passes: metrics, the body's limit, its route; images then the gate (429), the decoder's threads (422, 413),
the batcher, the encoder.
"""

import gc
import importlib.util
import io
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated

import numpy as np
import prometheus_client
from fastapi import FastAPI, File, Form, Query, Request, UploadFile
from fastapi.concurrency import run_in_threadpool
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import FileResponse, JSONResponse, RedirectResponse, Response
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import FormData
from starlette.datastructures import UploadFile as Upload

from export.artifact import BundleError, ModelCard
from serving import errors
from serving.decode import Decoder
from serving.errors import Malformed, NotFound, NotReady, TooLarge
from serving.index import Index, IndexProblem, Item, unit
from serving.limits import BodyLimit, Gate, Limits, cores
from serving.metrics import Measured, Metrics
from serving.views import MAX_PAIRS, draw_views, png_uri

log = logging.getLogger("twinview")

NPY = "application/x-npy"
PAGE = "/ui/"


class SearchQuery(BaseModel):
    """One of vector and id."""

    model_config = ConfigDict(extra="forbid")
    vector: list[float] | None = None
    id: str | None = None
    k: int = Field(12, ge=1, le=1000)


class Engine:
    """The encoder with what feeds it, and its index."""

    def __init__(self, encoder, index: Path, limits: Limits, metrics: Metrics):
        from serving.encoder import Batcher

        self.card: ModelCard = encoder.card
        self.decode = Decoder(self.card.preprocessing, cores(), limits.pixels)
        self.batch = Batcher(metrics.measure(encoder))
        self.gate = Gate(limits.images_at_once)
        self.index = Index(index, self.card.id, self.card.dimension)
        metrics.inside.set_function(lambda: self.gate.inside)

    async def embed(self, files: list[tuple[str, str, bytes]]) -> np.ndarray:
        """(field, name, bytes) of n images -> h, float32 (n, d). raises Busy, Undecodable, TooLarge."""
        with self.gate.admit(len(files)):
            return await self.batch(await self.decode(files))

    def close(self) -> None:
        self.decode.close()
        self.batch.close()
