"""Many images in one body, media type application/x-twinview-pack: one after the other, each behind its length.

    length   4 bytes, unsigned, big-endian: of the image that follows
    image    an encoded file, as it is

In Python, `b"".join(len(image).to_bytes(4, "big") + image for image in images)`.
"""

from collections.abc import Iterator, Sequence

MEDIA_TYPE = "application/x-twinview-pack"
PREFIX_BYTES = 4


class BrokenPack(ValueError):
    """A pack that ends too early. The message names the image; `image` is its name alone."""

    def __init__(self, image: str, reason: str):
        super().__init__(f"{image}: {reason}")
        self.image = image


def pack(images: Sequence[bytes]) -> bytes:
    return b"".join(part for image in images for part in (len(image).to_bytes(PREFIX_BYTES, "big"), image))


def unpack(body: bytes) -> Iterator[bytes]:
    """The images, one at a time. raises BrokenPack when it gets there."""
    start, i = 0, 0
    while start < len(body):
        end = start + PREFIX_BYTES
        if end > len(body):
            raise BrokenPack(f"images[{i}]", "the pack ends within its length")
        length = int.from_bytes(body[start:end], "big")
        if length > len(body) - end:
            raise BrokenPack(f"images[{i}]", f"the pack says {length} bytes and ends after {len(body) - end}")
        yield body[end : end + length]
        start, i = end + length, i + 1
