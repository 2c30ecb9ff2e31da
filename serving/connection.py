"""A client's connection: how long and how large a request's head may be, how slowly its body may arrive, and how slowly
the client may read the answer.

Uvicorn has no such limits, and calls the app only when it has read the whole head. So they are kept here, before anyone
asks for a key. A request that exceeds one is answered with 431 or 408, and its connection is closed.
"""

import asyncio
import contextlib
import fcntl
import struct
import termios
from collections.abc import Callable, Sequence
from typing import Any

from starlette.responses import Response
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from serving import errors
from serving.errors import HeadTooLarge, Refusal, TooSlow

HEAD_BYTES = 2**16
"""Most bytes of a request's first line and header lines."""
HEAD_LINES = 128
"""Most header lines of a request."""
HEAD_S = 10
"""Seconds in which the head must have arrived."""
BODY_S, BODY_BYTES = 10, 2**16
"""A body must bring so many bytes in each period of so many seconds, as long as the service waits for them."""
READ_S, READ_BYTES = 30, 2**16
"""A client must take so many bytes of an answer, or all that is left, in each period of so many seconds."""
MOST_WAITING = 64
"""Most requests that a client may send on a connection before it has the answer to an earlier one."""
IDLE_S = 75
"""Seconds for which a connection without a request stays open: longer than proxies keep theirs, usually 60 s, or they
would send requests on connections that are being closed. `bentoml serve --timeout-keep-alive` overrules it."""
UVICORN_IDLE_S = 5
TICK_S = 1.0

Answer = Callable[[Refusal, Sequence[tuple[bytes, bytes]], dict[str, Any] | None], Response]


class Connection(HttpToolsProtocol):
    """Give it to uvicorn as `http`."""

    def __init__(self, *arguments: Any, answer: Answer = lambda refusal, *_: errors.response(refusal), **options: Any):
        """answer  returns the answer to a request that is refused here, from the refusal, the request's header lines,
        and its ASGI state if the app has got it
        """
        super().__init__(*arguments, **options)
        if self.timeout_keep_alive == UVICORN_IDLE_S:  # nobody has chosen it
            self.timeout_keep_alive = IDLE_S
        self._answer = answer
        self._head_bytes = self._head_lines = 0
        self._unused_bytes = 0  # received since the parser has last reported anything
        self._body_bytes = 0  # in this period
        self._in_head, self._in_body, self._ended = True, False, False
        self._seconds = 0  # waited for the rest of the head, or in this period of the body
        self._timer: asyncio.TimerHandle | None = None
        self._unread, self._read = 0, 0  # bytes of answers that the client has not read yet, and has in this period
        self._read_seconds = 0
        self._read_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        if self._read_timer:
            self._read_timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._ended:
            return
        self._unused_bytes += len(data)
        super().data_received(data)
        if self._ended or self.transport.is_closing():
            return self._stop_waiting()
        if self._unused_bytes > HEAD_BYTES:  # of one header line, or of what belongs to no part of a request
            return self._end(_head_too_large())
        waiting = self._in_body or self._in_head or self.cycle is None or self.cycle.response_complete
        if waiting and self._timer is None and self.transport.get_protocol() is self:
            self._wait()
        elif not waiting:
            self._stop_waiting()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if len(self.pipeline) >= MOST_WAITING:
            raise ValueError("too many requests wait")  # ends the parser, and the connection with it
        self._stop_waiting()
        self._in_head, self._in_body = True, False
        self._head_bytes = self._head_lines = self._unused_bytes = 0

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_lines += 1
        self._count(len(name) + len(value) + len(b": \r\n"))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._stop_waiting()
        self._in_head, self._in_body = False, not self.parser.should_upgrade()
        self._body_bytes = self._unused_bytes = 0

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        self._unused_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_body = False
        self._unused_bytes = 0

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._read = READ_BYTES  # much was read; from now on more may be written, so what is left tells nothing

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_reader()

    def send_400_response(self, msg: str) -> None:
        """Uvicorn calls it when the parser fails, also because of `_count`."""
        self._end(_head_too_large() if self._is_too_large() else errors.Malformed(msg))

    def _count(self, size: int) -> None:
        """Count bytes of the head, or of lines after a body in chunks."""
        self._head_bytes += size
        self._unused_bytes = 0
        if self._is_too_large():
            raise ValueError("the head is too large")  # ends the parser

    def _is_too_large(self) -> bool:
        return self._head_bytes > HEAD_BYTES or self._head_lines > HEAD_LINES

    def _wait(self) -> None:
        self._seconds = 0
        self._timer = self.loop.call_later(TICK_S, self._tick)

    def _stop_waiting(self) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer = None

    def _tick(self) -> None:
        """Seconds are counted one by one, so that those in which the service was not listening count as one."""
        self._seconds += 1
        if self.flow.read_paused or (self._in_body and self.cycle.waiting_for_100_continue):
            self._seconds = self._body_bytes = 0  # the service is slow, not the client
        elif self._in_body and self._seconds >= BODY_S:
            if self._body_bytes < BODY_BYTES:
                return self._end(TooSlow(f"less than {BODY_BYTES // 1024} KiB of the request arrived in {BODY_S} s"))
            self._seconds = self._body_bytes = 0
        elif not self._in_body and self._seconds >= HEAD_S:
            begun = self._in_head and self.scope is not None
            return self._end(TooSlow(f"the request's header has not arrived in {HEAD_S} s") if begun else None)
        self._timer = self.loop.call_later(TICK_S, self._tick)

    def _watch_reader(self) -> None:
        """While an answer waits for the client to read it."""
        if self._read_timer is None and self.transport.get_write_buffer_size():
            self._read = self._read_seconds = 0
            self._unread = self._waiting_bytes()
            self._read_timer = self.loop.call_later(TICK_S, self._look_at_reader)

    def _look_at_reader(self) -> None:
        self._read_timer = None
        if not self.transport.get_write_buffer_size():
            return
        left = self._waiting_bytes()
        self._read += max(0, self._unread - left)
        self._unread = left
        self._read_seconds += 1
        if self._read_seconds >= READ_S:
            if self._read < READ_BYTES:
                return self.transport.abort()
            self._read = self._read_seconds = 0
        self._read_timer = self.loop.call_later(TICK_S, self._look_at_reader)

    def _waiting_bytes(self) -> int:
        """Bytes that the client's system has not confirmed, here and in the system's buffer of the socket. The system
        takes more only when a third of its buffer is free, which takes a slow client long."""
        socket, waiting = self.transport.get_extra_info("socket"), bytes(4)
        with contextlib.suppress(AttributeError, OSError):  # not a socket of the system
            waiting = fcntl.ioctl(socket.fileno(), termios.TIOCOUTQ, waiting)
        return self.transport.get_write_buffer_size() + struct.unpack("i", waiting)[0]

    def _end(self, refusal: Refusal | None) -> None:
        """Answer, unless another answer is on its way, and close the connection."""
        self._stop_waiting()
        self._ended, cycle = True, self.cycle
        if self._in_body:
            free = not (self.pipeline or cycle.response_started)
        else:
            free = cycle is None or cycle.response_complete
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()
        if refusal is None or not free or not self.transport.can_write_eof():
            return self.transport.abort()
        answer = self._answer(refusal, self.headers or (), self.scope["state"] if self._in_body else None)
        answer.headers["Connection"] = "close"
        lines = [name + b": " + value + b"\r\n" for name, value in answer.raw_headers]
        self.transport.write(b"".join([STATUS_LINE[refusal.status], *lines, b"\r\n", answer.body]))
        # A socket that is closed while data comes in is reset, and the client might never see the answer.
        self.transport.write_eof()
        self.flow.resume_reading()
        self.loop.call_later(TICK_S, self.transport.abort)


def _head_too_large() -> HeadTooLarge:
    return HeadTooLarge(f"the request's header has more than {HEAD_BYTES // 1024} KiB or {HEAD_LINES} lines")
