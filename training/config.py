"""Settings of a pretraining run, and the presets. The field docstrings are the command line's help."""

import dataclasses
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeVar

from training.augment import AugmentSettings

RUNS = Path("runs")
SEEDS = 2**24  # with a step's number behind it, a seed fits into 64 bits
T = TypeVar("T")


@dataclass(frozen=True)
class PretrainSettings:
    """Everything that decides a run. A checkpoint holds it, so that a run can be repeated or continued."""

    preset: Literal["tiny", "cifar", "cifar-fast", "photos", "imagenet"] = "tiny"
    """Where the other defaults come from; see the list above."""
    data: str = "shapes"
    """A folder of images, a .zip of one, WebDataset shards ('shards/*.tar'), a torchvision name (cifar10, cifar100,
    stl10, ...), or shapes: the built-in set. Labels are not needed; with them, kNN accuracy is shown."""
    name: str = ""
    """The run's folder is runs/NAME. By default: the data's name and the preset's."""
    resume: bool = False
    """Continue runs/NAME from its last checkpoint (a finished run is left as it is)."""

    init: str = ""
    """What f starts from, and g where it fits: a run or checkpoint, an exported encoder's folder, a ResNet of
    torchvision (resnet18, resnet50:IMAGENET1K_V1, resnet50:FILE.pth). Architecture, width and size are then its own
    unless they are given. By default nothing."""
    encoder: Literal["tiny", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152"] = "tiny"
    """Architecture of f."""
    width: Literal[1, 2, 4] = 1
    """Multiplies every channel count of f."""
    size_px: int = 48
    """Side of the square that the encoder sees. Up to 32 the stem is the one for CIFAR."""
    head_layers: Literal[0, 1, 2, 3] = 3
    """Layers of the projection head g: 2 in SimCLR v1, 3 in v2, 1 for a linear head, 0 for none."""
    head_dimension: int = 128
    """Length of z."""
    temperature: float = 0.2
    """tau of NT-Xent; 0.1 in the paper on ImageNet, 0.5 on CIFAR-10."""
    augment: AugmentSettings = field(default_factory=AugmentSettings)

    stream: bool | None = None
    """Decode pictures anew in every epoch, while the step before runs, instead of once onto the disk. By default where
    the decoded set would take more than half of the disk's free space."""

    epochs: int = 100
    """Passes over the images."""
    minutes: float | None = None
    """Instead of --epochs: as many epochs as fit in this time, by the speed of the first steps."""
    max_steps: int | None = None
    """Stop after so many steps, to try something out; the schedule stays that of the whole run."""
    batch_size: int = 256
    """Images (not views) per step, over all devices together."""
    chunk_size: int = 0
    """Images encoded at once on each device, for batches that do not fit into its memory; each is encoded twice, and
    batch norm sees a chunk at a time. 0 for the whole batch."""
    optimizer: Literal["lars", "sgd", "adamw"] = "lars"
    """LARS as in google-research/simclr; plain momentum SGD; AdamW."""
    lr: float = 0.075
    """Learning rate before scaling with the batch size."""
    lr_scaling: Literal["linear", "sqrt", "none"] = "sqrt"
    """linear: lr * batch / 256; sqrt: lr * sqrt(batch); none: lr."""
    warmup: float = 0.1
    """Share of the steps in which the learning rate rises from 0; a cosine to 0 follows."""
    momentum: float = 0.9
    """Of LARS and SGD."""
    weight_decay: float = 1e-4
    """On matrices and kernels only; biases and batch norm never decay."""
    seed: int = 0
    """Of weights, order, and augmentation."""
    knn_epochs: int = 10
    """Epochs between two measurements of kNN accuracy (of views matched, without labels)."""
    compile: bool | None = None
    """Use torch.compile, which needs a C++ compiler. By default: on a GPU, and for long runs on a CPU."""
    devices: int = 0
    """Processes on this machine, one a GPU; 0 for all that there are."""

    def __post_init__(self):
        positive = ("size_px", "head_dimension", "temperature", "epochs", "minutes", "max_steps", "lr", "knn_epochs")
        check_settings(self, positive)
        if not self.batch_size >= 2:
            raise ValueError(
                f"--batch-size must be at least 2 (a negative needs a second image), not {self.batch_size}"
            )
        if not 0 <= self.warmup < 1:
            raise ValueError(f"--warmup is a share of the steps in [0, 1), not {self.warmup}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"--momentum must be in [0, 1), not {self.momentum}")
        if not self.weight_decay >= 0:
            raise ValueError(f"--weight-decay must be at least 0, not {self.weight_decay}")
        if not self.chunk_size >= 0:
            raise ValueError(f"--chunk-size must be at least 0, not {self.chunk_size}")
        if not self.devices >= 0:
            raise ValueError(f"--devices must be at least 0, not {self.devices}")

    @property
    def architecture(self) -> str:
        return self.encoder if self.width == 1 else f"{self.encoder}-{self.width}x"

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, facts: dict) -> "PretrainSettings":
        facts = dict(facts)
        augment = dict(facts.pop("augment"))
        augment["crop_area"] = tuple(augment["crop_area"])
        return cls(augment=AugmentSettings(**augment), **facts)


def check_settings(settings, positive: tuple[str, ...]) -> None:
    """What all commands that train ask of theirs: `seed`, `name`, and those numbers, where given, above 0."""
    if not 0 <= settings.seed < SEEDS:
        raise ValueError(f"--seed must be at least 0 and below {SEEDS:,}, not {settings.seed}")
    if any(part in ("..", "") for part in settings.name.split("/")) and settings.name:
        raise ValueError(f"--name must be a folder name below runs/, not {settings.name!r}")
    for name in positive:
        value = getattr(settings, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name.replace('_', '-')} must be above 0, not {value}")


CIFAR = PretrainSettings(
    preset="cifar",
    data="cifar10",
    encoder="resnet18",
    size_px=32,
    augment=AugmentSettings(crop_area=(0.2, 1.0), strength=0.5, grey=0.1, blur=0.0),
    epochs=1000,
    batch_size=512,
    lr=1.0,
    lr_scaling="linear",
    warmup=0.01,
    temperature=0.5,
)

# What each is for, and what it should reach, stands beside it: the command line's help prints it.
PRESETS: dict[str, tuple[str, PretrainSettings]] = {
    "tiny": (
        "a 0.3 M parameter encoder at 48 px, for a machine without a GPU: on shapes 70 % kNN in two minutes, two cores",
        PretrainSettings(
            augment=AugmentSettings(crop_area=(0.25, 1.0)),
            batch_size=128,
            lr=0.15,
        ),
    ),
    "cifar": (
        "CIFAR-10 with ResNet-18, the paper's recipe (App. B.9) with larger crops and less grey: for a GPU; aims at "
        "92 % linear, others reach 91.9 with nearly this",
        CIFAR,
    ),
    "cifar-fast": (
        "the same in 300 epochs, with tau and learning rate for short runs: aims at 90 % kNN in a quarter of an hour "
        "on an H200, not measured yet",
        replace(CIFAR, preset="cifar-fast", epochs=300, temperature=0.2, lr=0.2, lr_scaling="sqrt", warmup=0.03),
    ),
    "photos": (
        "your own photographs with ResNet-18 at 128 px: an hour or so on a GPU for 10,000 of them",
        PretrainSettings(
            preset="photos",
            encoder="resnet18",
            size_px=128,
            temperature=0.2,
            epochs=200,
            batch_size=512,
        ),
    ),
    "imagenet": (
        "the paper's ImageNet recipe for small batches (ResNet-50, square-root scaling, tau 0.1): for several GPUs",
        PretrainSettings(
            preset="imagenet",
            encoder="resnet50",
            size_px=224,
            temperature=0.1,
            epochs=100,
            batch_size=4096,
        ),
    ),
}


def parse(arguments: list[str] | None = None) -> PretrainSettings:
    """The command line over the preset that it names."""
    title = "Pretrain an encoder on unlabelled images with SimCLR, into runs/NAME."
    return over_preset(PretrainSettings, PRESETS, title, arguments)


def over_preset(kind: type[T], presets: dict[str, tuple[str, T]], title: str, arguments: list[str] | None) -> T:
    """Settings by the command line: the defaults are those of the preset that it names, or of the class's own.

    presets  by name: what each is for, which the help prints, and its settings
    """
    import tyro

    arguments = sys.argv[1:] if arguments is None else arguments
    preset = kind.preset
    for i, argument in enumerate(arguments):
        if argument.startswith("--preset="):
            preset = argument.partition("=")[2]
        elif argument == "--preset" and i + 1 < len(arguments):
            preset = arguments[i + 1]
    default = presets.get(preset, presets[kind.preset])[1]  # an unknown one is tyro's to refuse
    lines = [f"  {name}: {purpose}" for name, (purpose, _) in presets.items()]
    description = "\n".join([f"{title} Presets:\n", *lines])
    return tyro.cli(kind, default=default, args=arguments, description=description)
