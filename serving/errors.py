"""The one shape of error responses, at every endpoint:

    {"error": {"message", "type", "code", "param"}}

message  a sentence for people that names the item they gave
type     the kind of error, for programs
code     the reason, for programs; one per status, as in KINDS
param    the field at fault, or null
"""

from collections.abc import Mapping, Sequence
from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

KINDS = {  # status: (type, code)
    400: ("invalid_request_error", "malformed"),
    401: ("authentication_error", "no_key"),
    403: ("permission_error", "closed"),
    404: ("not_found_error", "not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    409: ("conflict_error", "other_encoder"),
    413: ("invalid_request_error", "too_large"),
    415: ("invalid_request_error", "unsupported_type"),
    422: ("invalid_request_error", "undecodable"),
    429: ("rate_limit_error", "busy"),
    500: ("server_error", "internal_error"),
    501: ("server_error", "not_offered"),
    503: ("server_error", "not_ready"),
    507: ("server_error", "disk_full"),
}
DESCRIPTIONS = {
    400: "The request is malformed; `param` names the field.",
    401: "The service requires an API key, and the request has none or a wrong one.",
    403: "The service has no API keys, so it accepts requests from its own machine only.",
    404: "There is no such model, collection or item.",
    409: "The collection holds another encoder's vectors; the message says how to embed it again.",
    413: "The body, the number of images, or an image's number of pixels is too large.",
    415: "This route does not accept the body's media type.",
    422: "An image cannot be decoded; `param` names it.",
    429: "The service is busy. Try again after the seconds in `Retry-After`.",
    501: "This service was built without the packages that this route needs.",
    503: "There is no encoder to serve yet, or the collection cannot be read or written.",
    507: "The disk of the collection is full; nothing in the request was written.",
}


class Refusal(HTTPException):
    """A request that the service refuses. Each subclass has its own status."""

    status = 500

    def __init__(self, message: str, param: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(self.status, message, headers)
        self.param = param


class Malformed(Refusal):
    status = 400


class NoKey(Refusal):
    status = 401


class Closed(Refusal):
    status = 403


class NotFound(Refusal):
    status = 404


class Conflict(Refusal):
    status = 409


class TooLarge(Refusal):
    status = 413


class UnsupportedType(Refusal):
    status = 415


class Undecodable(Refusal):
    status = 422


class Busy(Refusal):
    status = 429


class NotOffered(Refusal):
    status = 501


class NotReady(Refusal):
    status = 503


class DiskFull(Refusal):
    status = 507


class Fault(BaseModel):
    message: str = Field(description="A sentence for people that names the item they gave.")
    type: str = Field(description="The kind of error, for programs.")
    code: str = Field(description="The reason, for programs.")
    param: str | None = Field(description="The field at fault, for instance images[3].")


class ErrorAnswer(BaseModel):
    error: Fault


def documented(*statuses: int) -> dict[int | str, dict]:
    """Returns FastAPI's `responses` for a route with these error statuses; every route may also respond 401 and 403."""
    responses = {
        status: {"model": ErrorAnswer, "description": DESCRIPTIONS[status]} for status in (401, 403, *statuses)
    }
    return {**responses, "default": {"model": ErrorAnswer, "description": "Any other error."}}


def response(error: HTTPException) -> Response:
    kind, code = KINDS.get(error.status_code, KINDS[400 if error.status_code < 500 else 500])
    content = {"message": error.detail, "type": kind, "code": code, "param": getattr(error, "param", None)}
    return Response(orjson.dumps({"error": content}), error.status_code, error.headers, "application/json")


def internal_error() -> Response:
    """Returns the response to an unexpected exception. It does not describe the exception; the log does."""
    return response(Refusal("the service failed; its log says why"))


def malformed(errors: Sequence[Mapping[str, Any]], skip: int = 0) -> Malformed:
    """Returns the error response for the first of pydantic's errors.

    skip  leading parts of its location that are not in the client's input
    """
    location = [part for part in errors[0]["loc"][skip:] if not str(part).startswith("~")]  # without the tags of unions
    is_file = errors[0]["type"] == "value_error"  # FastAPI's own message names its classes
    message = "must be a file" if is_file else errors[0]["msg"]
    if not location:
        return Malformed(message)
    param = str(location[0]) + "".join(f"[{part}]" for part in location[1:])
    return Malformed(f"{param}: {message}", param)


def install(app: FastAPI) -> None:
    """Use this shape for errors of the app's router and of FastAPI's validation. Envelope handles all others."""

    @app.exception_handler(HTTPException)
    async def _(request: Request, error: HTTPException) -> Response:
        if not isinstance(error, Refusal):
            path = request.url.path
            if error.status_code == 404:
                error.detail = f"there is nothing at {path}; /docs lists the routes"
            elif error.status_code == 405:
                error.detail = f"{path} does not accept {request.method}"
        return response(error)

    @app.exception_handler(RequestValidationError)
    async def _(request: Request, error: RequestValidationError) -> Response:
        return response(malformed(error.errors(), skip=1))  # body, query or path
