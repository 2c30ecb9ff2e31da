"""Adds a request id and security headers to every response, and records it in the metrics and the log.

X-Request-Id   the client's, if it consists of at most 128 letters, digits and ._:/+=- ; otherwise a new one
"""

import itertools
import logging
import os
import re
from time import perf_counter

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving import errors
from serving.api import log
from serving.metrics import Metrics

SECURITY_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"same-origin"),
    (b"content-security-policy", b"frame-ancestors 'self'"),
    (b"x-frame-options", b"SAMEORIGIN"),  # the same, for older browsers
    (b"cross-origin-resource-policy", b"same-origin"),
]
VALID_ID = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")
# An id consists of the process's id and a counter: random bytes for every request took 3 % of the CPU.
PROCESS, COUNTER = os.urandom(8).hex().encode(), itertools.count(1)
CLIENT_DISCONNECTED = 499  # nginx's status for this, for metrics and log only: no response is sent


class Envelope:
    """The outermost ASGI middleware. Also turns exceptions raised outside FastAPI's router into error responses."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started, status, request_id = perf_counter(), None, _request_id(scope)
        log.REQUEST_ID.set(request_id.decode())

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message.get("headers", ()), (b"x-request-id", request_id), *SECURITY_HEADERS]
                message = {**message, "headers": headers}
            await send(message)

        try:
            await self.app(scope, receive, send_with_headers)
        except ClientDisconnect:
            status = CLIENT_DISCONNECTED
        except Exception as error:
            if status is None and isinstance(error, errors.Refusal):
                response = errors.response(error)
            else:
                log.requests.exception("%s %s failed", scope["method"], _route(scope))
                if status is not None:  # the response has begun: let the server close the connection
                    raise
                response = errors.internal_error()
            await response(scope, receive, send_with_headers)
        finally:
            self._record(scope, 500 if status is None else status, perf_counter() - started)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        route = _route(scope)
        self.metrics.record_request(route, status, seconds)
        if log.requests.isEnabledFor(logging.INFO):
            facts = {"method": scope["method"], "route": route, "status": status, "seconds": round(seconds, 6)}
            facts |= scope.get("state", {}).get("facts", {})
            log.requests.info("%s %s %s", scope["method"], route, status, extra={"facts": facts})


def _request_id(scope: Scope) -> bytes:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and VALID_ID.fullmatch(value):
            return value
    return b"%s%016x" % (PROCESS, next(COUNTER))


def _route(scope: Scope) -> str:
    """Returns the route's pattern, never the path: clients can invent any number of paths."""
    route = scope.get("route")
    return scope.get("root_path", "") + route.path if route else "other"
