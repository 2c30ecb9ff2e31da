"""A part of a picture: the box that is drawn on it, and what lies inside."""

import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

LEAST = 0.01  # of a side


@dataclass(frozen=True)
class Box:
    """Edges as shares of the picture as it is seen, 0 to 1."""

    left: float
    top: float
    right: float
    bottom: float

    @classmethod
    def of(cls, edges) -> "Box":
        """From four numbers, or their texts. raises ValueError for what is no box."""
        left, top, right, bottom = (round(min(max(float(edge), 0.0), 1.0), 4) for edge in edges)
        if not (right - left >= LEAST and bottom - top >= LEAST):
            raise ValueError("the part is too small; draw a larger one")
        return cls(left, top, right, bottom)

    def __str__(self) -> str:
        return ",".join(f"{edge:g}" for edge in (self.left, self.top, self.right, self.bottom))


def cut(picture: Path | bytes, box: Box) -> bytes:
    """PNG of the part. raises OSError for what is no picture."""
    try:
        with Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture) as image:
            upright = ImageOps.exif_transpose(image)
            w, h = upright.size
            left, top = int(box.left * w), int(box.top * h)
            part = upright.crop((left, top, max(left + 1, round(box.right * w)), max(top + 1, round(box.bottom * h))))
            if part.mode not in ("RGB", "L"):
                part = part.convert("RGBA" if "transparency" in part.info or part.mode in ("LA", "PA") else "RGB")
    except (Image.DecompressionBombError, SyntaxError, ValueError) as error:  # what Pillow raises beside OSError
        raise OSError(str(error)) from error
    buffer = io.BytesIO()
    part.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
