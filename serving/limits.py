"""How much the service accepts: in one request, and in all requests together."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from export.artifact import MAX_PIXELS
from serving.errors import Busy

RETRY_AFTER_S = 1


@dataclass(frozen=True)
class Limits:
    body_bytes: int = 64 * 2**20
    """Largest request body, in bytes."""
    images: int = 256
    """Most images in one request."""
    rows: int = 1000
    """Most ids, or vectors computed elsewhere, in one request."""
    pixels: int = MAX_PIXELS
    """Largest image, in pixels."""
    images_at_once: int = 1024
    """Most images in progress (decoded, queued or encoded) at once; further requests get 429."""
    bytes_at_once: int = 2**30
    """Most bytes of request bodies in memory at once, each from its arrival until its response."""
    rows_at_once: int = 10_000
    """Most rows in progress (waiting or being written to collections) at once."""
    reads_at_once: int = 256
    """Most reads of collections in progress (waiting or running) at once."""
    threads: int = 0
    """Threads for decoding, and as many for the encoder; 0 for one per core."""


DEFAULT_LIMITS = Limits()


class Gate:
    """Admission counter: raises Busy when more than `most` would be in flight."""

    def __init__(self, most: int, unit: str = "images"):
        """unit  what is counted, for the error message"""
        self._most, self._unit = most, unit
        self.in_flight = 0

    def check(self, count: int = 1) -> None:
        """Raises Busy when `count` more would exceed the limit."""
        if self.in_flight + count > self._most:
            raise busy(f"{self._most} {self._unit}")

    @contextmanager
    def admit(self, count: int) -> Iterator[None]:
        """Counts `count` as in flight inside the context. Raises Busy as `check`."""
        self.check(count)
        self.in_flight += count
        try:
            yield
        finally:
            self.in_flight -= count


def busy(limit: str) -> Busy:
    message = f"the service is busy with {limit}, the most it takes at once; try again soon"
    return Busy(message, headers={"Retry-After": str(RETRY_AFTER_S)})


def cores() -> int:
    """Returns the number of processor cores this process may use, by its CPU affinity and the container's quota."""
    try:
        usable = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        usable = min(usable, -(-int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup v2, or no quota ("max")
        pass
    return max(1, usable)


def lower_priority() -> None:
    """Run this process at low priority from now on, so that others get the cores first."""
    if hasattr(os, "setpriority"):
        os.setpriority(os.PRIO_PROCESS, 0, 10)
