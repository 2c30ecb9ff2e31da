"""One error shape at every endpoint, for whatever is not answered:

    {"error": {"message", "type", "code", "param"}}

message  a sentence for people, naming the item that they gave
type     the kind, by status: invalid_request_error, authentication_error, not_found_error, rate_limit_error, server_error
code     a word for programs: the `code` of a class below, or the status's own name
param    the field that is meant, or null
"""

import logging
from collections.abc import Sequence
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

log = logging.getLogger("twinview")

TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}  # of the other 4xx and 5xx below


class Refusal(HTTPException):
    """An answer that is an error. Subclasses say which."""

    status = 500
    code = "internal_error"

    def __init__(self, message: str, param: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(self.status, message, headers)
        self.param = param


class Malformed(Refusal):
    status, code = 400, "malformed"


class NotFound(Refusal):
    status, code = 404, "not_found"


class TooLarge(Refusal):
    status, code = 413, "too_large"


class Undecodable(Refusal):
    status, code = 422, "undecodable"


class Busy(Refusal):
    status, code = 429, "busy"


class NotOffered(Refusal):
    status, code = 501, "not_offered"


class NotReady(Refusal):
    status, code = 503, "not_ready"


def answer(refusal: HTTPException) -> JSONResponse:
    status = refusal.status_code
    error = {
        "message": refusal.detail,
        "type": TYPES.get(status, "invalid_request_error" if status < 500 else "server_error"),
        "code": getattr(refusal, "code", HTTPStatus(status).phrase.lower().replace(" ", "_")),
        "param": getattr(refusal, "param", None),
    }
    return JSONResponse({"error": error}, status, refusal.headers)


def malformed(errors: Sequence[dict]) -> Malformed:
    """The first of pydantic's errors as a sentence."""
    first = errors[0]
    place = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    param = place[0] + "".join(f"[{part}]" for part in place[1:]) if place else None
    return Malformed(f"{param}: {first['msg']}" if param else first["msg"], param)


def install(app: FastAPI) -> None:
    """Make every error of the app, its router and its validation take the shape."""

    @app.exception_handler(HTTPException)
    async def _(request: Request, error: HTTPException) -> JSONResponse:
        if not isinstance(error, Refusal):  # the router's own
            path = request.url.path
            if error.status_code == 404:
                error.detail = f"there is nothing at {path}; /docs lists what there is"
            elif error.status_code == 405:
                error.detail = f"{path} does not take {request.method}"
        return answer(error)

    @app.exception_handler(RequestValidationError)
    async def _(request: Request, error: RequestValidationError) -> JSONResponse:
        return answer(malformed(error.errors()))

    @app.exception_handler(Exception)
    async def _(request: Request, error: Exception) -> JSONResponse:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return answer(Refusal("the service failed; its log says why"))
