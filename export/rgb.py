"""A decoded image becomes 8-bit RGB: upright, transparency on white, and in the colours of sRGB.

Images of one deep channel (16 or 32 bits, or floats) are scaled: black is 0, white the brightest value of the image
without its brightest thousandth, and at least 255, or 1 for floats. So 12 bits in a file of 16 are as bright as 8 bits
in one of 8, and one hot pixel changes nothing.
"""

import io
import math
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

from export.formats import MAX_PROFILE_BYTES, orientation

STRIP_PIXELS = 2**20  # converted to RGB at a time, to save memory
SAMPLE = 2**20  # values of a deep image that are looked at to find the brightest
BRIGHTEST = 0.001  # share of them that may be brighter than white
PHOTOMETRIC, WHITE_IS_ZERO = 262, 0  # tag of TIFF

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Modes in which a profile's colours are converted, by the profile's kind of colours.
PROFILE_MODES = {b"RGB ": ("RGB", "RGBA"), b"GRAY": ("L",), b"CMYK": ("CMYK",)}
SAME_COLOURS = 3  # of 255: a profile that changes no colour by more counts as sRGB


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB, upright. Returns the image itself if there is nothing to change.

    An image whose colour profile is still in its `info` needs `in_srgb`; after making it small, which is cheaper.
    """
    turn = TURNS.get(orientation(image))
    rgb = image if image.mode == "RGB" and not image.has_transparency_data else _converted(image)
    return rgb if turn is None else rgb.transpose(turn)


def in_srgb(image: Image.Image) -> Image.Image:
    """The result of `to_rgb`, of any size, in the colours of sRGB. Returns the image itself if it is already."""
    change = _transform(image.info.get("icc_profile"), "RGB")
    changed = ImageCms.applyTransform(image, change) if change else None
    return image if changed is None else changed


def is_turned(image: Image.Image) -> bool:
    """Whether width and height of the opened image change places when it is made upright."""
    return orientation(image) >= 5


def _converted(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    negative = image.format == "TIFF" and image.tag_v2.get(PHOTOMETRIC) == WHITE_IS_ZERO  # pyrefly: ignore
    rgb = Image.new("RGB", image.size)
    deep = image.mode == "F" or image.mode.startswith("I")  # one deep channel; 16-bit RGB arrives here as 8-bit
    white = _white(image) if deep else 0.0
    for box in _strips(image.size):
        strip = image.crop(box)
        if deep:
            values = _values(strip).clip(0, white) * (255 / white)
            strip = Image.fromarray((255 - values if negative else values).round().astype(np.uint8))
        elif strip.has_transparency_data:
            strip = _strip_in_srgb(strip.convert("RGBA"), profile)
            strip = Image.alpha_composite(Image.new("RGBA", strip.size, "white"), strip)
        else:
            strip = _strip_in_srgb(strip.convert("RGB") if strip.mode == "P" else strip, profile)
        rgb.paste(strip.convert("RGB"), box)
    return rgb


def _strip_in_srgb(strip: Image.Image, profile: object) -> Image.Image:
    change = _transform(profile, strip.mode)
    changed = ImageCms.applyTransform(strip, change) if change else None
    return strip if changed is None else changed


def _transform(profile: object, mode: str) -> ImageCms.ImageCmsTransform | None:
    """What turns the profile's colours into those of sRGB; None for nothing to do."""
    if not isinstance(profile, bytes) or len(profile) > MAX_PROFILE_BYTES:
        return None
    kind = profile[16:20]  # of colours
    return _built_transform(profile, mode) if mode in PROFILE_MODES.get(kind, ()) else None


@lru_cache(16)
def _built_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """None also for a profile that cannot be read, and for one that is nearly sRGB: most files have that."""
    target = "RGBA" if mode == "RGBA" else "RGB"
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        change = ImageCms.buildTransform(source, _srgb(), mode, target)
        sample = _colours(mode)
        changed = ImageCms.applyTransform(sample, change)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
    if changed is None:
        return None
    difference = np.abs(np.asarray(changed.convert("RGB"), int) - np.asarray(sample.convert("RGB"), int))
    return change if mode == "CMYK" or difference.max() > SAME_COLOURS else None


@lru_cache(1)
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


def _colours(mode: str) -> Image.Image:
    """Colours of all kinds, in this mode."""
    steps = np.arange(0, 256, 17, dtype=np.uint8)
    rgb = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(-1, 64, 3)
    return Image.fromarray(rgb).convert(mode)


def _white(image: Image.Image) -> float:
    """The value that becomes 255."""
    step = math.ceil(math.sqrt(image.width * image.height / SAMPLE))
    sample = np.concatenate([_values(image.crop(box))[::step, ::step].ravel() for box in _strips(image.size)])
    brightest = float(np.quantile(sample, 1 - BRIGHTEST, method="lower"))
    return max(brightest, 1.0 if image.mode == "F" else 255.0)


def _values(image: Image.Image) -> np.ndarray:
    return np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0, neginf=0)


def _strips(size: tuple[int, int]) -> Iterator[tuple[int, int, int, int]]:
    """Boxes of whole rows, of about STRIP_PIXELS each."""
    width, height = size
    rows = max(1, STRIP_PIXELS // width)
    for top in range(0, height, rows):
        yield 0, top, width, min(height, top + rows)
