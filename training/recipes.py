"""Settings of fine-tuning, and the published recipes. The field docstrings are the command line's help."""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from training.augment import AugmentSettings
from training.config import check_settings, over_preset

GENTLE, FRESH = 0.02, 1.0  # learning rates


@dataclass(frozen=True)
class FinetuneSettings:
    """Everything that decides a fine-tuning; its checkpoint holds it."""

    preset: Literal["few", "linear", "v1", "v2"] = "few"
    """Where the other defaults come from; see the list above."""
    data: str = "shapes"
    """Labelled pictures: a folder, a .zip, shards, a torchvision name, or shapes."""
    name: str = ""
    """The run's folder is runs/NAME. By default: the data's name, the preset's, and what it starts from."""
    resume: bool = False
    """Continue runs/NAME from where it was interrupted (a finished run is left as it is)."""
    init: str = ""
    """What the encoder starts from: a run or checkpoint, an exported encoder's folder, a ResNet of torchvision
    (resnet18, resnet50:IMAGENET1K_V1, resnet50:FILE.pth). By default nothing: from scratch."""
    mode: Literal["linear", "full", "head"] = "full"
    """linear: the encoder stays as it is; full: everything learns; head: everything, and the projection head's first
    layer stays between h and the classifier (SimCLR v2)."""
    encoder: Literal["tiny", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152"] | None = None
    """Architecture, where it starts from nothing (by default tiny)."""
    width: Literal[1, 2, 4] | None = None
    """Where it starts from nothing."""
    size_px: int | None = None
    """By default what the encoder was trained at; 48 from nothing."""

    label_share: float = 1.0
    """Of each class's labels, how many are used: 0.01, 0.1."""
    labels_per_class: int | None = None
    """Instead: so many of each class."""
    held_out: float = 0.0
    """Of the labels used, the share that is held out: the best epoch is the one that is best there. 0 for none: all
    epochs are trained, on all of them, which is better with few labels (some dozens held out choose by chance)."""
    patience: int = 50
    """Epochs without a better one on the held-out part after which it ends."""
    balance: Literal["none", "loss", "sampling"] = "none"
    """Where classes differ in size: weigh the loss by one over it, or draw each class equally often. Then the held-out
    part is judged by the mean of the classes' accuracies."""

    augment: AugmentSettings = field(
        default_factory=lambda: AugmentSettings(crop_area=(0.25, 1.0), jitter=0.0, grey=0.0, blur=0.0)
    )
    """Crops and flips only, as published; the published crops take 0.08 to 1 of the area."""
    epochs: int = 100
    """Passes over the labelled pictures."""
    batch_size: int = 32
    """At most all the labelled pictures."""
    optimizer: Literal["sgd", "lars"] = "sgd"
    """Nesterov momentum; or LARS, which adapts at any decay. The classifier itself is never adapted."""
    lr: float | None = None
    """Learning rate before scaling with the batch size. By default 0.02 where an encoder that has learnt something goes
    on learning, so that little of it is lost, and 1 otherwise."""
    lr_scaling: Literal["linear", "sqrt", "none"] = "linear"
    """linear: lr * batch / 256; sqrt: lr * sqrt(batch); none: lr."""
    warmup: float = 0.0
    """Share of the steps in which the learning rate rises from 0; a cosine to 0 follows."""
    momentum: float = 0.9
    weight_decay: float = 0.0
    """On matrices and kernels only."""
    seed: int = 0
    """Of which labels are used and held out, of order and augmentation."""

    def __post_init__(self):
        check_settings(self, ("size_px", "labels_per_class", "patience", "epochs", "lr"))
        if not 0 < self.label_share <= 1:
            raise ValueError(f"--label-share is a share in (0, 1], not {self.label_share}")
        if self.labels_per_class and self.label_share != 1:
            raise ValueError("give --label-share or --labels-per-class, not both")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"--held-out is a share in [0, 1), not {self.held_out}")
        if not self.batch_size >= 2:
            raise ValueError(f"--batch-size must be at least 2, not {self.batch_size}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"--warmup is a share of the steps in [0, 1), not {self.warmup}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"--momentum must be in [0, 1), not {self.momentum}")
        if self.optimizer == "sgd" and self.momentum == 0:
            raise ValueError("--momentum must be above 0 for Nesterov's")
        if not self.weight_decay >= 0:
            raise ValueError(f"--weight-decay must be at least 0, not {self.weight_decay}")

    @property
    def learning_rate(self) -> float:
        return self.lr or (GENTLE if self.init and self.mode != "linear" else FRESH)

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)


CROPS = AugmentSettings(jitter=0.0, grey=0.0, blur=0.0)  # and flips: as published

PRESETS: dict[str, tuple[str, FinetuneSettings]] = {
    "few": (
        "everything learns, in small batches: for your own few labels",
        FinetuneSettings(),
    ),
    "linear": (
        "linear evaluation as published for CIFAR (App. B.9): 100 epochs, Nesterov SGD 0.1 * batch / 256, batch 512",
        FinetuneSettings(preset="linear", mode="linear", batch_size=512, lr=0.1, augment=CROPS),
    ),
    "v1": (
        "SimCLR's with 1 % of ImageNet's labels (App. B.5): 60 epochs (30 with 10 %), Nesterov SGD 0.05 * batch / 256",
        FinetuneSettings(preset="v1", epochs=60, batch_size=4096, lr=0.05, augment=CROPS),
    ),
    "v2": (
        "SimCLR v2's with 1 %: from the head's first layer, LARS without decay, 0.005 * sqrt(batch), 60 epochs (30)",
        FinetuneSettings(
            preset="v2",
            mode="head",
            epochs=60,
            batch_size=1024,
            optimizer="lars",
            lr=0.005,
            lr_scaling="sqrt",
            augment=CROPS,
        ),
    ),
}


def parse(arguments: list[str] | None = None) -> FinetuneSettings:
    """The command line over the preset that it names."""
    title = "Fine-tune an encoder on labelled pictures, into runs/NAME."
    return over_preset(FinetuneSettings, PRESETS, title, arguments)
