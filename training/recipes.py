"""Settings of a fine-tuning, and presets with the published recipes. Field docstrings are the command line's help."""

from dataclasses import dataclass
from typing import Literal

from training.augment import AugmentSettings
from training.config import check_settings, over_preset
from training.resumable import ResumableSettings

PRETRAINED_LR, SCRATCH_LR = 0.02, 1.0


@dataclass(frozen=True)
class FinetuneSettings(ResumableSettings):
    """All settings of a fine-tuning; its checkpoint contains them."""

    preset: Literal["few", "linear", "v1", "v2"] = "few"
    """The recipe that sets the defaults of the other options; see the list above."""
    mode: Literal["linear", "full", "head"] = "full"
    """linear: train the classifier on a frozen encoder; full: train everything; head: train everything, and keep the
    projection head's first layer between h and the classifier (SimCLR v2)."""

    labels: tuple[str, ...] = ()
    """CSV files with the columns label, and path or name, such as those of `twinview pick` and of the page. Only their
    labels are used then, instead of the names of the folders of the training pictures. The pictures that the classifier
    is least sure of are listed in runs/NAME/next.csv."""
    next: int = 30
    """With --labels: number of pictures to list in next.csv."""
    label_share: float = 1.0
    """Share of the labels of each class to use, such as 0.01 or 0.1."""
    labels_per_class: int | None = None
    """Instead of --label-share: number of labels of each class to use."""
    held_out: float = 0.0
    """Share of the used labels that is held out to choose the best epoch. 0: train for all epochs on all labels, which
    is better with few labels, since the accuracy on a few dozen held-out pictures is mostly chance."""
    patience: int = 50
    """With --held-out: stop after this many epochs without a better held-out accuracy."""
    balance: Literal["none", "loss", "sampling"] = "none"
    """For classes of different sizes: weight the loss by one over the class size (loss), or draw each class equally
    often (sampling). The held-out accuracy is then the mean of the classes' accuracies."""

    batch_size: int = 32
    """Pictures per step. Reduced if there are fewer labelled pictures."""
    optimizer: Literal["sgd", "lars"] = "sgd"
    """SGD with Nesterov momentum, or LARS, which adapts the learning rate of each layer except the classifier."""
    lr: float | None = None
    """Learning rate before scaling with the batch size. By default 0.02 to train a pretrained encoder further, so that
    it keeps most of what it has learnt, and 1 otherwise."""
    lr_scaling: Literal["linear", "sqrt", "none"] = "linear"
    """linear: lr * batch / 256; sqrt: lr * sqrt(batch); none: lr."""
    warmup: float = 0.0
    """Share of the steps in which the learning rate rises from 0, before the cosine decay to 0."""
    momentum: float = 0.9
    """Momentum of SGD and LARS."""
    weight_decay: float = 0.0
    """Weight decay of matrices and kernels; biases and batch norm never decay."""

    def __post_init__(self) -> None:
        positive = ("size_px", "labels_per_class", "patience", "epochs", "lr", "next")
        check_settings(self, positive, ("weight_decay",), ("held_out", "warmup", "momentum"))
        if not 0 < self.label_share <= 1:
            raise ValueError(f"--label-share is a share in (0, 1], not {self.label_share}")
        if self.labels_per_class and self.label_share != 1:
            raise ValueError("give --label-share or --labels-per-class, not both")
        if not self.batch_size >= 2:
            raise ValueError(f"--batch-size must be at least 2, not {self.batch_size}")
        if self.optimizer == "sgd" and self.momentum == 0:
            raise ValueError("--momentum must be above 0 with --optimizer sgd, which uses Nesterov momentum")

    @property
    def learning_rate(self) -> float:
        return self.lr or (PRETRAINED_LR if self.init and self.mode != "linear" else SCRATCH_LR)


CROPS = AugmentSettings(jitter=0.0, grey=0.0, blur=0.0)  # crops and flips as published

PRESETS: dict[str, tuple[str, FinetuneSettings]] = {
    "few": (
        "for a few labels of your own: trains all layers, in small batches",
        FinetuneSettings(),
    ),
    "linear": (
        "linear evaluation as published for CIFAR (App. B.9): 100 epochs, batch size 512, Nesterov SGD with learning "
        "rate 0.1 * batch / 256",
        FinetuneSettings(preset="linear", mode="linear", batch_size=512, lr=0.1, augment=CROPS),
    ),
    "v1": (
        "SimCLR's recipe for 1 % of ImageNet's labels (App. B.5): 60 epochs (use 30 for 10 %), Nesterov SGD with "
        "learning rate 0.05 * batch / 256",
        FinetuneSettings(preset="v1", epochs=60, batch_size=4096, lr=0.05, augment=CROPS),
    ),
    "v2": (
        "SimCLR v2's recipe for 1 % of ImageNet's labels: keeps the head's first layer, 60 epochs (use 30 for 10 %), "
        "LARS without weight decay and with learning rate 0.005 * sqrt(batch)",
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
    """Settings from the command line, with the defaults of the preset that it names."""
    title = "Fine-tune an encoder on labelled pictures, into runs/NAME."
    return over_preset(FinetuneSettings, PRESETS, title, arguments)
