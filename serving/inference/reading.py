"""Decodes files in a process of its own, which `decode.DecodingProcess` starts: strangers' bytes meet Pillow here.

A decoder that crashes, hangs, holds Python's lock or needs too much memory costs this process and one picture. The
system limits its memory, and the processor time of each file: a file that takes longer ends the process.

    request  head: {"read": a key of READS, "preprocessing", "max_pixels", "max_work", "files": [lengths]}
    answer   head: for each file {"work", "lengths", "numbers"}, or {"problem", "work", "too_many"}
             body: the results, one after the other
"""

if __name__ == "__main__" and not __package__:
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import contextlib
import gc
import io
import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from PIL import AvifImagePlugin, Image

from export.artifact import Preprocessing, TooManyPixels, UnreadableImage, decode, open_image, preprocess
from serving.inference.process import make_frame, read_frame
from serving.inference.thumbnail import DecodedPicture, decode_picture, large_picture

SECONDS_PER_PIXEL = 2e-7  # of work; a JPEG 2000, the slowest, takes three quarters of it


class Read(NamedTuple):
    """A result of decoding, in pieces that can be sent."""

    decode: Callable[[Image.Image, bytes, Preprocessing], tuple[list[bytes], list[int]]]
    """Takes the opened image and its file."""
    restore: Callable[[list[bytes], list[int], Preprocessing], Any]


class FileProblem(NamedTuple):
    error: UnreadableImage


class Done(NamedTuple):
    result: Any
    work: int
    """As `open_image`."""


def _decode_pixels(image: Image.Image, data: bytes, preprocessing: Preprocessing) -> tuple[list[bytes], list[int]]:
    return [preprocess(decode(image, preprocessing.enough_px), preprocessing).tobytes()], []


def _restore_pixels(pieces: list[bytes], numbers: list[int], preprocessing: Preprocessing) -> np.ndarray:
    return np.frombuffer(pieces[0], np.uint8).reshape(preprocessing.size_px, preprocessing.size_px, 3)


def _decode_picture(image: Image.Image, data: bytes, preprocessing: Preprocessing) -> tuple[list[bytes], list[int]]:
    picture = decode_picture(image, data, preprocessing)
    return [picture.pixels.tobytes(), picture.thumbnail], [picture.width, picture.height]


def _restore_picture(pieces: list[bytes], numbers: list[int], preprocessing: Preprocessing) -> DecodedPicture:
    return DecodedPicture(_restore_pixels(pieces, numbers, preprocessing), pieces[1], *numbers)


READS = {
    "pixels": Read(_decode_pixels, _restore_pixels),
    "picture": Read(_decode_picture, _restore_picture),
    "large": Read(lambda image, data, _: ([large_picture(image)], []), lambda pieces, numbers, _: pieces[0]),
}


def read_file(
    read: Read,
    data: bytes,
    preprocessing: Preprocessing,
    max_pixels: int,
    max_work: int,
    allow: Callable[[int], None] = lambda work: None,
) -> tuple[list[bytes], list[int], int]:
    """Returns pieces, numbers and work. allow: called before decoding, with the work. Raises UnreadableImage."""
    image, work = open_image(data, max_pixels, max_work)
    allow(work)
    return *read.decode(image, data, preprocessing), work


# In the process -------------------------------------------------------------------------------------------------------


def serve(cpu_s: float, connection: socket.socket) -> None:
    """Answer requests until the connection is closed.

    cpu_s  processor time for a file's header, and for decoding it in addition to SECONDS_PER_PIXEL of its work
    """

    def allow(work: int) -> None:
        signal.setitimer(signal.ITIMER_PROF, cpu_s + work * SECONDS_PER_PIXEL)  # SIGPROF ends the process

    with io.BufferedReader(connection.makefile("rb", 0), 2**20) as file:
        while request := read_frame(file):
            head, body = request
            preprocessing = Preprocessing(**head["preprocessing"])
            answers, pieces, start = [], [], 0
            for size in head["files"]:
                data = body[start : start + size]
                start += size
                allow(0)
                try:
                    read = READS[head["read"]]
                    new, numbers, work = read_file(
                        read, data, preprocessing, head["max_pixels"], head["max_work"], allow
                    )
                    answers.append({"work": work, "lengths": [len(piece) for piece in new], "numbers": numbers})
                    pieces += new
                except UnreadableImage as error:
                    too_many = isinstance(error, TooManyPixels)
                    work = error.work if isinstance(error, TooManyPixels) else None
                    answers.append({"problem": str(error), "work": work, "too_many": too_many})
                finally:
                    signal.setitimer(signal.ITIMER_PROF, 0)
            del request, body
            connection.sendall(make_frame(answers, *pieces))
            del pieces


def limit_memory(data_bytes: int) -> None:
    """Let this process allocate at most this much more."""
    with contextlib.suppress(ImportError, OSError, ValueError):  # not Linux
        import resource

        with open("/proc/self/statm") as file:
            used = int(file.read().split()[5]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_DATA, (used + data_bytes, used + data_bytes))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches this process too; the service ends it
    cpu_s, memory_bytes, niceness, fd = sys.argv[1:]
    os.nice(int(niceness))
    Image.init()  # all formats
    # The other cores have processes of their own.
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # pyrefly: ignore[bad-assignment]
    gc.freeze()
    limit_memory(int(memory_bytes))
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the service has ended
        serve(float(cpu_s), socket.socket(fileno=int(fd)))
