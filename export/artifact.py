"""The contract between training and serving: an encoder's input pixels, and the bundle that contains it.

A bundle is a folder of two files:

    encoder.onnx      input `pixels` uint8 (N, H, W, 3) RGB, output `embedding` float32 (N, d): h, not normalised;
                      if the card names C classes also `logits` float32 (N, C), whose softmax gives probabilities
    model_card.json   the ModelCard below

Training's evaluation and the service both read pictures with `read_pixels`, so the service gives the vectors that were
evaluated. Only numpy, Pillow and the standard library are imported: serving needs no torch.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

GRAPH = "encoder.onnx"
CARD = "model_card.json"
PRECISIONS = ("fp32", "fp16", "int8")

# The formats that Pillow may try on untrusted bytes: raster images only (its EPS plugin would start Ghostscript).
# JPEG includes MPO, which Pillow does not register as a format: naming it would make all other formats fail.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
MAX_PIXELS = 2**27  # 134 megapixels, 0.4 GB as RGB

# `_decode` has its own limit; Pillow's would only warn up to twice its size.
Image.MAX_IMAGE_PIXELS = None


class UnreadableImage(ValueError):
    """Bytes that do not decode. The message completes the sentence "<name> ..."."""


class TooManyPixels(UnreadableImage):
    """An image larger than the limit, refused by its header before anything was decoded."""


class BundleError(ValueError):
    """A folder without a usable encoder bundle. The message names the folder and what to do."""


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes the encoder's `pixels`.

    With a number as `crop`, the centred square of `crop` times the shorter side is used (0.875 in the paper's ImageNet
    evaluation), in its own proportions: what torchvision's Resize(round(size_px / crop)) and CenterCrop(size_px) give.
    With None the whole picture is squeezed into the square.
    """

    size_px: int
    """Side of the encoder's square input."""
    crop: float | None = None
    """Side of the centred square, as a share of the shorter side, in (0, 1]; None for the whole picture."""
    interpolation: str = "bicubic"
    """bicubic or bilinear; always antialiased."""

    def __post_init__(self):
        if not self.size_px >= 1:
            raise ValueError(f"size_px must be at least 1, not {self.size_px}")
        if self.crop is not None and not 0 < self.crop <= 1:
            raise ValueError(f"crop must be in (0, 1] or None, not {self.crop}")
        if self.interpolation not in ("bicubic", "bilinear"):
            raise ValueError(f"interpolation must be bicubic or bilinear, not {self.interpolation!r}")

    @property
    def enough_px(self) -> float:
        """Smallest shorter side that a JPEG may be decoded to at a reduced scale."""
        return 2 * self.size_px / (self.crop or 1)


def read_image(data: bytes, max_pixels: int = MAX_PIXELS, enough_px: float | None = None) -> Image.Image:
    """Decode to an upright 8-bit RGB image: EXIF orientation applied, transparency on white, first frame.

    enough_px  a JPEG may be decoded at a reduced scale, with a shorter side of at least this
    raises     UnreadableImage, or its subclass TooManyPixels, for bytes that cannot be decoded completely
    """
    return _decode(data, max_pixels, enough_px)


def read_pixels(data: bytes, preprocessing: Preprocessing, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode and preprocess: uint8 (S, S, 3) RGB, S = size_px. raises UnreadableImage.

    A JPEG of at least four times the size is decoded at a reduced scale (never below twice the size), which
    makes large photographs several times cheaper.
    """
    return preprocess(_decode(data, max_pixels, preprocessing.enough_px), preprocessing)


def preprocess(image: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """RGB image of any size -> uint8 (S, S, 3), S = size_px, in one antialiased resampling."""
    size, box = preprocessing.size_px, None
    if preprocessing.crop is not None:
        box = _crop_box(image.size, size, round(size / preprocessing.crop))
    filters = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
    return np.asarray(image.resize((size, size), filters[preprocessing.interpolation], box=box))


def _crop_box(image_size: tuple[int, int], size_px: int, shorter_px: int) -> tuple[float, float, float, float]:
    """The part of the image that torchvision's Resize(shorter_px) and CenterCrop(size_px) keep, with their rounding."""
    width, height = image_size
    if width <= height:
        resized = shorter_px, shorter_px * height // width
    else:
        resized = shorter_px * width // height, shorter_px
    left, top = (round((side - size_px) / 2) for side in resized)
    x, y = width / resized[0], height / resized[1]
    return left * x, top * y, min(width, (left + size_px) * x), min(height, (top + size_px) * y)


def _decode(data: bytes, max_pixels: int, enough_px: float | None) -> Image.Image:
    if not data:
        raise UnreadableImage("is empty")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception as error:  # Pillow's parsers raise nearly anything on malformed bytes
        raise UnreadableImage("is not an image in a supported format") from error
    if image.width * image.height > max_pixels:
        raise TooManyPixels(f"has {image.width} x {image.height} pixels; at most {max_pixels:,} are read")
    try:
        if enough_px is not None:
            image.draft(image.mode, (int(enough_px), int(enough_px)))  # a no-op for other formats than JPEG
        image.load()
        with contextlib.suppress(Exception):  # unreadable EXIF data is ignored
            image = ImageOps.exif_transpose(image)
        return _to_rgb(image)
    except Exception as error:
        raise UnreadableImage("is truncated or damaged") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):  # one deep channel; 16-bit RGB arrives here as 8-bit
        values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0, neginf=0)
        top = 65535 if image.mode.startswith("I") else 1.0 if values.max() <= 1 else 255
        image = Image.fromarray((values.clip(0, top) * (255 / top)).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


@dataclass(frozen=True)
class ModelCard:
    """Describes an encoder. `id` identifies the function: the same graph and preprocessing have the same id."""

    id: str
    """Architecture and a hash of graph and preprocessing; stored with every vector."""
    architecture: str
    """For instance resnet18 or resnet50-2x."""
    dimension: int
    """d, the length of an embedding."""
    preprocessing: Preprocessing
    sha256: str
    """SHA-256 of encoder.onnx."""
    training: dict = field(default_factory=dict)
    """Data, images, epochs, settings, commit."""
    figures: dict = field(default_factory=dict)
    """Measurements: kNN accuracy, parity error."""
    licence: str = "unspecified"
    probe: list[float] = field(default_factory=list)
    """probe_values of the output for probe_pixels, to check the loaded graph. Empty: unknown."""
    classes: list[str] = field(default_factory=list)
    """Names of the classes in the order of the logits; empty for an encoder without a classifier."""
    precision: str = "fp32"
    """Arithmetic of the graph, one of PRECISIONS. The results of fp16 and int8 depend more on the processor."""

    def __post_init__(self):
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {self.precision!r}")

    @property
    def outputs(self) -> int:
        """How many numbers the graph returns per picture: h and the logits."""
        return self.dimension + len(self.classes)

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Bundle:
    folder: Path
    card: ModelCard

    @property
    def graph(self) -> Path:
        return self.folder / GRAPH


def probe_pixels(size_px: int) -> np.ndarray:
    """A fixed picture with detail at every scale: uint8 (1, S, S, 3)."""
    row, column, colour = np.ogrid[:size_px, :size_px, :3]
    return ((row * row + 5 * row * column + (85 * colour + 1) * column) % 256).astype(np.uint8)[None]


def probe_values(embedding: np.ndarray) -> list[float]:
    """A summary of h (d,): the means of 16 equal parts, or h itself up to d = 16."""
    return [float(part.mean()) for part in np.array_split(embedding, min(16, len(embedding)))]


def encoder_id(architecture: str, graph_sha256: str, preprocessing: Preprocessing) -> str:
    recipe = json.dumps([graph_sha256, dataclasses.asdict(preprocessing)], sort_keys=True)
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", architecture.partition(":")[2] or architecture)  # it names tables and files
    return f"{name}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"


def save_bundle(folder: Path, graph: bytes, card: ModelCard) -> Bundle:
    """Write both files into a temporary folder, then rename it to `folder`: readers see the old bundle or the new."""
    folder = Path(folder)
    fresh, old = (folder.with_name(f".{folder.name}.{kind}") for kind in ("new", "old"))
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir(parents=True)
    for name, content in ((GRAPH, graph), (CARD, json.dumps(card.to_dict(), indent=2).encode())):
        with open(fresh / name, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    return Bundle(folder, card)


def load_bundle(folder: Path) -> Bundle:
    """Read and check a bundle. raises BundleError: missing, incomplete, unreadable card, or wrong hash."""
    folder = Path(folder)
    for name in (CARD, GRAPH):
        if not (folder / name).is_file():
            raise BundleError(
                f"{folder} is not an encoder bundle: it has no {name}. Make one with `python export/to_onnx.py RUN`."
            )
    try:
        facts = json.loads((folder / CARD).read_text())
        facts["preprocessing"] = Preprocessing(**facts["preprocessing"])
        card = ModelCard(**facts)
    except (ValueError, TypeError, KeyError) as error:
        raise BundleError(f"{folder / CARD} cannot be read as a model card: {error}") from error
    digest = hashlib.sha256((folder / GRAPH).read_bytes()).hexdigest()
    if digest != card.sha256:
        raise BundleError(f"{folder / GRAPH} is not the file its card describes (sha256 {digest[:12]}…); export again.")
    return Bundle(folder, card)
