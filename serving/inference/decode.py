"""Where files become pixels: in processes of their own, by a budget of memory, time and pixels.

The header of a file says what decoding takes (`export.artifact.open_image`). By that and by its first bytes it goes
through a lane (LANES): large pictures and unusual formats never delay ordinary ones. Only small files of two formats
are decoded elsewhere, together with their batch (`is_small`, lane.py).
"""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from export.artifact import BYTES_PER_PIXEL, MAX_PIXELS, Preprocessing, TooManyPixels, UnreadableImage
from serving.errors import NotReady, Refusal, TooLarge, Undecodable
from serving.inference import reading
from serving.inference.process import Ended, Process, make_frame
from serving.inference.reading import READS, Done, FileProblem
from serving.inference.thumbnail import DecodedPicture
from serving.inference.turns import FairThreads
from serving.limits import DECODE_S, Gate, decode_s

# Passing a file to a process and back takes as long as decoding 32 x 32 pixels, so small files share a call.
FILES_PER_CALL = 8
BYTES_PER_CALL = 2**16

# Smaller files decode in milliseconds, so they may be decoded within a batch. `SMALL_WORK` is in pixels.
SMALL_BYTES, SMALL_WORK = 2**16, 2**20

FILE_BYTES = 2**28  # memory for the file itself and its header, which may be as large
TRIES = 3  # of a file whose process is ended from outside


@dataclass(frozen=True)
class DecodingLane:
    """A kind of process that decodes. Its pixels are those of `open_image`'s work."""

    max_work: int
    """A file that takes more goes to another lane."""
    cpu_s: float
    """Processor time for a file, besides reading.SECONDS_PER_PIXEL of its work; longer with a longer decode_s()."""
    niceness: int = 0

    @property
    def memory_bytes(self) -> int:
        return self.max_work * BYTES_PER_PIXEL + FILE_BYTES


LANES = {
    "quick": DecodingLane(2**23, 0.5, niceness=3),  # files that take longer are tried again in "large"
    "unusual": DecodingLane(
        2**22, DECODE_S, niceness=10
    ),  # formats whose decoders are slow, hold Python's lock, or are Python
    "large": DecodingLane(MAX_PIXELS, DECODE_S, niceness=10),
}
QUICK = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF")  # JPEG, PNG, WebP


class Upload(NamedTuple):
    """An encoded image in a request."""

    field: str
    """Name of its position in the request, for instance images[3]."""
    name: str
    """The client's name for it; may be empty."""
    data: bytes


class DecodingTooSlow(UnreadableImage):
    """A file that takes more processor time than its pixels may."""

    def __init__(self) -> None:
        super().__init__("takes too long to decode for its pixels")


class NotDecoded(Exception):
    """The process was ended from outside, again and again. That does not tell anything about the file."""

    def __init__(self) -> None:
        super().__init__("its process was ended, perhaps for lack of memory")


def is_small(data: bytes) -> bool:
    """Whether a file may be decoded within a batch: in bounded time by a decoder that frees Python's lock."""
    return len(data) <= SMALL_BYTES and data.startswith(QUICK[:2])


def first_lane(data: bytes) -> str:
    return "quick" if data.startswith(QUICK) else "unusual"


class DecodingProcess:
    """Decodes the files of one call at a time, from any thread. The process starts when it is first needed, and again
    after its end."""

    def __init__(self, lane: DecodingLane):
        self.lane = lane
        self._cpu_s = lane.cpu_s * decode_s() / DECODE_S
        self._process: Process | None = None
        self._closed = False

    def __call__(
        self,
        read: str,
        files: Sequence[bytes],
        preprocessing: Preprocessing,
        max_pixels: int = MAX_PIXELS,
        max_work: int | None = None,
    ) -> list[Done | FileProblem]:
        """Returns the results of the files, up to the first that cannot be decoded and is not too large.

        read      a key of READS
        max_work  by default the lane's
        raises    NotDecoded
        """
        max_work = self.lane.max_work if max_work is None else max_work
        ask = partial(self._ask, read, preprocessing, max_pixels, max_work)
        if len(files) > 1:
            try:
                return ask(files)
            except Ended:
                pass
        results = []
        for data in files:
            results.append(self._alone(ask, [data]))
            if isinstance(results[-1], FileProblem) and not isinstance(
                results[-1].error, TooManyPixels | DecodingTooSlow
            ):
                break
        return results

    def close(self) -> None:
        """From any thread."""
        self._closed = True
        if process := self._process:
            process.end()

    def _alone(self, ask: partial, files: Sequence[bytes]) -> Done | FileProblem:
        """Only a file that crashes the process twice, alone, is a file that crashes its decoder."""
        crashed = False
        for _ in range(TRIES):
            try:
                return ask(files)[0]
            except Ended as ended:
                if ended.too_slow:
                    return FileProblem(DecodingTooSlow())
                if ended.crashed and crashed:
                    return FileProblem(UnreadableImage("crashes its decoder"))
                crashed = ended.crashed
        raise NotDecoded

    def _ask(
        self, read: str, preprocessing: Preprocessing, max_pixels: int, max_work: int, files: Sequence[bytes]
    ) -> list[Done | FileProblem]:
        """Raises Ended."""
        head = {
            "read": read,
            "preprocessing": asdict(preprocessing),
            "max_pixels": max_pixels,
            "max_work": max_work,
            "files": [len(data) for data in files],
        }
        if self._closed:
            raise NotDecoded
        if self._process is None:
            self._process = self._start()
        try:
            answers, body = self._process.ask(make_frame(head, *files))
        except Ended:
            self._process = None
            raise
        return _results(READS[read], answers, body, preprocessing)

    def _start(self) -> Process:
        lane = self.lane
        # Large blocks are given back to the system when they are freed; BLAS would start a thread per core.
        variables = {"MALLOC_MMAP_THRESHOLD_": str(2**20), "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        arguments = [str(self._cpu_s), str(lane.memory_bytes), str(lane.niceness)]
        return Process(os.path.abspath(reading.__file__), arguments, **variables)


def _results(
    read: reading.Read, answers: list[dict], body: bytes, preprocessing: Preprocessing
) -> list[Done | FileProblem]:
    results, start = [], 0
    for answer in answers:
        if "problem" in answer:
            too_many, reason = answer["too_many"], answer["problem"]
            results.append(FileProblem(TooManyPixels(reason, answer["work"]) if too_many else UnreadableImage(reason)))
            continue
        pieces = []
        for length in answer["lengths"]:
            pieces.append(body[start : start + length])
            start += length
        results.append(Done(read.restore(pieces, answer["numbers"], preprocessing), answer["work"]))
    return results


class Decoder:
    """Decodes the uploads of all requests."""

    def __init__(
        self,
        processes: int,
        max_pixels: int = MAX_PIXELS,
        request_pixels: int = 4 * MAX_PIXELS,
        pixels_at_once: int = 8 * MAX_PIXELS,
    ):
        """processes       for ordinary files; two more start when they are needed, for large and for unusual ones
        request_pixels  most pixels of one request, as `open_image` counts its work
        pixels_at_once  most pixels of all large pictures that are decoded or wait
        """
        self.max_pixels, self._request_pixels = max_pixels, request_pixels
        self._large = Gate(pixels_at_once, "pixels of large pictures")
        counts = {"quick": processes, "unusual": 1, "large": 1}
        self._processes = {name: [DecodingProcess(LANES[name]) for _ in range(n)] for name, n in counts.items()}
        self._threads = {name: FairThreads(f"decode {name}", several) for name, several in self._processes.items()}

    async def __call__(self, uploads: Sequence[Upload], preprocessing: Preprocessing) -> np.ndarray:
        """n >= 1 uploads -> uint8 (n, S, S, 3) RGB.

        When cancelled, or after a failure, uploads that no process has begun are dropped. Raises Undecodable or
        TooLarge, naming the first upload that fails; Busy; and NotReady when the processes are ended from outside.
        """
        return np.stack(await self._each(uploads, preprocessing, "pixels"))

    async def readable(self, uploads: Sequence[Upload], preprocessing: Preprocessing) -> list[np.ndarray | None]:
        """Like a call, for each upload uint8 (S, S, 3), or None if it cannot be decoded or is too large by itself."""
        return await self._each(uploads, preprocessing, "pixels", leave_out=True)

    async def pictures(self, uploads: Sequence[Upload], preprocessing: Preprocessing) -> list[DecodedPicture]:
        """Like a call, with what a collection stores."""
        return await self._each(uploads, preprocessing, "picture")

    async def large(self, upload: Upload) -> bytes:
        """Like a call, a JPEG file to look at."""
        [jpeg] = await self._each([upload], Preprocessing(1), "large")
        return jpeg

    def close(self) -> None:
        for threads in self._threads.values():
            threads.close()
        for several in self._processes.values():
            for process in several:
                process.close()

    async def _each(
        self, uploads: Sequence[Upload], preprocessing: Preprocessing, read: str, leave_out: bool = False
    ) -> list[Any]:
        """All files are tried in their first lane before a large one is decoded: so their sum is known by then.

        leave_out  the result of a file that cannot be decoded is None, instead of an error for all
        """

        def job(files: Sequence[bytes], max_work: int | None = None) -> Callable[[DecodingProcess], list]:
            return lambda process: process(read, files, preprocessing, self.max_pixels, max_work)

        results: list[Any] = [None] * len(uploads)
        large: dict[int, int] = {}
        spent, i = 0, 0
        # When a file crashes its process, those after it in the same call are not tried.
        groups = list(_groups(uploads, 1 if leave_out else FILES_PER_CALL))
        async for answers in self._answers([(lane, job(files)) for lane, files in groups]):
            for answer in answers:
                if not isinstance(answer, FileProblem):
                    results[i], work = answer
                elif (needed := _work_if_large(uploads[i], answer.error)) is not None:
                    large[i] = work = needed
                elif leave_out:
                    work = 0
                else:
                    raise refusal(uploads[i], answer.error) from answer.error
                spent += work
                if spent > self._request_pixels:
                    raise TooLarge(f"the request's pictures have more than {self._request_pixels:,} pixels; send fewer")
                i += 1
        if large:
            with self._large.admit(sum(large.values())):
                calls = [("large", job([uploads[i].data], work)) for i, work in large.items()]
                order = iter(large)
                async for [answer] in self._answers(calls):
                    i = next(order)
                    if not isinstance(answer, FileProblem):
                        results[i] = answer.result
                    elif not leave_out:
                        raise refusal(uploads[i], answer.error) from answer.error
        return results

    async def _answers(self, calls: Sequence[tuple[str, Callable]]) -> AsyncIterator[list[Done | FileProblem]]:
        """Make these calls of one request, each in its lane, and yield their results in order. Raises NotReady."""
        futures: dict[int, Future] = {}
        for lane in LANES:
            own = [i for i, (name, _) in enumerate(calls) if name == lane]
            futures |= zip(own, self._threads[lane].submit([calls[i][1] for i in own]), strict=True)
        try:
            for i in range(len(calls)):
                yield await asyncio.wrap_future(futures[i])
        except NotDecoded as error:
            raise NotReady(f"an image was not decoded: {error}; try again") from error
        finally:
            for future in futures.values():
                future.cancel()


def _work_if_large(upload: Upload, error: UnreadableImage) -> int | None:
    """What a file needs that its first lane has refused; None if no lane can decode it."""
    if isinstance(error, DecodingTooSlow) and first_lane(upload.data) == "quick":
        return LANES["quick"].max_work
    if isinstance(error, TooManyPixels) and error.work is not None and error.work <= LANES["large"].max_work:
        return error.work
    return None


def refusal(upload: Upload, problem: UnreadableImage) -> Refusal:
    """Returns the error response's exception, which names the upload."""
    kind = TooLarge if isinstance(problem, TooManyPixels) else Undecodable
    label = f"{upload.field} ({upload.name})" if upload.name else upload.field
    return kind(f"{label} {problem}", param=upload.field)


def _groups(uploads: Sequence[Upload], most: int = FILES_PER_CALL) -> Iterator[tuple[str, list[bytes]]]:
    """Split into groups for one call each, in order: one large upload or up to `most` small ones of one lane."""
    group: list[bytes] = []
    lane, size = "", 0
    for _, _, data in uploads:
        own = first_lane(data)
        if group and (own != lane or len(group) == most or size + len(data) > BYTES_PER_CALL):
            yield lane, group
            group, size = [], 0
        lane = own
        group.append(data)
        size += len(data)
    yield lane, group
