"""Limits the size of request bodies, and refuses compressed ones, whose size nobody knows before they are read."""

import asyncio
from time import monotonic

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.errors import Busy, TooLarge, UnsupportedType
from serving.limits import busy

UPLOAD_S = 60.0
"""Seconds after which an upload gives way to others when there is no memory for all."""


class BodyLimit:
    """ASGI middleware that raises TooLarge, UnsupportedType and Busy; Envelope turns them into responses.

    When there is no memory left, uploads that have taken longer than a minute are ended, the oldest first. Otherwise
    some clients that send slowly could keep the service busy for hours.

    most     largest body, in bytes; checked by the Content-Length, or without one while the body arrives
    at_once  most bytes of all bodies in memory together; a single body may exceed it if there is no other
    """

    def __init__(self, app: ASGIApp, most: int, at_once: int):
        self.app = app
        self.most, self.at_once = most, at_once
        self.in_flight = 0
        self._arriving: dict[_Upload, None] = {}  # in the order of their arrival

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        for name, value in scope["headers"]:
            if name == b"content-length" and value.isdigit() and int(value) > self.most:
                raise self._too_large()
            if name == b"content-encoding" and value.strip().lower() not in (b"", b"identity"):
                encoding = value[:100].decode("latin-1")
                raise UnsupportedType(
                    f"the body is sent as {encoding}; send it uncompressed, since images are compressed already",
                    headers={"Accept-Encoding": "identity"},
                )
        upload = _Upload(asyncio.current_task())

        async def receive_counted() -> Message:
            if not upload.whole:
                self._arriving[upload] = None
            message = await receive()
            if not message.get("more_body", False):
                upload.whole = True
                self._arriving.pop(upload, None)
            size = len(message.get("body", b""))
            upload.received += size
            self.in_flight += size
            if upload.received > self.most:
                raise self._too_large()
            if size and self.in_flight > max(self.at_once, upload.received):
                self._end_oldest()
                raise self._busy()
            return message

        try:
            await self.app(scope, receive_counted, send)
        except asyncio.CancelledError:
            if upload.ended and upload.task:
                upload.task.uncancel()
                raise self._busy() from None
            raise
        finally:
            self._arriving.pop(upload, None)
            self.in_flight -= upload.received

    def _end_oldest(self) -> None:
        oldest = next((upload for upload in self._arriving if not upload.ended), None)
        if oldest and oldest.task and monotonic() - oldest.begun > UPLOAD_S:
            oldest.ended = True
            oldest.task.cancel()

    def _busy(self) -> Busy:
        return busy(f"{self.at_once / 2**20:.0f} MiB")

    def _too_large(self) -> TooLarge:
        return TooLarge(f"the request is larger than {self.most / 2**20:g} MiB; send fewer images at a time")


class _Upload:
    """A request whose body is arriving."""

    def __init__(self, task: asyncio.Task | None):
        self.task = task
        self.begun = monotonic()
        self.received = 0  # bytes
        self.whole = False
        self.ended = False
