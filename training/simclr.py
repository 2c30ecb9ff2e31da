"""SimCLR as a Lightning module: f, g, and one training step (Chen et al. 2020, arXiv:2002.05709, Algorithm 1).

A step: N images, V = 2 views of each in one batch of VN, h = f(view), z = g(h), the contrastive loss. With more views
the loss is the mean over all pairs of views (after Poly-View, Shidani et al. 2024, arXiv:2403.05490). All random
numbers are functions of (seed, step), so a resumed run gives the result of an uninterrupted one.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from training import budget, checkpoint, report
from training.augment import Draws, draw, generator_at, render
from training.average import Average
from training.batches import Batches
from training.config import PretrainSettings
from training.data.mixture import ALL_ONCE, Mixture
from training.data.store import PixelStore
from training.data.stream import Stream
from training.device import mixed_precision
from training.encoders import embed, freeze_statistics, project_beginnings, projection_head
from training.evaluation import judge, knn
from training.evaluation.judge import verdict
from training.evaluation.retrieval import neighbours_shared
from training.initial import InitialWeights, apply_initial
from training.lars import lars_groups
from training.loss import LOSSES, gather
from training.optimizers import OPTIMIZERS
from training.progress import RunBar
from training.recompute import recomputed
from training.run_folder import commit, write_config, write_metrics
from training.schedule import cosine_schedule, scaled_lr
from training.zoo import build

FINAL_BANK, INTERIM_BANK = 50_000, 10_000  # largest kNN bank: before and after the run; during it
MEASURING, TIMED = 0.1, 64  # part of --minutes for encoding that bank; images by which its time is estimated
HEAD_ALONE = 0.2  # most of the time of --minutes in which only g is trained


class SimCLR(pl.LightningModule):
    """f, g and one training step. `history` has one row per epoch; `facts` go into the model card."""

    def __init__(
        self,
        settings: PretrainSettings,
        train: PixelStore | Stream,
        test: PixelStore | Stream | None,
        start: InitialWeights | None = None,
        mixture: Mixture = ALL_ONCE,
    ):
        super().__init__()
        torch.manual_seed(settings.seed)
        self.settings, self.train_store, self.test_store = settings, train, test
        self.encoder = build(settings.encoder, settings.width, settings.size_px)
        self.projector = projection_head(self.encoder.dimension, settings.head_layers, settings.head_dimension)
        origin = apply_initial(start, self.encoder, self.projector, train.pixels) if start else ""
        self.to(memory_format=torch.channels_last)
        self.render, self.project = render, self.z_of
        self.history: list[dict] = []
        self.judged = bool(settings.init)  # whether the result is compared with the weights that it started from
        self.start: dict[str, Tensor] = {}  # these weights, if it is
        self.mixture = mixture
        self.budget = budget.Budget(settings.minutes)
        self.average: Average | None = None
        self.average_state: dict[str, Tensor] = {}  # of a resumed run
        self.facts: dict[str, Any] = {
            "data": train.source,
            "images": len(train.pixels),
            "images_per_epoch": mixture.images_per_epoch(train),
            "commit": commit(),
            "origin": origin,
        }

    @property
    def steps_per_epoch(self) -> int:
        return self.mixture.images_per_epoch(self.train_store) // self.settings.batch_size

    @property
    def local_batch(self) -> int:
        """Images of a batch that each process takes."""
        world = self._trainer.world_size if self._trainer else 1
        return self.settings.batch_size // world

    def training_step(self, images: Tensor, batch_index: int) -> Tensor:
        loss = self.loss(images, self.global_step)
        self.loss_value = loss.detach()  # for Watch; a tensor, since reading its value would wait for the device
        self.loss_sum += self.loss_value
        self.log("loss_step", self.loss_value)
        return loss * self.settings.loss_scale

    def loss(self, images: Tensor, step: int) -> Tensor:
        """images (N, S, S, 3) uint8 -> the loss over the batches of all processes together, ()."""
        n, size = len(images), self.settings.chunk_size or len(images)
        draws = self.draws(images, step)
        if size >= n:
            z = self.project_views(images, draws)  # V times (N, d), or 4 V times
        else:
            parts = [slice(start, start + size) for start in range(0, n, size)]
            chunk_draws = [draws.map(lambda d, part=part: rows_of_views(d, n, part)) for part in parts]
            chunks = [
                recomputed(self.project_views, self, images[p], drawn)
                for p, drawn in zip(parts, chunk_draws, strict=True)
            ]
            z = tuple(torch.cat(chunk) for chunk in zip(*chunks, strict=True))
        # For Watch: about 1 if projections have independent directions, 0 if they are equal.
        self.spread = F.normalize(z[0].detach().float(), dim=1).std(dim=0).norm()
        loss, all_z = LOSSES[self.settings.loss].function, [gather(view.float()) for view in z]  # (N of all, d) each
        count = self.settings.views
        pairs = [pair for i in range(0, len(all_z), count) for pair in combinations(all_z[i : i + count], 2)]
        losses = [loss(z_a, z_b, self.settings.temperature) for z_a, z_b in pairs]
        return torch.stack(losses).mean()

    def draws(self, images: Tensor, step: int) -> Draws:
        """The random numbers of all views of each image: a function of seed, step and process."""
        generator = generator_at(images.device, self.settings.seed, step, self.global_rank)
        n, height, width, _ = images.shape
        return draw(self.settings.views * n, height, width, self.settings.augment, generator)

    def project_views(self, images: Tensor, draws: Draws) -> tuple[Tensor, ...]:
        """z of the V views, which share their batch norm statistics: V times (N, d). With --matryoshka 4 V times: those
        of whole h, then those of each of its beginnings."""
        views = self.render(images.repeat(self.settings.views, 1, 1, 1), draws, self.settings.size_px)  # (VN, 3, S, S)
        return self.project(views.contiguous(memory_format=torch.channels_last)).split(len(images))

    def z_of(self, views: Tensor) -> Tensor:
        """(VN, 3, S, S) -> (VN, d), with --matryoshka (4 VN, d)."""
        h = self.encoder(views)
        z = self.projector(h)
        return torch.cat([z, project_beginnings(self.projector, h)]) if self.settings.matryoshka else z

    def compile_parts(self, images: Tensor, world: int = 1) -> None:
        """Compile the augmentation, and on a GPU f and g. If a step then fails, print why and train uncompiled.

        world  processes of the run. With several, f and g stay uncompiled: their batch norms are synchronised, and
               torch.compile would break its graph at each of them
        """
        uncompiled = self.render, self.project
        self.render = torch.compile(render, dynamic=False, fullgraph=True)
        if compiles_networks(images.device, world):
            self.project = torch.compile(self.project, dynamic=False)
        with self.unchanged():
            try:
                with mixed_precision(images.device, self):  # another autocast state than training's compiles it twice
                    z = self.project_views(images, self.draws(images, 0))
                torch.cat(z).sum().backward()
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # no C++ compiler, most often
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                print(f"training without torch.compile, which would be faster: {reason}")
                self.render, self.project = uncompiled

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """A step for trial: afterwards weights, batch norm's statistics and gradients are as before."""
        before = {name: value.clone() for name, value in self.state_dict().items()}
        try:
            yield
        finally:
            self.load_state_dict(before)
            self.zero_grad()

    def first_images(self, n: int) -> Tensor:
        """Images to compile and time with: (n, S, S, 3) uint8 on the device."""
        return torch.from_numpy(self.train_store.pixels[:n].copy()).to(self.device)  # the store is read-only

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        s = self.settings
        lr = scaled_lr(s.lr, s.batch_size, s.lr_scaling)
        groups = lars_groups(self, s.weight_decay)
        if s.encoder_lr != 1:
            groups = lars_groups(self.projector, s.weight_decay)
            groups += [group | {"lr": lr * s.encoder_lr} for group in lars_groups(self.encoder, s.weight_decay)]
        optimizer = OPTIMIZERS[s.optimizer].build(groups, lr, s.momentum)
        scheduler = cosine_schedule(optimizer, s.warmup, s.epochs * self.steps_per_epoch, self.budget)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def train_dataloader(self) -> "Batches":
        return Batches(self)

    def on_train_start(self) -> None:
        for result in ("after", "epochs", "verdict"):  # of a trial by --max-steps that is continued
            self.facts.pop(result, None)
        if self.settings.compile:
            at_once = self.settings.chunk_size or self.local_batch
            self.compile_parts(self.first_images(at_once), self.trainer.world_size)
        if self.settings.ema:
            self.encoder.show_features()  # the average has the buffers of a training step
            self.average = Average(self.encoder, self.settings.ema)
            if self.average_state:
                self.average.load(self.average_state)
        if "before" not in self.facts:
            self.facts["largest_bank"] = self.budget.affordable(MEASURING, self.encoding_s(), FINAL_BANK)
            with self.budget.ending("measuring", 1 + bool(self.settings.ema) + self.judged):
                self.facts["before"] = self.measure(FINAL_BANK)
            if self.judged:
                self.start = {name: value.cpu().clone() for name, value in self.encoder.state_dict().items()}
            if self.settings.minutes and self.global_rank == 0:
                with self.budget.ending("report"):
                    report.write(Path(self.trainer.default_root_dir) / report.NAME, self)
        self.budget.start()

    def encoding_s(self) -> float:
        """Seconds that reading and encoding one image takes."""
        pixels = self.train_store.pixels
        return budget.item_s(lambda: embed(self.encoder, np.array(pixels[:TIMED])), min(TIMED, len(pixels)))

    def lr_scheduler_step(self, scheduler: LRScheduler, metric: Any) -> None:
        self.budget.step()
        scheduler.step()

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        if self.settings.head_first:
            head_alone = self.global_step < self.settings.head_first and self.budget.share < HEAD_ALONE
            self.encoder.requires_grad_(not head_alone)
        if self.settings.freeze_statistics:
            freeze_statistics(self.encoder)

    def on_train_batch_end(self, outputs: Any, batch: Tensor, batch_idx: int) -> None:
        if self.average:
            self.average.update(self.encoder)
        if self.budget.is_over:
            self.trainer.should_stop = True

    def on_train_epoch_start(self) -> None:
        self.loss_sum = torch.zeros((), device=self.device)
        self.encoder.show_features()

    def on_train_epoch_end(self) -> None:
        bar, scheduler = self.trainer.progress_bar_callback, self.lr_schedulers()
        assert isinstance(bar, RunBar) and isinstance(scheduler, LRScheduler)  # see fit() and configure_optimizers()
        epoch = self.current_epoch + 1
        row: dict[str, Any] = {
            "epoch": epoch,
            "step": self.global_step,
            "loss": self.loss_sum.item() / max(1, bar.steps),
            "chance": LOSSES[self.settings.loss].chance(self.settings.batch_size),
            "lr": scheduler.get_last_lr()[0],
            "images_per_s": round(bar.images_per_s, 1),
            "wait_share": round(bar.wait_share, 4),
        }
        if self.settings.minutes:
            self.settings = replace(self.settings, epochs=self.budget.estimated_epochs(epoch))
        ends, is_trial = epoch == self.settings.epochs, self.global_step == self.trainer.max_steps
        if epoch % self.settings.knn_epochs == 0 and not (ends or is_trial) and self.has_time_to_measure():
            row |= self.measure(INTERIM_BANK)
            ends = self.stops_early(row)
        if ends or is_trial:
            row |= self.finish(epoch, ends)
        self.history.append(row)
        for logger in self.loggers:
            logger.log_metrics(
                {name: float(row[name]) for name in row if name not in ("epoch", "step")}, self.global_step
            )
        if self.trainer.is_global_zero:
            write_config(Path(self.trainer.default_root_dir), self.settings)
            write_metrics(Path(self.trainer.default_root_dir) / "metrics.csv", self.history)

    def has_time_to_measure(self) -> bool:
        """Whether a measurement leaves time for the one at the end, by the clocks of all processes."""
        fits = self.budget.left_s > self.budget.ending_s.get("measuring", 0.0)
        return self.trainer.strategy.reduce_boolean_decision(fits, all=True)

    def stops_early(self, row: dict) -> bool:
        """Note the best measurement, whose weights checkpoint.py keeps; whether --patience is exhausted since it."""
        best = self.facts.setdefault("best", row)
        if knn.figure(row) > knn.figure(best):
            best = self.facts["best"] = row
        waited = (row["epoch"] - best["epoch"]) // self.settings.knn_epochs
        if not self.settings.patience or waited < self.settings.patience:
            return False
        saved = checkpoint.load(self.checkpoints / checkpoint.BEST)["state_dict"]
        self.load_state_dict(saved)
        self.facts["stopped"] = f"stopped early after epoch {row['epoch']}; the weights are those of {best['epoch']}"
        return True

    def finish(self, epoch: int, ends: bool) -> dict:
        """Measure f, choose between its weights and their average, and judge the result. Returns the figures.

        ends  the run is at its end, and not only at --max-steps, from where it can be continued
        """
        after = self.measure(FINAL_BANK)
        if self.average and "stopped" not in self.facts:
            last = {name: value.clone() for name, value in self.encoder.state_dict().items()}
            self.encoder.load_state_dict(self.average.weights)
            averaged = self.measure(FINAL_BANK)
            is_kept = ends and knn.figure(averaged) > knn.figure(after)
            self.facts["average"] = {"better": is_kept, "last": knn.figure(after), "average": knn.figure(averaged)}
            if is_kept:
                after = averaged
            else:
                self.encoder.load_state_dict(last)
        self.facts |= {"epochs": epoch, "after": after}
        if self.judged:
            found = verdict(self.facts["origin"], self.facts["before"], after)
            self.facts["verdict"] = found._asdict()
        return after

    @property
    def checkpoints(self) -> Path:
        return Path(self.trainer.default_root_dir) / "checkpoints"

    def measure(self, max_bank: int) -> dict:
        """kNN accuracy, or without labels the share of views matched, with at most `max_bank` images in the bank.

        Sets f's centre and whitening first, by the features of some training images.
        """
        max_bank = min(max_bank, self.facts.get("largest_bank", max_bank))  # older runs have none
        self.encoder.whiten(self.train_store.pixels, self.settings.whiten)
        figures = knn.metrics(self.encoder, self.train_store, self.test_store, self.settings, max_bank)
        if self.judged:
            stores = [self.test_store, self.train_store] if self.test_store else [self.train_store]
            chosen = [np.random.default_rng(0).permutation(len(store.pixels))[: judge.PICTURES] for store in stores]
            parts = [store.pixels[np.sort(rows)] for store, rows in zip(stores, chosen, strict=True)]
            pixels = np.concatenate(parts)[: judge.PICTURES]  # held out ones first: few would make the figure chance
            figures |= {"found_again": judge.found_again(partial(embed, self.encoder), pixels), "judged": len(pixels)}
            if self.start:
                start = copy.deepcopy(self.encoder)
                start.load_state_dict(self.start)
                figures["neighbours_shared"] = neighbours_shared(embed(start, pixels), embed(self.encoder, pixels))
        return figures

    def latest_figure(self) -> dict[str, str]:
        """The latest measurement, for the progress bar."""
        for row in reversed([self.facts.get("before", {}), *self.history]):
            for name in ("knn", "views_matched"):
                if name in row:
                    return {name: f"{row[name]:.1%}"}
        return {}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint |= {"settings": self.settings.to_dict(), "facts": self.facts, "history": self.history}
        checkpoint["facts"]["budget"] = self.budget.state()
        checkpoint["start"] = self.start
        if self.average:
            checkpoint["average"] = self.average.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.facts, self.history = checkpoint["facts"], checkpoint["history"]
        self.start, self.average_state = checkpoint.get("start", {}), checkpoint.get("average", {})


def rows_of_views(values: Tensor, n: int, part: slice) -> Tensor:
    """The images `part` of each view: (V n, ...) -> (V rows, ...)."""
    return torch.cat([view[part] for view in values.split(n)])


def compiles_networks(device: torch.device, world: int) -> bool:
    """Whether f and g are compiled: on a CPU it gains nothing (training/RECORDS.md)."""
    return device.type == "cuda" and world == 1
