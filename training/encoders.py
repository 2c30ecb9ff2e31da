"""The encoder f and the projection head g (arXiv:2002.05709, Sec. 2.1; google-research/simclr, tf2/resnet.py).

f is a ResNet of this file, or a network of timm or torchvision (training/zoo.py, whose `build` makes any f by name).
"""

import copy
from collections.abc import Sequence
from typing import Any, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.resnet import BasicBlock, Bottleneck

SMALL_IMAGE_PX = 32
CENTRE_IMAGES = 1000  # whose mean is the centre of h
LEAST_VARIANCE = 0.1  # of the mean variance, added to that of each direction before whitening
MOST_AT_ONCE, PIXELS_AT_ONCE = 512, 2**22  # images, and their pixels, that are encoded at once


class Images(Protocol):
    """An array or tensor of images, or an object that makes slices of one on demand."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: slice, /) -> np.ndarray | Tensor: ...


# name: block, blocks in each of the four stages, channels of the first stage
ARCHITECTURES = {
    "tiny": (BasicBlock, (1, 1, 1, 1), 16),
    "resnet18": (BasicBlock, (2, 2, 2, 2), 64),
    "resnet34": (BasicBlock, (3, 4, 6, 3), 64),
    "resnet50": (Bottleneck, (3, 4, 6, 3), 64),
    "resnet101": (Bottleneck, (3, 4, 23, 3), 64),
    "resnet152": (Bottleneck, (3, 8, 36, 3), 64),
}


class Encoder(nn.Module):
    """f: (N, 3, H, W) float in [0, 1] -> h (N, d) float: the features, whitened if that was asked for, minus `centre`.

    Training ends with setting `centre` to the mean of the features over the training pictures. Before that it is 0.
    The cosine of two pictures then compares how they differ from the average picture, instead of what all have in
    common. `whiten` makes directions in which all pictures vary much count less.
    """

    centre: Tensor  # (d,)
    whitening: Tensor | None  # (d, d); None: the identity

    def __init__(self, dimension: int):
        super().__init__()
        self.dimension = dimension
        self.register_buffer("centre", torch.zeros(dimension))
        self.register_buffer("whitening", None)
        self.register_load_state_dict_pre_hook(_match_buffers)

    def forward(self, x: Tensor) -> Tensor:
        h = self.features(x)
        return (h if self.whitening is None else h @ self.whitening) - self.centre

    def features(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def set_centre(self, pixels: Any) -> None:
        """Set `centre` to the mean of up to CENTRE_IMAGES images: (N, S, S, 3) uint8, as stored. `whitening` stays."""
        self.centre.zero_()
        self.centre.copy_(embed(self, pixels[_sample(pixels)]).mean(dim=0))

    def whiten(self, pixels: Any, power: float) -> None:
        """Set `whitening` by up to CENTRE_IMAGES images, and `centre`: divide each principal direction of the features
        by its variance to this power.

        pixels  (N, S, S, 3) uint8, as stored
        power   0.5 gives all directions the same variance; a smaller one makes the variances less different; 0: none
        """
        self.show_features()
        h = embed(self, pixels[_sample(pixels)]).double()
        self.centre.copy_(h.mean(dim=0))
        if power and h.isfinite().all():
            h -= h.mean(dim=0)
            variances, directions = torch.linalg.eigh(h.T @ h / len(h))  # (d,), (d, d)
            relative = variances / variances.mean().clamp(min=1e-12) + LEAST_VARIANCE
            self.whitening = (directions * relative**-power @ directions.T).to(self.centre)
            self.centre.copy_(self.centre @ self.whitening)

    def show_features(self) -> None:
        """Make h the features as they are, which is what training needs."""
        self.centre.zero_()
        self.whitening = None


def _sample(pixels: Images) -> np.ndarray:
    return np.sort(np.random.default_rng(0).permutation(len(pixels))[:CENTRE_IMAGES])


def _match_buffers(encoder: "Encoder", state_dict: dict, prefix: str, *args: Any) -> None:
    """Before loading: older checkpoints have no centre, and only some have a whitening."""
    state_dict.setdefault(f"{prefix}centre", torch.zeros(encoder.dimension))
    whitening = state_dict.get(f"{prefix}whitening")
    encoder.whitening = None if whitening is None else torch.empty_like(whitening, device=encoder.centre.device)


class ResNetEncoder(Encoder):
    """A ResNet with torchvision's residual blocks and parameter names, and without a classifier.

    It differs from torchvision's in three things: every channel count times `width`, a 3x3 stem without pooling for
    images of up to 32 px (App. B.9), and the published initialisation.

    architecture  a key of ARCHITECTURES
    width         1, 2 or 4: multiplies every channel count, the stem's included (the paper's 1x, 2x, 4x)
    size_px       side of the images it is built for; decides the stem
    """

    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module
    layer4: nn.Module

    def __init__(self, architecture: str, width: int, size_px: int):
        if architecture not in ARCHITECTURES:
            raise ValueError(f"encoder must be one of {', '.join(ARCHITECTURES)}, not {architecture!r}")
        block, depths, first = ARCHITECTURES[architecture]
        super().__init__(first * width * 2 ** (len(depths) - 1) * block.expansion)
        channels = first * width
        if size_px <= SMALL_IMAGE_PX:
            self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
            self.maxpool = nn.Identity()
        else:
            self.conv1 = nn.Conv2d(3, channels, 7, stride=2, padding=3, bias=False)
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        before = channels
        for stage, depth in enumerate(depths):
            planes = channels * 2**stage
            blocks = []
            for i in range(depth):
                stride = 2 if stage > 0 and i == 0 else 1
                blocks.append(_block(block, before, planes, stride))
                before = planes * block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self._initialise()

    def features(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return x.mean(dim=(2, 3))  # (N, d)

    def _initialise(self) -> None:
        """Kernels: truncated normal of variance 1 / fan_in. Last gain of each block: 0, so blocks start as identity."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_in = module.weight[0].numel()
                std = fan_in**-0.5 / 0.8796  # cutting at two deviations multiplies the deviation by .8796
                nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
            elif isinstance(module, BasicBlock):
                nn.init.zeros_(module.bn2.get_parameter("weight"))
            elif isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.get_parameter("weight"))


class ForeignEncoder(Encoder):
    """A network that others designed: (N, 3, H, W), normalised -> (N, d).

    mean, std  (3,) each: the network's input is (x - mean) / std, for x in [0, 1]
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, dimension: int, mean: Sequence[float], std: Sequence[float]):
        super().__init__(dimension)
        self.network = network
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def features(self, x: Tensor) -> Tensor:
        return self.network((x - self.mean) / self.std)


def _block(block: type[BasicBlock | Bottleneck], before: int, planes: int, stride: int) -> nn.Module:
    after = planes * block.expansion
    downsample = None
    if stride != 1 or before != after:
        downsample = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
    return block(before, planes, stride, downsample)


def projection_head(dimension: int, layers: int, output: int) -> nn.Module:
    """g: h (N, dimension) -> z (N, output), in the official layout.

    layers - 1 times [Linear, BN, ReLU] of the features' width, then Linear and a BN with gain but without bias.
    Linear layers have no bias. 3 layers: SimCLR v2 and the official default; 2: v1's "non-linear"; 1: "linear"; 0: no
    head, where z is h and `output` is not used. Raises ValueError for other values.
    """
    if layers not in range(4):
        raise ValueError(f"head_layers must be 0 to 3, not {layers}")
    if layers == 0:
        return nn.Identity()
    modules: list[nn.Module] = []
    for _ in range(layers - 1):
        modules += [_linear(dimension, dimension), nn.BatchNorm1d(dimension), nn.ReLU(inplace=True)]
    last = nn.BatchNorm1d(output)
    last.bias.requires_grad_(False)  # stays 0
    return nn.Sequential(*modules, _linear(dimension, output), last)


@torch.no_grad()
def head_for_h(projector: nn.Module, encoder: Encoder) -> nn.Module:
    """A copy of g that takes h. g itself was trained on the features: (h + centre) @ whitening^-1.

    The change goes into g's first Linear and the batch norm after it; a head without layers stays as it is.
    """
    head = copy.deepcopy(projector)
    if isinstance(head, nn.Sequential):
        linear, norm = cast(nn.Linear, head[0]), cast(nn.BatchNorm1d, head[1])
        if encoder.whitening is not None:
            linear.weight.copy_(linear.weight.double() @ encoder.whitening.double().inverse().T)
        norm.get_buffer("running_mean").sub_(linear.weight @ encoder.centre)
    return head


def freeze_statistics(network: nn.Module) -> None:
    """Normalise by the statistics that batch norm has, and leave them as they are. Until the next `train()`."""
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.eval()


def shortened(dimension: int) -> list[int]:
    """The lengths of h, besides the whole, that a run with --matryoshka trains: d / 2, d / 4 and d / 8."""
    return [dimension // part for part in (2, 4, 8)]


def project_beginnings(projector: nn.Module, h: Tensor) -> Tensor:
    """z of each beginning of h that `shortened` names, with the rest of h at zero: (N, d) -> (3 N, d of z).

    Matryoshka representation learning (Kusupati et al. 2022, arXiv:2205.13147, its efficient form: one g, of which a
    beginning meets the first columns). g's running statistics stay those of whole h.
    """
    buffers = dict(projector.named_buffers())
    z = []
    for length in shortened(h.shape[1]):
        beginning = F.pad(h[:, :length], (0, h.shape[1] - length))
        z.append(functional_call(projector, {name: b.clone() for name, b in buffers.items()}, (beginning,)))
    return torch.cat(z)


def _linear(inputs: int, outputs: int) -> nn.Linear:
    linear = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(linear.weight, std=0.01)
    return linear


def batch_size(size_px: int) -> int:
    """How many images of this side are encoded at once: a bounded number of pixels, since activations take memory."""
    return max(1, min(MOST_AT_ONCE, PIXELS_AT_ONCE // size_px**2))


def embed(encoder: nn.Module, images: Images) -> Tensor:
    """h of many images, computed in evaluation mode and float32 (TF32 on a GPU): (N, d) float32 on the CPU.

    images  uint8 (N, H, W, 3) array or tensor as stored, or float (N, 3, H, W) views in [0, 1]
    The encoder's mode is restored afterwards.
    """
    device = next(encoder.parameters()).device
    training = encoder.training
    encoder.eval()
    rows, size = [], batch_size(images[:1].shape[2])
    with torch.no_grad():
        for start in range(0, len(images), size):
            batch = torch.as_tensor(images[start : start + size]).to(device)
            x = to_input(batch) if batch.dtype == torch.uint8 else batch
            rows.append(encoder(x).float().cpu())
    encoder.train(training)
    return torch.cat(rows)


def to_input(pixels: Tensor) -> Tensor:
    """SimCLR's normalisation, a scaling to [0, 1]: uint8 (N, H, W, 3) -> float32 (N, 3, H, W)."""
    return pixels.permute(0, 3, 1, 2).float() / 255
