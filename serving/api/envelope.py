"""Adds a request id and security headers to every response, and records it in the metrics and the log.

X-Request-Id   the client's, if it consists of at most 128 letters, digits and ._:/+=- ; otherwise a new one
"""

import itertools
import logging
import os
import re
from collections.abc import Sequence
from time import perf_counter
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving import errors
from serving.access import KEY
from serving.api import log
from serving.errors import Refusal
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
REQUEST_ID, REFUSED = "request_id", "refused"  # keys of the ASGI state: bytes; a status
OTHER = "other"  # instead of a route
CLIENT_DISCONNECTED = 499  # nginx's status for this, for metrics and log only: no response is sent


class Envelope:
    """The outermost ASGI middleware. Also turns exceptions raised outside FastAPI's router into error responses."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        below = scope.get("root_path", "")  # the public path; the routes of a mounted app add the mount's
        started, status, request_id = perf_counter(), None, _request_id(scope["headers"])
        log.REQUEST_ID.set(request_id.decode())
        state = scope.setdefault("state", {})
        state[REQUEST_ID] = request_id

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
            status = state.get(REFUSED, CLIENT_DISCONNECTED)
        except Exception as error:
            response = None if status is not None else errors.response_to(error)
            if response is None:
                log.requests.exception("%s %s failed", scope["method"], _route(scope, below))
                if status is not None:  # the response has begun: let the server close the connection
                    raise
                response = errors.internal_error()
            await response(scope, receive, send_with_headers)
        finally:
            self._record(scope, _route(scope, below), 500 if status is None else status, perf_counter() - started)

    def _record(self, scope: Scope, route: str, status: int, seconds: float) -> None:
        self.metrics.record_request(route, status, seconds)
        if log.requests.isEnabledFor(logging.INFO):
            facts = {"method": scope["method"], "route": route, "status": status, "seconds": round(seconds, 6)}
            facts |= scope.get("state", {}).get("facts", {})
            if key := scope.get(KEY):
                facts["key"] = key
            log.requests.info("%s %s %s", scope["method"], route, status, extra={"facts": facts})


def answer_early(
    metrics: Metrics, refusal: Refusal, headers: Sequence[tuple[bytes, bytes]], state: dict[str, Any] | None
) -> Response:
    """Returns the answer to a request that its connection refuses, and records it.

    headers  the header lines that have arrived
    state    the request's ASGI state, if it has come as far as Envelope, which then records it
    """
    response = errors.response(refusal)
    if state and REQUEST_ID in state:
        request_id = state[REQUEST_ID]
        state[REFUSED] = refusal.status
    else:
        request_id = _request_id(headers)
        metrics.record_request(OTHER, refusal.status, 0.0)
        facts = {"route": OTHER, "status": refusal.status, "request_id": request_id.decode()}
        log.requests.info("refused %s", refusal.status, extra={"facts": facts})
    response.raw_headers += [(b"x-request-id", request_id), *SECURITY_HEADERS]
    return response


def _request_id(headers: Sequence[tuple[bytes, bytes]]) -> bytes:
    for name, value in headers:
        if name == b"x-request-id" and VALID_ID.fullmatch(value):
            return value
    return b"%s%016x" % (PROCESS, next(COUNTER))


def _route(scope: Scope, below: str) -> str:
    """Returns the route's pattern without the public path, never the path: clients can invent any number of paths."""
    route = scope.get("route")
    return scope.get("root_path", "").removeprefix(below) + route.path if route else OTHER
