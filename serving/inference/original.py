"""The picture that an item was made from, to look at: upright, at most LARGE_PX on its longer side, as a new JPEG file.

An item's path comes from whoever added the item, so the file must prove itself: it is used only if its hash is the
item's id, which means that it is the very picture that was indexed. No path leads to any other file.
"""

import io
import os
import stat

from PIL import Image

from export.artifact import UnreadableImage, read_image
from serving.collection.items import Item, content_id

LARGE_PX = 2048
QUALITY = 88


def large_original(item: Item, most_bytes: int, max_pixels: int) -> bytes:
    """A JPEG file of the item's picture.

    most_bytes  largest file that is read
    raises      UnreadableImage when the file is not there, has changed, or was never a file of its own
    """
    data = _read(item.path, min(item.bytes, most_bytes)) if item.path else b""
    if content_id(data) != item.id:
        raise UnreadableImage("is not the picture that was indexed")
    image = read_image(data, max_pixels, LARGE_PX)
    image.thumbnail((LARGE_PX, LARGE_PX), Image.Resampling.LANCZOS, reducing_gap=3.0)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY, comment=b"")  # without it Pillow would copy the file's own
    return file.getvalue()


def _read(path: str, size: int) -> bytes:
    """Returns a file of exactly `size` bytes. Raises UnreadableImage.

    Devices and pipes are neither opened nor waited for.
    """
    try:
        if stat.S_ISREG(os.stat(path).st_mode):
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            with os.fdopen(descriptor, "rb") as file:
                facts = os.fstat(descriptor)
                if stat.S_ISREG(facts.st_mode) and facts.st_size == size:
                    return file.read(size)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise UnreadableImage("cannot be read") from error
    raise UnreadableImage("is not the file that was indexed")
