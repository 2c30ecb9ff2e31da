"""Checks the multipart forms of all routes: their text is UTF-8, and they have an end.

The libraries that read forms would use any of Python's encodings, some of which fail in their own ways, and take a form
that was cut off for a short one.
"""

import codecs

from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.errors import Malformed

CHARSETS = ("utf-8", "ascii")
AFTER_BYTES = 1024  # after the end; nothing belongs there, but it is allowed


class CheckForms:
    """ASGI middleware that raises Malformed; Envelope turns it into a response."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        given = Headers(scope=scope).get("content-type", "")  # the first one, as in the libraries
        if not given.lower().startswith("multipart/"):
            return await self.app(scope, receive, send)
        _, options = parse_options_header(given)
        if b"boundary" not in options:  # no library reads it then
            return await self.app(scope, receive, send)
        charset = options.get(b"charset", b"utf-8").decode("latin-1")
        if not _is_allowed(charset):
            raise Malformed(f"forms are sent in UTF-8, not in {charset[:100]!r}")
        end = b"--" + options[b"boundary"] + b"--"
        last = b""

        async def receive_checked() -> Message:
            nonlocal last
            message = await receive()
            if message["type"] == "http.request":
                last = (last + message.get("body", b""))[-len(end) - AFTER_BYTES :]
                if not message.get("more_body", False) and end not in last:
                    raise Malformed("the form is cut off: it has no end")
            return message

        await self.app(scope, receive_checked, send)


def _is_allowed(charset: str) -> bool:
    try:
        return codecs.lookup(charset).name in CHARSETS
    except (LookupError, ValueError):  # a null character
        return False
