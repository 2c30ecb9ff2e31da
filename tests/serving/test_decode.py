import asyncio
import io
import os
import signal
import struct
import subprocess
import sys
import threading
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from export.artifact import Preprocessing, TooManyPixels, read_pixels
from serving.errors import Busy, NotReady, TooLarge, Undecodable
from serving.inference.decode import (
    BYTES_PER_CALL,
    FILES_PER_CALL,
    LANES,
    SMALL_BYTES,
    Decoder,
    DecodingLane,
    DecodingProcess,
    DecodingTooSlow,
    NotDecoded,
    Upload,
    _groups,
    is_small,
)
from serving.inference.process import IDLE_LOOKS, Watch, cpu_s
from serving.inference.reading import Done, FileProblem
from tests.conftest import PATIENCE_S

SQUARE = Preprocessing(32)
JPEG = b"\xff\xd8\xff"


def decode(*images: bytes, preprocessing: Preprocessing = SQUARE, **options) -> np.ndarray:
    decoder = Decoder(2, **options)
    try:
        files = [Upload(f"images[{i}]", f"{i}.png", data) for i, data in enumerate(images)]
        return asyncio.run(decoder(files, preprocessing))
    finally:
        decoder.close()


@pytest.mark.slow
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF"])
def test_pixels_equal_those_of_the_export_bit_for_bit(picture, format, monkeypatch):
    monkeypatch.setattr("serving.inference.decode.DecodingProcess", DecodingProcess)
    files = [picture(i, size, format) for i, size in enumerate([(40, 30), (300, 200), (32, 32), (900, 700)])]
    for preprocessing in (SQUARE, Preprocessing(24, crop=0.875, interpolation="bilinear")):
        expected = [read_pixels(data, preprocessing) for data in files]
        np.testing.assert_array_equal(decode(*files, preprocessing=preprocessing), np.stack(expected))


def test_small_files_share_a_call_and_large_ones_have_their_own():
    def sizes(*lengths):
        return [[len(data) for data in group] for _, group in _groups([Upload("", "", b"x" * n) for n in lengths])]

    many = FILES_PER_CALL + 2
    assert sizes(*[10] * many) == [[10] * FILES_PER_CALL, [10] * 2]
    assert sizes(5) == [[5]]
    assert sizes(10, BYTES_PER_CALL, 10, 20) == [[10], [BYTES_PER_CALL], [10, 20]]


def test_files_of_unusual_formats_have_their_own_lane(picture):
    uploads = [Upload("", "", picture(1, format=format)) for format in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "JPEG")]
    assert [(lane, len(group)) for lane, group in _groups(uploads)] == [("quick", 3), ("unusual", 2), ("quick", 1)]


def test_only_small_files_of_bounded_work_are_decoded_within_a_batch(picture):
    png = picture(1)
    assert is_small(png) and is_small(picture(1, format="JPEG"))
    assert not any(is_small(picture(1, format=format)) for format in ("BMP", "GIF", "TIFF", "JPEG2000", "WEBP"))
    assert not is_small(png + b"x" * SMALL_BYTES)


@pytest.mark.parametrize("broken", [0, 5, FILES_PER_CALL, 2 * FILES_PER_CALL + 3])
def test_the_first_undecodable_file_is_named(picture, broken):
    files = [picture(1)] * (3 * FILES_PER_CALL)
    files[broken] = files[-1] = b"no picture"
    with pytest.raises(Undecodable) as refused:
        decode(*files)
    assert refused.value.param == f"images[{broken}]"
    assert refused.value.detail == f"images[{broken}] ({broken}.png) is not an image in a supported format"


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bombs() -> dict[str, bytes]:
    """Files of a few bytes whose headers announce 3.6 billion pixels."""
    png = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    png += png_chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + png_chunk(b"IEND", b"")
    bmp = b"BM" + struct.pack("<IHHI", 54, 0, 0, 54)
    bmp += struct.pack("<IiiHHIIiiII", 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0)
    gif = b"GIF89a" + struct.pack("<HHBBB", 60_000, 60_000, 0, 0, 0) + b","
    gif += struct.pack("<HHHHB", 0, 0, 60_000, 60_000, 0) + b"\x02\x00;"
    return {"png": png, "bmp": bmp, "gif": gif, "ppm": b"P6 60000 60000 255\n"}


@pytest.mark.parametrize("kind", ["png", "bmp", "gif", "ppm"])
def test_a_decompression_bomb_is_refused_by_its_header(kind):
    tracemalloc.start()
    try:
        with pytest.raises(TooLarge, match=r"images\[0\] \(0.png\) has 60000 x 60000 pixels"):
            decode(bombs()[kind])
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_only_the_first_frame_of_an_animation_is_read(format):
    red, blue, green = (Image.new("RGB", (64, 64), colour) for colour in ("red", "blue", "green"))
    buffer = io.BytesIO()
    red.save(buffer, format, save_all=True, append_images=[blue, green] * 20)
    data = buffer.getvalue()
    assert Image.open(io.BytesIO(data)).n_frames > 1
    np.testing.assert_allclose(decode(data)[0], np.broadcast_to([255, 0, 0], (32, 32, 3)), atol=2)
    if format == "GIF":  # stores its frames one after the other, so a truncated file still has the first
        np.testing.assert_array_equal(decode(data[: len(data) // 2]), decode(data))


class Fake:
    """Stands for a process: waits for `go_on` before each call, and notes what it is asked."""

    def __init__(self, lane):
        self.lane = lane
        self.asked, self.has_begun, self.go_on = [], threading.Event(), threading.Event()
        self.started.append(self)

    def __call__(self, read, files, preprocessing, max_pixels, max_work=None):
        self.asked.append([files, max_work])
        self.has_begun.set()
        assert self.go_on.wait(PATIENCE_S)
        return [self.result(data, max_work or self.lane.max_work) for data in files]

    def result(self, data: bytes, max_work: int) -> Done | FileProblem:
        kind, _, work = data.partition(b" ")
        if kind.endswith(b"slow"):
            return FileProblem(DecodingTooSlow())
        if int(work or 1) > max_work:
            return FileProblem(TooManyPixels("has too many pixels", int(work)))
        return Done(np.zeros((32, 32, 3), np.uint8), int(work or 1))

    def close(self):
        pass


@pytest.fixture
def lanes(monkeypatch):
    """lanes(**options) -> a Decoder and its fake processes by lane."""
    decoders = []

    def start(**options) -> tuple[Decoder, dict[str, Fake]]:
        monkeypatch.setattr(Fake, "started", [], raising=False)
        monkeypatch.setattr("serving.inference.decode.DecodingProcess", Fake)
        decoders.append(Decoder(1, **options))
        names = {lane: name for name, lane in LANES.items()}
        return decoders[-1], {names[fake.lane]: fake for fake in Fake.started}

    yield start
    for decoder in decoders:
        decoder.close()


def uploads(*files: bytes) -> list[Upload]:
    return [Upload(f"images[{i}]", "", data) for i, data in enumerate(files)]


def test_a_cancelled_request_does_not_decode_what_no_process_has_begun(lanes):
    decoder, processes = lanes()
    process = processes["unusual"]
    large = b"x" * BYTES_PER_CALL  # each has its own call

    async def ask():
        gone = asyncio.create_task(decoder(uploads(*[large + b"%d" % i for i in range(4)]), SQUARE))
        await asyncio.to_thread(process.has_begun.wait, 60)
        stays = asyncio.create_task(decoder(uploads(b"other"), SQUARE))
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone  # the calls that no process has begun are cancelled
        process.go_on.set()
        return await stays

    assert asyncio.run(ask()).shape == (1, 32, 32, 3)
    assert [files for files, _ in process.asked] == [[large + b"0"], [b"other"]]


def test_a_small_request_does_not_wait_for_the_rest_of_a_large_one(lanes):
    decoder, processes = lanes()
    process, large = processes["quick"], JPEG + b"x" * BYTES_PER_CALL

    async def ask():
        first = asyncio.create_task(decoder(uploads(*[large] * 20), SQUARE))
        await asyncio.to_thread(process.has_begun.wait, 60)
        second = asyncio.create_task(decoder(uploads(JPEG + b" 1"), SQUARE))
        await asyncio.sleep(0)
        process.go_on.set()
        await asyncio.gather(first, second)

    asyncio.run(ask())
    assert [JPEG + b" 1"] in [files for files, _ in process.asked[:3]]


def test_large_and_slow_files_are_decoded_in_the_lane_of_large_ones_with_the_limit_they_need(lanes):
    decoder, processes = lanes()
    for process in processes.values():
        process.go_on.set()
    files = [JPEG + b" 5", JPEG + b" 99000000", b"x 30000000", JPEG + b" 5"]
    assert asyncio.run(decoder(uploads(*files), SQUARE)).shape == (4, 32, 32, 3)
    assert processes["large"].asked == [[[files[1]], 99_000_000], [[files[2]], 30_000_000]]
    processes["large"].asked.clear()
    with pytest.raises(Undecodable, match=r"images\[0\] takes too long to decode"):
        asyncio.run(decoder(uploads(JPEG + b"slow"), SQUARE))
    assert processes["large"].asked == [[[JPEG + b"slow"], LANES["quick"].max_work]]
    with pytest.raises(Undecodable, match=r"images\[0\] takes too long to decode"):
        asyncio.run(decoder(uploads(b"slow"), SQUARE))
    assert len(processes["large"].asked) == 1


def test_files_that_no_lane_can_decode_are_left_out_if_asked_and_their_pixels_do_not_count(lanes):
    decoder, processes = lanes(request_pixels=110_000_000)
    for process in processes.values():
        process.go_on.set()
    files = [JPEG + b" 5", b"slow", JPEG + b"slow", JPEG + b" 99000000", b"x 200000000", JPEG + b" 5"]
    got = asyncio.run(decoder.readable(uploads(*files), SQUARE))
    assert [one is not None for one in got] == [True, False, False, True, False, True]
    assert [files for files, _ in processes["large"].asked] == [[JPEG + b"slow"], [JPEG + b" 99000000"]]
    with pytest.raises(TooLarge, match="the request's pictures have more than 110,000,000 pixels"):
        asyncio.run(decoder.readable(uploads(*[JPEG + b" 99000000"] * 2), SQUARE))


def test_a_request_of_too_many_pixels_is_refused_before_a_large_picture_is_decoded(lanes):
    decoder, processes = lanes(request_pixels=200_000_000)
    for process in processes.values():
        process.go_on.set()
    with pytest.raises(TooLarge, match="the request's pictures have more than 200,000,000 pixels; send fewer"):
        asyncio.run(decoder(uploads(*[JPEG + b" 99000000"] * 3), SQUARE))
    assert processes["large"].asked == []
    with pytest.raises(TooLarge):
        asyncio.run(decoder(uploads(*[JPEG + b" 9000000"] * 30), SQUARE))


def test_large_pictures_beyond_the_limit_of_all_requests_are_refused_as_busy(lanes):
    decoder, processes = lanes(pixels_at_once=200_000_000)
    processes["quick"].go_on.set()
    large = uploads(JPEG + b" 99000000")

    async def ask():
        taken = [asyncio.create_task(decoder(large, SQUARE)) for _ in range(2)]
        await asyncio.to_thread(processes["large"].has_begun.wait, 60)
        while decoder._large.in_flight < 2 * 99_000_000:
            await asyncio.sleep(0)
        with pytest.raises(Busy):
            await decoder(large, SQUARE)
        small = await decoder(uploads(JPEG + b" 5"), SQUARE)  # others are not refused
        processes["large"].go_on.set()
        await asyncio.gather(*taken)
        return small, await decoder(large, SQUARE)

    assert [len(pixels) for pixels in asyncio.run(ask())] == [1, 1]


# Processes ------------------------------------------------------------------------------------------------------------

# What some files do to the process that decodes them. KILLED counts the kills.
ACTS = """
import os, signal
import PIL.Image
open_image = PIL.Image.open
def acting(file, *rest, **more):
    data = file.getvalue()
    if data == b"crash":
        os.abort()
    if data == b"loop":
        while True: pass
    if data.startswith(b"kill"):
        with open(os.environ["KILLED"], "ab") as kills:
            kills.write(b"x")
        if os.path.getsize(os.environ["KILLED"]) <= int(data[4:]):
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError
    if data == b"hoard":
        bytearray(2**30)
    return open_image(file, *rest, **more)
PIL.Image.open = acting
"""


@pytest.fixture
def process(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(ACTS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("KILLED", str(tmp_path / "kills"))
    one = DecodingProcess(DecodingLane(2**20, 0.2))
    yield one
    one.close()


def outcome(answer: Done | FileProblem) -> str:
    return str(answer.error) if isinstance(answer, FileProblem) else "decoded"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (b"crash", "crashes its decoder"),
        (b"loop", "takes too long to decode for its pixels"),
        (b"hoard", "needs more memory than is allowed for its pixels"),
    ],
)
def test_a_file_that_brings_its_process_down_is_refused_and_the_others_are_decoded(process, picture, file, reason):
    answers = process("pixels", [picture(1), picture(2), file, picture(3)], SQUARE)
    assert [outcome(answer) for answer in answers][:3] == ["decoded", "decoded", reason]
    assert [outcome(answer) for answer in process("pixels", [picture(3)], SQUARE)] == ["decoded"]


@pytest.mark.slow
@pytest.mark.usefixtures("process")
def test_files_next_to_one_that_crashes_its_process_are_read(picture, monkeypatch):
    monkeypatch.setattr("serving.inference.decode.DecodingProcess", DecodingProcess)
    decoder = Decoder(1)
    files = [picture(1, format="GIF"), b"crash", picture(2, format="GIF"), b"crash", picture(3, format="GIF")]
    got = asyncio.run(decoder.readable(uploads(*files), SQUARE))
    decoder.close()
    assert [one is not None for one in got] == [True, False, True, False, True]


@pytest.mark.slow
def test_the_time_for_a_file_can_be_set(picture, monkeypatch):
    """The limits of the system for the process, as the system knows them."""
    for given, seconds in (("", 0.5), ("20", 5.0)):
        monkeypatch.setenv("TWINVIEW_DECODE_S", given)
        process = DecodingProcess(LANES["quick"])
        process("pixels", [picture(1)], SQUARE)
        arguments = Path(f"/proc/{process._process.pid}/cmdline").read_bytes().split(b"\0")
        assert float(arguments[2]) == seconds
        process.close()


@pytest.mark.slow
def test_a_file_whose_process_is_killed_from_outside_is_tried_again(process, tmp_path):
    assert outcome(process("pixels", [b"kill2"], SQUARE)[0]) == "is not an image in a supported format"
    (tmp_path / "kills").unlink()
    with pytest.raises(NotDecoded):
        process("pixels", [b"kill99"], SQUARE)


@pytest.mark.slow
def test_the_service_answers_503_while_decoding_is_killed_from_outside(process, monkeypatch):
    monkeypatch.setattr("serving.inference.decode.DecodingProcess", DecodingProcess)
    decoder = Decoder(1)
    with pytest.raises(NotReady, match="an image was not decoded: its process was ended"):
        asyncio.run(decoder(uploads(b"kill99"), SQUARE))
    decoder.close()


@pytest.mark.slow
def test_a_process_that_has_stopped_is_replaced_soon(process, picture, monkeypatch):
    monkeypatch.setattr("serving.inference.process.LOOK_S", 0.05)
    process("pixels", [picture(1)], SQUARE)
    stopped = process._process.pid
    os.kill(stopped, signal.SIGSTOP)
    assert [outcome(answer) for answer in process("pixels", [picture(3)], SQUARE)] == ["decoded"]
    assert process._process.pid != stopped


class TimeOf:
    """The processor time of a process, one value for each look."""

    def __init__(self, monkeypatch, *seconds: float):
        self.seconds = iter(seconds)
        monkeypatch.setattr("serving.inference.process.cpu_s", lambda pid: next(self.seconds))


def test_a_process_works_as_long_as_it_gets_some_processor_time(monkeypatch):
    """However little, as on a busy machine."""
    slow = [i // (IDLE_LOOKS - 1) * 0.01 for i in range(500)]
    TimeOf(monkeypatch, *slow)
    watch = Watch(1)
    assert {watch.look() for _ in slow} == {None}


def test_a_process_that_gets_none_has_stopped(monkeypatch):
    TimeOf(monkeypatch, 1.0, *[2.0] * (IDLE_LOOKS + 1))
    watch = Watch(1)
    assert [watch.look() for _ in range(IDLE_LOOKS + 1)] == [None] * (IDLE_LOOKS + 1)
    assert watch.look() == "it has used no processor time for 15 s"


def test_a_process_that_works_too_long_is_ended(monkeypatch):
    TimeOf(monkeypatch, 5.0, 10.0, 14.9, 15.1)
    watch = Watch(1, 10.0)
    assert [watch.look() for _ in range(3)] == [None] * 3
    assert watch.look() == "it has used more than 10 s of processor time"


def test_the_processor_time_of_a_process_is_read():
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        try:
            first = cpu_s(busy.pid)
            while cpu_s(busy.pid) == first:  # ends when it has worked
                pass
        finally:
            busy.kill()
    assert cpu_s(busy.pid) == 0
