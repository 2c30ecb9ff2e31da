"""One error shape at every endpoint, for whatever is not answered:

    {"error": {"message", "type", "code", "param"}}

message  a sentence for people, naming the item that they gave
type     the kind of fault, for programs
code     the reason, for programs; one per status, as in KINDS
param    the field that is meant, or null
"""

from collections.abc import Sequence

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

KINDS = {  # status: (type, code)
    400: ("invalid_request_error", "malformed"),
    401: ("authentication_error", "no_key"),
    404: ("not_found_error", "not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    413: ("invalid_request_error", "too_large"),
    422: ("invalid_request_error", "undecodable"),
    429: ("rate_limit_error", "busy"),
    500: ("server_error", "internal_error"),
    501: ("server_error", "not_offered"),
    503: ("server_error", "not_ready"),
}


class Refusal(HTTPException):
    """An answer that is an error; the subclasses say which."""

    status = 500

    def __init__(self, message: str, param: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(self.status, message, headers)
        self.param = param


class Malformed(Refusal):
    status = 400


class NotFound(Refusal):
    status = 404


class TooLarge(Refusal):
    status = 413


class Undecodable(Refusal):
    status = 422


class Busy(Refusal):
    status = 429


class NotOffered(Refusal):
    status = 501


class NotReady(Refusal):
    status = 503


def answer(error: HTTPException) -> JSONResponse:
    kind, code = KINDS.get(error.status_code, KINDS[400 if error.status_code < 500 else 500])
    content = {"message": error.detail, "type": kind, "code": code, "param": getattr(error, "param", None)}
    return JSONResponse({"error": content}, error.status_code, error.headers)


def malformed(errors: Sequence[dict]) -> Malformed:
    """The first of pydantic's errors."""
    place = [part for part in errors[0]["loc"] if part not in ("body", "query", "path")]
    is_file = errors[0]["type"] == "value_error"  # FastAPI's words for a text where a file should be name its classes
    message = "must be a file" if is_file else errors[0]["msg"]
    if not place:
        return Malformed(message)
    param = str(place[0]) + "".join(f"[{part}]" for part in place[1:])
    return Malformed(f"{param}: {message}", param)


def install(app: FastAPI) -> None:
    """Give the shape to every error of the app: its router's, its validation's, and those that nobody foresaw."""

    @app.exception_handler(HTTPException)
    async def _(request: Request, error: HTTPException) -> JSONResponse:
        if not isinstance(error, Refusal):
            path = request.url.path
            if error.status_code == 404:
                error.detail = f"there is nothing at {path}; /docs lists what there is"
            elif error.status_code == 405:
                error.detail = f"{path} does not take {request.method}"
        return answer(error)

    @app.exception_handler(RequestValidationError)
    async def _(request: Request, error: RequestValidationError) -> JSONResponse:
        return answer(malformed(error.errors()))

    @app.exception_handler(Exception)  # whoever runs the app logs it
    async def _(request: Request, error: Exception) -> JSONResponse:
        return answer(Refusal("the service failed; its log says why"))
