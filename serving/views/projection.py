"""The run that an encoder was exported from, where its checkpoint is at hand, and that run's projection head g.

The layout is training/encoders.py's `projection_head`: [Linear, BN, ReLU] any number of times, Linear and BN; no Linear
has a bias. It is run here from its weights, in evaluation mode: training's own module would load torchvision and
Lightning, which takes several times longer than all else that views need.
"""

import hashlib
import logging
import os
import pickle
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from export.artifact import ModelCard

log = logging.getLogger("twinview")

PREFIX = "projector."
EPSILON = 1e-5  # of torch's batch norm
KEPT = 4  # heads

Head = Callable[[np.ndarray], np.ndarray]  # h (n, d) -> z (n, p) float32


def checkpoint_of(folder: Path, card: ModelCard) -> Path | None:
    """What the bundle in `folder` was exported from, beside it or in a run; known by the hash in its card."""
    digest = card.training.get("checkpoint_sha256")
    return _checkpoint(folder, digest) if digest else None


@lru_cache(KEPT)
def _checkpoint(folder: Path, digest: str) -> Path | None:
    from serving.runs import PLACE  # routes, which import the engine

    runs = Path(os.environ.get(PLACE) or "runs").expanduser()
    for path in (*folder.parent.glob("checkpoints/*.ckpt"), *runs.glob("*/checkpoints/*.ckpt")):
        with suppress(OSError), open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() == digest:
                return path
    return None


def head_of(folder: Path, card: ModelCard) -> Head | None:
    """g of the encoder whose bundle lies in `folder`; None where its checkpoint is not at hand, or holds none. Loads
    torch."""
    path = checkpoint_of(folder, card)
    return _head(path) if path else None


@lru_cache(KEPT)
def _head(path: Path) -> Head | None:
    import torch

    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        layers = _layers({name[len(PREFIX) :]: value for name, value in weights.items() if name.startswith(PREFIX)})
    except (OSError, pickle.UnpicklingError, RuntimeError, KeyError, ValueError) as error:
        log.warning("%s is not read, so there is no z of its encoder: %s", path, type(error).__name__)
        return None
    return partial(_project, layers) if layers else None


def _layers(weights: dict) -> list[tuple]:
    """(matrix (out, in), scale (out,), shift (out,)) float32 of each Linear with the batch norm behind it."""
    modules: dict[int, dict] = {}
    for name, value in weights.items():
        number, _, part = name.partition(".")
        modules.setdefault(int(number), {})[part] = value.numpy()
    ordered = [modules[number] for number in sorted(modules)]
    layers = []
    for linear, norm in zip(ordered[::2], ordered[1::2], strict=True):
        scale = norm["weight"] / np.sqrt(norm["running_var"] + EPSILON)
        layers.append((linear["weight"], scale, norm["bias"] - norm["running_mean"] * scale))
    return layers


def _project(layers: list[tuple], x: np.ndarray) -> np.ndarray:
    for i, (matrix, scale, shift) in enumerate(layers):
        x = x @ matrix.T * scale + shift
        if i + 1 < len(layers):
            x = np.maximum(x, 0)
    return x
