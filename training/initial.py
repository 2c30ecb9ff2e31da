"""Initial weights of an encoder: from a run, an exported encoder's checkpoint, the zoo of others, or random."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from export.artifact import CARD, load_bundle
from export.paths import at_home
from training import checkpoint, zoo
from training.checkpoint import CheckpointError
from training.config import RUNS, PretrainSettings
from training.encoders import ARCHITECTURES, SMALL_IMAGE_PX, Encoder, Images, projection_head, to_input

COMPARED = 256  # number of pictures whose statistics are compared with those of the first batch norm
LARGE_MISMATCH = 1.0  # in standard deviations; above it a note is printed


class InitialWeights(NamedTuple):
    encoder: Encoder
    projector: nn.Module | None  # g, if the weights have one
    settings: PretrainSettings  # encoder, width and size_px of the weights; the others of their run, or defaults
    origin: str  # name of the weights, for messages and the model card


def load_initial(init: str, encoder: str | None, width: int | None, size_px: int | None, seed: int) -> InitialWeights:
    """Load initial weights.

    init                     a run's folder, a checkpoint, an exported encoder's folder, a name of training/zoo.py, or
                             "" for random weights
    encoder, width, size_px  as requested; None: those of `init`, or the defaults
    seed                     of random weights
    raises                   CheckpointError, BundleError, ZooError
    """
    if not init:
        defaults = PretrainSettings()
        requested = {"encoder": encoder, "width": width, "size_px": size_px}
        overrides: dict[str, Any] = {name: value for name, value in requested.items() if value is not None}
        settings = replace(defaults, seed=seed, **overrides)
        torch.manual_seed(seed)
        return InitialWeights(
            zoo.build(settings.encoder, settings.width, settings.size_px), None, settings, "random weights"
        )
    path = Path(at_home(init))
    if path.exists():
        if path.suffix == ".onnx":
            raise CheckpointError(
                f"--init {init}: training cannot continue from an ONNX graph; give the weights that it was made from, "
                "or distil from it with training/distil.py --teacher"
            )
        exported = load_bundle(path).card if (path / CARD).exists() else None
        path = checkpoint_of(path) if exported else checkpoint.find(path)
        saved = checkpoint.load(path)
        if not all(weight.isfinite().all() for weight in saved["state_dict"].values()):
            raise CheckpointError(f"{path} holds weights that are NaN or infinite: give an earlier run")
        own = checkpoint.settings_of(saved)
        for name, value in (("encoder", encoder), ("width", width)):
            if value not in (None, getattr(own, name)):
                raise CheckpointError(f"{path} has --{name} {getattr(own, name)}, not {value}: leave --{name} out")
        settings = replace(own, size_px=_size(init, own.encoder, own.size_px, size_px))
        result = exported is not None and not exported.is_start  # an export with --force is the result
        network = checkpoint.encoder_of(saved, result=result)
        if checkpoint.keeps_start(saved) and not result:
            print(checkpoint.start_note(init, saved))
            return InitialWeights(network, None, settings, saved["facts"]["origin"])
        projector = projection_head(network.dimension, own.head_layers, own.head_dimension)
        prefix = "projector."
        weights = {k.removeprefix(prefix): w for k, w in saved["state_dict"].items() if k.startswith(prefix)}
        if weights:
            projector.load_state_dict(weights)
        return InitialWeights(network, projector if weights else None, settings, f"{own.name or init}")
    if zoo.parse(init):
        return _from_zoo(init, encoder, width, size_px)
    near = zoo.nearest_names(init)
    raise CheckpointError(
        f"--init {init}: no run, checkpoint or exported encoder has this name, nor a network of timm or torchvision"
        + (f" (nearest: {', '.join(near)})" if near else "")
    )


def apply_initial(start: InitialWeights, encoder: Encoder, projector: nn.Module, pixels: Images) -> str:
    """Copy the initial weights into f, and into g if they fit; print what does not. Returns the origin.

    pixels  uint8 (N, S, S, 3), the training images
    """
    encoder.load_state_dict(start.encoder.state_dict())
    if start.projector is not None and _shapes(start.projector) == _shapes(projector):
        projector.load_state_dict(start.projector.state_dict())
    elif start.projector is not None:
        print(
            f"note: the projection head of {start.origin} does not match --head-layers and --head-dimension, so g "
            "starts from random weights"
        )
    off = statistics_mismatch(encoder, pixels)
    if off > LARGE_MISMATCH:
        print(
            f"note: {start.origin} was trained on different pictures or with another normalisation: the channel "
            f"means at its first batch norm are off by {off:.1f} standard deviations. Training adapts to that"
        )
    return start.origin


@torch.no_grad()
def statistics_mismatch(encoder: Encoder, pixels: Images) -> float:
    """Distance of the pictures' channel means from the first batch norm's, in standard deviations (rms); 0 without one.

    pixels  uint8 (N, S, S, 3)
    """
    norms = [module for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)]
    if not norms:
        return 0.0
    inputs: list[Tensor] = []
    hook = norms[0].register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
    training = encoder.training
    encoder.eval()(to_input(torch.from_numpy(np.array(pixels[:COMPARED]))))
    encoder.train(training)
    hook.remove()
    mean, variance = (norms[0].get_buffer(name) for name in ("running_mean", "running_var"))
    off = (inputs[0].mean(dim=(0, 2, 3)) - mean) / (variance + norms[0].eps).sqrt()
    return off.square().mean().sqrt().item()


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in module.state_dict().items()}


def checkpoint_of(bundle_folder: Path) -> Path:
    """The checkpoint that an encoder was exported from, by the hash in its card. raises CheckpointError."""
    card = load_bundle(bundle_folder).card
    digest = card.training.get("checkpoint_sha256")
    for path in [*bundle_folder.parent.glob("checkpoints/*.ckpt"), *RUNS.glob("*/checkpoints/*.ckpt")]:
        if hashlib.sha256(path.read_bytes()).hexdigest() == digest:
            return path
    raise CheckpointError(
        f"{bundle_folder} was exported from a checkpoint that is neither next to it nor under {RUNS}/, or has changed "
        f"since (sha256 {str(digest)[:12]}…): give the run instead"
    )


def _from_zoo(name: str, encoder: str | None, width: int | None, size_px: int | None) -> InitialWeights:
    model = zoo.load(name, size_px)
    if encoder not in (None, model.architecture) or width not in (None, 1):
        raise CheckpointError(f"--init {name} does not have the architecture of --encoder {encoder or name}")
    preprocessing = model.preprocessing
    own: dict[str, Any] = {"encoder": model.architecture, "width": 1, "size_px": preprocessing.size_px}
    settings = replace(PretrainSettings(), **own, crop=preprocessing.crop)
    return InitialWeights(model.encoder, None, settings, name)


def _size(name: str, architecture: str, own_px: int, requested_px: int | None) -> int:
    if requested_px is None or requested_px == own_px:
        return own_px
    if architecture in ARCHITECTURES and (requested_px <= SMALL_IMAGE_PX) != (own_px <= SMALL_IMAGE_PX):
        raise CheckpointError(
            f"{name} takes {own_px} px, and an encoder for {requested_px} px has a different first layer: give a "
            f"--size-px {'of at most' if own_px <= SMALL_IMAGE_PX else 'above'} {SMALL_IMAGE_PX}, or leave it out"
        )
    if not 0.5 <= requested_px / own_px <= 2:
        print(f"note: {name} was trained at {own_px} px; at {requested_px} px its batch norm statistics do not fit")
    return requested_px
