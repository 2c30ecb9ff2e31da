"""Many images in one request body of media type application/x-twinview-pack. For each image:

    length   size of the file in bytes, as 4 bytes, unsigned, big-endian
    image    the file

In Python, `b"".join(len(image).to_bytes(4, "big") + image for image in images)`.
"""

from collections.abc import Iterator, Sequence

MEDIA_TYPE = "application/x-twinview-pack"
PREFIX_BYTES = 4


class BrokenPack(ValueError):
    """A pack that ends too early. `image` names the incomplete image, and so does the message."""

    def __init__(self, image: str, reason: str):
        super().__init__(f"{image}: {reason}")
        self.image = image


def pack(images: Sequence[bytes]) -> bytes:
    return b"".join(part for image in images for part in (len(image).to_bytes(PREFIX_BYTES, "big"), image))


def unpack(body: bytes) -> Iterator[bytes]:
    """Yields the images. Raises BrokenPack at an incomplete one."""
    start, i = 0, 0
    while start < len(body):
        end = start + PREFIX_BYTES
        if end > len(body):
            raise BrokenPack(f"images[{i}]", "the pack ends within the 4 bytes of its length")
        length = int.from_bytes(body[start:end], "big")
        if length > len(body) - end:
            raise BrokenPack(f"images[{i}]", f"its length is {length} bytes, but the pack ends after {len(body) - end}")
        yield body[end : end + length]
        start, i = end + length, i + 1
