"""The service's HTTP interface: what each route takes and gives. The work is engine.py's.

Every answer but a thumbnail, an .npy and the metrics is JSON; every error has the shape of errors.py.
"""

import gc
import importlib.util
import io
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated

import numpy as np
import prometheus_client
from fastapi import APIRouter, Depends, FastAPI, Form, Query, Request, UploadFile
from fastapi.concurrency import run_in_threadpool
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import FileResponse, JSONResponse, RedirectResponse, Response
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, ConfigDict, Field, Json, ValidationError
from starlette.datastructures import UploadFile as StarletteUpload
from starlette.middleware import Middleware

from export.artifact import BundleError
from serving import errors
from serving.decode import File
from serving.engine import Engine
from serving.errors import NotFound, NotReady, TooLarge
from serving.index import IndexProblem, Item, unit
from serving.limits import USUAL, BodyLimit, Limits
from serving.metrics import Measured, Metrics
from serving.views import MAX_PAIRS, png_uri

log = logging.getLogger("twinview")

NPY = "application/x-npy"
FOREVER = "public, max-age=31536000, immutable"  # an id is a hash of the content
router = APIRouter()


def create_app(encoder: str | None, index: Path, limits: Limits = USUAL) -> FastAPI:
    """encoder  as find_bundle's `chosen`; looked for when the app starts
    index    folder of the collection; need not exist
    """
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        try:
            app.state.engine = await run_in_threadpool(Engine, encoder, index, limits, metrics)
        except BundleError as error:  # stay up and say so: a page that explains beats one that is gone
            app.state.problem = f"{str(error).rstrip('.')}. Then start the service again: it looks for one only then."
            log.warning(app.state.problem)
        else:
            await _announce(app.state.engine)
        gc.collect()
        gc.freeze()  # what is loaded stays: looking through it again would stop requests for 100 ms
        yield
        if app.state.engine:
            app.state.engine.close()

    app = FastAPI(
        title="Twinview",
        description="Embeddings of pictures, and pictures by likeness.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        middleware=[Middleware(Measured, metrics=metrics), Middleware(BodyLimit, most=limits.body_bytes)],
    )
    app.state.engine, app.state.problem = None, "the service is starting"
    app.state.limits, app.state.metrics = limits, metrics
    errors.install(app)
    app.include_router(router)
    app.mount("/docs/assets", StaticFiles(directory=_swagger()))

    @app.exception_handler(IndexProblem)
    async def _(request: Request, error: IndexProblem) -> JSONResponse:
        return errors.answer(NotReady(str(error)))

    return app


async def _announce(engine: Engine) -> None:
    """Also opens the index, so that the first search need not. One that is damaged does not stop the encoder."""
    try:
        count = await run_in_threadpool(engine.index.count)
        log.info("serving %s; %s pictures in %s", engine.card.id, f"{count:,}", engine.index.folder)
    except IndexProblem as error:
        log.warning("serving %s without a collection. %s", engine.card.id, error)


def _engine(request: Request) -> Engine:
    if request.app.state.engine is None:
        raise NotReady(request.app.state.problem)
    return request.app.state.engine


Ready = Annotated[Engine, Depends(_engine)]


@router.post("/embed")
async def embed(request: Request, engine: Ready, images: list[UploadFile], normalize: bool = False) -> Response:
    """Embeddings h of 1 to 256 images, in their order; of unit length with `normalize`.

    Asked for with `Accept: application/x-npy` they come as a float32 .npy of (n, d), the model's id in the header
    `Twinview-Model`.
    """
    most = request.app.state.limits.images
    if len(images) > most:
        raise TooLarge(f"{len(images)} images in one request; at most {most} are taken", "images")
    files = [await _file(f"images[{i}]", image) for i, image in enumerate(images)]
    vectors = await engine.embed(files)
    if normalize:
        vectors = unit(vectors)
    if NPY in request.headers.get("accept", ""):
        buffer = io.BytesIO()
        np.save(buffer, vectors)
        return Response(buffer.getvalue(), media_type=NPY, headers={"Twinview-Model": engine.card.id})
    answer = {"model": engine.card.id, "dimension": engine.card.dimension, "embeddings": vectors.tolist()}
    return JSONResponse(answer)


class SearchQuery(BaseModel):
    """One of vector and id; or neither, beside an image."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    vector: list[float] | None = Field(None, description="of any length but 0")
    id: str | None = Field(None, description="an item of the collection, itself left out of the results")
    k: int = Field(12, ge=1, le=1000)


class SearchForm(SearchQuery):
    vector: Json[list[float]] | None = None


SEARCH_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": SearchQuery.model_json_schema()},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {
                        **SearchQuery.model_json_schema()["properties"],
                        "image": {"type": "string", "format": "binary"},
                    },
                }
            },
        },
    }
}


@router.post("/search", openapi_extra=SEARCH_BODY)
async def search(request: Request, engine: Ready) -> Response:
    """The k items of the collection nearest to one of: an image, a vector, an item. Nearest first, with the cosine."""
    image = None
    try:
        if request.headers.get("content-type", "").startswith("application/json"):
            query = SearchQuery.model_validate_json(await request.body())
        else:
            async with request.form(max_files=1) as form:
                fields = dict(form)
                if isinstance(fields.get("image"), StarletteUpload):
                    image = await _file("image", fields.pop("image"))
                query = SearchForm.model_validate(fields)
    except ValidationError as error:
        raise errors.malformed(error.errors()) from error
    found = await engine.search(query.k, image, query.vector, query.id)
    results = [{**_public(item), "similarity": round(similarity, 6)} for item, similarity in found]
    return JSONResponse({"model": engine.card.id, "results": results})


@router.get("/items")
async def items(
    engine: Ready, limit: Annotated[int, Query(ge=1, le=1000)] = 50, offset: Annotated[int, Query(ge=0)] = 0
) -> Response:
    """The collection, a page at a time."""
    count = await run_in_threadpool(engine.index.count)
    page = await run_in_threadpool(engine.index.page, limit, offset)
    return JSONResponse({"count": count, "items": [_public(item) for item in page]})


@router.get("/items/{id}/thumbnail", response_class=FileResponse)
async def thumbnail(id: str, engine: Ready) -> Response:
    """JPEG, at most 256 px on its longest side."""
    path = await run_in_threadpool(engine.index.thumbnail, id)
    if path is None:
        raise NotFound(f"no item {id} is in the index", "id")
    return FileResponse(path, media_type="image/jpeg", headers={"Cache-Control": FOREVER})


@router.post("/views")
async def views(
    request: Request,
    engine: Ready,
    image: UploadFile,
    pairs: Annotated[int, Form(ge=1, le=MAX_PAIRS)] = 4,
    seed: Annotated[int, Form(ge=0, lt=2**63)] = 0,
) -> Response:
    """Pairs of augmented views of an image as PNG data URIs, with the cosine of their embeddings.

    Further form fields are the augmentation's settings: crop_area (twice: least and greatest share), crop_sampling,
    flip, jitter, strength, grey, blur.
    """
    form = await request.form()
    settings = {name: form.getlist(name) for name in form if name not in ("image", "pairs", "seed")}
    drawn, similarities = await engine.views(await _file("image", image), pairs, seed, settings)
    answer = [
        {"views": [png_uri(view) for view in pair], "similarity": round(float(similarity), 6)}
        for pair, similarity in zip(drawn, similarities, strict=True)
    ]
    return JSONResponse({"pairs": answer})


@router.get("/v1/models")
async def models(request: Request) -> Response:
    """The model card of the encoder that is served."""
    engine = request.app.state.engine
    return JSONResponse({"data": [engine.card.to_dict()] if engine else []})


@router.get("/livez")
async def livez() -> Response:
    return JSONResponse({"status": "alive"})


@router.get("/readyz")
async def readyz(engine: Ready) -> Response:
    return JSONResponse({"status": "ready", "model": engine.card.id})


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """For Prometheus."""
    text = prometheus_client.generate_latest(request.app.state.metrics.registry)
    return Response(text, media_type=prometheus_client.CONTENT_TYPE_LATEST)


@router.get("/", include_in_schema=False)
async def start(request: Request) -> Response:
    """The page where there is one."""
    has_page = any(getattr(route, "path", None) == "/ui" for route in request.app.routes)
    return RedirectResponse("/ui/" if has_page else "/docs")


@router.get("/docs", include_in_schema=False)
async def docs(request: Request) -> Response:
    return get_swagger_ui_html(
        openapi_url=request.app.openapi_url,
        title="Twinview",
        swagger_js_url="/docs/assets/swagger-ui-bundle.js",
        swagger_css_url="/docs/assets/swagger-ui.css",
        swagger_favicon_url="/docs/assets/favicon-light-32x32.png",
    )


def _swagger() -> Path:
    """BentoML's copy of Swagger UI: FastAPI's own page would fetch one from outside."""
    return Path(importlib.util.find_spec("bentoml").origin).parent / "_internal/server/static_content"


async def _file(field: str, upload: UploadFile) -> File:
    return File(field, upload.filename or "", await upload.read())


def _public(item: Item) -> dict:
    return {"id": item.id, "name": item.name, "label": item.label, "path": item.path}
