"""The stream of answers: when it ends, which messages it gives, and what happens to events of a client that leaves."""

import asyncio
import json
from types import SimpleNamespace

import pytest
from gradio.server_messages import ProcessCompletedMessage, ProcessStartsMessage

from tests.conftest import PATIENCE_S
from ui import streams
from ui.streams import ADD, STREAM, Streams


class Queue:
    """What Streams uses of Gradio's queue, with one session."""

    def __init__(self):
        self.pending_messages_per_session = {"a1": asyncio.Queue()}
        self.pending_event_ids_session = {"a1": set()}
        self.cleaned = []

    async def clean_events(self, session_hash: str) -> None:
        self.cleaned.append(session_hash)

    def begin(self, event: str) -> None:
        self.pending_event_ids_session["a1"].add(event)
        self.pending_messages_per_session["a1"].put_nowait(ProcessStartsMessage(event_id=event))

    def answer(self, event: str) -> None:
        message = ProcessCompletedMessage(event_id=event, output={}, success=True)
        self.pending_messages_per_session["a1"].put_nowait(message)


class Reader:
    """A client that reads a stream. `got` lists the messages' kinds, and the events they are of."""

    def __init__(self, app: Streams, session: str = "a1"):
        self.got: list[tuple[str, str | None]] = []
        self._leaves = asyncio.Event()
        scope = {"type": "http", "path": f"/ui{STREAM}", "query_string": f"session_hash={session}".encode()}
        self.task = asyncio.create_task(app(scope, self._receive, self._send))

    async def leave(self) -> None:
        self._leaves.set()
        await self.task

    async def _receive(self) -> dict:
        await self._leaves.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict) -> None:
        if line := message.get("body"):
            facts = json.loads(line.removeprefix(b"data: "))
            self.got.append((facts["msg"], facts["event_id"]))


async def gradio(scope, receive, send) -> None:
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


async def add(app: Streams, session: str = "a1") -> None:
    """Add an event; returns when the request is answered."""
    body = json.dumps({"data": [], "session_hash": session}).encode()
    parts = [{"type": "http.request", "body": body[:9], "more_body": True}, {"type": "http.request", "body": body[9:]}]

    async def receive() -> dict:
        return parts.pop(0)

    async def send(message: dict) -> None:
        pass

    await app({"type": "http", "path": f"/ui{ADD}"}, receive, send)


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.fixture
def run(monkeypatch):
    """run(check) calls check(app, queue) with streams that end at once when no event is left."""
    monkeypatch.setattr(streams, "QUIET_S", 0.01)

    def call(check) -> None:
        async def checked() -> None:
            queue = Queue()
            await asyncio.wait_for(
                check(Streams(gradio, SimpleNamespace(_queue=queue), asyncio.Event()), queue), PATIENCE_S
            )

        asyncio.run(checked())

    return call


async def until(reader: Reader, kind: str) -> None:
    while kind not in [got for got, _ in reader.got]:
        await asyncio.sleep(0.001)


def test_a_stream_ends_when_all_is_answered_and_the_next_event_waits_for_that(run):
    async def check(app, queue) -> None:
        queue.begin("e1")
        reader = Reader(app)
        await until(reader, "process_starts")
        queue.answer("e1")
        await until(reader, "close_stream")
        assert reader.got == [("process_starts", "e1"), ("process_completed", "e1"), ("close_stream", None)]
        await add(app, "of another page")
        adding = asyncio.create_task(add(app))
        await settled()
        assert not adding.done(), "the client does not know yet that the stream has ended, and would open no other"
        await reader.leave()
        await adding
        assert queue.cleaned == [] and not app.streams
        await add(app)

    run(check)


def test_a_client_that_is_not_seen_to_leave_is_waited_for_a_short_time(run, monkeypatch):
    monkeypatch.setattr(streams, "LEAVE_S", 0.01)

    async def check(app, queue) -> None:
        reader = Reader(app)
        await until(reader, "close_stream")
        await add(app)
        await reader.task

    run(check)


def test_a_later_stream_gets_the_messages_and_no_event_is_dropped(run):
    async def check(app, queue) -> None:
        queue.begin("e1")
        first = Reader(app)
        await until(first, "process_starts")
        second = Reader(app)
        await first.task
        queue.answer("e1")
        await until(second, "process_completed")
        await first.leave()
        assert queue.cleaned == []

    run(check)


def test_the_events_of_a_client_that_is_gone_are_dropped_and_messages_are_kept(run):
    async def check(app, queue) -> None:
        queue.begin("e1")
        reader = Reader(app)
        await until(reader, "process_starts")
        queue.answer("e1")  # while it leaves
        await reader.leave()
        assert queue.cleaned == ["a1"]
        assert queue.pending_messages_per_session["a1"].qsize() == 1 and reader.got == [("process_starts", "e1")]

    run(check)


def test_a_stream_says_that_it_is_alive_while_an_event_takes_long(run, monkeypatch):
    monkeypatch.setattr(streams, "HEARTBEAT_S", 0.01)

    async def check(app, queue) -> None:
        queue.begin("e1")
        reader = Reader(app)
        await until(reader, "heartbeat")
        assert "close_stream" not in [kind for kind, _ in reader.got]
        await reader.leave()

    run(check)


def test_all_streams_end_when_the_service_stops_and_a_forgotten_page_learns_it(run):
    async def check(app, queue) -> None:
        queue.begin("e1")
        reader = Reader(app)
        await until(reader, "process_starts")
        app.stop.set()
        await reader.task
        forgotten = Reader(app, "b2")
        await forgotten.task
        assert forgotten.got == [("unexpected_error", None)]

    run(check)
