"""How BentoML starts the service: `bentoml serve` and `bentoml build` find this file through bentofile.yaml.

    TWINVIEW_ENCODER   encoder bundle's folder or tag of BentoML's model store, several with commas between, the first
                       for whoever names none; the newest under runs/ by default
    TWINVIEW_INDEX     folder of the collections, or s3://bucket/prefix; ./index by default
    TWINVIEW_API_KEYS, TWINVIEW_API_KEYS_FILE, TWINVIEW_OPEN: see keys.py. TWINVIEW_LOG: see log.py

BentoML supervises the process, builds images and keeps models. Its HTTP layer is not used: it answers for itself at
/readyz and /metrics, in other shapes than ours, and costs more than our own part of a small request.
"""

import asyncio
import contextlib
import importlib.util
import logging
import os
import signal
import sys
from dataclasses import replace

# No reports to its makers. The command line asked about this before it imported us, and remembers.
os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")
with contextlib.suppress(ImportError, AttributeError):
    from bentoml._internal.utils.analytics.usage_stats import do_not_track

    do_not_track.cache_clear()

import bentoml
import uvicorn
from bentoml._internal.configuration.containers import BentoMLContainer
from bentoml._internal.resource import system_resources
from starlette.types import ASGIApp

from serving.app import create_app
from serving.limits import cores

STOP_S = 10  # for requests under way, when the service is told to stop

try:
    app = create_app(os.environ.get("TWINVIEW_ENCODER"), os.environ.get("TWINVIEW_INDEX") or "index")
except ValueError as error:  # of the environment's variables, which the message names
    sys.exit(f"error: {error}")


class Direct(bentoml.Service):
    """BentoML starts and stops; requests go straight to our app."""

    def to_asgi(self, is_main: bool = True):
        lifecycle = super().to_asgi(is_main)
        app.state.limits = replace(app.state.limits, threads=max(1, cores() // workers()))

        served = traced(app)

        async def asgi(scope, receive, send):
            with contextlib.suppress(asyncio.CancelledError):  # cut off, STOP_S after the stop: no fault to report
                await (lifecycle if scope["type"] == "lifespan" else served)(scope, receive, send)

        return asgi


def workers() -> int:
    """Processes that share the cores. BentoML tells each of them its number, but not how many there are."""
    count = BentoMLContainer.config.get()["services"]["twinview"]["workers"]
    return int(system_resources()["cpu"]) if count == "cpu_count" else count or 1


def traced(app: ASGIApp) -> ASGIApp:
    """With a span of OpenTelemetry a request, where BentoML's configuration (`tracing`) asks for some."""
    if not BentoMLContainer.tracing.sample_rate.get():
        return app
    from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware

    return OpenTelemetryMiddleware(
        app,
        excluded_urls=BentoMLContainer.tracing_excluded_urls.get(),
        tracer_provider=BentoMLContainer.tracer_provider.get(),
    )


# For this machine alone, unless --host says otherwise. A container has a network of its own.
HOST = "0.0.0.0" if "BENTOML_CONTAINERIZED" in os.environ else "127.0.0.1"


@bentoml.service(name="twinview", service_class=Direct, http={"host": HOST})
@bentoml.asgi_app(app, path="/")
class Twinview:
    def __init__(self):
        _stop_in_time()
        logging.getLogger("twinview").setLevel(logging.INFO)
        if workers() > 1:
            logging.getLogger("twinview").warning("the page is left out: it works with one worker only")
        elif importlib.util.find_spec("ui"):  # a built bento may leave it out
            from ui.app import mount

            mount(app)


def _stop_in_time() -> None:
    """Else one upload that stalls would hold up the end: uvicorn waits for it without limit, and BentoML for a day.

    BentoML leaves no other way to set this; the worker has uvicorn's server behind its signals.
    """
    server = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    if isinstance(server, uvicorn.Server) and server.config.timeout_graceful_shutdown is None:
        server.config.timeout_graceful_shutdown = STOP_S
