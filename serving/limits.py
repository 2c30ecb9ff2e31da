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
    pixels: int = MAX_PIXELS
    """Of one image."""
    images_at_once: int = 1024
    """Of all requests together, being decoded, waiting or being encoded; beyond it requests are turned away."""


USUAL = Limits()


class Gate:
    """Counts the images that are in the house."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.inside = 0

    @contextmanager
    def admit(self, images: int) -> Iterator[None]:
        """raises Busy when they would be more than the capacity together with those inside."""
        if self.inside + images > self.capacity:
            raise Busy(
                f"the service is working on {self.inside} images and takes on at most {self.capacity}; come back soon",
                headers={"Retry-After": str(RETRY_AFTER_S)},
            )
        self.inside += images
        try:
            yield
        finally:
            self.inside -= images


class BodyLimit:
    """ASGI middleware: 413 for a body above `most` bytes, by its announced length or else as it arrives."""

    def __init__(self, app: ASGIApp, most: int):
        self.app = app
        self.most = most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        refusal = TooLarge(f"the request is larger than {self.most / 2**20:g} MiB; send fewer images at a time")
        announced = dict(scope["headers"]).get(b"content-length", b"")
        if announced.isdigit() and int(announced) > self.most:
            return await errors.answer(refusal)(scope, receive, send)
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.most:
                raise refusal
            return message

        await self.app(scope, counted, send)


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
