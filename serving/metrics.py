"""The metrics that /metrics shows, in Prometheus's text format.

Requests are counted by route, never by path: clients can invent any number of paths. Under BentoML the counts are sums
over all workers, whichever worker answers /metrics; the `process_` metrics are that worker's own.
"""

import os
from collections.abc import Callable
from functools import partial
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
        registry = self.registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "twinview_requests", "Requests answered, by route and status.", ["route", "status"], registry=registry
        )
        what = "Time from the first byte of a request to the last byte of its response."
        self.seconds = Histogram("twinview_request_seconds", what, ["route"], buckets=SECONDS, registry=registry)
        what = "Images per run of the encoder."
        self.batch = Histogram("twinview_batch_images", what, buckets=IMAGES, registry=registry)
        self.encoding = Counter("twinview_encoding_seconds", "Time in runs of the encoder.", registry=registry)
        gauge = partial(Gauge, registry=registry, multiprocess_mode="livesum")
        self.in_flight = gauge("twinview_images_at_once", "Images in flight.")
        self.waiting = gauge("twinview_images_waiting", "Images waiting for a batch.")
        self.levels: Callable[[], tuple[int, int]] = lambda: (0, 0)
        """Returns the current values of the two gauges: images in flight, images waiting."""
        self.images = Counter("twinview_images", "Images embedded for requests.", registry=registry)
        what = "Time of an embedding request in each stage: decoding, waiting for a batch, runs of the encoder."
        stages = Histogram("twinview_stage_seconds", what, ["stage"], buckets=STAGE_SECONDS, registry=registry)
        self.stages = {stage: stages.labels(stage) for stage in STAGES}

    def record_request(self, route: str, status: int, seconds: float) -> None:
        """route  the router's pattern, never the path"""
        self.requests.labels(route, status).inc()
        self.seconds.labels(route).observe(seconds)

    def record_embedding(self, images: int, times: dict[str, float]) -> None:
        """times  seconds by stage"""
        self.images.inc(images)
        for stage, seconds in times.items():
            self.stages[stage].observe(seconds)

    def record_run(self, images: int, seconds: float) -> None:
        """Count one run of the encoder."""
        self.encoding.inc(seconds)
        self.batch.observe(images)

    def update_gauges(self) -> None:
        """Read the gauges' values. Other workers see those of the latest update."""
        in_flight, waiting = self.levels()
        self.in_flight.set(in_flight)
        self.waiting.set(waiting)

    def text(self) -> bytes:
        self.update_gauges()
        folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
        if not folder:
            return generate_latest(self.registry)
        for file in Path(folder).glob("gauge_live*.db"):
            pid = int(file.stem.rpartition("_")[2])
            if not psutil.pid_exists(pid):  # a killed worker leaves its gauges behind
                mark_process_dead(pid)
        all_workers = CollectorRegistry()
        ProcessCollector(registry=all_workers)
        MultiProcessCollector(all_workers)
        return generate_latest(all_workers)
