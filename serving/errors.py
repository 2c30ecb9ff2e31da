"""The one shape of error responses, at every endpoint:

    {"error": {"message", "type", "code", "param"}}

message  a sentence for people that names the item they gave
type     the kind of error, for programs
code     the reason, for programs; one per status, as in KINDS
param    the field at fault, or null
"""

import errno
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from serving.mistakes import foremost, mistake

logger = logging.getLogger("twinview")

KINDS = {  # status: (type, code)
    400: ("invalid_request_error", "malformed"),
    401: ("authentication_error", "no_key"),
    403: ("permission_error", "closed"),
    404: ("not_found_error", "not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    408: ("invalid_request_error", "too_slow"),
    409: ("conflict_error", "other_encoder"),
    413: ("invalid_request_error", "too_large"),
    415: ("invalid_request_error", "unsupported_type"),
    422: ("invalid_request_error", "undecodable"),
    429: ("rate_limit_error", "busy"),
    431: ("invalid_request_error", "header_too_large"),
    500: ("server_error", "internal_error"),
    501: ("server_error", "not_offered"),
    503: ("server_error", "not_ready"),
    507: ("server_error", "disk_full"),
}
DESCRIPTIONS = {
    400: "The request is malformed; `param` names the field.",
    401: "The service requires an API key, and the request has none or a wrong one.",
    403: "The key may only read, the request is for another site's page, or without keys it is from another machine.",
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


class TooSlow(Refusal):
    status = 408


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


class HeadTooLarge(Refusal):
    status = 431


class NotOffered(Refusal):
    status = 501


class NotReady(Refusal):
    status = 503


class DiskFull(Refusal):
    status = 507


FORMS = {  # Starlette's words for forms that it cannot read
    "Invalid multipart data": lambda: Malformed(
        "the form cannot be read: it is not multipart/form-data, or the head of a part, with the name of its file, is "
        "longer than 4,096 bytes"
    ),
    "Missing boundary": lambda: Malformed("the form cannot be read: its Content-Type names no boundary"),
    "Part exceeded": lambda: TooLarge("a field of the form is larger than 1 MiB"),
    "The Content-Disposition header field": lambda: Malformed("a part of the form has no name"),
    "Too many fields": lambda: TooLarge("the form has more than 1,000 fields"),
    "Too many files": lambda: TooLarge("the form has too many files"),
}


def disk_is_full(error: BaseException | None) -> bool:
    """LanceDB's errors have no errno, only a message."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return any(words in str(error) for words in ("No space left on device", "Disk quota exceeded", "os error 28"))


def refusal_of(error: Exception) -> Refusal | None:
    """Returns the refusal that an exception outside the routes stands for; None if it is unexpected."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, HTTPException):
        for words, make in FORMS.items():
            if error.detail.startswith(words):
                return make()
    if disk_is_full(error) or disk_is_full(error.__cause__):
        logger.error("a disk is full: %s", error.__cause__ or error)
        return DiskFull("the disk for temporary files is full; try again later, or send fewer pictures at a time")
    return None


def response_to(error: Exception) -> Response | None:
    """As refusal_of. Whoever catches an error must not keep it in a variable: with it the request's body would stay in
    memory until garbage is collected."""
    refusal = refusal_of(error)
    return response(refusal) if refusal else None


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


def malformed(errors: Sequence[Mapping[str, Any]], kind: type[BaseModel] | None = None, skip: int = 0) -> Malformed:
    """Returns the error response for the foremost of pydantic's errors. The arguments are `mistakes.mistake`'s."""
    return Malformed(*mistake(foremost(errors), kind, skip))


def install(app: FastAPI) -> None:
    """Use this shape for errors of the app's router and of FastAPI's validation. Envelope handles all others."""

    @app.exception_handler(HTTPException)
    async def _(request: Request, error: HTTPException) -> Response:
        if refusal := refusal_of(error):  # FastAPI answers 400 when it cannot store a form
            return response(refusal)
        path = request.url.path
        if error.status_code == 404:
            error.detail = f"there is nothing at {path}; /docs lists the routes"
        elif error.status_code == 405:
            error.detail = f"{path} does not accept {request.method}"
        return response(error)

    @app.exception_handler(RequestValidationError)
    async def _(request: Request, error: RequestValidationError) -> Response:
        return response(malformed(error.errors(), skip=1))  # body, query or path


def without_place(message: str, uri: str) -> str:
    """Leaves out where the index is: that is not for strangers. LanceDB writes paths without the first slash."""
    for place in (uri, uri.strip("/")):
        message = message.replace(place, "the index") if place.strip("/") else message
    return message
