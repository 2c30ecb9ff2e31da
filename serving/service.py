"""The service as BentoML starts it: bentofile.yaml names this file for `bentoml serve` and `bentoml build`.

    TWINVIEW_ENCODER   folder of an encoder bundle, or tag of BentoML's model store; several separated by commas, the
                       first is the default encoder. By default the newest export in runs/
    TWINVIEW_INDEX     folder of the collections, or s3://bucket/prefix; by default index/
    TWINVIEW_GPU=required   serve nothing on the CPU
    TWINVIEW_DECODE_S       seconds of processor time for decoding a file, besides those for its pixels; by default 2
    TWINVIEW_API_KEYS, TWINVIEW_API_KEYS_FILE, TWINVIEW_OPEN: see access.py. TWINVIEW_LOG: see api/log.py.
    TWINVIEW_PUBLIC_PATH: see public_path.py

BentoML supervises the process, builds images and stores models. Its HTTP layer is bypassed: its /readyz and /metrics
have other formats, and it takes more time than our own code for a small request.
"""

import asyncio
import contextlib
import importlib.util
import logging
import os
import signal
import sys
from dataclasses import replace
from functools import partial

import bentoml
import uvicorn
from bentoml._internal.configuration.containers import BentoMLContainer
from bentoml._internal.resource import system_resources
from starlette.types import ASGIApp, Receive, Scope, Send

from serving import supervisor
from serving.app import create_app
from serving.connection import Connection
from serving.limits import cores

STOP_S = 10  # for running requests to finish after the signal to stop

try:
    app = create_app(os.environ.get("TWINVIEW_ENCODER"), os.environ.get("TWINVIEW_INDEX") or "index")
except ValueError as error:  # names the environment variable at fault
    sys.exit(f"error: {error}")


class DirectService(bentoml.Service):
    """Starts and stops like every BentoML service, but passes requests directly to the app."""

    def inject_config(self) -> None:
        super().inject_config()
        if not supervisor.is_worker():
            supervisor.prepare()

    def to_asgi(self, is_main: bool = True) -> ASGIApp:
        lifecycle = super().to_asgi(is_main)
        app.state.limits = replace(app.state.limits, threads=max(1, cores() // workers()))
        requests = traced(app)

        async def asgi(scope: Scope, receive: Receive, send: Send) -> None:
            with contextlib.suppress(asyncio.CancelledError):  # a request still running STOP_S after the signal
                await (lifecycle if scope["type"] == "lifespan" else requests)(scope, receive, send)

        return asgi


def workers() -> int:
    """Returns the number of processes that share the cores. BentoML only gives a worker its own index."""
    count = BentoMLContainer.config.get()["services"]["twinview"]["workers"]
    return int(system_resources()["cpu"]) if count == "cpu_count" else count or 1


def traced(app: ASGIApp) -> ASGIApp:
    """Adds an OpenTelemetry span for each request if BentoML's configuration (`tracing`) enables tracing."""
    if not BentoMLContainer.tracing.sample_rate.get():
        return app
    from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware

    return OpenTelemetryMiddleware(
        app,
        excluded_urls=BentoMLContainer.tracing_excluded_urls.get(),
        tracer_provider=BentoMLContainer.tracer_provider.get(),
    )


# Listen on this machine only, unless --host is given. A container has its own network.
HOST = "0.0.0.0" if "BENTOML_CONTAINERIZED" in os.environ else "127.0.0.1"


# pyrefly: ignore[bad-assignment]  # BentoML converts the host's text
@bentoml.service(name="twinview", service_class=DirectService, http={"host": HOST})
@bentoml.asgi_app(app, path="/")
class Twinview:
    def __init__(self):
        _set_up_server()
        if supervisor.is_worker():
            supervisor.end_with_supervisor()
        logging.getLogger("twinview").setLevel(logging.INFO)
        if workers() > 1:
            logging.getLogger("twinview").warning("the page is left out, because it works with one worker only")
        elif importlib.util.find_spec("ui") and importlib.util.find_spec("gradio"):  # an installation may lack them
            from ui.app import mount

            mount(app)


def _set_up_server() -> None:
    """Sets what BentoML has no setting for. Uvicorn's server is the object behind the worker's signal handler, and
    listens only when the service has started."""
    server = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    if not isinstance(server, uvicorn.Server):
        return
    # pyrefly: ignore[bad-assignment]  # any callable that makes one
    server.config.http_protocol_class = partial(Connection, answer=app.state.answer_early)
    if server.config.timeout_graceful_shutdown is None:
        # Otherwise one stalled upload delays the shutdown: uvicorn waits for it without limit, and BentoML for a day.
        server.config.timeout_graceful_shutdown = STOP_S
