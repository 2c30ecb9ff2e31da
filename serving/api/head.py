"""Answers HEAD wherever GET is answered: with the same status and headers, and without the body."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

PAGE = "/ui/"  # the page's own routes decide themselves: some send events without end


class Head:
    """ASGI middleware that passes HEAD on as GET: FastAPI's routes answer only the methods that they name."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["type"] != "http" or scope["method"] != "HEAD" or path.startswith(PAGE):
            return await self.app(scope, receive, send)

        async def send_without_body(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        scope["method"] = "GET"
        try:
            await self.app(scope, receive, send_without_body)
        finally:
            scope["method"] = "HEAD"  # for the log
