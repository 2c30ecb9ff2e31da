"""How much the service takes on: of one request, and of all requests together."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from export.artifact import MAX_PIXELS
from serving import errors
from serving.errors import Busy, TooLarge

RETRY_AFTER_S = 1


@dataclass(frozen=True)
class Limits:
    body_bytes: int = 64 * 2**20
    """Of one request."""
    images: int = 256
    """Of one request."""
    rows: int = 1000
    """Of one request: ids, or vectors that are ready."""
    pixels: int = MAX_PIXELS
    """Of one image."""
    images_at_once: int = 1024
    """Of all requests together, being decoded, waiting or being encoded; beyond it requests are turned away."""
    bytes_at_once: int = 2**30
    """Of all requests' bodies together, from their arrival to the answer."""
    rows_at_once: int = 10_000
    """Of all requests together, waiting to be written to collections or being written."""
    reads_at_once: int = 256
    """Of collections, by all requests together."""
    threads: int = 0
    """For decoding, and as many for the encoder; 0 for one a core."""


USUAL = Limits()


class Gate:
    """Counts the images that are in the house, or what else there is a limit of."""

    def __init__(self, most: int, what: str = "images"):
        """how many are taken in at once"""
        self._most, self._what = most, what
        self.inside = 0

    def check(self, count: int = 1) -> None:
        """raises Busy when with those inside they would be too many"""
        if self.inside + count > self._most:
            raise _busy(f"{self._most} {self._what}")

    @contextmanager
    def admit(self, count: int) -> Iterator[None]:
        """raises as check"""
        self.check(count)
        self.inside += count
        try:
            yield
        finally:
            self.inside -= count


def _busy(most: str) -> Busy:
    message = f"the service has as much work as it takes on at once, {most}; come back soon"
    return Busy(message, headers={"Retry-After": str(RETRY_AFTER_S)})


class BodyLimit:
    """ASGI middleware: 413 for a body above `most` bytes, by its announced length or else as it arrives; 429 for what
    arrives when all bodies together have `at_once` bytes, however slowly they come."""

    def __init__(self, app: ASGIApp, most: int, at_once: int):
        self.app = app
        self.most, self.at_once = most, at_once
        self.inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        for name, value in scope["headers"]:
            if name == b"content-length" and value.isdigit() and int(value) > self.most:
                return await errors.answer(self._refusal())(scope, receive, send)
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            size = len(message.get("body", b""))
            received += size
            self.inside += size
            if received > self.most:
                raise self._refusal()
            if size and self.inside > max(self.at_once, received):  # one alone is never too large
                raise _busy(f"{self.at_once / 2**20:.0f} MiB")
            return message

        try:
            await self.app(scope, counted, send)
        finally:
            self.inside -= received

    def _refusal(self) -> TooLarge:
        return TooLarge(f"the request is larger than {self.most / 2**20:g} MiB; send fewer images at a time")


def cores() -> int:
    """Processor cores that this process may use: its affinity, and a container's quota."""
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


def give_way() -> None:
    """Let other processes have the cores first, from now on."""
    if hasattr(os, "setpriority"):
        os.setpriority(os.PRIO_PROCESS, 0, 10)
