"""The page: the pictures most like a picture, the map of a collection, training runs, and more.

The service mounts it at /ui; its requests then stay within the process. Alone, it sends them to a service over HTTP:

    python ui/app.py --service http://127.0.0.1:3000

with the key in TWINVIEW_API_KEY if the service requires one. The page has the same access control as the service (see
serving/access.py): visitors need one of the keys in TWINVIEW_API_KEYS; without keys only this machine can open it.
"""

import asyncio
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

if __name__ == "__main__" and not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import export.silence  # noqa: F401  turns off Gradio's reports before its import

import gradio as gr
import gradio.route_utils
import httpx
from fastapi import FastAPI, Request
from fastapi.responses import RedirectResponse, Response
from starlette.middleware import Middleware

from export.paths import parse_settings
from serving.access import Access, AccessProblem, internal
from serving.client import COLLECTION, AsyncClient, ServiceError
from serving.connection import Connection
from serving.public_path import PublicPath, PublicPathProblem, public_path
from ui import style
from ui.api import EACH
from ui.assets import raw_html, script, style_sheet
from ui.routes import NeededRoutes, Uploads
from ui.streams import Streams
from ui.tabs.duplicates import DuplicatesTab
from ui.tabs.invariance import InvarianceTab
from ui.tabs.map import MapTab
from ui.tabs.runs import RunsTab
from ui.tabs.similar import SimilarTab
from ui.tabs.views import ViewsTab
from ui.widgets import acts, large, side

PATH = "/ui"
TABS = (SimilarTab, MapTab, DuplicatesTab, ViewsTab, InvarianceTab, RunsTab)
UPLOADS = "twinview-uploads-"
MASTHEAD = '<header class="masthead"><h1>Twinview</h1><p>Search pictures by similarity, without labels.</p></header>'


@dataclass(frozen=True)
class PageOptions:
    """Serve only the page, for a service that runs elsewhere."""

    service: str = "http://127.0.0.1:3000"
    """Address of the service (`bentoml serve`). It can be started later."""
    port: int = 7860
    """Port of the page: http://127.0.0.1:PORT."""


def build(client: AsyncClient) -> gr.Blocks:
    """The page of the client's service."""
    deletion_s = (600, 3600)  # every ten minutes, delete uploads older than an hour
    with gr.Blocks(title="Twinview", fill_width=True, delete_cache=deletion_s) as page:
        with gr.Row(elem_id="top"):
            raw_html(MASTHEAD)
            collection = gr.Dropdown(
                [COLLECTION], value=COLLECTION, show_label=False, container=False, visible=False, elem_id="collection"
            )
        trail = gr.State(())  # a Trail
        changed = gr.State(0)  # how often the page has changed a collection
        selected = gr.State(SimilarTab.title)
        with gr.Row(elem_id="frame"):
            with gr.Column(elem_id="side"):
                side.column(trail)
            with gr.Column(elem_id="main"), gr.Tabs(elem_id="tabs") as tabs:
                for tab in TABS:
                    with gr.Tab(tab.title, id=tab.title.lower()):
                        tab(client, trail, collection, tabs, page, changed, selected)
        tabs.select(_title, None, selected, **EACH)
        large.overlay(client, trail, tabs)
        acts.overlay(client, changed)
    return page.queue(default_concurrency_limit=16)


def _title(event: gr.SelectData) -> str:
    return str(event.value)


def mount(app: FastAPI) -> FastAPI:
    """Add the page at /ui to the service's own app. Its requests are answered in this process, without a socket."""
    # An exception becomes a response with status 500, as over a socket.
    transport = httpx.ASGITransport(internal(app), raise_app_exceptions=False)
    return _add_page(app, AsyncClient("http://service", transport=transport))


def standalone(client: AsyncClient) -> FastAPI:
    """An app with the page only. It passes pictures on, so that the browser needs no other address."""
    app = FastAPI(openapi_url=None)

    @app.get("/")
    async def start(request: Request) -> Response:
        return RedirectResponse(request.scope["root_path"] + PATH)

    @app.get("/collections/{name}/items/{id}/thumbnail")
    async def thumbnail(name: str, id: str) -> Response:
        return await _picture(client.thumbnail(id, collection=name))

    @app.get("/collections/{name}/items/{id}/original")
    async def original(name: str, id: str, model: str | None = None) -> Response:
        return await _picture(client.original(id, collection=name, model=model))

    return _add_page(app, client)


async def _picture(read: Awaitable[bytes]) -> Response:
    try:
        data = await read
    except ServiceError as error:
        return Response(str(error), status_code=error.status or 502, media_type="text/plain")
    return Response(data, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=3600"})


def _add_page(app: FastAPI, client: AsyncClient) -> FastAPI:
    if "GRADIO_TEMP_DIR" not in os.environ:  # uploads go into a folder that only this user can read
        os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix=UPLOADS)
    gr.processing_utils.async_ssrf_protected_download = _fetch_nothing  # that a program names as a picture
    gradio.route_utils.GradioMultiPartParser = Uploads
    page = build(client)
    page.has_launched = True  # otherwise Gradio would accept any file of this machine as an upload
    app = gr.mount_gradio_app(
        app,
        page,
        path=PATH,
        root_path=public_path(os.environ) + PATH,  # behind a proxy Gradio would guess
        theme=style.theme(),
        css=style_sheet(),
        head=style.ICON + f"<script>{script('sliders')}</script>",
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        show_error=False,
    )
    mount: Any = app.routes[-1]  # of Gradio's own app, which has more attributes than Starlette's types know
    _stop_cleanly(app, mount.app.stop_event, Path(os.environ["GRADIO_TEMP_DIR"]), client)
    mount.app = Streams(NeededRoutes(mount.app, page), page, mount.app.stop_event)
    return app


async def _fetch_nothing(url: str, cache_dir: str) -> str:
    raise gr.Error("this page loads nothing from other addresses; upload the picture", print_exception=False)


def _stop_cleanly(app: FastAPI, stop: asyncio.Event, uploads: Path, client: AsyncClient) -> None:
    """On Ctrl-C or SIGTERM, set `stop`: it ends Gradio's streams to open pages, which the server would wait for.
    Then close the client's connections, and delete the uploads, if this process made their folder."""
    lifespan = app.router.lifespan_context

    @asynccontextmanager
    async def stopping(app: FastAPI) -> AsyncIterator[Any]:
        loop, before = asyncio.get_running_loop(), {}

        def on_signal(number: int, frame: FrameType | None) -> None:
            loop.call_soon_threadsafe(stop.set)
            before[number](number, frame)

        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if callable(signal.getsignal(number)):  # the server's
                    before[number] = signal.signal(number, on_signal)
        try:
            async with lifespan(app) as state:
                yield state
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            await client.aclose()
            if uploads.name.startswith(UPLOADS):
                shutil.rmtree(uploads, ignore_errors=True)

    app.router.lifespan_context = stopping


def serve(options: PageOptions) -> None:
    import uvicorn

    try:
        access, below = Access.from_environment(os.environ), public_path(os.environ)
    except (AccessProblem, PublicPathProblem) as error:
        sys.exit(f"error: {error}")
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", options.port))
        except (OSError, OverflowError) as error:
            sys.exit(f"Port {options.port} cannot be used ({error}); choose another with --port.")
        print(f"The page is at http://127.0.0.1:{options.port}, for the service at {options.service}. Ctrl-C stops it.")
        app = standalone(AsyncClient(options.service, os.environ.get("TWINVIEW_API_KEY")))
        app.user_middleware[:0] = [Middleware(PublicPath, path=below), *access.middleware()]
        with suppress(KeyboardInterrupt):
            uvicorn.Server(uvicorn.Config(app, log_level="warning", http=Connection)).run(sockets=[listener])


def main() -> None:
    serve(parse_settings(PageOptions, description=__doc__))


if __name__ == "__main__":
    main()
