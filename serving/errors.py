"""One error shape at every endpoint, for whatever is not answered:

    {"error": {"message", "type", "code", "param"}}

message  a sentence for people, naming the item that they gave
type     the kind of fault, for programs
code     the reason, for programs; one per status, as in KINDS
param    the field that is meant, or null
"""

from collections.abc import Sequence

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
    401: "The service wants a key, and this is none of its keys.",
    403: "The service has no keys, and so answers on its own machine only.",
    404: "There is no such model, collection or item.",
    409: "The collection holds another encoder's vectors; the message says how to re-embed it.",
    413: "The body, the number of images, or an image's number of pixels is too large.",
    415: "The body is of a type that is not taken here.",
    422: "An image cannot be decoded; `param` names it.",
    429: "The service has as much work as it takes on. `Retry-After` says in how many seconds to come back.",
    501: "This service was built without the part that does this.",
    503: "There is no encoder to serve yet, or the collection cannot be read or written.",
    507: "The disk of the collection is full; nothing of the request was written.",
}


class Refusal(HTTPException):
    """An answer that is an error; the subclasses say which."""

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
    message: str = Field(description="A sentence for people, naming the item that they gave.")
    type: str = Field(description="The kind of fault, for programs.")
    code: str = Field(description="The reason, for programs.")
    param: str | None = Field(description="The field that is meant, for instance images[3].")


class ErrorAnswer(BaseModel):
    error: Fault


def documented(*statuses: int) -> dict[int | str, dict]:
    """What FastAPI's `responses` says of a route that may answer with these; any route may answer 401 and 403."""
    responses = {
        status: {"model": ErrorAnswer, "description": DESCRIPTIONS[status]} for status in (401, 403, *statuses)
    }
    return {**responses, "default": {"model": ErrorAnswer, "description": "Whatever else went wrong."}}


def answer(error: HTTPException) -> Response:
    kind, code = KINDS.get(error.status_code, KINDS[400 if error.status_code < 500 else 500])
    content = {"message": error.detail, "type": kind, "code": code, "param": getattr(error, "param", None)}
    return Response(orjson.dumps({"error": content}), error.status_code, error.headers, "application/json")


def failed() -> Response:
    """For what nobody foresaw. It tells nothing of the insides."""
    return answer(Refusal("the service failed; its log says why"))


def malformed(errors: Sequence[dict], inside: int = 0) -> Malformed:
    """The first of pydantic's errors. inside: how many parts of its place are not the user's."""
    place = [part for part in errors[0]["loc"][inside:] if not str(part).startswith("~")]  # a union's tag
    is_file = errors[0]["type"] == "value_error"  # FastAPI's words for a text where a file should be name its classes
    message = "must be a file" if is_file else errors[0]["msg"]
    if not place:
        return Malformed(message)
    param = str(place[0]) + "".join(f"[{part}]" for part in place[1:])
    return Malformed(f"{param}: {message}", param)


def install(app: FastAPI) -> None:
    """Give the shape to the errors of the app's router and of its validation. Those that nobody foresaw reach
    envelope.py, which answers `failed`."""

    @app.exception_handler(HTTPException)
    async def _(request: Request, error: HTTPException) -> Response:
        if not isinstance(error, Refusal):
            path = request.url.path
            if error.status_code == 404:
                error.detail = f"there is nothing at {path}; /docs lists what there is"
            elif error.status_code == 405:
                error.detail = f"{path} does not take {request.method}"
        return answer(error)

    @app.exception_handler(RequestValidationError)
    async def _(request: Request, error: RequestValidationError) -> Response:
        return answer(malformed(error.errors(), inside=1))  # body, query or path
