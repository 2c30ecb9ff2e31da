"""Whether a picture is dark, over-exposed, empty or blurred, by simple measures.

The limits were chosen on photographs of clothes and on CIFAR-10, plain, and darkened, brightened, blurred or blank: few
plain pictures are beyond them. serving/RECORDS.md has the shares.
"""

from typing import NamedTuple

import numpy as np
from PIL import Image

WHITE = 250  # of 255, in all three channels
WIDTH = 9  # pixels of the blur that a picture is compared with; as in the paper


class Defect(NamedTuple):
    name: str
    value: float
    """What the defect's measure gives."""
    severity: float
    """Above 0 to 1: how far the value is on the way from the limit to the worst one."""


def defect(image: Image.Image) -> Defect | None:
    """Returns the first defect of MEASURES that an RGB image has, None if it has none."""
    for name, (measure, limit, worst) in MEASURES.items():
        value = measure(image)
        if (severity := (value - limit) / (worst - limit)) > 0:
            return Defect(name, value, severity)
    return None


def brightest(image: Image.Image) -> float:
    """Returns the grey value, 0 to 1, that 5 % of the pixels exceed."""
    counts = np.bincount(_grey(image).ravel(), minlength=256).cumsum()
    return float(np.searchsorted(counts, 0.95 * counts[-1])) / 255


def white_share(image: Image.Image) -> float:
    """Returns the share of white pixels of the middle half of each side: around it, many pictures are white on
    purpose."""
    pixels = np.asarray(image)
    top, left = pixels.shape[0] // 4, pixels.shape[1] // 4
    middle = pixels[top : pixels.shape[0] - top, left : pixels.shape[1] - left]
    return float((middle >= WHITE).all(axis=2).mean())


def contrast(image: Image.Image) -> float:
    """Returns the standard deviation of the grey values, which are 0 to 1."""
    return float(_grey(image).std()) / 255


def blur(image: Image.Image) -> float:
    """Returns 0 (sharp) to 1: how much of the differences between neighbouring pixels stays when the picture is blurred
    along one axis, the one with more of it. Blurring changes a blurred picture little (Crété et al. 2007, The Blur
    Effect: Perception and Estimation with a New No-Reference Perceptual Blur Metric)."""
    grey = _grey(image).astype(np.int16)
    return max(_blur_along_rows(grey), _blur_along_rows(np.ascontiguousarray(grey.T)))


def _blur_along_rows(grey: np.ndarray) -> float:
    """grey (h, w) int16. The means of WIDTH pixels around neighbouring pixels differ in one pixel at each end."""
    padded = np.pad(grey, ((0, 0), (WIDTH // 2, WIDTH // 2)), mode="edge")
    of_means = np.abs(padded[:, WIDTH:] - padded[:, : grey.shape[1] - 1])  # times WIDTH
    own = WIDTH * np.abs(np.diff(grey, axis=1))
    lost = int(np.maximum(0, own - of_means).sum(dtype=np.int64))
    total = int(own.sum(dtype=np.int64))
    return 1 - lost / total if total else 0.0


def _grey(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("L"))


# name: measure, limit, worst value. A dark picture is often empty too, and an empty one neither sharp nor blurred.
MEASURES = {
    "dark": (brightest, 0.3, 0.0),
    "over_exposed": (white_share, 0.25, 1.0),
    "empty": (contrast, 0.03, 0.0),
    "blurred": (blur, 0.5, 1.0),
}
