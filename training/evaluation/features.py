"""One interface to the features h of any encoder, ours or not: uint8 pixels in, h out.

runs/NAME, a .ckpt file          f of a checkpoint; with `:random` appended, the same f untrained
a bundle's folder, a .onnx file  an exported encoder, in ONNX Runtime; without a card its size is read from the graph
lite0, timm:NAME, resnet50, ...  an encoder that others trained, by the names of training/zoo.py
pixels                           the picture itself, shrunk: a baseline that every encoder should beat
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from export.artifact import CARD, GRAPH, BundleError, Preprocessing, load_bundle
from export.paths import at_home
from export.suggest import program
from training import checkpoint, zoo
from training.checkpoint import CheckpointError
from training.data.sources import SourcePicture
from training.device import training_device
from training.encoders import batch_size, to_input

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

Encode = Callable[[np.ndarray], Tensor]
PIXELS, PIXELS_PX = "pixels", 32
RANDOM = f":{zoo.RANDOM}"
ENLARGED = 2.0  # a note is printed when pictures are enlarged by this factor or more
SIZED_PICTURES = 32  # pictures read to find the typical size of a set


class Sliceable(Protocol):
    """Pictures whose slices are uint8 (n, S, S, 3): an array, StreamedRows, or views made on demand."""

    def __len__(self) -> int: ...
    def __getitem__(self, rows: slice, /) -> np.ndarray: ...


class EncoderError(ValueError):
    """A name that is not an encoder, or an encoder that gives no usable features. The message names it."""


@dataclass(frozen=True)
class Extractor:
    name: str
    preprocessing: Preprocessing
    encode: Encode
    """uint8 (n, S, S, 3) -> h (n, d) float32 on the CPU."""
    megabytes: float = 0.0
    """Size of its weights."""

    def __call__(self, pixels: Sliceable, names: Sequence[str] | None = None) -> Tensor:
        """h of many pictures: (N, d) float32.

        pixels  uint8 (N, S, S, 3), or an object whose slices are such arrays
        names   of the pictures, for messages
        raises  EncoderError when a value is NaN or infinite
        """
        rows, size = [], batch_size(self.preprocessing.size_px)
        for start in tqdm(range(0, len(pixels), size), desc=f"encoding by {self.name}", unit="batch", leave=False):
            h = self.encode(np.ascontiguousarray(pixels[start : start + size]))
            if not (finite := h.isfinite().all(dim=1)).all():
                first = start + int((~finite).nonzero()[0])
                picture = names[first] if names else f"picture {first}"
                raise EncoderError(f"{self.name} gives values that are NaN or infinite for {picture}")
            rows.append(h)
        return torch.cat(rows)


def open_encoder(name: str, size_px: int | None = None) -> Extractor:
    """The encoder that `name` stands for; an existing path is preferred to a name.

    size_px  for encoders of any size: those of training/zoo.py, and pixels
    raises   EncoderError, CheckpointError, BundleError, ZooError
    """
    untrained = name.endswith(RANDOM)
    path = Path(at_home(name.removesuffix(RANDOM)))
    if path.exists():
        if (path / GRAPH).exists() or (path / CARD).exists() or path.suffix == ".onnx":
            if untrained:
                raise EncoderError(f"{name}: an exported encoder cannot be untrained; give its run")
            return _from_onnx(name, path)
        return _from_checkpoint(name, path, untrained)
    if name == PIXELS:
        return Extractor(name, Preprocessing(size_px or PIXELS_PX), _centred_pixels)
    if zoo.parse(name):
        model = zoo.load(name, size_px)
        return Extractor(name, model.preprocessing, extract_with_torch(model.encoder), megabytes(model.encoder))
    near = zoo.nearest_names(name)
    raise EncoderError(
        f"{name} is not a run, checkpoint, exported encoder or network of timm or torchvision"
        + (f" (nearest: {', '.join(near)})" if near else "")
        + f"; {PIXELS} compares the pictures' own pixels"
    )


def size_note(name: str, size_px: int, pictures: Sequence[SourcePicture]) -> str:
    """A note for the user if the pictures are much smaller than the encoder's input; otherwise empty."""
    sides = [min(size) for size in sampled_sizes(pictures)]
    side = int(np.median(sides)) if sides else size_px
    if size_px < ENLARGED * side:
        return ""
    return (
        f"{name} takes {size_px} px and these pictures have {side}: enlarged, they differ from those it was trained on"
    )


def sampled_sizes(pictures: Sequence[SourcePicture]) -> list[tuple[int, int]]:
    """Width and height in pixels, as stored, of about SIZED_PICTURES of the pictures that can be read."""
    sizes = []
    for picture in pictures[:: max(1, len(pictures) // SIZED_PICTURES)]:
        try:
            with Image.open(io.BytesIO(picture.read())) as image:
                sizes.append(image.size)
        except Exception:  # unreadable files are counted and listed when they are decoded
            continue
    return sizes


def _from_checkpoint(name: str, path: Path, untrained: bool) -> Extractor:
    saved = checkpoint.load(checkpoint.find(path))
    settings = checkpoint.settings_of(saved)
    if untrained:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)  # the initial weights of the run, if it started from random weights
            encoder = zoo.build(settings.encoder, settings.width, settings.size_px)
    else:
        encoder = checkpoint.encoder_of(saved)
        if checkpoint.keeps_start(saved):
            print(checkpoint.start_note(name, saved))
    return Extractor(name, settings.preprocessing, extract_with_torch(encoder), megabytes(encoder))


def _from_onnx(name: str, path: Path) -> Extractor:
    folder = path if path.is_dir() else path.parent
    card = None
    if path.is_dir() or (path.name == GRAPH and (folder / CARD).exists()):
        bundle = load_bundle(folder)
        path, card = bundle.graph, bundle.card
    session = onnx_session(path)
    pixels, *more = session.get_inputs()
    shape = pixels.shape
    if more or pixels.type != "tensor(uint8)" or len(shape) != 4 or shape[3] != 3 or not isinstance(shape[1], int):
        raise BundleError(
            f"{path} does not take uint8 pixels (N, S, S, 3) alone: make a bundle of it with "
            f"`{program('export/to_onnx.py')} {path}`, and give that"
        )
    preprocessing = card.preprocessing if card else Preprocessing(shape[1])
    if preprocessing.size_px != shape[1]:
        raise BundleError(f"{path} takes {shape[1]} px but its card says {preprocessing.size_px}: export again")
    size = path.stat().st_size / 1e6
    return Extractor(
        name, preprocessing, lambda batch: torch.from_numpy(session.run(None, {pixels.name: batch})[0]), size
    )


def onnx_session(graph: Path) -> "InferenceSession":
    """Load a graph, onto the GPU if there is one. Raises BundleError when ONNX Runtime cannot."""
    import onnxruntime  # takes a second, and most encoders do not need it

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    providers = ["CPUExecutionProvider"]
    if torch.cuda.is_available() and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        onnxruntime.preload_dlls()  # loads the CUDA and cuDNN that pip installed
        providers.insert(0, "CUDAExecutionProvider")
    try:
        return onnxruntime.InferenceSession(graph, options, providers=providers)
    except Exception as error:  # ONNX Runtime has an exception class for each of its states
        raise BundleError(f"{graph} does not run: {' '.join(str(error).split())[:200]}") from error


def megabytes(network: nn.Module) -> float:
    return sum(weight.nbytes for weight in network.parameters()) / 1e6


def extract_with_torch(network: nn.Module) -> Callable[[np.ndarray], Tensor]:
    """`encode` of an Extractor. Moves the network to the GPU if there is one, and into evaluation mode."""
    device = training_device()
    network = network.to(device).eval()

    def encode(batch: np.ndarray) -> Tensor:
        with torch.no_grad():
            return network(to_input(torch.from_numpy(batch).to(device))).float().cpu()

    return encode


def _centred_pixels(batch: np.ndarray) -> Tensor:
    """Pixels minus mid grey, so that the cosine is not dominated by what all pictures have in common."""
    return torch.from_numpy(batch.reshape(len(batch), -1).astype(np.float32)) / 255 - 0.5


ENCODER_ERRORS = (EncoderError, CheckpointError, BundleError, zoo.ZooError)
