"""What is around every answer: the request's id, headers for the browser's safety, the count, the line in the log.

X-Request-Id   the client's own, where it is one line of at most 128 letters, digits and ._:/+=- ; otherwise made
"""

import itertools
import os
import re
from time import perf_counter

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving import errors
from serving.api import log
from serving.metrics import Metrics

SAFETY = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"same-origin"),
    (b"content-security-policy", b"frame-ancestors 'self'"),
    (b"x-frame-options", b"SAMEORIGIN"),  # the same, for what is older
    (b"cross-origin-resource-policy", b"same-origin"),
]
SANE_ID = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")
PROCESS, NUMBER = os.urandom(8).hex().encode(), itertools.count(1)  # urandom anew took 3 % of the CPU
CLIENT_GONE = 499  # no answer; what nginx counts it as


class Envelope:
    """ASGI middleware, around all others."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started, status, request_id = perf_counter(), None, _request_id(scope)
        log.REQUEST_ID.set(request_id.decode())

        async def sealed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message.get("headers", ()), (b"x-request-id", request_id), *SAFETY]
                message = {**message, "headers": headers}
            await send(message)

        try:
            await self.app(scope, receive, sealed)
        except ClientDisconnect:
            status = CLIENT_GONE
        except Exception:
            log.requests.exception("%s %s failed", scope["method"], _route(scope))
            if status is not None:  # too late for another answer: the server breaks off
                raise
            await errors.failed()(scope, receive, sealed)
        finally:
            self._told(scope, 500 if status is None else status, perf_counter() - started)

    def _told(self, scope: Scope, status: int, seconds: float) -> None:
        route = _route(scope)
        self.metrics.answered(route, status, seconds)
        if log.requests.isEnabledFor(log.logging.INFO):
            facts = {"method": scope["method"], "route": route, "status": status, "seconds": round(seconds, 6)}
            facts |= scope.get("state", {}).get("facts", {})
            log.requests.info("%s %s %s", scope["method"], route, status, extra={"facts": facts})


def _request_id(scope: Scope) -> bytes:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and SANE_ID.fullmatch(value):
            return value
    return b"%s%016x" % (PROCESS, next(NUMBER))


def _route(scope: Scope) -> str:
    """The pattern that the path has matched, never the path: paths are the visitors' to invent."""
    route = scope.get("route")
    return scope.get("root_path", "") + route.path if route else "other"
