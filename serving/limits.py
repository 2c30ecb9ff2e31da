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
    """Of their files."""
    rows_at_once: int = 10_000
    """Of all requests together, waiting to be written to collections or being written."""
    reads_at_once: int = 256
    """Of collections, by all requests together."""
    threads: int = 0
    """For decoding, and as many for the encoder; 0 for one a core."""


USUAL = Limits()


class Gate:
    """Counts the images that are in the house, or what else there is a limit of, and the bytes of their files."""

    def __init__(self, images: int, bytes: int = USUAL.bytes_at_once, what: str = "images"):
        """how many are taken in at once"""
        self._images, self._bytes, self._what = images, bytes, what
        self.inside = 0
        self.inside_bytes = 0

    def check(self, images: int = 1, bytes: int = 0) -> None:
        """raises Busy when with those inside they would be too many. One request alone never is too large for bytes."""
        if self.inside + images > self._images:
            raise self._busy(f"{self._images} {self._what}")
        if self.inside and self.inside_bytes + bytes > self._bytes:
            raise self._busy(f"{self._bytes / 2**20:.0f} MiB of {self._what}")

    @contextmanager
    def admit(self, images: int, bytes: int) -> Iterator[None]:
        """raises as check"""
        self.check(images, bytes)
        self.inside += images
        self.inside_bytes += bytes
        try:
            yield
        finally:
            self.inside -= images
            self.inside_bytes -= bytes

    def _busy(self, most: str) -> Busy:
        message = f"the service has as much work as it takes on at once, {most}; come back soon"
        return Busy(message, headers={"Retry-After": str(RETRY_AFTER_S)})


class BodyLimit:
    """ASGI middleware: 413 for a body above `most` bytes, by its announced length or else as it arrives."""

    def __init__(self, app: ASGIApp, most: int):
        self.app = app
        self.most = most

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
            received += len(message.get("body", b""))
            if received > self.most:
                raise self._refusal()
            return message

        await self.app(scope, counted, send)

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
