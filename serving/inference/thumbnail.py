"""Decodes a picture for a collection once, for the encoder's pixels, the thumbnail and the size."""

import contextlib
import io
import math
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image

from export.artifact import FORMATS, MAX_PIXELS, Preprocessing, preprocess, read_image

THUMBNAIL_PX = 256  # its longer side
QUALITY = 85


class Picture(NamedTuple):
    pixels: np.ndarray
    """uint8 (S, S, 3), bit for bit those of `read_pixels`."""
    thumbnail: bytes
    """A JPEG file."""
    width: int
    """Pixels of the whole picture, upright."""
    height: int


def read_picture(data: bytes, preprocessing: Preprocessing, max_pixels: int = MAX_PIXELS) -> Picture:
    """Raises UnreadableImage."""
    image = read_image(data, max_pixels, preprocessing.enough_px)
    pixels = preprocess(image, preprocessing)
    width, height = whole_size(data, image)
    if max(image.size) < min(THUMBNAIL_PX, max(width, height)):  # decoded too small for the thumbnail
        image = read_image(data, max_pixels, THUMBNAIL_PX)
    return Picture(pixels, thumbnail(image), width, height)


def thumbnail(image: Image.Image) -> bytes:
    """RGB image of any size -> JPEG file of THUMBNAIL_PX or up to an eighth less; smaller if the image is smaller."""
    longer = max(image.size)
    factor = math.ceil(longer / THUMBNAIL_PX)
    if longer / factor >= 7 / 8 * THUMBNAIL_PX:
        image = image.reduce(factor)  # means of factor x factor pixels: five times faster than resampling
    elif longer > THUMBNAIL_PX:
        # For downscaling, Hamming is nearly as sharp as bicubic and takes two thirds of the time.
        size = [max(1, round(side * THUMBNAIL_PX / longer)) for side in image.size]
        image = image.resize(size, Image.Resampling.HAMMING, reducing_gap=2.0)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def whole_size(data: bytes, image: Image.Image | None = None) -> tuple[int, int]:
    """Returns width and height of a readable picture, upright and at full scale.

    image  the picture decoded, perhaps at a reduced scale; saves reading EXIF if it is at full scale
    """
    with Image.open(io.BytesIO(data), formats=FORMATS) as header:
        if image is not None and max(header.size) == max(image.size):
            return image.size
        with contextlib.suppress(Exception):  # with unreadable EXIF the picture counts as upright
            if header.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8):  # turned by 90 degrees
                return header.height, header.width
        return header.size
