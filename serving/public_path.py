"""The path below which a proxy publishes the service: TWINVIEW_PUBLIC_PATH=/tv for https://example.com/tv/.

    location /tv/ { proxy_pass http://127.0.0.1:3000/; }      nginx takes /tv away
    location /tv/ { proxy_pass http://127.0.0.1:3000; }       nginx leaves it there

Requests are answered with and without the path, so both work, and the service's own address too.
"""

import re
from collections.abc import Mapping

from starlette.types import ASGIApp, Receive, Scope, Send

VARIABLE = "TWINVIEW_PUBLIC_PATH"


class PublicPathProblem(ValueError):
    """A path that cannot be used. The message names the variable."""


def public_path(environment: Mapping[str, str]) -> str:
    """Such as /tv or /a/b; empty without one. Raises PublicPathProblem."""
    given = environment.get(VARIABLE, "").strip()
    path = "/" + given.strip("/") if given.strip("/") else ""
    if path and not re.fullmatch(r"(/[\w~-][\w.~-]*)+", path, re.ASCII):
        raise PublicPathProblem(
            f"{VARIABLE}: {given} is not a path like /tv; it has no host, and only letters, digits and -._~"
        )
    return path


class PublicPath:
    """ASGI middleware, the outermost: everything inside sees the path as the browser does, and where it begins."""

    def __init__(self, app: ASGIApp, path: str):
        self.app, self.path = app, path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.path and scope["type"] != "lifespan":
            if not f"{scope['path']}/".startswith(f"{self.path}/"):
                scope["path"] = self.path + scope["path"]
                if raw := scope.get("raw_path"):
                    scope["raw_path"] = self.path.encode() + raw
            scope["root_path"] = self.path
        await self.app(scope, receive, send)
