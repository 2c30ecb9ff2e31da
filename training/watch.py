"""Warns during a run that cannot work: a loss at chance, collapse, an unusual learning rate. A loss of NaN ends it."""

import math
from typing import TYPE_CHECKING, Any, cast

import pytorch_lightning as pl
from torch import Tensor

from training.config import PretrainSettings
from training.loss import LOSSES
from training.optimizers import OPTIMIZERS
from training.schedule import scaled_lr

if TYPE_CHECKING:
    from training.simclr import SimCLR

FIRST_CHECK, CHECK_EVERY = 10, 100  # steps; reading the loss waits for the device
PATIENCE = 200  # steps after the warm-up, after which a loss at chance is reported
RECENT = 50  # steps over which the loss is averaged, since that of one small batch may be at chance by chance
AT_CHANCE = 0.02  # with a loss within this share of its chance level, nothing has been learnt
COLLAPSED = 0.1  # spread of the projections; 1 for independent directions


class RunProblem(ValueError):
    """A run that was stopped because it cannot learn. The message says why and what to change."""


class Watch(pl.Callback):
    """Checks `module.loss_value` and `module.spread`, tensors () on the device, at some steps and after each epoch."""

    def __init__(self, warmup_steps: int):
        self.warmup_steps = warmup_steps
        self.warned: set[str] = set()
        self.recent_loss: Tensor | None = None  # stays on the device

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if warning := lr_warning(cast("SimCLR", pl_module).settings):
            self._warn("lr", trainer, warning)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Tensor, batch_idx: int
    ) -> None:
        step, loss = trainer.global_step, cast("SimCLR", pl_module).loss_value
        self.recent_loss = loss if self.recent_loss is None else self.recent_loss.lerp(loss, 1 / RECENT)
        if step == FIRST_CHECK or step % CHECK_EVERY == 0:
            self.check(trainer, cast("SimCLR", pl_module))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.check(trainer, cast("SimCLR", pl_module))  # before the checkpoint of this epoch is written

    def check(self, trainer: pl.Trainer, module: "SimCLR") -> None:
        """raises RunProblem if the loss is not finite."""
        step, loss, spread = trainer.global_step, module.loss_value.item(), module.spread.item()
        settings = module.settings
        if not math.isfinite(loss):
            raise RunProblem(
                f"the loss is {loss} at step {step:,}, so the run was stopped; its last checkpoint is older. "
                f"Try a lower --lr than {settings.lr:g}, a longer --warmup, or a higher --temperature."
            )
        chance = LOSSES[settings.loss].chance(settings.batch_size)
        recent = loss if self.recent_loss is None else self.recent_loss.item()
        if spread < COLLAPSED:
            self._warn(
                "collapse",
                trainer,
                f"the projections of all pictures point the same way (spread {spread:.3f} of 1 at step {step:,}): the "
                f"encoder is collapsing. Try a lower --lr, or a --head-layers of 2 or 3, whose batch norm prevents it.",
            )
        elif self.is_warm(step, module) and recent > (1 - AT_CHANCE) * chance:
            self._warn(
                "chance",
                trainer,
                f"the loss, {recent:.3f} on average before step {step:,}, is still at its chance level {chance:.3f}: "
                f"nothing is being learnt. Are the pictures all alike, or their views too different? Try a gentler "
                f"augmentation, another --lr, or a lower --temperature.",
            )

    def is_warm(self, step: int, module: "SimCLR") -> bool:
        """Whether the warm-up was over PATIENCE steps ago; with --minutes, the warm-up is a share of the time."""
        if module.settings.minutes and module.budget.share < module.settings.warmup:
            self.warmup_steps = step
        return step > self.warmup_steps + PATIENCE

    def _warn(self, topic: str, trainer: pl.Trainer, warning: str) -> None:
        """Print a warning, once per topic."""
        if topic not in self.warned:
            self.warned.add(topic)
            if trainer.is_global_zero:
                bar = trainer.progress_bar_callback
                (bar.print if bar else print)(f"warning: {warning}")


def lr_warning(settings: PretrainSettings) -> str | None:
    """Warns of a peak learning rate outside the range in which the optimizer was seen to learn; None within it."""
    peak = scaled_lr(settings.lr, settings.batch_size, settings.lr_scaling)
    low, high = OPTIMIZERS[settings.optimizer].sensible_lr
    if low <= peak <= high:
        return None
    return (
        f"the peak learning rate is {peak:g} (--lr {settings.lr:g} with --lr-scaling {settings.lr_scaling} at batch "
        f"size {settings.batch_size}); {settings.optimizer} has been seen to learn between {low:g} and {high:g}."
    )
