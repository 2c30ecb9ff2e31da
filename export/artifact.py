"""The contract between training and serving: an encoder's input pixels, and the bundle that contains it.

A bundle is a folder of two files:

    encoder.onnx      input `pixels` uint8 (N, H, W, 3) RGB, output `embedding` float32 (N, d): h, not normalised;
                      if the card names C classes also `logits` float32 (N, C), whose softmax gives probabilities
    model_card.json   the ModelCard below

A third, encoder.safetensors, contains the weights for use in torch (export/weights.py). The service does not need it.
An encoder that reads text too has two more files, which the card's section `text` describes (export/tokens.py):

    text.onnx         inputs `ids` and `mask` int64 (N, L), output `embedding` float32 (N, d), not normalised, to be
                      compared with the embeddings of pictures by the cosine
    tokenizer.json    makes ids of text, with the package tokenizers

Training's evaluation and the service both read pictures with `read_pixels`, so the service gives the vectors that were
evaluated. Only numpy, Pillow and the standard library are imported: serving needs no torch.
"""

import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import stat
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from export import formats
from export.rgb import in_srgb, to_rgb
from export.suggest import program
from export.tokens import TextTower

GRAPH = "encoder.onnx"
CARD = "model_card.json"
WEIGHTS = "encoder.safetensors"
TEXT_GRAPH = "text.onnx"
TOKENIZER = "tokenizer.json"
PRECISIONS = ("fp32", "fp16", "int8")

MAX_PIXELS = 2**27  # 134 megapixels, 0.4 GB as RGB
MAX_SIDE_PX = 2**18  # resampling needs memory for each pixel of a side
TILE_WIDTH, TILE_LENGTH = 322, 323  # tags of TIFF

# Decoding takes at most BYTES_PER_PIXEL of memory for each pixel of its work (`open_image`). Some formats take more
# than others; a JPEG less, as it can be decoded at a reduced scale, but it may have thousands of scans.
BYTES_PER_PIXEL = 16
WORK_PER_PIXEL = {"WEBP": 2, "AVIF": 2, "JPEG2000": 2, formats.HEIC: 2}
JPEG_WORK, JPEG_WORK_PER_SCAN = 3 / 16, 1 / 16

# `read_image` has its own limit; Pillow's would only warn up to twice its size.
Image.MAX_IMAGE_PIXELS = None

TOO_MUCH_MEMORY = "needs more memory than is allowed for its pixels"


class UnreadableImage(ValueError):
    """Bytes that do not decode. The message completes the sentence "<name> ..."."""


class TooManyPixels(UnreadableImage):
    """An image larger than the limit, refused by its header before anything was decoded."""

    def __init__(self, message: str, work: int | None = None):
        """work  the `max_work` that it needs; None: it is too large in itself"""
        super().__init__(message)
        self.work = work


def read_regular_file(path: str | Path, most_bytes: int) -> bytes:
    """The bytes of a file. Devices and pipes are neither opened nor waited for. Raises UnreadableImage."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UnreadableImage("is not a file")
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            facts = os.fstat(descriptor)
            if not stat.S_ISREG(facts.st_mode):  # replaced since
                raise UnreadableImage("is not a file")
            if facts.st_size > most_bytes:
                raise UnreadableImage(f"is larger than {most_bytes // 2**20} MiB")
            return file.read(most_bytes)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        if isinstance(error, UnreadableImage):
            raise
        reason = getattr(error, "strerror", None) or "its name is not allowed"
        raise UnreadableImage(f"cannot be read: {reason}") from error


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
    """Decode to an 8-bit RGB image: upright, in sRGB, transparency on white, the first frame.

    enough_px  a JPEG may be decoded at a reduced scale, with a shorter side of at least this
    raises     UnreadableImage, or its subclass TooManyPixels, for bytes that cannot be decoded completely
    """
    return in_srgb(decode(open_image(data, max_pixels)[0], enough_px))


def open_image(data: bytes, max_pixels: int = MAX_PIXELS, max_work: int = MAX_PIXELS) -> tuple[Image.Image, int]:
    """Read the header only. Returns the image, to `decode` it, and the work that this takes.

    The work is in pixels of a simple format such as PNG: decoding takes at most BYTES_PER_PIXEL of memory for each.
    Raises as `read_image`.
    """
    if not data:
        raise UnreadableImage("is empty")
    try:
        image = formats.open_file(data)
        pixels, work = image.width * image.height, _work(image, data)
    except MemoryError as error:
        raise UnreadableImage(TOO_MUCH_MEMORY) from error
    except Exception as error:  # Pillow's parsers raise nearly anything on malformed bytes
        raise UnreadableImage(formats.why_unreadable(data)) from error
    size = f"has {image.width} x {image.height} pixels"
    if pixels > max_pixels:
        raise TooManyPixels(f"{size}; at most {max_pixels:,} are read")
    if max(image.size) > MAX_SIDE_PX:
        raise TooManyPixels(f"{size}; at most {MAX_SIDE_PX:,} are read on a side")
    if work > max_work:
        as_much = f"{size}, as much work as {work:,} of a simpler format"
        raise TooManyPixels(f"{as_much}; at most {max_work:,} are read", work)
    return image, work


def decode(image: Image.Image, enough_px: float | None = None) -> Image.Image:
    """Decode an opened image. Arguments and errors as `read_image`.

    `preprocess` and `in_srgb` convert the colours, which is cheaper when it is small.
    """
    try:
        return to_rgb(formats.load(image, enough_px))
    except MemoryError as error:
        raise UnreadableImage(TOO_MUCH_MEMORY) from error
    except Exception as error:
        truncated = formats.is_truncated(error)
        raise UnreadableImage("is truncated: its end is missing" if truncated else "is damaged") from error


def read_pixels(
    data: bytes, preprocessing: Preprocessing, max_pixels: int = MAX_PIXELS, max_work: int = MAX_PIXELS
) -> np.ndarray:
    """Decode and preprocess: uint8 (S, S, 3) RGB, S = size_px. Raises UnreadableImage.

    A JPEG of at least four times the size is decoded at a reduced scale (never below twice the size), which
    makes large photographs several times cheaper.
    """
    image, _ = open_image(data, max_pixels, max_work)
    return preprocess(decode(image, preprocessing.enough_px), preprocessing)


def preprocess(image: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """RGB image of any size -> uint8 (S, S, 3), S = size_px, in one antialiased resampling."""
    size, box = preprocessing.size_px, None
    if preprocessing.crop is not None:
        box = _crop_box(image.size, size, round(size / preprocessing.crop))
    filters = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
    return np.asarray(in_srgb(image.resize((size, size), filters[preprocessing.interpolation], box=box)))


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


def _work(image: Image.Image, data: bytes) -> int:
    """What decoding takes, by the header: as much memory, and about as much time, as this many pixels of a PNG."""
    pixels = image.width * image.height
    if image.format in ("JPEG", "MPO"):
        return math.ceil(pixels * (JPEG_WORK + JPEG_WORK_PER_SCAN * data.count(b"\xff\xda")))
    if image.format == "TIFF":  # a tile is decoded as a whole
        tags = image.tag_v2  # pyrefly: ignore[missing-attribute]
        pixels = max(pixels, int(tags.get(TILE_WIDTH, 0)) * int(tags.get(TILE_LENGTH, 0)))
    return pixels * WORK_PER_PIXEL.get(image.format or "", 1)


@dataclass(frozen=True)
class ModelCard:
    """Describes an encoder. `id` identifies what it makes of pictures: the same graph and preprocessing have the same
    id, with and without a text tower."""

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
    """Measurements: `parity_error`; a run's own `before` and `after` training, on `data` of `training`; `measured`, the
    latest evaluation of this bundle, with the name of its `data`."""
    licence: str = "unspecified"
    probe: list[float] = field(default_factory=list)
    """probe_values of the output for probe_pixels, to check the loaded graph. Empty: unknown."""
    classes: list[str] = field(default_factory=list)
    """Names of the classes in the order of the logits; empty for an encoder without a classifier."""
    shortened: list[int] = field(default_factory=list)
    """Lengths below `dimension` to which embeddings may be cut, since their beginnings were trained too."""
    precision: str = "fp32"
    """Arithmetic of the graph, one of PRECISIONS. The results of fp16 and int8 depend more on the processor."""
    text: TextTower | None = None
    """How it reads text; None for an encoder that reads none."""

    def __post_init__(self):
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {self.precision!r}")

    @property
    def is_start(self) -> bool:
        """Whether the weights are those that a run started from and did not improve."""
        return self.training.get("epochs") == 0

    @property
    def outputs(self) -> int:
        """How many numbers the graph returns per picture: h and the logits."""
        return self.dimension + len(self.classes)

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, facts: dict) -> "ModelCard":
        """The card that `to_dict` gave. raises ValueError, TypeError, KeyError"""
        preprocessing = Preprocessing(**facts["preprocessing"])
        text = TextTower(**facts["text"]) if facts.get("text") is not None else None
        return cls(**facts | {"preprocessing": preprocessing, "text": text})


@dataclass(frozen=True)
class Bundle:
    folder: Path
    card: ModelCard

    @property
    def graph(self) -> Path:
        return self.folder / GRAPH

    def read_text_files(self) -> "TextFiles | None":
        """None for an encoder that reads no text. raises BundleError: missing, or not the files of the card"""
        text = self.card.text
        if text is None:
            return None
        digests = {TEXT_GRAPH: text.sha256, TOKENIZER: text.tokenizer_sha256}
        return TextFiles(*(_read_checked(self.folder / name, digest) for name, digest in digests.items()))


@dataclass(frozen=True)
class TextFiles:
    """Contents of the files of a text tower."""

    graph: bytes
    tokenizer: bytes


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


def save_bundle(
    folder: Path, graph: bytes, card: ModelCard, weights: bytes | None = None, text: TextFiles | None = None
) -> Bundle:
    """Write the files into a temporary folder, then rename it to `folder`: readers see the old bundle or the new."""
    folder = Path(folder)
    fresh, old = (folder.with_name(f".{folder.name}.{kind}") for kind in ("new", "old"))
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir(parents=True)
    contents = {GRAPH: graph, CARD: json.dumps(card.to_dict(), indent=2).encode(), WEIGHTS: weights}
    if text is not None:
        contents |= {TEXT_GRAPH: text.graph, TOKENIZER: text.tokenizer}
    for name, content in contents.items():
        if content is not None:
            _write(fresh / name, content)
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    return Bundle(folder, card)


def refuse_unwritable(folder: Path) -> None:
    """Raises BundleError, before long work, if a bundle cannot be written into `folder`."""
    there = next(parent for parent in Path(folder).absolute().parents if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = f"there is no permission to write in {there}" if there.is_dir() else f"{there} is a file"
        raise BundleError(f"{folder} cannot be written: {why}; name another folder with --out")


def record_measured(folder: Path, measured: dict) -> None:
    """Write `measured` into the figures of the bundle's card. The encoder and its id stay the same.

    raises  BundleError; OSError if the folder cannot be written
    """
    card = load_bundle(folder).card
    card = dataclasses.replace(card, figures=card.figures | {"measured": measured})
    fresh = Path(folder) / f".{CARD}.new"
    _write(fresh, json.dumps(card.to_dict(), indent=2).encode())
    fresh.replace(Path(folder) / CARD)


def _write(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def load_bundle(folder: Path) -> Bundle:
    """Read and check a bundle. raises BundleError: missing, incomplete, unreadable card, or wrong hash."""
    folder = Path(folder)
    for name in (CARD, GRAPH):
        if not (folder / name).is_file():
            raise BundleError(
                f"{folder} is not an encoder bundle: it has no {name}. Make one with "
                f"`{program('export/to_onnx.py')} RUN`."
            )
    try:
        card = ModelCard.from_dict(json.loads((folder / CARD).read_text()))
    except (ValueError, TypeError, KeyError) as error:
        raise BundleError(f"{folder / CARD} cannot be read as a model card: {error}") from error
    for name in (TEXT_GRAPH, TOKENIZER) if card.text else ():
        if not (folder / name).is_file():
            raise BundleError(f"{folder} has no {name}, which its card describes; export again.")
    _read_checked(folder / GRAPH, card.sha256)
    return Bundle(folder, card)


def _read_checked(file: Path, sha256: str) -> bytes:
    """raises BundleError: it cannot be read, or is another file"""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise BundleError(f"{file} cannot be read: {error.strerror}") from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != sha256:
        raise BundleError(f"{file} is not the file its card describes (sha256 {digest[:12]}…); export again.")
    return content
