"""The formats that are read, and what is done about their oddities before and after decoding.

docs/formats.md is the table of what comes out. HEIC is read if pillow-heif is installed: pip install 'twinview[heic]'.
"""

import contextlib
import hashlib
import io
import re
import struct
import zlib
from collections.abc import Callable

from PIL import ExifTags, Image

# The formats that Pillow may try on untrusted bytes: raster images only (its EPS plugin would start Ghostscript).
# JPEG includes MPO, which Pillow does not register as a format: naming it would make all other formats fail.
FORMATS: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
HEIC = "HEIF"  # Pillow's name for it

try:
    import pillow_heif
except ImportError:
    pass
else:
    pillow_heif.register_heif_opener(thumbnails=False)
    # The other cores have processes of their own.
    pillow_heif.options.DECODE_THREADS = 1  # pyrefly: ignore[bad-assignment]
    FORMATS = (*FORMATS, HEIC)

MAX_PROFILE_BYTES = 2**22  # larger colour profiles are ignored

PNG = b"\x89PNG\r\n\x1a\n"
JPEG_END = b"\xff\xd9"
NOISE = bytes((73 * i + 19) % 251 for i in range(512))
JPEG_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])", re.DOTALL)  # those with a length, and the first one
JPEG_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
# Chunks that change how a PNG looks, besides the colour profile. All that are not critical (capital letter) may go.
SIDE_CHUNKS = (b"tRNS", b"eXIf", b"gAMA", b"cHRM", b"sRGB")

# How the files of other formats begin, and what they are. The brands of ISO files stand at byte 8.
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
OTHER_FORMATS = (
    (re.compile(rb"\s*(?:<\?xml.{0,500}?|<!--.{0,500}?-->\s*)?<svg", re.DOTALL), "is an SVG drawing"),
    (re.compile(rb"%PDF-"), "is a PDF document"),
    (re.compile(rb"8BPS"), "is a Photoshop document"),
    (re.compile(rb"\xff\x0a|\0\0\0\x0cJXL "), "is a JPEG XL picture"),
    (re.compile(rb"....ftyp(?:isom|mp4|M4V|qt  |avc1|iso\d|3gp)", re.DOTALL), "is a video"),
    (re.compile(rb"\x1aE\xdf\xa3"), "is a video"),
    (re.compile(rb"PK\x03\x04|Rar!|7z\xbc\xaf|\x1f\x8b"), "is an archive"),
    (re.compile(rb"....ftypcrx |FUJIFILMCCD-RAW|IIRO|II\x55\0", re.DOTALL), "is a camera's raw file"),
    (re.compile(rb"v/1\x01|#\?RADIANCE"), "is an HDR picture"),
    (re.compile(rb".{128}DICM", re.DOTALL), "is a DICOM file"),
)
DAMAGED = (
    (re.compile(re.escape(PNG)), "PNG"),
    (re.compile(rb"\xff\xd8\xff"), "JPEG"),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), "WebP"),
    (re.compile(rb"GIF8[79]a"), "GIF"),
    (re.compile(rb"II\*\0|MM\0\*"), "TIFF"),
    (re.compile(rb"....ftypavi[fs]", re.DOTALL), "AVIF"),
)


def why_unreadable(data: bytes) -> str:
    """Why Pillow does not open these bytes. Completes the sentence "<name> ..."."""
    if data[4:8] == b"ftyp" and data[8:12] in HEIC_BRANDS:
        if HEIC in FORMATS:
            return "is a damaged or incomplete HEIC file"
        return "is a HEIC picture, which needs pillow-heif: pip install 'twinview[heic]'"
    for beginning, what in OTHER_FORMATS:
        if beginning.match(data):
            return f"{what}, which is not a supported format"
    for beginning, name in DAMAGED:
        if beginning.match(data):
            return f"is a damaged or incomplete {name} file"
    return "is not an image in a supported format"


def open_file(data: bytes) -> Image.Image:
    """Read the header only. Raises whatever Pillow raises."""
    data, profile = without_side_chunks(data)
    image = _open(data)
    if profile:
        image.info["icc_profile"] = profile
    return image


def _open(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data), formats=FORMATS)


def load(image: Image.Image, enough_px: float | None) -> Image.Image:
    """Decode an opened image, at a reduced scale if that is enough. Raises whatever Pillow raises."""
    file, name = getattr(image, "fp", None), image.format
    try:
        _load(image, enough_px)
    except OSError:
        if name not in ("JPEG", "MPO") or not isinstance(file, io.BytesIO):
            raise
        complete = None
        with contextlib.suppress(OSError):
            complete = without_end(file.getvalue(), lambda data: _load(_open(data), enough_px))
        if complete is None:
            raise
        complete.info.update(image.info)
        return complete
    return image


def _load(image: Image.Image, enough_px: float | None) -> Image.Image:
    if enough_px is not None:
        image.draft(image.mode, (int(enough_px), int(enough_px)))  # a no-op for other formats than JPEG
    image.load()
    return image


def without_side_chunks(data: bytes) -> tuple[bytes, bytes | None]:
    """A PNG without what does not belong to its pixels: texts of any length, other programs' data, damaged side chunks.

    Returns the file, and the colour profile, which is taken out too. Any other file is returned as it is.
    """
    if not data.startswith(PNG):
        return data, None
    parts, profile, at, kept_from = [], None, len(PNG), 0
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if end > len(data):
            break
        is_side = bool(kind[0] & 0x20)
        if is_side:
            sound = zlib.crc32(data[at + 4 : end - 4]) == struct.unpack_from(">I", data, end - 4)[0]
            if kind == b"iCCP" and sound and profile is None:
                profile = _inflated(data[at + 8 : end - 4])
            if not (sound and kind in SIDE_CHUNKS):
                parts.append(data[kept_from:at])
                kept_from = end
        at = end
    if not parts:
        return data, profile
    return b"".join([*parts, data[kept_from:]]), profile


def _inflated(chunk: bytes) -> bytes | None:
    """The colour profile in a chunk iCCP."""
    try:
        profile = zlib.decompressobj().decompress(chunk.partition(b"\0")[2][1:], MAX_PROFILE_BYTES + 1)
    except zlib.error:
        return None
    return profile if len(profile) <= MAX_PROFILE_BYTES else None


def without_end(data: bytes, read: Callable[[bytes], Image.Image]) -> Image.Image | None:
    """A JPEG that ends without its last marker; None if pixels are missing too.

    The decoder fills up missing pixels silently. So the file is decoded three times, with nothing, with noise and with
    its opposite in the place of what is missing: only a complete picture comes out the same. Whole scans that are
    missing would not be noticed, so they are counted.
    """
    if not has_all_scans(data):
        return None
    digests = []
    for rest in (NOISE, bytes(255 ^ byte for byte in NOISE).replace(b"\xff", b"\xfe"), b""):
        image = read(data.rstrip(b"\xff") + rest + JPEG_END)
        digest = hashlib.sha1(usedforsecurity=False)
        for top in range(0, image.height, 256):
            digest.update(image.crop((0, top, image.width, min(image.height, top + 256))).tobytes())
        digests.append(digest.digest())
    return image if len(set(digests)) == 1 else None


def has_all_scans(data: bytes) -> bool:
    """Whether the scans of a JPEG bring all bits of all coefficients of all components (ITU T.81, G.1.1.1)."""
    missing: dict[int, list[int]] = {}  # for each coefficient of each component the number of bits still to come
    at = 0
    while found := JPEG_MARKER.search(data, at):
        marker, at = found[1][0], found.end()
        if marker == 0xD8:
            continue
        length = int.from_bytes(data[at : at + 2], "big")
        head = data[at + 2 : at + length]
        at += length
        if marker in JPEG_FRAMES:
            missing = {component: [16] * 64 for component in head[6::3]}
        elif marker == 0xDA and head and len(head) == 4 + 2 * head[0]:
            first, last, bits = head[-3], head[-2], head[-1] & 15
            for component in head[1:-3:2]:
                missing.setdefault(component, [16] * 64)[first : last + 1] = [bits] * (min(last, 63) + 1 - first)
    return bool(missing) and not any(any(bits) for bits in missing.values())


def orientation(image: Image.Image) -> int:
    """How an opened image must still be turned, as EXIF numbers it; 1 for one that is upright.

    Reads this tag alone: in many files another one is damaged. A TIFF is turned by Pillow, HEIC by its library.
    """
    if image.format in ("TIFF", HEIC):
        return 1
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow's parsers raise nearly anything on malformed bytes
        return 1
    return found if found in range(1, 9) else 1


def is_truncated(error: Exception) -> bool:
    """Whether Pillow's error says that the end of a file is missing."""
    return isinstance(error, EOFError) or "truncated" in str(error).lower()
