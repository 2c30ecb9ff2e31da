"""Each row of docs/formats.md about pictures: a file of that kind is made, and read as the table says."""

import contextlib
import importlib
import io
import re
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from export import formats
from export.artifact import Preprocessing, TooManyPixels, UnreadableImage, read_image, read_pixels
from serving.inference.thumbnail import read_picture, whole_size

TABLE = Path(__file__).parents[2] / "docs" / "formats.md"
WIDTH, HEIGHT = 48, 32
ORIENTATION = 0x0112


def encode(image: Image.Image, format: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def colours() -> Image.Image:
    """Left half red, right half blue, the upper left quarter bright; muted, so that profiles have room."""
    pixels = np.full((HEIGHT, WIDTH, 3), 40, np.uint8)
    pixels[:, : WIDTH // 2, 0] = 120
    pixels[:, WIDTH // 2 :, 2] = 180
    pixels[: HEIGHT // 2, : WIDTH // 2, 0] = 200
    return Image.fromarray(pixels)


def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))


def ramp(top: float = 255) -> np.ndarray:
    return np.tile(np.linspace(0, top, WIDTH), (HEIGHT, 1))


def deep(values: np.ndarray, kind: type, **options) -> bytes:
    return encode(
        Image.fromarray(values.round().astype(kind) if kind != np.float32 else values.astype(kind)), **options
    )


def comes_out(data: bytes, expected: Image.Image | np.ndarray, at_most: int = 0) -> None:
    pixels, expected = np.asarray(read_image(data), int), np.asarray(expected, int)
    expected = np.stack([expected] * 3, -1) if expected.ndim == 2 else expected
    assert pixels.shape == expected.shape
    assert np.abs(pixels - expected).max() <= at_most


def refused(data: bytes, reason: str) -> None:
    for read in (read_image, lambda data: read_pixels(data, Preprocessing(8))):
        with pytest.raises(UnreadableImage) as raised:
            read(data)
        assert re.fullmatch(reason, str(raised.value)), str(raised.value)


def chunk(kind: bytes, data: bytes, checksum: int = 0) -> bytes:
    """checksum  differs from the right one by this much"""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) ^ checksum)


def with_chunk(png: bytes, extra: bytes, at_end: bool = False) -> bytes:
    at = len(png) - 12 if at_end else 33  # before IEND, or after IHDR
    return png[:at] + extra + png[at:]


def exif(orientation: int, order: str = "<") -> bytes:
    """Orientation, and an ExposureBiasValue of -1/0, which Pillow cannot write."""
    sub = 8 + 2 + 2 * 12 + 4
    entries = struct.pack(f"{order}HHIHH", ORIENTATION, 3, 1, orientation, 0)
    entries += struct.pack(f"{order}HHII", 0x8769, 4, 1, sub)
    bias = struct.pack(f"{order}HHHIII", 1, 0x9204, 10, 1, sub + 18, 0) + struct.pack(f"{order}ii", -1, 0)
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return b"Exif\0\0" + mark + struct.pack(f"{order}IH", 8, 2) + entries + struct.pack(f"{order}I", 0) + bias


def stored(upright: Image.Image, orientation: int) -> Image.Image:
    """As a camera stores it, by the definition of the tag."""
    a = np.asarray(upright)
    turned = a.transpose(1, 0, 2)
    undone = [a, a[:, ::-1], a[::-1, ::-1], a[::-1], turned, turned[::-1], turned[::-1, ::-1], turned[:, ::-1]]
    return Image.fromarray(np.ascontiguousarray(undone[orientation - 1]))


def s15(*values: float) -> bytes:
    return b"".join(struct.pack(">i", round(65536 * value)) for value in values)


def display_p3() -> bytes:
    """A profile with the primaries of Display P3 and a gamma of 2.2."""
    curve = b"curv\0\0\0\0" + struct.pack(">IHH", 1, round(2.2 * 256), 0)
    text = b"desc\0\0\0\0" + struct.pack(">I", 8) + b"like P3\0" + b"\0" * 80
    primaries = {
        b"rXYZ": (0.5151, 0.2412, -0.0011),
        b"gXYZ": (0.2920, 0.6922, 0.0419),
        b"bXYZ": (0.1571, 0.0666, 0.7841),
    }
    tags = {b"desc": text, b"cprt": b"text\0\0\0\0none\0\0\0\0", b"wtpt": b"XYZ \0\0\0\0" + s15(0.9642, 1, 0.8249)}
    tags |= {name: b"XYZ \0\0\0\0" + s15(*xyz) for name, xyz in primaries.items()}
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    at, table, body = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, value in tags.items():
        table += name + struct.pack(">II", at + len(body), len(value))
        body += value
    head = struct.pack(">I4sI4s4s4s", at + len(body), b"none", 0x02100000, b"mntr", b"RGB ", b"XYZ ")
    head += b"\0" * 12 + b"acsp" + b"\0" * 28 + s15(0.9642, 1, 0.8249)
    return head.ljust(128, b"\0") + table + body


P3 = display_p3()
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def in_p3(image: Image.Image) -> Image.Image:
    """The same colours, in numbers of P3."""
    transform = ImageCms.buildTransform(
        ImageCms.createProfile("sRGB"), ImageCms.ImageCmsProfile(io.BytesIO(P3)), "RGB", "RGB"
    )
    return ImageCms.applyTransform(image, transform)


# One function per row ------------------------------------------------------------------------------------------------


def the_usual_formats() -> None:
    lossy = {"JPEG": {"quality": 100, "subsampling": 0}, "AVIF": {"quality": 100, "subsampling": "4:4:4"}}
    lossy["MPO"] = lossy["JPEG"] | {"save_all": True, "append_images": [Image.new("RGB", (9, 9))]}
    for format in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "MPO"):
        options = lossy.get(format, {"lossless": True} if format == "WEBP" else {})
        comes_out(encode(colours(), format, **options), colours(), 6 if format in lossy else 0)


def heic() -> None:
    data = encode(colours(), "HEIF", quality=100, chroma=444)
    comes_out(data, colours(), 8)
    turned = encode(stored(colours(), 6), "HEIF", quality=100, chroma=444, exif=exif(6))
    comes_out(turned, colours(), 8)
    assert whole_size(turned) == (WIDTH, HEIGHT)
    refused(data[: len(data) // 2], "is a damaged or incomplete HEIC file")


def animations() -> None:
    for format in ("GIF", "PNG", "WEBP", "TIFF"):
        others = [Image.new("RGB", colours().size, "green")] * 2
        options = {"lossless": True} if format == "WEBP" else {}
        comes_out(encode(colours(), format, save_all=True, append_images=others, **options), colours())


def orientation() -> None:
    big = colours().resize((1200, 800))  # decoded at a reduced scale
    for order in "<>":
        for number in range(1, 9):
            for format, options in (
                ("PNG", {}),
                ("JPEG", {"quality": 100, "subsampling": 0}),
                ("WEBP", {"lossless": 1}),
            ):
                data = encode(stored(colours(), number), format, exif=exif(number, order), **options)
                comes_out(data, colours(), 6 if format == "JPEG" else 0)
                assert whole_size(data) == (WIDTH, HEIGHT)
            picture = read_picture(encode(stored(big, number), "JPEG", exif=exif(number, order)), Preprocessing(8))
            assert (picture.width, picture.height) == big.size
    for compression in ("raw", "tiff_lzw"):
        data = encode(stored(colours(), 6), "TIFF", tiffinfo={ORIENTATION: 6}, compression=compression)
        comes_out(data, colours())
        picture = read_picture(data, Preprocessing(8))
        assert whole_size(data) == (picture.width, picture.height) == (WIDTH, HEIGHT)


def unreadable_exif() -> None:
    for format in ("PNG", "WEBP"):
        options = {"lossless": True} if format == "WEBP" else {}
        comes_out(encode(colours(), format, exif=b"Exif\0\0garbage", **options), colours())
    for number in (0, 9, 77):
        odd = encode(colours(), exif=exif(number))
        comes_out(odd, colours())
        assert whole_size(odd) == (WIDTH, HEIGHT)


def transparency() -> None:
    image = colours().convert("RGBA")
    image.putalpha(0)
    comes_out(encode(image), Image.new("RGB", image.size, "white"))
    comes_out(encode(Image.new("RGBA", (4, 4), (0, 0, 0, 128))), Image.new("RGB", (4, 4), (127,) * 3))


def profiles() -> None:
    wide = in_p3(colours())
    assert np.abs(np.asarray(wide, int) - np.asarray(colours(), int)).max() > 10
    comes_out(encode(wide, icc_profile=P3), colours(), 2)
    comes_out(encode(wide, "JPEG", icc_profile=P3, quality=100, subsampling=0), colours(), 8)
    transparent = wide.convert("RGBA")
    transparent.putpixel((0, 0), (0, 0, 0, 0))
    pixels = np.asarray(read_image(encode(transparent, icc_profile=P3)), int)
    assert (pixels[0, 0] == 255).all() and np.abs(pixels - np.asarray(colours(), int))[:, 1:].max() <= 2
    few = wide.quantize(8)
    comes_out(encode(few, icc_profile=P3), colours(), 4)
    # What the encoder and the page see is converted too, once.
    data = encode(wide.resize((600, 400), Image.Resampling.NEAREST), icc_profile=P3)
    picture = read_picture(data, Preprocessing(8))
    thumbnail = Image.open(io.BytesIO(picture.thumbnail))
    assert "icc_profile" not in thumbnail.info
    for pixels in (picture.pixels, read_pixels(data, Preprocessing(8)), np.asarray(thumbnail.resize((8, 8)))):
        assert (
            np.abs(pixels[[1, -2, -2], [1, 1, -2]].astype(int) - [(200, 40, 40), (120, 40, 40), (40, 40, 180)]).max()
            < 7
        )
    comes_out(encode(colours(), icc_profile=SRGB), colours())  # not even rounded


def unreadable_profiles() -> None:
    for profile in (b"no profile at all" * 20, P3[:300], b"\0" * 5_000_000):
        comes_out(encode(colours(), icc_profile=profile), colours())
        comes_out(encode(colours(), "WEBP", lossless=True, icc_profile=profile), colours())
    comes_out(
        encode(Image.fromarray(ramp().round().astype(np.uint8)), icc_profile=P3), ramp().round()
    )  # of other colours


def cmyk() -> None:
    comes_out(encode(colours().convert("CMYK"), "TIFF"), colours(), 2)
    comes_out(encode(colours().convert("CMYK"), "JPEG", quality=100, subsampling=0), colours(), 8)


def sixteen_bits() -> None:
    for format in ("PNG", "TIFF", "JPEG2000"):
        comes_out(deep(ramp(65535), np.uint16, format=format), ramp(), 1)
    hot = ramp(20_000)
    hot[5, 5] = 65535
    pixels = np.asarray(read_image(deep(hot, np.uint16)), int)
    pixels[5, 5] = ramp()[5, 5]
    assert np.abs(pixels[..., 0] - ramp()).max() <= 1
    comes_out(deep(ramp(10), np.uint16), ramp(10), 1)  # at least 255: noise near black stays black


def twelve_bits() -> None:
    comes_out(deep(ramp(4095), np.uint16), ramp(), 1)
    comes_out(deep(ramp(4095), np.uint16, format="TIFF"), ramp(), 1)


def floats() -> None:
    for top in (1.0, 1.01, 255, 65535):
        comes_out(deep(ramp(top), np.float32, format="TIFF"), ramp(), 1)
    outlier = ramp(1)
    outlier[5, 5] = 1.01
    pixels = np.asarray(read_image(deep(outlier, np.float32, format="TIFF")), int)
    assert np.abs(pixels[..., 0] - np.minimum(ramp() + 0 * outlier, 255))[:5].max() <= 1
    comes_out(deep(ramp(0.2), np.float32, format="TIFF"), ramp(51), 1)


def odd_values() -> None:
    values = ramp(1)
    values[0, :4] = np.nan, np.inf, -np.inf, -7
    pixels = np.asarray(read_image(deep(values, np.float32, format="TIFF")), int)
    assert (pixels[0, :4] == 0).all() and np.abs(pixels[1:, :, 0] - ramp()[1:]).max() <= 1


def sixteen_bit_colour() -> None:
    rows = b"".join(b"\0" + np.full((2, 3), 0x80FF, ">u2").tobytes() for _ in range(2))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0))
    png = formats.PNG + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    comes_out(png, Image.new("RGB", (2, 2), (128, 128, 128)))


def white_is_zero() -> None:
    for kind, top in ((np.uint8, 255), (np.uint16, 65535)):
        data = bytearray(deep(ramp(top), kind, format="TIFF"))
        at = data.index(struct.pack("<HHI", 262, 3, 1)) + 8  # PhotometricInterpretation
        data[at] = 0
        comes_out(bytes(data), 255 - ramp(), 1)


def long_texts() -> None:
    png = encode(colours())
    for at_end in (False, True):
        for text in (b"zTXtComment\0\0" + zlib.compress(b"x" * 3_000_000), b"tEXtComment\0" + b"x" * 3_000_000):
            comes_out(with_chunk(png, chunk(text[:4], text[4:]), at_end), colours())
    large = P3 + bytes(range(256)) * 6_000
    comes_out(encode(in_p3(colours()), icc_profile=struct.pack(">I", len(large)) + large[4:]), colours(), 2)


def wrong_checksums() -> None:
    for at_end in (False, True):
        for kind in (b"tEXt", b"iCCP", b"pHYs", b"eXIf", b"abCd"):
            comes_out(with_chunk(encode(colours()), chunk(kind, b"what\0ever", 1), at_end), colours())


def no_end_marker() -> None:
    big = colours().resize((900, 600))
    for image in (colours(), big):
        for options in ({}, {"progressive": True}):
            whole = encode(image, "JPEG", **options)
            for cut in (1, 2):
                comes_out(whole[:-cut], read_image(whole))
            assert (read_pixels(whole[:-2], Preprocessing(8)) == read_pixels(whole, Preprocessing(8))).all()
    for options in ({}, {"progressive": True}):
        whole = encode(noise(), "JPEG", **options)
        for cut in (30, len(whole) // 3):
            refused(whole[:-cut], "is truncated: its end is missing")
    turned = encode(stored(colours(), 6), "JPEG", exif=exif(6))
    comes_out(turned[:-2], read_image(turned))
    whole = encode(colours().resize((400, 300)), "JPEG", progressive=True)
    scans = [found.start() for found in re.finditer(b"\xff\xda", whole)]
    assert len(scans) == 10
    for cut in scans[1:]:  # no scan is cut, but the last ones are missing
        refused(whole[:cut], "is truncated: its end is missing")
        with pytest.raises(UnreadableImage, match="truncated"):
            read_pixels(whole[:cut], Preprocessing(8))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"progressive": True, "subsampling": 0}], ids=str)
def test_a_jpeg_that_is_cut_off_is_refused_or_comes_out_as_the_whole(options):
    """Also at a reduced scale, for which the end of a progressive file is not needed."""
    random = np.random.default_rng(0)
    noisy = np.asarray(colours().resize((200, 160))).astype(int) + random.integers(-20, 20, (160, 200, 3))
    whole = encode(Image.fromarray(noisy.clip(0, 255).astype(np.uint8)), "JPEG", quality=85, **options)
    reads = [read_image, lambda data: read_pixels(data, Preprocessing(10))]
    for read in reads:
        expected, came_out = np.asarray(read(whole)), 0
        for cut in (*range(200, len(whole) - 16, len(whole) // 60), *range(len(whole) - 16, len(whole))):
            with contextlib.suppress(UnreadableImage):
                assert (np.asarray(read(whole[:cut])) == expected).all(), cut
                came_out += 1
        assert came_out >= 2


def truncated() -> None:
    for format in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "PPM"):
        data = encode(noise(), format)
        refused(data[: len(data) * 2 // 3], "is truncated: its end is missing")
    for format, name in (("PNG", "PNG"), ("JPEG", "JPEG"), ("WEBP", "WebP"), ("GIF", "GIF"), ("AVIF", "AVIF")):
        refused(encode(noise(), format)[:20], f"is a damaged or incomplete {name} file")


def other_files() -> None:
    for data, what in (
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "an SVG drawing"),
        (b"%PDF-1.7\n", "a PDF document"),
        (b"8BPS\0\1", "a Photoshop document"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL picture"),
        (b"\0" * 128 + b"DICM", "a DICOM file"),
        (b"\0\0\0\x18ftypcrx \0", "a camera's raw file"),
        (b"\0\0\0\x20ftypisom\0", "a video"),
        (b"PK\x03\x04", "an archive"),
    ):
        refused(data + b"\0" * 100, f"is {what}, which is not a supported format")


def too_large() -> None:
    for width, height, reason in ((100_000, 100_000, "at most 134,217,728"), (262_145, 1, "at most 262,144")):
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        with pytest.raises(TooManyPixels, match=reason):
            read_image(formats.PNG + header + chunk(b"IDAT", b""))


CHECKS = {
    "JPEG, PNG, WebP, GIF, BMP, TIFF, PPM, JPEG 2000, AVIF, MPO": the_usual_formats,
    "HEIC": heic,
    "an animation, or several pages": animations,
    "EXIF orientation, whatever its other tags hold": orientation,
    "EXIF that cannot be read": unreadable_exif,
    "transparency": transparency,
    "a colour profile, such as Display P3, Adobe RGB or one of CMYK": profiles,
    "a colour profile that cannot be read, or is larger than 4 MiB": unreadable_profiles,
    "CMYK without a profile": cmyk,
    "16 bits per pixel, one channel": sixteen_bits,
    "12 bits in a file of 16": twelve_bits,
    "floats, one channel": floats,
    "values below 0, and values that are not numbers": odd_values,
    "16 bits per channel, in colour": sixteen_bit_colour,
    "a TIFF of one channel in which 0 is white": white_is_zero,
    "a PNG with a long text or much other data": long_texts,
    "a PNG with a wrong checksum in a side chunk": wrong_checksums,
    "a JPEG without its end marker": no_end_marker,
    "a file whose end is missing": truncated,
    "an SVG, PDF, Photoshop, JPEG XL or DICOM file, a raw file, a video, an archive": other_files,
    "more than 134,217,728 pixels, or 262,144 on a side": too_large,
}


def test_the_table_and_the_checks_name_the_same_files():
    section = TABLE.read_text().partition("## Pictures")[2].partition("## ")[0]
    rows = re.findall(r"^\| (.+?) \| .+ \|$", section, re.MULTILINE)
    assert [row for row in rows if row != "file"] == list(CHECKS)


@pytest.mark.parametrize("row", CHECKS, ids=str)
def test_a_file_comes_out_as_the_table_says(row):
    CHECKS[row]()


def test_without_pillow_heif_the_message_says_what_to_install(monkeypatch):
    data = encode(colours(), "HEIF")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    try:
        importlib.reload(formats)
        assert formats.HEIC not in formats.FORMATS
        refused(data, re.escape("is a HEIC picture, which needs pillow-heif: pip install 'twinview[heic]'"))
        comes_out(encode(colours()), colours())
    finally:
        monkeypatch.undo()
        importlib.reload(formats)
    comes_out(data, colours(), 60)
