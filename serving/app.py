"""Assembles the service: middleware, routes, error handlers, and the engine that is loaded when the app starts.

Every response is JSON, except thumbnails, .npy files and metrics; every error has the shape of errors.py.
"""

import asyncio
import gc
import logging
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response
from starlette.middleware import Middleware

from export.artifact import BundleError
from serving import errors
from serving.access import Access
from serving.api import (
    classify,
    collections,
    copies,
    derived,
    drift,
    embed,
    lightly,
    log,
    names,
    openapi,
    picks,
    reembedding,
    runs,
    status,
    tools,
    views,
)
from serving.api.body_limit import BodyLimit
from serving.api.embed import EmbedShortcut
from serving.api.envelope import Envelope, answer_early
from serving.api.forms import CheckForms
from serving.api.head import Head
from serving.collection.index import DEFAULT, IndexProblem
from serving.collection.index import names as names_embedded_by
from serving.derived.automatic import AutomaticResults
from serving.engine import Engine
from serving.limits import (
    DEFAULT_LIMITS,
    Limits,
    consistency_s,
    decode_s,
    gpu_required,
    keeps_originals,
    refuse_misspelt,
)
from serving.metrics import Metrics
from serving.protocol.shown import counted
from serving.public_path import PublicPath, public_path
from serving.reembedder import Reembedder

logger = logging.getLogger("twinview")

RETRY_S = 2.0  # between attempts to load an encoder, and between updates of the gauges

ROUTERS = (
    embed.router,
    collections.router,
    copies.router,
    picks.router,
    derived.router,
    drift.router,
    reembedding.router,
    names.router,
    classify.router,
    lightly.router,
    views.router,
    runs.router,
    status.router,
)


def create_app(
    encoder: str | None, index: str | Path, limits: Limits = DEFAULT_LIMITS, access: Access | None = None
) -> FastAPI:
    """Build the service's app. Its engine is loaded when the app starts.

    encoder  as Engine's `encoders`
    index    folder of the collections, or s3://bucket/prefix; it need not exist
    access   who may use the service; by default read from the environment variables
    raises   AccessProblem, PublicPathProblem; ValueError for a wrong TWINVIEW_LOG, TWINVIEW_GPU, TWINVIEW_DECODE_S,
             TWINVIEW_KEEP_ORIGINALS or TWINVIEW_CONSISTENCY_S
    """
    log.install(os.environ)
    refuse_misspelt(), gpu_required(), decode_s(), keeps_originals(), consistency_s()  # wrong settings end the start
    access = Access.from_environment(os.environ) if access is None else access
    below = public_path(os.environ)
    metrics = Metrics()
    app = FastAPI(
        title="Twinview",
        description="Embeddings of pictures, and search for similar pictures.",
        lifespan=partial(_lifespan, encoder=encoder, index=index, access=access),
        docs_url=None,
        redoc_url=None,
        middleware=[  # the outermost first
            Middleware(PublicPath, path=below),
            Middleware(Envelope, metrics=metrics),
            *access.middleware(),
            Middleware(Head),
            Middleware(BodyLimit, most=limits.body_bytes, at_once=limits.bytes_at_once),
            Middleware(CheckForms),
            Middleware(EmbedShortcut),
        ],
    )
    app.state.engine, app.state.problem = None, "the service is starting"
    app.state.answer_early = partial(answer_early, metrics)
    app.state.limits, app.state.metrics, app.state.started = limits, metrics, int(time.time())

    # with include_router every request would search the routes twice
    app.router.routes[:0] = [route for router in ROUTERS for route in router.routes]
    app.state.tools = tools.Tools(app)
    app.router.routes.append(app.state.tools.route)
    app.mount(status.DOCS_ASSETS, status.docs_assets())
    app.openapi = lambda: openapi.document(app, access)

    errors.install(app)
    app.exception_handler(IndexProblem)(_answer_index_problem)
    return app


async def _answer_index_problem(request: Request, error: IndexProblem) -> Response:
    refusal = collections.refusal(error)
    if refusal.status >= 500:
        logger.warning("%s", error)
        refusal.detail = errors.without_place(refusal.detail, request.app.state.engine.library.store.uri)
    return errors.response(refusal)


@asynccontextmanager
async def _lifespan(app: FastAPI, encoder: str | None, index: str | Path, access: Access) -> AsyncIterator[None]:
    """Loads the engine, trying again while there is no encoder, and closes it at the end."""

    async def load_or_update() -> None:
        while True:
            await asyncio.sleep(RETRY_S)
            if app.state.engine or await _load_engine(app, encoder, index):
                await run_in_threadpool(app.state.engine.library.drift.look)
                app.state.metrics.update_gauges()

    await _load_engine(app, encoder, index)
    if not access.keys:
        who = "everyone" if access.open else "requests from this machine only"
        logger.info("there are no API keys, so the service answers %s", who)
    background = asyncio.create_task(load_or_update())
    automatic = AutomaticResults(index, lambda: app.state.engine.cards if app.state.engine else [])
    automatic.start()
    reembedder = app.state.reembedder = Reembedder(index, lambda: app.state.engine and app.state.engine.library)
    reembedder.start()
    async with app.state.tools.run():
        yield
    automatic.close()
    await run_in_threadpool(reembedder.close)
    background.cancel()
    with suppress(asyncio.CancelledError):
        await background
    gc.unfreeze()
    if app.state.engine:
        app.state.engine.close()


async def _load_engine(app: FastAPI, encoder: str | None, index: str | Path) -> bool:
    """Returns whether the engine is loaded. Without it the service runs, and its responses say what is missing."""
    try:
        engine = await run_in_threadpool(Engine, encoder, index, app.state.limits, app.state.metrics)
    except BundleError as error:
        problem = f"{str(error).rstrip('.')}. This service tries again every {RETRY_S:g} s."
        if problem != app.state.problem:
            app.state.problem = problem
            logger.warning(problem)
        return False
    app.state.engine = engine
    await _open_collections(engine)
    gc.collect()
    gc.freeze()  # what is loaded is never freed; collecting it again would stop requests for 100 ms
    return True


async def _open_collections(engine: Engine) -> None:
    """Opens the collections, so that the first search is fast, and logs what is served. A damaged one does not stop the
    service."""
    library, encoders = engine.library, ", ".join(card.id for card in engine.cards)

    def contents() -> str:
        others = (name for card in engine.cards for name in names_embedded_by(library.store.uri, card.id))
        indices = [index for name in dict.fromkeys([DEFAULT, *others]) if (index := library.index(name)).exists()]
        pictures = counted(sum(index.count() for index in indices))
        return f"{pictures} in {counted(len(indices), 'collection')} of {library.store.uri}"

    try:
        logger.info("serving %s on %s; %s", encoders, engine.providers[0], await run_in_threadpool(contents))
    except IndexProblem as error:
        logger.warning("serving %s on %s. %s", encoders, engine.providers[0], error)
