import asyncio
import io
import struct
import threading
import time
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from export.artifact import Preprocessing, read_pixels
from serving.errors import TooLarge, Undecodable
from serving.inference.decode import BYTES_PER_CALL, FILES_PER_CALL, Decoder, Upload, _groups

SQUARE = Preprocessing(32)


def decode(*images: bytes, preprocessing: Preprocessing = SQUARE, **options) -> np.ndarray:
    decoder = Decoder(2, **options)
    try:
        files = [Upload(f"images[{i}]", f"{i}.png", data) for i, data in enumerate(images)]
        return asyncio.run(decoder(files, preprocessing))
    finally:
        decoder.close()


@pytest.mark.slow
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF"])
def test_pixels_equal_those_of_the_export_bit_for_bit(picture, format):
    files = [picture(i, size, format) for i, size in enumerate([(40, 30), (300, 200), (32, 32), (900, 700)])]
    for preprocessing in (SQUARE, Preprocessing(24, crop=0.875, interpolation="bilinear")):
        expected = [read_pixels(data, preprocessing) for data in files]
        np.testing.assert_array_equal(decode(*files, preprocessing=preprocessing), np.stack(expected))


def test_small_files_share_a_call_and_large_ones_have_their_own():
    def sizes(*lengths):
        return [[len(file.data) for file in group] for group in _groups([Upload("", "", b"x" * n) for n in lengths])]

    many = FILES_PER_CALL + 2
    assert sizes(*[10] * many) == [[10] * FILES_PER_CALL, [10] * 2]
    assert sizes(5) == [[5]]
    assert sizes(10, BYTES_PER_CALL, 10, 20) == [[10], [BYTES_PER_CALL], [10, 20]]


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


def test_a_cancelled_request_does_not_decode_what_no_thread_has_begun(monkeypatch):
    begun, has_begun, go_on = [], threading.Event(), threading.Event()

    def read(data, *_):
        begun.append(data)
        has_begun.set()
        assert go_on.wait(60)
        return np.zeros((32, 32, 3), np.uint8)

    monkeypatch.setattr("serving.inference.decode.read_pixels", read)
    decoder = Decoder(1)
    large = b"x" * BYTES_PER_CALL  # each has its own call

    async def ask():
        gone = asyncio.create_task(decoder([Upload("", "", large + b"%d" % i) for i in range(4)], SQUARE))
        stays = asyncio.create_task(decoder([Upload("", "", b"other")], SQUARE))
        assert await asyncio.to_thread(has_begun.wait, 60)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone  # the calls that no thread has begun are cancelled
        go_on.set()
        return await stays

    assert asyncio.run(ask()).shape == (1, 32, 32, 3)
    decoder.close()
    assert begun == [large + b"0", b"other"]


def test_very_large_pictures_are_decoded_one_at_a_time(picture, monkeypatch):
    monkeypatch.setattr("serving.inference.decode.LARGE_PIXELS", 40 * 30)
    large, small, lock = picture(1, (41, 30)), picture(1, (40, 30)), threading.Lock()
    pair = threading.Barrier(2, timeout=60)  # two small ones are decoded at the same time

    def read(data, preprocessing, max_pixels):
        pixels = read_pixels(data, preprocessing, max_pixels)
        if data == small:
            pair.wait()
            return pixels
        assert lock.acquire(blocking=False), "two large pictures are decoded at once"
        time.sleep(0.02)  # time enough for a second one to begin
        lock.release()
        return pixels

    monkeypatch.setattr("serving.inference.decode.read_pixels", read)
    monkeypatch.setattr("serving.inference.decode.FILES_PER_CALL", 1)
    for data in (large, small):
        np.testing.assert_array_equal(decode(*[data] * 4), np.stack([read_pixels(data, SQUARE)] * 4))
