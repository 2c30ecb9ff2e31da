"""Fine-tuning and distillation: the run's folder, the loop over epochs, and resuming after an interruption.

runs/NAME/checkpoints/halfway.ckpt  network, optimizer, schedule, history and best epoch so far; deleted at the end

A resumed run gives the same result as one that was never interrupted.
"""

import copy
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm

from training import checkpoint
from training.augment import AugmentSettings
from training.budget import Budget
from training.checkpoint import AtomicCheckpointIO, CheckpointError
from training.run_folder import commit, other_setting, write_config, write_metrics

KINDS = {"label_share": "fine-tuning", "teacher": "distillation"}  # a setting that only this kind of run has


@dataclass(frozen=True)
class ResumableSettings:
    """Settings that fine-tuning and distillation share."""

    data: str = "shapes"
    """Pictures to train on (with labels for fine-tuning): a folder, a .zip, shards, hf:NAME,
    a torchvision name, or shapes."""
    name: str = ""
    """Name of the run, which is written to runs/NAME. By default made from the names of the data and the encoders."""
    resume: bool = False
    """Continue runs/NAME where it was interrupted. A finished run is not changed."""
    init: str = ""
    """Initial weights of the encoder: a run or checkpoint, an exported encoder's folder, or an encoder that others
    trained (lite0, timm:NAME, torchvision:NAME, also with :FILE). By default random weights."""
    encoder: str | None = None
    """Architecture of an encoder with random weights (by default tiny), as in pretrain.py."""
    width: Literal[1, 2, 4] | None = None
    """Multiplies every channel count of an encoder with random weights (by default 1)."""
    size_px: int | None = None
    """Side of the encoder's square input, in pixels. By default that of the weights in --init; with random weights that
    of the teacher in a distillation, otherwise 48."""
    augment: AugmentSettings = field(
        default_factory=lambda: AugmentSettings(crop_area=(0.25, 1.0), jitter=0.0, grey=0.0, blur=0.0)
    )
    """Augmentation, by default crops and flips only. The published fine-tuning uses crops of 0.08 to 1 of the area."""
    epochs: int = 100
    """Passes over the pictures."""
    seed: int = 0
    """Seed of the random weights, the choice of labels, the order of the pictures and the augmentation."""

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)


@dataclass
class TrainingProgress:
    history: list[dict]
    """One row per finished epoch."""
    best: tuple[float, float] = (-1.0, 0.0)
    """Score of the best epoch."""
    best_epoch: int = 0
    best_weights: dict | None = None
    """State dict of the network after the best epoch."""


def is_finished(folder: Path, settings: ResumableSettings) -> bool:
    """Whether the folder holds a finished run, which --resume leaves as it is.

    raises  CheckpointError: it holds one and --resume was not given, or one with other settings
    """
    path = folder / "checkpoints" / checkpoint.NAME
    if not path.exists():
        return False
    if not settings.resume:
        raise CheckpointError(f"{folder} already contains a run: give another --name")
    saved = checkpoint.load(path)
    _check_same(folder, (saved.get("classifier") or saved.get("distillation") or saved)["settings"], settings)
    print(f"{folder} is finished")
    return True


def _check_same(folder: Path, own: dict, settings: ResumableSettings) -> None:
    """raises CheckpointError when a run would be resumed with other settings than it was started with."""
    requested = settings.to_dict()
    for setting, kind in KINDS.items():
        if setting in requested and setting not in own:
            raise CheckpointError(f"{folder} is not a {kind}: give another --name")
    # --minutes decided the epochs
    may_differ = {"name", "resume"} | ({"epochs"} if requested.get("minutes") else set())
    for name, value in requested.items():
        if name not in may_differ and value != own.get(name, value):
            raise CheckpointError(other_setting(folder, name, own[name], value))


class ResumableRun:
    """The folder of one run. Saves at most every checkpoint.EVERY_S seconds; later epochs are repeated on resuming."""

    def __init__(self, folder: Path, settings: ResumableSettings, images: int) -> None:
        """raises CheckpointError: an interrupted run without --resume, or with other settings or images"""
        self.folder, self.settings, self.images = folder, settings, images
        self.path = folder / "checkpoints" / checkpoint.HALFWAY
        self.saved_at = 0.0
        self.saved = None
        self.budget = Budget(None)
        if not self.path.exists():
            return
        if not settings.resume:
            raise CheckpointError(f"{folder} has an unfinished run: give --resume to continue it, or another --name")
        self.saved = checkpoint.load(self.path)
        _check_same(folder, self.saved["settings"], settings)
        if self.saved["pictures"] != images:
            raise CheckpointError(
                f"{folder} was started on {self.saved['pictures']:,} pictures and {settings.data} now has {images:,}: "
                "give another --name"
            )

    def begin(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_config(self.folder, self.settings)
        self.began = time.monotonic()

    def load(self, network: nn.Module, optimizer: Optimizer, scheduler: LRScheduler) -> TrainingProgress:
        """Restore all three from halfway.ckpt; without one, return an empty TrainingProgress."""
        if not self.saved:
            return TrainingProgress([])
        network.load_state_dict(self.saved["state_dict"])
        optimizer.load_state_dict(self.saved["optimizer"])
        scheduler.load_state_dict(self.saved["scheduler"])
        return TrainingProgress(
            self.saved["history"], tuple(self.saved["best"]), self.saved["since"], self.saved["kept"]
        )

    def save(
        self, network: nn.Module, optimizer: Optimizer, scheduler: LRScheduler, progress: TrainingProgress
    ) -> None:
        write_config(self.folder, self.settings)
        write_metrics(self.folder / "metrics.csv", progress.history)
        if time.monotonic() - self.saved_at < checkpoint.EVERY_S:
            return
        content = {"settings": self.settings.to_dict(), "pictures": self.images, "state_dict": network.state_dict()}
        content |= {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
        content |= {"history": progress.history, "best": progress.best}
        content |= {"since": progress.best_epoch, "kept": progress.best_weights, "budget": self.budget.state()}
        with self.budget.ending("saving"):
            AtomicCheckpointIO().save_checkpoint(content, self.path)
        self.saved_at = time.monotonic()

    def facts(self, data: str, epochs: int) -> dict:
        """Metadata for the finished checkpoint and result.json."""
        minutes = (time.monotonic() - self.began) / 60
        return {"data": data, "images": self.images, "epochs": epochs, "commit": commit(), "minutes": minutes}

    def end(self) -> None:
        self.path.unlink(missing_ok=True)


def train_epochs(
    network: nn.Module,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    settings: ResumableSettings,
    lr: float,
    losses: Callable[[int], Iterator[Tensor]],
    run: ResumableRun | None = None,
    evaluate: Callable[[], dict] | None = None,
    patience: int = 0,
) -> list[dict]:
    """Train in place, from the start or from where `run` was interrupted. Returns one row per epoch.

    lr        of the settings, for the error message
    losses    epoch (from 1) -> the loss of each of its steps
    evaluate  measures the network on the held-out part: training stops when the best epoch is `patience` epochs old,
              and the network ends with that epoch's weights
    raises    ValueError when the loss becomes NaN or infinite
    """
    progress = run.load(network, optimizer, scheduler) if run else TrainingProgress([])
    budget, first = run.budget if run else Budget(None), len(progress.history) + 1
    epochs = itertools.count(first) if budget.minutes else range(first, settings.epochs + 1)
    budget.start()
    bar = tqdm(epochs, desc="training", unit="epoch", dynamic_ncols=True)
    for epoch in bar:
        if evaluate and epoch - 1 - progress.best_epoch >= patience:
            break
        total, steps = 0.0, 0
        for loss in losses(epoch):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total, steps = total + loss.item(), steps + 1
            budget.step()
            scheduler.step()
            if budget.is_over:
                break
        if not np.isfinite(total):
            raise ValueError(f"the loss is not a number in epoch {epoch}: give a smaller --lr than {lr}")
        row = {"epoch": epoch, "loss": total / steps, "lr": scheduler.get_last_lr()[0]}
        if evaluate:
            row |= evaluate()
            if score(row) > progress.best:
                progress.best, progress.best_epoch = score(row), epoch
                progress.best_weights = copy.deepcopy(network.state_dict())
        bar.set_postfix({name: f"{row[name]:.3f}" for name in ("loss", "held_out") if name in row})
        progress.history.append(row)
        if run:
            if budget.minutes:
                run.settings = dataclasses.replace(run.settings, epochs=budget.estimated_epochs(epoch))
            run.save(network, optimizer, scheduler, progress)
        if budget.is_over:
            break
    bar.close()
    if progress.best_weights:
        network.load_state_dict(progress.best_weights)
    network.eval()
    return progress.history


def score(row: dict) -> tuple[float, float]:
    """Ranks epochs by held-out accuracy, and equal ones by the smaller held-out loss."""
    return row["held_out"], -row["held_out_loss"]
