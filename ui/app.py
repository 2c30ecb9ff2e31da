"""The page: pictures like a picture, and the pairs of views that SimCLR trains on.

The service mounts it at its own /ui, where its requests stay in the process. Alone, it asks a service over HTTP:

    python ui/app.py --service http://127.0.0.1:3000

with the key in TWINVIEW_API_KEY, where the service wants one. Who sees the page is decided as for the service (see
serving/access.py): whoever has one of TWINVIEW_API_KEYS, or without keys whoever is on this machine.
"""

import asyncio
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__" and not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio as gr
import httpx
from fastapi import FastAPI
from fastapi.responses import RedirectResponse, Response

from serving.access import Access, KeyProblem, Lock, inside
from serving.client import AsyncClient, ServiceError
from serving.client.calls import COLLECTION
from ui import style
from ui.tabs import duplicates, invariance, map, runs, similar, views
from ui.widgets import augmentation, camera, computing, curves, grid, matrix, side, well

PATH = "/ui"
CSS = "".join(
    part.CSS
    for part in (
        style,
        well,
        camera,
        side,
        grid,
        similar,
        computing,
        map,
        duplicates,
        augmentation,
        matrix,
        views,
        curves,
        invariance,
        runs,
    )
)
UPLOADS = "twinview-uploads-"
MASTHEAD = '<header class="masthead"><h1>Twinview</h1><p>Pictures by likeness, without a single label.</p></header>'


@dataclass(frozen=True)
class Options:
    """Serve the search page on this machine, for a service that runs elsewhere or without it."""

    service: str = "http://127.0.0.1:3000"
    """Address of the service (`bentoml serve`). It need not be up yet."""
    port: int = 7860
    """Where the page is served, at http://127.0.0.1:PORT."""


def build(client) -> gr.Blocks:
    """The page over `client`, an AsyncClient."""
    deletion_s = (600, 3600)  # every ten minutes, uploads of more than an hour ago
    with gr.Blocks(title="Twinview", fill_width=True, delete_cache=deletion_s) as page:
        with gr.Row(elem_id="top"):
            gr.HTML(MASTHEAD, apply_default_css=False, js_on_load=None)
            collection = gr.Dropdown(
                [COLLECTION], value=COLLECTION, show_label=False, container=False, visible=False, elem_id="collection"
            )
        trail = gr.State(())  # of Query: what was searched for; the last is the present one
        with gr.Row(elem_id="frame"):
            with gr.Column(elem_id="side"):
                side.column(trail)
            with gr.Column(elem_id="main"), gr.Tabs(elem_id="tabs") as tabs:
                with gr.Tab("Similar", id="similar"):
                    similar.tab(client, trail, collection, page)
                with gr.Tab("Map", id="map"):
                    map.tab(client, trail, collection, tabs)
                with gr.Tab("Duplicates", id="duplicates"):
                    duplicates.tab(client, trail, collection, tabs)
                with gr.Tab("Views", id="views"):
                    views.tab(client, trail, collection, tabs)
                with gr.Tab("Invariance", id="invariance"):
                    invariance.tab(client, trail, collection, tabs)
                with gr.Tab("Runs", id="runs"):
                    runs.tab(client, trail, collection, tabs)
    return page.queue(default_concurrency_limit=16)


def mount(app: FastAPI) -> FastAPI:
    """Put the page at /ui of the service's own app. Its requests are answered in this process, without a socket."""
    # A failure is answered 500, as over a socket.
    transport = httpx.ASGITransport(inside(app), raise_app_exceptions=False)
    return _put(app, AsyncClient("http://service", transport=transport))


def standalone(client) -> FastAPI:
    """An app of the page alone. Thumbnails pass through it, so a browser needs to reach no other address."""
    app = FastAPI(openapi_url=None)

    @app.get("/")
    async def start() -> Response:
        return RedirectResponse(PATH)

    @app.get("/collections/{name}/items/{id}/thumbnail")
    async def thumbnail(name: str, id: str) -> Response:
        try:
            data = await client.thumbnail(id, collection=name)
        except ServiceError as error:
            return Response(str(error), status_code=error.status or 502, media_type="text/plain")
        return Response(data, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=3600"})

    return _put(app, client)


def _put(app: FastAPI, client) -> FastAPI:
    if "GRADIO_TEMP_DIR" not in os.environ:  # uploads lie in a folder that nobody but this process's user reads
        os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix=UPLOADS)
    for fetching in ("file=http{url:path}", "proxy={url:path}"):  # Gradio would fetch what a visitor names
        app.add_api_route(f"{PATH}/gradio_api/{fetching}", _refuse, methods=["GET", "HEAD"], include_in_schema=False)
    gr.processing_utils.async_ssrf_protected_download = _fetch_nothing  # nor what a program names as a picture
    page = build(client)
    page.has_launched = True  # or Gradio would take any file of this machine for an upload
    app = gr.mount_gradio_app(
        app,
        page,
        path=PATH,
        theme=style.theme(),
        css=CSS,
        head=style.ICON + style.KEYS,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        show_error=False,
    )
    _stop_clean(app, app.routes[-1].app.stop_event, Path(os.environ["GRADIO_TEMP_DIR"]))
    return app


async def _fetch_nothing(url: str, cache_dir: str) -> str:
    raise gr.Error("this page fetches nothing from elsewhere; upload the picture", print_exception=False)


async def _refuse() -> Response:
    return Response("this page fetches nothing from elsewhere", status_code=404, media_type="text/plain")


def _stop_clean(app: FastAPI, stop: asyncio.Event, uploads: Path) -> None:
    """On Ctrl-C or SIGTERM, `stop` what Gradio sends to open pages without end: a server would wait for the end.
    Then delete the uploads, where their folder is ours."""
    lifespan = app.router.lifespan_context

    @asynccontextmanager
    async def listening(app: FastAPI):
        loop, before = asyncio.get_running_loop(), {}

        def stopped(number, frame):
            loop.call_soon_threadsafe(stop.set)
            before[number](number, frame)

        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if callable(signal.getsignal(number)):  # the server's
                    before[number] = signal.signal(number, stopped)
        try:
            async with lifespan(app) as state:
                yield state
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            if uploads.name.startswith(UPLOADS):
                shutil.rmtree(uploads, ignore_errors=True)

    app.router.lifespan_context = listening


def main(options: Options) -> None:
    import uvicorn

    try:
        access = Access.from_environment(os.environ)
    except KeyProblem as error:
        sys.exit(f"error: {error}")
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", options.port))
        except (OSError, OverflowError) as error:
            sys.exit(f"Port {options.port} cannot be used ({error}); name another with --port.")
        print(f"The page is at http://127.0.0.1:{options.port}, for the service at {options.service}. Ctrl-C ends it.")
        app = standalone(AsyncClient(options.service, os.environ.get("TWINVIEW_API_KEY")))
        app.add_middleware(Lock, access=access)
        with suppress(KeyboardInterrupt):
            uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Options, description=__doc__))
