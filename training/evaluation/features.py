"""h of any encoder by one call, uint8 pixels in: what is evaluated need not be ours.

runs/NAME, a .ckpt file          f of a checkpoint; with `:random` behind it, the same f untrained
a bundle's folder, a .onnx file  an exported encoder, in ONNX Runtime; without its card the graph tells the size
resnet50, resnet50:random, ...   an architecture of torchvision and its weights (training/zoo.py), without its
                                 last layer
pixels                           the picture itself, shrunk: the floor
"""

import difflib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from export.artifact import CARD, GRAPH, BundleError, Preprocessing, load_bundle
from training import checkpoint, zoo
from training.checkpoint import CheckpointError
from training.data.sources import Picture
from training.device import training_device
from training.encoders import Encoder, to_input

PIXELS, PIXELS_PX = "pixels", 32
RANDOM = f":{zoo.RANDOM}"
BATCH = 256
ENLARGED = 2.0  # times, from which on a picture's size is said not to fit
LOOKED_AT = 32  # pictures, to know a set's size


class EncoderError(ValueError):
    """What was named as an encoder is none, or gives no features. The message names it."""


@dataclass(frozen=True)
class Extractor:
    name: str
    preprocessing: Preprocessing
    encode: Callable[[np.ndarray], Tensor]
    """uint8 (n, S, S, 3) -> h (n, d) float32 on the CPU."""
    megabytes: float = 0.0
    """Of its weights."""

    def __call__(self, pixels, names: Sequence[str] | None = None) -> Tensor:
        """h of many pictures: (N, d) float32.

        pixels  uint8 (N, S, S, 3), or whatever gives such arrays by slices
        names   of the pictures, for messages
        raises  EncoderError where a value is no number
        """
        rows = []
        for start in tqdm(range(0, len(pixels), BATCH), desc=f"encoding by {self.name}", unit="batch", leave=False):
            h = self.encode(np.ascontiguousarray(pixels[start : start + BATCH]))
            if not (fine := h.isfinite().all(dim=1)).all():
                first = start + int((~fine).nonzero()[0])
                which = names[first] if names else f"picture {first}"
                raise EncoderError(f"{self.name} gives values that are no numbers (NaN or infinite) for {which}")
            rows.append(h)
        return torch.cat(rows)


def open_encoder(name: str, size_px: int | None = None) -> Extractor:
    """What `name` stands for; what exists at a path of that name wins.

    size_px  for those that are not bound to a size: torchvision's, and pixels
    raises   EncoderError, CheckpointError, BundleError, ZooError
    """
    untrained = name.endswith(RANDOM)
    path = Path(name.removesuffix(RANDOM)).expanduser()
    if path.exists():
        if (path / GRAPH).exists() or (path / CARD).exists() or path.suffix == ".onnx":
            if untrained:
                raise EncoderError(f"{name}: an exported encoder cannot be untrained; name its run")
            return _exported(name, path)
        return _trained(name, path, untrained)
    if name == PIXELS:
        return Extractor(name, Preprocessing(size_px or PIXELS_PX), _flat)
    if zoo.known(name):
        return _of_zoo(name, size_px)
    near = difflib.get_close_matches(name.partition(":")[0], zoo.architectures(), n=3)
    raise EncoderError(
        f"{name} is no run, checkpoint, exported encoder or torchvision architecture"
        + (f" (nearest: {', '.join(near)})" if near else "")
        + f"; {PIXELS} stands for the picture itself"
    )


def size_note(name: str, size_px: int, pictures: Sequence[Picture]) -> str:
    """A sentence where the pictures are much smaller than the encoder sees them; empty where they are not."""
    sides = []
    for picture in pictures[:: max(1, len(pictures) // LOOKED_AT)]:
        try:
            with Image.open(io.BytesIO(picture.read())) as image:
                sides.append(min(image.size))
        except Exception:  # what cannot be read is counted and listed where it is decoded
            continue
    side = int(np.median(sides)) if sides else size_px
    if size_px < ENLARGED * side:
        return ""
    return f"{name} sees {size_px} px and these pictures have {side}: enlarged, they look like none it was trained on"


def _trained(name: str, path: Path, untrained: bool) -> Extractor:
    saved = checkpoint.load(checkpoint.find(path))
    settings = checkpoint.settings_of(saved)
    if untrained:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)  # as the run began, if it began from nothing
            encoder = Encoder(settings.encoder, settings.width, settings.size_px)
    else:
        encoder = checkpoint.encoder_of(saved)
    return Extractor(name, Preprocessing(settings.size_px), by_torch(encoder), megabytes(encoder))


def _exported(name: str, path: Path) -> Extractor:
    import onnxruntime  # takes a second, and most encoders need none of it

    folder = path if path.is_dir() else path.parent
    card = None
    if path.is_dir() or (path.name == GRAPH and (folder / CARD).exists()):
        bundle = load_bundle(folder)
        path, card = bundle.graph, bundle.card
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    providers = onnxruntime.get_available_providers() if torch.cuda.is_available() else ["CPUExecutionProvider"]
    try:
        session = onnxruntime.InferenceSession(path, options, providers=providers)
    except Exception as error:  # ONNX Runtime has a class of exception for each of its states
        raise BundleError(f"{path} does not run: {' '.join(str(error).split())[:200]}") from error
    pixels, *more = session.get_inputs()
    shape = pixels.shape
    if more or pixels.type != "tensor(uint8)" or len(shape) != 4 or shape[3] != 3 or not isinstance(shape[1], int):
        raise BundleError(
            f"{path} does not take uint8 pixels (N, S, S, 3) alone: it is no export of python export/to_onnx.py"
        )
    preprocessing = card.preprocessing if card else Preprocessing(shape[1])
    if preprocessing.size_px != shape[1]:
        raise BundleError(f"{path} takes {shape[1]} px and its card says {preprocessing.size_px}: export again")
    size = path.stat().st_size / 1e6
    return Extractor(
        name, preprocessing, lambda batch: torch.from_numpy(session.run(None, {pixels.name: batch})[0]), size
    )


def _of_zoo(name: str, size_px: int | None) -> Extractor:
    model = zoo.load(name)
    preprocessing = replace(model.preprocessing, size_px=size_px) if size_px else model.preprocessing
    last = [key for key, module in model.network.named_modules() if isinstance(module, nn.Linear)]
    if not last:
        raise EncoderError(f"{name} does not end in a linear layer: there is no h before it")
    above, _, key = last[-1].rpartition(".")
    setattr(model.network.get_submodule(above), key, nn.Identity())
    mean, std = (torch.tensor(values)[:, None, None] for values in (model.mean, model.std))
    encode = by_torch(model.network, mean, std)
    try:
        encode(np.zeros((1, preprocessing.size_px, preprocessing.size_px, 3), np.uint8))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise EncoderError(f"{name} takes no pictures of {preprocessing.size_px} px: {error}") from error
    return Extractor(name, preprocessing, encode, megabytes(model.network))


def megabytes(network: nn.Module) -> float:
    return sum(weight.nbytes for weight in network.parameters()) / 1e6


def by_torch(network: nn.Module, mean: Tensor | float = 0.0, std: Tensor | float = 1.0) -> Callable:
    """`encode` of an Extractor. The network is put onto the GPU where there is one, and into evaluation mode."""
    device = training_device()
    network = network.to(device).eval()
    mean, std = (value.to(device) if isinstance(value, Tensor) else value for value in (mean, std))

    def encode(batch: np.ndarray) -> Tensor:
        with torch.no_grad():
            x = to_input(torch.from_numpy(batch).to(device))
            return network((x - mean) / std).float().cpu()

    return encode


def _flat(batch: np.ndarray) -> Tensor:
    """Around mid grey, so that the cosine compares what differs."""
    return torch.from_numpy(batch.reshape(len(batch), -1).astype(np.float32)) / 255 - 0.5


ENCODER_ERRORS = (EncoderError, CheckpointError, BundleError, zoo.ZooError)
