"""The progress bar of a run, with its speed and the share of time spent waiting for data."""

import time
from typing import TYPE_CHECKING, Any, cast

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar
from torch import Tensor
from tqdm import tqdm

if TYPE_CHECKING:
    from training.simclr import SimCLR

REDRAW_S = 0.5


class RunBar(ProgressBar):
    """Also measures `images_per_s` and `wait_share` of each epoch, for metrics.csv."""

    def __init__(self, total_steps: int, batch_size: int):
        super().__init__()
        self.total_steps = total_steps
        self.batch_size = batch_size
        self.images_per_s = 0.0
        self.wait_share = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.bar = tqdm(
            total=self.total_steps or None,
            initial=trainer.global_step,
            desc="pretraining",
            unit="step",
            dynamic_ncols=True,
            disable=not trainer.is_global_zero,
            mininterval=REDRAW_S,
        )
        self.drawn_at = 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.started = self.ended = time.perf_counter()
        self.waited = 0.0
        self.steps = 0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Tensor, batch_idx: int
    ) -> None:
        self.waited += time.perf_counter() - self.ended

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Tensor, batch_idx: int
    ) -> None:
        self.ended = time.perf_counter()
        self.steps += 1
        elapsed = self.ended - self.started
        self.images_per_s = self.steps * self.batch_size / elapsed
        self.wait_share = self.waited / elapsed
        self.bar.update()
        if self.ended - self.drawn_at > REDRAW_S:  # not at every step: reading the loss waits for the device
            self.drawn_at = self.ended
            postfix = {
                "epoch": trainer.current_epoch + 1,
                "img/s": f"{self.images_per_s:.0f}",
                "wait": f"{self.wait_share:.0%}",
                "loss": f"{outputs['loss'].item():.3f}",
                **({} if self.total_steps else {"time": f"{cast('SimCLR', pl_module).budget.share:.0%}"}),
                **cast("SimCLR", pl_module).latest_figure(),
            }
            self.bar.set_postfix(postfix, refresh=False)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.bar.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if hasattr(self, "bar"):
            self.bar.close()

    def disable(self) -> None:
        """Lightning calls this in all processes but the first; on_train_start has disabled their bars already."""

    def print(self, *args: Any, **kwargs: Any) -> None:
        tqdm.write(" ".join(map(str, args)))
