"""Work whose client has gone is not done.

    async with present(request):
        vectors = await engine.embed(files)

Whatever is awaited inside is cancelled when the client closes the connection: what waits for a batch is dropped from
it. The request's body must have been read.
"""

import asyncio

from starlette.requests import ClientDisconnect, Request


class present:
    """raises ClientDisconnect in place of the cancellation."""

    def __init__(self, request: Request):
        self._receive = request.receive
        self._gone = False

    async def __aenter__(self) -> None:
        self._task = asyncio.current_task()
        self._watch = asyncio.create_task(self._wait())

    async def __aexit__(self, kind, error, trace) -> None:
        self._watch.cancel()
        if self._gone:
            self._task.uncancel()
            if kind is asyncio.CancelledError:
                raise ClientDisconnect() from None

    async def _wait(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._gone = True
        self._task.cancel()
