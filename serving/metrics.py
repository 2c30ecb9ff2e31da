"""What /metrics tells, in Prometheus's text format.

Requests are counted by route, never by the path that was asked for: paths are the visitors' to invent.
"""

from collections.abc import Callable
from time import perf_counter

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
IMAGES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    def __init__(self):
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter(
            "twinview_requests", "Requests answered, by route and status.", ["route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "twinview_request_seconds",
            "From the first byte of a request to the last of its answer.",
            ["route"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.batch = Histogram(
            "twinview_batch_images", "Images per run of the encoder.", buckets=IMAGES, registry=self.registry
        )
        self.encoding = Counter("twinview_encoding_seconds", "Time in runs of the encoder.", registry=self.registry)
        self.inside = Gauge("twinview_images_at_once", "Images being worked on.", registry=self.registry)

    def measured(self, encode: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
        """The same function, each call observed."""

        def observed(pixels: np.ndarray) -> np.ndarray:
            started = perf_counter()
            vectors = encode(pixels)
            self.encoding.inc(perf_counter() - started)
            self.batch.observe(len(pixels))
            return vectors

        return observed


class Measured:
    """ASGI middleware that counts and times requests."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started, status = perf_counter(), 500

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noting)
        finally:
            route = scope.get("route")
            name = scope.get("root_path", "") + route.path if route else "other"
            self.metrics.requests.labels(name, status).inc()
            self.metrics.seconds.labels(name).observe(perf_counter() - started)
