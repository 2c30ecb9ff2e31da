"""Settings of a pretraining run, and the presets. The field docstrings are the command line's help."""

import dataclasses
import json
import math
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Protocol, TypeVar, get_args

from export.artifact import Preprocessing
from export.paths import local_path, parse_settings
from training.augment import AugmentSettings
from training.loss import LOSSES, LossName
from training.optimizers import OPTIMIZERS, OptimizerName
from training.trackers import TrackerName

RUNS = Path("runs")
SEEDS = 2**32  # a CPU's generator, which draws the initial weights, keeps 32 bits of a seed
Names = tuple[str, ...]


@dataclass(frozen=True)
class PretrainSettings:
    """All settings of a run. Its checkpoint holds them, so that the run can be repeated or continued."""

    preset: Literal["tiny", "cifar", "cifar-fast", "photos", "aerial", "microscopy", "imagenet", "adapt"] = "tiny"
    """The recipe that sets the defaults of the other options; see the list above."""
    data: str = "shapes"
    """A folder of images, a .zip of one, WebDataset shards ('shards/*.tar'), Parquet files with images, hf:NAME for a
    data set of Hugging Face, the name of a torchvision data set (cifar10, cifar100, stl10, ...), or shapes, the
    built-in set. Labels are optional, to measure kNN accuracy."""
    also: tuple[str, ...] = ()
    """More sources to train on, each as DATA or DATA=WEIGHT: their pictures are taken WEIGHT times in an epoch, so 0.5
    takes another half of them in each."""
    name: str = ""
    """Name of the run, which is written to runs/NAME. By default DATA-PRESET."""
    resume: bool = False
    """Continue runs/NAME from its last checkpoint. A finished run is not changed."""

    init: str = ""
    """Initial weights of the encoder f, and of the projection head g if its layers have the same shapes: a run or
    checkpoint, an exported encoder's folder, or an encoder that others trained: lite0 (EfficientNet-Lite0), timm:NAME,
    timm:NAME:FILE, torchvision:NAME, torchvision:NAME:FILE. Architecture, width and input size are then by default
    those of the weights. By default the weights are random."""
    encoder: str = "tiny"
    """Architecture of the encoder f: tiny, resnet18, resnet34, resnet50, resnet101, resnet152, or that of a network of
    timm or torchvision, such as timm:vit_tiny_patch16_224 or torchvision:convnext_tiny."""
    width: Literal[1, 2, 4] = 1
    """Multiplies every channel count of an encoder that is not timm's or torchvision's."""
    size_px: int = 48
    """Side of the encoder's square input, in pixels. Up to 32, a ResNet has the small first layer used for CIFAR."""
    crop: float | None = 1.0
    """Side of the centred square that is used of each picture, as a share of its shorter side. With none the whole
    picture is squeezed into a square, which changes its proportions."""
    head_layers: Literal[0, 1, 2, 3] = 3
    """Layers of the projection head g: 2 in SimCLR v1, 3 in v2, 1 for a linear head, 0 for none."""
    head_dimension: int = 128
    """Length of the projection z = g(h)."""
    matryoshka: bool = False
    """Train the first half, quarter and eighth of h too, so that vectors can be shortened to them: the loss is the mean
    over the four lengths."""
    views: int = 2
    """Views of each picture in a step. With more than 2, the loss is the mean over all pairs of views."""
    whiten: float = 0.0
    """After training, divide each principal direction of h by its variance to this power, so that the few directions in
    which all pictures vary most do not decide which are near: 0.5 whitens h fully, 0 leaves it as it is. The preset
    tiny has 0.25, and --init by default that of the weights; encoders that others trained do not need it."""
    loss: LossName = "nt_xent"
    """Contrastive loss: nt_xent as in the paper, or dcl, which leaves the positive pair out of the denominator."""
    loss_scale: float = 1.0
    """Multiplies the gradient of the loss. 1: the paper's mean over all views. 2, as in google-research/simclr, which
    adds the means of both halves: biases and batch norm move twice as far, and weight decay counts half as much."""
    temperature: float = 0.2
    """Temperature tau of the loss. The paper uses 0.1 on ImageNet and 0.5 on CIFAR-10."""
    augment: AugmentSettings = field(default_factory=AugmentSettings)

    stream: bool | None = None
    """Decode the pictures again in every epoch, while the previous step runs, instead of once to the disk. By default
    only if the decoded pictures would take more than half of the free disk space."""

    epochs: int = 100
    """Passes over the images."""
    minutes: float | None = None
    """Instead of --epochs: the whole command takes this long, by the clock, and the learning rate follows the time."""
    max_steps: int | None = None
    """For a trial: stop after this many steps. The learning rate follows the schedule of the whole run. Resumed, the
    run goes on with the next epoch."""
    batch_size: int = 256
    """Images (not views) per step, on all devices together. With fewer images it is reduced; the default of a preset is
    reduced so that an epoch has at least 10 steps, but not below 32."""
    chunk_size: int = 0
    """Images encoded at once on each device, for batches that do not fit into its memory. Each image is then encoded
    twice, and batch norm uses the statistics of a chunk. 0: the whole batch at once."""
    optimizer: OptimizerName = "lars"
    """lars: as in google-research/simclr; sgd: with momentum, but not Nesterov's; adamw: ignores --momentum."""
    lr: float = 0.075
    """Learning rate before scaling with the batch size."""
    encoder_lr: float = 1.0
    """Learning rate of f as a share of that of g: small for an f that others trained well."""
    lr_scaling: Literal["linear", "sqrt", "none"] = "sqrt"
    """linear: lr * batch / 256; sqrt: lr * sqrt(batch); none: lr."""
    warmup: float = 0.1
    """Share of the steps in which the learning rate rises from 0. It then falls to 0 along a cosine."""
    momentum: float = 0.9
    """Momentum of LARS and SGD."""
    weight_decay: float = 1e-4
    """Weight decay of matrices and kernels; biases and batch norm have none."""
    head_first: int = 0
    """Steps at the start in which only the projection head g is trained, so that a random g does not disturb an f that
    others trained."""
    freeze_statistics: bool = False
    """Keep the means and variances of f's batch norms as they are in --init."""
    seed: int = 0
    """Seed of the initial weights, the order of the images and the augmentation."""
    ema: float = 0.0
    """Decay at each step of an exponential moving average of f's weights, such as 0.999. At the end it is measured
    beside the last weights, and the better of both is kept. 0: no average."""
    knn_epochs: int = 10
    """Epochs between two measurements of kNN accuracy, or without labels of how often two views of a picture match."""
    patience: int = 0
    """Stop early after this many measurements (see --knn-epochs) without a better one, and go back to the best
    weights. 0: never."""
    keep_every: int = 0
    """Keep a checkpoint of every so many epochs, as checkpoints/epoch-0010.ckpt. 0: only the last and the best."""
    compile: bool | None = None
    """Use torch.compile, which needs a C++ compiler. By default on a GPU, and for long runs on a CPU."""
    logger: TrackerName = "tensorboard"
    """Where the figures of metrics.csv go too: tensorboard alone, or also wandb or mlflow. All write below runs/ and
    send nothing, unless the variables WANDB_MODE or MLFLOW_TRACKING_URI say otherwise."""
    devices: int = 0
    """Number of processes on this machine, one per GPU. 0: one for each GPU, or one without a GPU."""

    def __post_init__(self):
        positive = (
            "size_px",
            "head_dimension",
            "loss_scale",
            "temperature",
            "epochs",
            "minutes",
            "max_steps",
            "lr",
            "encoder_lr",
            "knn_epochs",
        )
        check_settings(
            self,
            positive,
            ("weight_decay", "chunk_size", "devices", "head_first", "patience", "keep_every", "whiten"),
            ("warmup", "momentum", "ema"),
        )
        for name, choices in (("loss", LOSSES), ("optimizer", OPTIMIZERS), ("logger", get_args(TrackerName))):
            if getattr(self, name) not in choices:
                raise ValueError(f"--{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}")
        if self.whiten > 0.5:
            raise ValueError(f"--whiten must be between 0 and 0.5, not {self.whiten}")
        if self.crop is not None and not 0 < self.crop <= 1:
            raise ValueError(f"--crop must be above 0 and at most 1, or None, not {self.crop}")
        if not self.views >= 2:
            raise ValueError(f"--views must be at least 2, not {self.views}")
        if not self.batch_size >= 2:
            raise ValueError(
                f"--batch-size must be at least 2 (negatives come from other images), not {self.batch_size}"
            )

    @property
    def architecture(self) -> str:
        return self.encoder if self.width == 1 else f"{self.encoder}-{self.width}x"

    @property
    def preprocessing(self) -> Preprocessing:
        return Preprocessing(self.size_px, self.crop)

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, facts: dict) -> "PretrainSettings":
        facts = dict(facts)
        augment = dict(facts.pop("augment"))
        augment["crop_area"] = tuple(augment["crop_area"])
        facts.setdefault("crop", None)  # what older checkpoints did
        facts["also"] = tuple(facts.get("also", ()))
        return cls(augment=AugmentSettings(**augment), **facts)


class RunSettings(Protocol):
    """The settings that all training commands have."""

    @property
    def name(self) -> str: ...
    @property
    def seed(self) -> int: ...


def check_settings(settings: RunSettings, positive: Names, not_negative: Names = (), below_one: Names = ()) -> None:
    """Check `seed`, `name` and the ranges of numbers. Raises ValueError.

    positive      settings that must be above 0, or None
    not_negative  at least 0
    below_one     in [0, 1)
    """
    if not 0 <= settings.seed < SEEDS:
        raise ValueError(f"--seed must be at least 0 and below {SEEDS:,}, not {settings.seed}")
    if any(part in ("..", "") for part in settings.name.split("/")) and settings.name:
        raise ValueError(f"--name must be a folder name below runs/, not {settings.name!r}")
    for name in (*positive, *not_negative, *below_one):
        flag, value = f"--{name.replace('_', '-')}", getattr(settings, name)
        if value == math.inf:
            raise ValueError(f"{flag} must be a finite number, not {value}")
        if name in positive and value is not None and not value > 0:
            raise ValueError(f"{flag} must be above 0, not {value}")
        if name in not_negative and not value >= 0:
            raise ValueError(f"{flag} must be at least 0, not {value}")
        if name in below_one and not 0 <= value < 1:
            raise ValueError(f"{flag} must be in [0, 1), not {value}")


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
    loss_scale=2.0,
    temperature=0.5,
)

PHOTOS = PretrainSettings(preset="photos", encoder="resnet18", size_px=128, temperature=0.2, epochs=200, batch_size=512)

# Purpose and expected accuracy of each preset, which the command line's help prints, and its settings.
PRESETS: dict[str, tuple[str, PretrainSettings]] = {
    "tiny": (
        "a small encoder (0.3 M parameters) at 48 px, for machines without a GPU; 68 % kNN accuracy on shapes after "
        "two minutes on two cores",
        PretrainSettings(
            augment=AugmentSettings(crop_area=(0.25, 1.0)),
            head_layers=2,
            whiten=0.25,
            temperature=0.1,
            batch_size=128,
            lr=0.15,
        ),
    ),
    "cifar": (
        "CIFAR-10 with ResNet-18 on a GPU: the paper's recipe (App. B.9) with larger crops and less grey; the target "
        "is 92 % linear accuracy (others reach 91.9 with nearly this recipe)",
        CIFAR,
    ),
    "cifar-fast": (
        "cifar in 500 epochs, with a smaller head, temperature and learning rate for short runs; the target is 90 % "
        "kNN accuracy on a GPU, not measured yet",
        replace(
            CIFAR,
            preset="cifar-fast",
            augment=replace(CIFAR.augment, grey=0.2),
            epochs=500,
            head_layers=2,
            head_dimension=64,
            temperature=0.1,
            lr=0.2,
            lr_scaling="sqrt",
            warmup=0.03,
        ),
    ),
    "photos": (
        "your own photographs with ResNet-18 at 128 px; about an hour on a GPU for 10,000 photographs",
        PHOTOS,
    ),
    "aerial": (
        "photos for pictures from above: any side may be up, and scale and colour change less",
        replace(
            PHOTOS,
            preset="aerial",
            augment=AugmentSettings(
                crop_area=(0.2, 1.0), vertical_flip=0.5, quarter_turns=0.75, strength=0.5, grey=0.1
            ),
        ),
    ),
    "microscopy": (
        "photos for microscopes and scans: any side may be up, crops change the scale alone, intensities vary by gamma",
        replace(
            PHOTOS,
            preset="microscopy",
            augment=AugmentSettings(
                crop_area=(0.2, 1.0),
                crop_aspect=1.0,
                vertical_flip=0.5,
                quarter_turns=0.75,
                gamma=0.5,
                strength=0.3,
                grey=0.0,
                blur=0.2,
            ),
        ),
    ),
    "adapt": (
        "an encoder that others trained, adapted gently to your pictures: lite0 at 128 px, or another as --init",
        PretrainSettings(
            preset="adapt",
            init="lite0",
            size_px=128,
            augment=AugmentSettings(crop_area=(0.3, 1.0), strength=0.3, grey=0.1, blur=0.0),
            head_layers=2,
            temperature=0.2,
            batch_size=128,
            epochs=2,  # and more for few images (enough_epochs in pretrain.py)
            optimizer="adamw",
            lr=1e-3,
            encoder_lr=0.05,
            lr_scaling="none",
            head_first=24,
            freeze_statistics=True,
        ),
    ),
    "imagenet": (
        "the paper's ImageNet recipe for small batches (ResNet-50, square-root scaling, tau 0.1), for several GPUs",
        PretrainSettings(
            preset="imagenet",
            encoder="resnet50",
            size_px=224,
            loss_scale=2.0,
            temperature=0.1,
            epochs=100,
            batch_size=4096,
        ),
    ),
}


def parse(arguments: list[str] | None = None) -> PretrainSettings:
    """Settings from the command line; defaults are those of the preset that it names."""
    title = (
        "Pretrain an encoder on unlabelled images with SimCLR, into runs/NAME. "
        "--config runs/OTHER/config.json starts from the settings of another run."
    )
    arguments = sys.argv[1:] if arguments is None else arguments
    config, arguments = _option("config", arguments, remove=True)
    if config is None:
        return over_preset(PretrainSettings, PRESETS, title, arguments)
    if _option("preset", arguments)[0]:
        raise ValueError("give either --config or --preset: a run's settings name the preset that they come from")
    given = replace(read_config(config), name="", resume=False)
    return over_preset(PretrainSettings, {given.preset: ("", given)}, title, arguments)


def read_config(file: str) -> PretrainSettings:
    """The settings in a run's config.json, which may be named by its folder. Raises ValueError: there is no such file,
    or it does not hold settings."""
    path = local_path(file)
    try:
        path = path / "config.json" if path.is_dir() else path
        return PretrainSettings.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ValueError(f"--config {file} cannot be read: {error.strerror}") from error
    except KeyError as error:
        raise ValueError(f"--config {file} does not hold the settings of a run: {error} is missing") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"--config {file} does not hold the settings of a run: {error}") from error


class HasPreset(Protocol):
    """Settings that can be those of a preset."""

    @property
    def preset(self) -> str: ...


T = TypeVar("T", bound=HasPreset)


def over_preset(kind: type[T], presets: dict[str, tuple[str, T]], title: str, arguments: list[str] | None) -> T:
    """Settings of class `kind` from the command line; defaults are those of the preset that it names.

    presets    name -> purpose, which the help prints, and settings
    title      first line of the help
    arguments  of the command line; None: sys.argv
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    usual = kind().preset if kind().preset in presets else next(iter(presets))
    preset, _ = _option("preset", arguments)
    default = presets.get(preset or usual, presets[usual])[1]  # tyro refuses an unknown one
    lines = [f"  {name}: {purpose}" for name, (purpose, _) in presets.items() if purpose]
    description = "\n".join([f"{title} Presets:\n", *lines]) if lines else title
    return parse_settings(kind, arguments, default=default, description=description)


def _option(name: str, arguments: list[str], remove: bool = False) -> tuple[str | None, list[str]]:
    """The value of --name, None if it is not given; and the arguments, without it if `remove`."""
    value, others = None, []
    waiting = iter(arguments)
    for argument in waiting:
        if argument.startswith(f"--{name}="):
            value = argument.partition("=")[2]
        elif argument == f"--{name}":
            if (value := next(waiting, None)) is None or value.startswith("--"):
                raise ValueError(f"--{name} needs a value")
        else:
            others.append(argument)
    return value, others if remove else arguments
