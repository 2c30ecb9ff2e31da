"""The metrics that /metrics shows, in Prometheus's text format.

Requests are counted by route, never by path: clients can invent any number of paths. Under BentoML the counts are sums
over all workers, whichever worker answers /metrics; the `process_` metrics are that worker's own.
"""

import os
from collections.abc import Callable, Iterable
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
        self.gpu_failed = gauge("twinview_gpu_failed", "Workers that run an encoder on the CPU because the GPU failed.")
        self.levels: Callable[[], tuple[int, int, bool]] = lambda: (0, 0, False)
        """Returns the current values of the gauges: images in flight, images waiting, whether the GPU has failed."""
        labels = ["collection", "model"]
        drift = partial(Gauge, labelnames=labels, registry=registry)
        what = "How far the last pictures lie from the collection, 0 (alike) to 1.41; of several workers the largest."
        self.drift_distance = drift("twinview_drift_distance", what, multiprocess_mode="livemax")
        what = "How likely pictures like the collection's lie so far from it; of several workers the smallest."
        self.drift_p_value = drift("twinview_drift_p_value", what, multiprocess_mode="livemin")
        what = "Number of the last pictures that are compared; of several workers the largest."
        self.drift_pictures = drift("twinview_drift_pictures", what, multiprocess_mode="livemax")
        self.drifts: Callable[[], Iterable[tuple[str, str, float, float, int]]] = tuple
        """Returns collection, model, distance, p-value and pictures of each comparison."""
        self._drifts_shown: set[tuple[str, str]] = set()
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
        in_flight, waiting, gpu_failed = self.levels()
        self.in_flight.set(in_flight)
        self.waiting.set(waiting)
        self.gpu_failed.set(gpu_failed)
        drifts = {(collection, model): values for collection, model, *values in self.drifts()}
        nothing = dict.fromkeys(self._drifts_shown - drifts.keys(), (0.0, 1.0, 0))  # shared gauges cannot be removed
        for labels, (distance, p_value, pictures) in (drifts | nothing).items():
            self.drift_distance.labels(*labels).set(distance)
            self.drift_p_value.labels(*labels).set(p_value)
            self.drift_pictures.labels(*labels).set(pictures)
        self._drifts_shown |= drifts.keys()

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
