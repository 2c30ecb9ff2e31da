"""A child process of the service at the other end of a socket, and the frames that they exchange.

A frame is the lengths of head and body (4 bytes each, big-endian), the head in JSON, and the body in bytes.
"""

import io
import math
import os
import signal
import socket
import struct
import subprocess
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, BinaryIO

import orjson

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

LENGTHS = struct.Struct("!II")
DEATH_S = 5.0  # a process that has closed its socket ends within this time
LOOK_S = 1.0
IDLE_LOOKS = 15
"""A process that is to answer has stopped when it has used no processor time between so many looks, LOOK_S apart. On a
busy machine it gets some, however little."""
CRASHES = {signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE, signal.SIGTRAP, signal.SIGSYS}


class Ended(Exception):
    """The process has ended or was ended, because it did not answer in time. Nobody has its answer."""

    def __init__(self, cause: int):
        """cause  the signal that ended it, 0 for none"""
        super().__init__(f"ended by {signal.Signals(cause).name}" if cause else "ended")
        self.cause = cause

    @property
    def too_slow(self) -> bool:
        """Whether it used more processor time than it had set itself."""
        return self.cause == signal.SIGPROF

    @property
    def crashed(self) -> bool:
        """Whether its own code crashed. Otherwise it was ended from outside, for instance for lack of memory."""
        return self.cause in CRASHES


class Watch:
    """Whether a process that is to answer still works: by its processor time, which a busy machine does not stretch."""

    def __init__(self, pid: int, most_s: float = math.inf):
        """most_s: processor time from the first look on, in seconds"""
        self._pid, self._most_s = pid, most_s
        self._first: float | None = None
        self._used = 0.0
        self._idle = 0

    def look(self) -> str | None:
        """Returns why the process does not work any more, None if it does. Call it every LOOK_S."""
        used = cpu_s(self._pid)
        if self._first is None:
            self._first = used
        self._idle = self._idle + 1 if used == self._used else 0
        self._used = used
        if self._idle >= IDLE_LOOKS:
            return f"it has used no processor time for {IDLE_LOOKS * LOOK_S:g} s"
        if used - self._first > self._most_s:
            return f"it has used more than {self._most_s:g} s of processor time"
        return None


def cpu_s(pid: int) -> float:
    """Returns the processor time that a process has used, in seconds; 0 when it has ended."""
    import psutil  # here, since the processes that decode do without it

    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return 0.0
    return times.user + times.system


class Process:
    """Ends when this object is garbage collected, and when this process ends, however that happens."""

    def __init__(self, program: str, arguments: Sequence[str], fds: Sequence[int] = (), **variables: str):
        """program    Python file, which gets the arguments and then the file descriptor of its socket
        fds        further file descriptors that it inherits
        variables  of its environment
        """
        self.socket, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, program, *arguments, str(theirs.fileno())]
            environment: Mapping[str, str] = os.environ | variables
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno(), *fds], env=environment)
        self._end = weakref.finalize(self, _end, self._process)

    @property
    def pid(self) -> int:
        return self._process.pid

    def end(self) -> None:
        self._end()
        self.socket.close()

    def wait(self, seconds: float) -> Ended:
        """Wait until it has ended, and end it after `seconds`."""
        try:
            cause = max(0, -self._process.wait(seconds))
        except subprocess.TimeoutExpired:
            cause = 0
        self.end()
        return Ended(cause)

    def ask(self, frame: bytes) -> tuple[Any, bytes]:
        """Send a frame, and return head and body of the answer. Blocks; ends the process when it has stopped (Watch).
        Raises Ended."""
        self.socket.settimeout(LOOK_S)
        watch, rest = Watch(self.pid), memoryview(frame)
        try:
            while rest:
                rest = rest[self._again(watch, partial(self.socket.send, rest)) :]
            with io.BufferedReader(_Received(self, watch)) as file:
                answer = read_frame(file)
        except OSError:
            answer = None
        if answer is None:
            raise self.wait(DEATH_S)
        return answer

    def _again(self, watch: Watch, call: Callable[[], int]) -> int:
        """Make a call on the socket, and make it again while the process works. Raises Ended, OSError."""
        while True:
            try:
                return call()
            except TimeoutError:
                if watch.look():
                    raise self.wait(0) from None

    def receive(self, seconds: float) -> tuple[Any, bytes]:
        """Raises Ended."""
        self.socket.settimeout(seconds)
        try:
            with self.socket.makefile("rb") as file:
                frame = read_frame(file)
        except TimeoutError:
            raise self.wait(0) from None
        except OSError:
            frame = None
        if frame is None:
            raise self.wait(DEATH_S)
        return frame


class _Received(io.RawIOBase):
    """What a process sends."""

    def __init__(self, process: Process, watch: Watch):
        self._process, self._watch = process, watch

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        """Raises Ended, OSError."""
        return self._process._again(self._watch, partial(self._process.socket.recv_into, buffer))


def _end(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()


def make_frame(head: list | dict, *body: bytes | memoryview) -> bytes:
    encoded = orjson.dumps(head)
    return b"".join([LENGTHS.pack(len(encoded), sum(map(len, body))), encoded, *body])


def read_frame(file: BinaryIO) -> tuple[Any, bytes] | None:
    """Returns head and body; None at the end."""
    lengths = file.read(LENGTHS.size)
    if len(lengths) < LENGTHS.size:
        return None
    head_bytes, body_bytes = LENGTHS.unpack(lengths)
    head, body = file.read(head_bytes), file.read(body_bytes)
    return (orjson.loads(head), body) if len(head) == head_bytes and len(body) == body_bytes else None
