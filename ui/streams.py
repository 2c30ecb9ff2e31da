"""The stream of answers to a page's events, in the place of Gradio's own, which sometimes loses the next answer.

Gradio's client opens a stream when it adds an event and believes that none is open. Gradio ends the stream as soon as
no event is left. If it answers the request that adds the next event while the message about the end is on its way, the
client opens no other stream, and the user's click seems to do nothing. And a client that leaves one stream for another
has its next events dropped. Here a stream stays open for a short time, a request that adds an event is answered when
the client has left a stream that ends, and only a client that has left its last stream has its events dropped.
"""

import asyncio
import re
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from urllib.parse import parse_qs

import gradio as gr
import orjson
from gradio.server_messages import (
    BaseMessage,
    CloseStreamMessage,
    HeartbeatMessage,
    ProcessCompletedMessage,
    UnexpectedErrorMessage,
)
from starlette.types import ASGIApp, Message, Receive, Scope, Send

STREAM, ADD = "/gradio_api/queue/data", "/gradio_api/queue/join"
SESSION = re.compile(rb'"session_hash"\s*:\s*"(\w+)"')
QUIET_S = 3.0  # without an event, until a stream ends
LEAVE_S = 2.0  # until a client counts as having left an ended stream, where a proxy hides it
HEARTBEAT_S = 15.0  # a proxy may end a silent stream
UNKNOWN = UnexpectedErrorMessage(message="This page has been forgotten; reload it.", session_not_found=True)


class OpenStream:
    """One stream of a session. left: the client reads no more of it"""

    def __init__(self) -> None:
        self.ending, self.left = False, asyncio.Event()


class Streams:
    """ASGI app: a page of Gradio with these streams.

    page  its queue holds the messages of each session, and the ids of its events without an answer
    stop  ends all streams
    """

    def __init__(self, app: ASGIApp, page: gr.Blocks, stop: asyncio.Event):
        self.app, self.page, self.stop = app, page, stop
        self.streams: dict[str, OpenStream] = {}
        """The last stream of each session."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if path.endswith(STREAM):
            await self._stream(scope, receive, send)
        elif path.endswith(ADD):
            await self._add(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        session = parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [""])[0]
        if before := self.streams.get(session):
            before.left.set()
        stream = self.streams[session] = OpenStream()
        leaving = asyncio.create_task(_leave(receive, stream))
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            async with aclosing(self._messages(session, stream)) as messages:
                async for message in messages:
                    await send({"type": "http.response.body", "body": _encoded(message), "more_body": True})
            if stream.ending:
                with suppress(TimeoutError):
                    await asyncio.wait_for(stream.left.wait(), LEAVE_S)
            await send({"type": "http.response.body", "body": b""})
        finally:
            leaving.cancel()
            stream.left.set()
            if self.streams.get(session) is stream:
                del self.streams[session]
                if not stream.ending:
                    await self.page._queue.clean_events(session_hash=session)

    async def _messages(self, session: str, stream: OpenStream) -> AsyncGenerator[BaseMessage, None]:
        queue = self.page._queue
        messages = queue.pending_messages_per_session.get(session)
        if messages is None:
            yield UNKNOWN
            return
        over = [asyncio.create_task(event.wait()) for event in (stream.left, self.stop)]
        try:
            while True:
                unanswered = queue.pending_event_ids_session.get(session, set())
                message = asyncio.create_task(messages.get())
                wait_s = HEARTBEAT_S if unanswered else QUIET_S
                await asyncio.wait([message, *over], timeout=wait_s, return_when="FIRST_COMPLETED")
                if any(task.done() for task in over):
                    if not message.cancel():
                        messages.put_nowait(message.result())  # for the next stream
                    return
                if message.done():
                    yield message.result()
                    if isinstance(message.result(), ProcessCompletedMessage):
                        unanswered.discard(message.result().event_id or "")
                    continue
                message.cancel()
                if unanswered:
                    yield HeartbeatMessage()
                else:
                    stream.ending = True
                    yield CloseStreamMessage()
                    return
        finally:
            for task in over:
                task.cancel()

    async def _add(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = bytearray()

        async def receive_and_keep() -> Message:
            message = await receive()
            body.extend(message.get("body", b""))
            return message

        async def send_when_left(message: Message) -> None:
            found = SESSION.search(body) if message["type"] == "http.response.start" else None
            stream = self.streams.get(found[1].decode()) if found else None
            if stream and stream.ending:
                await stream.left.wait()
            await send(message)

        await self.app(scope, receive_and_keep, send_when_left)


async def _leave(receive: Receive, stream: OpenStream) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    stream.left.set()


def _encoded(message: BaseMessage) -> bytes:
    return b"data: %s\n\n" % orjson.dumps(message.model_dump(), default=str)
