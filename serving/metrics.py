"""What /metrics tells, in Prometheus's text format.

Requests are counted by route, never by the path that was asked for: paths are the visitors' to invent. Under BentoML
the counts are those of all workers together, whichever of them is asked; `process_` tells of that one.
"""

import os
from collections.abc import Callable
from pathlib import Path

import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
STAGE_SECONDS = (0.0005, 0.001, 0.0025, *SECONDS)
STAGES = ("decode", "queue", "model")
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
        self.inside = Gauge(
            "twinview_images_at_once", "Images being worked on.", registry=self.registry, multiprocess_mode="livesum"
        )
        self.waiting = Gauge(
            "twinview_images_waiting",
            "Images that wait for a batch.",
            registry=self.registry,
            multiprocess_mode="livesum",
        )
        self.levels: Callable[[], tuple[int, int]] = lambda: (0, 0)
        """Gives what the two gauges are to show."""
        self.images = Counter("twinview_images", "Images embedded for requests.", registry=self.registry)
        stages = Histogram(
            "twinview_stage_seconds",
            "Of a request that embeds: in decoding, waiting for a batch, and in runs of the encoder.",
            ["stage"],
            buckets=STAGE_SECONDS,
            registry=self.registry,
        )
        self.stages = {stage: stages.labels(stage) for stage in STAGES}

    def answered(self, route: str, status: int, seconds: float) -> None:
        """route  as the router knows it, never a path that was asked for"""
        self.requests.labels(route, status).inc()
        self.seconds.labels(route).observe(seconds)

    def embedded(self, images: int, times: dict[str, float]) -> None:
        """times  seconds by stage"""
        self.images.inc(images)
        for stage, seconds in times.items():
            self.stages[stage].observe(seconds)

    def look(self) -> None:
        """Read the gauges. Other workers see what the last look has read."""
        inside, waiting = self.levels()
        self.inside.set(inside)
        self.waiting.set(waiting)

    def text(self) -> bytes:
        self.look()
        folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
        if not folder:
            return generate_latest(self.registry)
        for file in Path(folder).glob("gauge_live*.db"):
            pid = int(file.stem.rpartition("_")[2])
            if not psutil.pid_exists(pid):  # a worker that was killed leaves its levels behind
                mark_process_dead(pid)
        everyone = CollectorRegistry()
        ProcessCollector(registry=everyone)
        MultiProcessCollector(everyone)
        return generate_latest(everyone)

    def encoded(self, images: int, seconds: float) -> None:
        """A run of the encoder."""
        self.encoding.inc(seconds)
        self.batch.observe(images)
