"""A part of a picture: the box drawn on it, and the pixels inside."""

import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

MIN_SIDE = 0.01  # of a box, as a share of the picture's side


@dataclass(frozen=True)
class Box:
    """Edges as shares, 0 to 1, of the upright picture."""

    left: float
    top: float
    right: float
    bottom: float

    @classmethod
    def from_edges(cls, edges: Iterable[float | str]) -> "Box":
        """A box from four numbers or texts, clipped to the picture. Raises ValueError if they form no box."""
        left, top, right, bottom = (round(min(max(float(edge), 0.0), 1.0), 4) for edge in edges)
        if not (right - left >= MIN_SIDE and bottom - top >= MIN_SIDE):
            raise ValueError("the part is too small; draw a larger one")
        return cls(left, top, right, bottom)

    def __str__(self) -> str:
        return ",".join(f"{edge:g}" for edge in (self.left, self.top, self.right, self.bottom))


def cut(picture: Path | bytes, box: Box) -> bytes:
    """PNG of the part. Raises OSError if the picture cannot be read."""
    try:
        with Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture) as image:
            upright = ImageOps.exif_transpose(image)
            w, h = upright.size
            left, top = int(box.left * w), int(box.top * h)
            part = upright.crop((left, top, max(left + 1, round(box.right * w)), max(top + 1, round(box.bottom * h))))
            if part.mode not in ("RGB", "L"):
                part = part.convert("RGBA" if "transparency" in part.info or part.mode in ("LA", "PA") else "RGB")
    except (Image.DecompressionBombError, SyntaxError, ValueError) as error:  # Pillow raises these too
        raise OSError(str(error)) from error
    buffer = io.BytesIO()
    part.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
