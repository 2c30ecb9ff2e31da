"""Limits the size of request bodies."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.errors import TooLarge
from serving.limits import busy


class BodyLimit:
    """ASGI middleware that raises TooLarge and Busy; Envelope turns them into responses.

    most     largest body, in bytes; checked by the Content-Length, or without one while the body arrives
    at_once  most bytes of all bodies in memory together; a single body may exceed it if there is no other
    """

    def __init__(self, app: ASGIApp, most: int, at_once: int):
        self.app = app
        self.most, self.at_once = most, at_once
        self.in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        for name, value in scope["headers"]:
            if name == b"content-length" and value.isdigit() and int(value) > self.most:
                raise self._too_large()
        received = 0

        async def receive_counted() -> Message:
            nonlocal received
            message = await receive()
            size = len(message.get("body", b""))
            received += size
            self.in_flight += size
            if received > self.most:
                raise self._too_large()
            if size and self.in_flight > max(self.at_once, received):
                raise busy(f"{self.at_once / 2**20:.0f} MiB")
            return message

        try:
            await self.app(scope, receive_counted, send)
        finally:
            self.in_flight -= received

    def _too_large(self) -> TooLarge:
        return TooLarge(f"the request is larger than {self.most / 2**20:g} MiB; send fewer images at a time")
