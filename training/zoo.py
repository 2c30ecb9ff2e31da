"""torchvision's classifiers by name, with published weights, weights from a file, or random ones.

resnet50                    the newest weights, downloaded once by torchvision
resnet50:IMAGENET1K_V1      weights by torchvision's name
resnet50:FILE.pth           a state dict of that architecture
resnet50:random             untrained, from a seed
"""

import pickle
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision
from torch import nn
from torchvision.models import WeightsEnum

from export.artifact import Preprocessing

RANDOM = "random"


class ZooError(ValueError):
    """Unknown model, or weights that do not fit it. The message names the model."""


@dataclass(frozen=True)
class ZooModel:
    network: nn.Module
    """The classifier, in evaluation mode."""
    preprocessing: Preprocessing
    """torchvision's recommended resize and centre crop, as one box."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """(3,) each: the network's input is (x - mean) / std, for x in [0, 1]."""


def architectures() -> list[str]:
    return torchvision.models.list_models(module=torchvision.models)


def known(name: str) -> bool:
    return name.partition(":")[0] in architectures()


def load(name: str, seed: int = 0) -> ZooModel:
    """Load a model as described above. raises ZooError."""
    architecture, _, requested = name.partition(":")
    if not known(name):
        raise ZooError(f"torchvision has no architecture {architecture!r}; it has {', '.join(architectures())}")
    choices = torchvision.models.get_model_weights(architecture)
    published = choices.__members__.get(requested, choices["DEFAULT"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = torchvision.models.get_model(architecture, **_silent(architecture))
    if requested != RANDOM:
        if not requested or requested in choices.__members__:
            weights = _download(name, published)
        elif Path(requested).is_file():
            weights = _read(Path(requested))
        else:
            raise ZooError(
                f"{name}: {requested} is neither a file nor weights of {architecture}, which are "
                f"{', '.join(choices.__members__)} and {RANDOM}"
            )
        try:
            network.load_state_dict(weights)
        except (RuntimeError, TypeError, AttributeError) as error:
            raise ZooError(f"{name}: these weights are of another architecture ({_one_line(error)})") from error
    transforms = published.transforms()
    crop, resize = transforms.crop_size[0], transforms.resize_size[0]
    preprocessing = Preprocessing(crop, min(1.0, crop / resize), transforms.interpolation.value)
    return ZooModel(network.eval(), preprocessing, tuple(transforms.mean), tuple(transforms.std))


def _silent(architecture: str) -> dict:
    """Arguments that suppress a warning of two architectures."""
    return {"init_weights": True} if architecture in ("googlenet", "inception_v3") else {}


def _download(name: str, weights: WeightsEnum) -> dict:
    try:
        return weights.get_state_dict(progress=True)
    except (RuntimeError, OSError) as error:
        raise ZooError(
            f"{name}: the weights cannot be downloaded; is there a network? You can also give a file: "
            f"{name.partition(':')[0]}:FILE.pth ({_one_line(error)})"
        ) from error


def _read(file: Path) -> dict:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise ZooError(f"{file} is not a file of weights that can be read: {type(error).__name__}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
