"""The projection head g of the run that an encoder was exported from, if the run's checkpoint still exists.

The layout is that of training/encoders.py's `projection_head`: [Linear, BN, ReLU] any number of times, then Linear and
BN; no Linear has a bias. It is computed here from its weights, in evaluation mode: training's own module would load
torchvision and Lightning, which takes several times longer than everything else that views need. g was trained on the
features, which are (h + centre) @ whitening^-1; as `head_for_h` there does it, this goes into the first layer.
"""

import hashlib
import logging
import pickle
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from export.artifact import ModelCard
from serving.runs import runs_folder

if TYPE_CHECKING:
    import torch

log = logging.getLogger("twinview")

PREFIX = "projector."
EPSILON = 1e-5  # of torch's batch norm
CACHED = 4  # projection heads

Projection = Callable[[np.ndarray], np.ndarray]  # h (n, d) -> z (n, p) float32
Layer = tuple[np.ndarray, np.ndarray, np.ndarray]  # matrix (out, in), scale (out,), shift (out,), all float32


def projection_of(folder: Path, card: ModelCard) -> Projection | None:
    """g of the encoder in the bundle `folder`; None if its checkpoint is missing or has no g. Loads torch."""
    digest = card.training.get("checkpoint_sha256")
    if card.is_start:  # g was trained with other weights
        return None
    checkpoint = _checkpoint(folder, digest) if digest else None
    return _load(checkpoint) if checkpoint else None


@lru_cache(CACHED)
def _checkpoint(folder: Path, digest: str) -> Path | None:
    """The checkpoint with this SHA-256, in the run that the bundle `folder` is in, or in any other."""
    for path in (*folder.parent.glob("checkpoints/*.ckpt"), *runs_folder().glob("*/checkpoints/*.ckpt")):
        with suppress(OSError), open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() == digest:
                return path
    return None


@lru_cache(CACHED)
def _load(checkpoint: Path) -> Projection | None:
    import torch

    try:
        weights = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
        layers = _layers({name[len(PREFIX) :]: value for name, value in weights.items() if name.startswith(PREFIX)})
        layers[:1] = [_for_h(layer, weights) for layer in layers[:1]]
    except (OSError, pickle.UnpicklingError, RuntimeError, KeyError, ValueError) as error:
        log.warning("%s cannot be read (%s), so this encoder has no z", checkpoint, type(error).__name__)
        return None
    return partial(_project, layers) if layers else None


def _layers(weights: "dict[str, torch.Tensor]") -> list[Layer]:
    """Each Linear, joined with the batch norm after it."""
    modules: dict[int, dict[str, np.ndarray]] = {}
    for name, value in weights.items():
        number, _, part = name.partition(".")
        modules.setdefault(int(number), {})[part] = value.numpy()
    ordered = [modules[number] for number in sorted(modules)]
    layers = []
    for linear, norm in zip(ordered[::2], ordered[1::2], strict=True):
        scale = norm["weight"] / np.sqrt(norm["running_var"] + EPSILON)
        layers.append((linear["weight"], scale, norm["bias"] - norm["running_mean"] * scale))
    return layers


def _for_h(first: Layer, weights: "dict[str, torch.Tensor]") -> Layer:
    """The first layer, for h instead of the features."""
    matrix, scale, shift = first
    whitening, centre = (weights.get(f"encoder.{name}") for name in ("whitening", "centre"))
    if whitening is not None:
        matrix = (matrix @ np.linalg.inv(whitening.double().numpy()).T).astype(np.float32)
    if centre is not None:  # older checkpoints have none
        shift = shift + matrix @ centre.numpy() * scale
    return matrix, scale, shift


def _project(layers: list[Layer], x: np.ndarray) -> np.ndarray:
    for i, (matrix, scale, shift) in enumerate(layers):
        x = x @ matrix.T * scale + shift
        if i + 1 < len(layers):
            x = np.maximum(x, 0)
    return x
