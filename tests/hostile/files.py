"""Makes pictures that stall or end careless services, each from a few lines."""

import io
import struct
import zlib
from collections.abc import Callable

from PIL import Image

MIB = 2**20
LARGEST = 11_585  # pixels on a side; 134 megapixels


def encoded(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png(width: int, height: int, depth: int, colour: int, row: int, before: bytes = b"") -> bytes:
    """A PNG of zeros. row: bytes of a row; before: chunks before the pixels."""
    packer = zlib.compressobj(9)
    pixels = b"".join(packer.compress(bytes(row + 1)) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + before + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def grey16(side: int = LARGEST) -> bytes:
    return png(side, side, 16, 0, 2 * side)


def row(width: int) -> bytes:
    return png(width, 1, 8, 0, width)


def rle8(width: int, height: int, codes: bytes) -> bytes:
    """A BMP whose run-length codes Pillow decodes in Python."""
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(codes), 0, 0, 256, 0)
    start = 14 + len(header) + 1024
    return b"BM" + struct.pack("<IHHI", start + len(codes), 0, 0, start) + header + bytes(1024) + codes


def bmp_of_a_delta() -> bytes:
    return rle8(130_000_000, 1, b"\0\2\xff\xff\0\1")


def bmp_of_ends_of_lines(side: int = LARGEST) -> bytes:
    return rle8(side, side, b"\1\0\0\0" * 120 + b"\0\1")


def tiff_of_a_tile(side: int = 30_000) -> bytes:
    """64 x 64 pixels, in one tile of side x side."""
    data = zlib.compress(bytes(3 * 10**6), 9)
    tags = [(256, 64), (257, 64), (258, 8), (259, 8), (262, 1), (277, 1), (322, side), (323, side), (324, 8)]
    tags += [(325, len(data))]
    table = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + table + bytes(4)


def jpeg2000() -> bytes:
    return encoded(Image.new("RGB", (3000, 3000), "red"), "JPEG2000")


def jpeg_of_scans(count: int = 1000) -> bytes:
    data = encoded(Image.new("RGB", (2000, 2000), "red"), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * count + data[-2:]


def gif_of_comments(size: int = 8 * MIB) -> bytes:
    data = encoded(Image.new("P", (8, 8)), "GIF")
    comment = b"\x21\xfe" + (b"\xff" + b"x" * 255) * 4 + b"\0"
    return data[:13] + comment * (size // len(comment)) + data[13:]


def png_of_chunks(size: int = 8 * MIB) -> bytes:
    return png(8, 8, 8, 0, 8, chunk(b"abCd", b"") * (size // 12))


def png_of_texts() -> bytes:
    return png(8, 8, 8, 0, 8, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(MIB), 9)) * 50)


ONE = {
    "a 16-bit PNG of 134 megapixels": grey16,
    "a PNG of 30,000,000 x 1": lambda: row(30_000_000),
    "a PNG of 70,000,000 x 1": lambda: row(70_000_000),
    "a BMP of 130,000,000 x 1 with a delta": bmp_of_a_delta,
    "a BMP with ends of lines": bmp_of_ends_of_lines,
    "a TIFF with a large tile": tiff_of_a_tile,
    "a JPEG 2000": jpeg2000,
    "a JPEG of 1,000 scans": jpeg_of_scans,
    "a GIF of comments": gif_of_comments,
    "a PNG of empty chunks": png_of_chunks,
    "a PNG of compressed texts": png_of_texts,
}
SEVERAL: dict[str, Callable[[], list[bytes]]] = {
    "twelve PNGs of 134 megapixels": lambda: [grey16()] * 12,
    "256 BMPs with ends of lines": lambda: [bmp_of_ends_of_lines(2000)] * 256,
    "256 PNGs of compressed texts": lambda: [png_of_texts()] * 256,
    "256 PNGs of 16 megapixels": lambda: [grey16(4000)] * 256,
}
