"""Pretrain an encoder with SimCLR (Chen et al. 2020, arXiv:2002.05709) into runs/NAME.

    python training/pretrain.py --data ~/Pictures --minutes 15

A step: N images, two views of each in one batch of 2N, h = f(view), z = g(h), the contrastive loss, LARS. All random
numbers are functions of (seed, step), so a resumed run gives the result of an uninterrupted one.

    runs/NAME/  config.json  metrics.csv  report.png  skipped.csv  checkpoints/last.ckpt  and TensorBoard's events
"""

if __name__ == "__main__" and not __package__:
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import csv
import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.lr_scheduler import LRScheduler

from training import checkpoint, report, zoo
from training.augment import Draws, draw, render
from training.checkpoint import AtomicCheckpointIO, CheckpointError, EveryEpoch
from training.config import PRESETS, RUNS, PretrainSettings, parse
from training.data import stream
from training.data.sources import DataError, Source, open_source, with_test_split
from training.data.store import PixelStore, map_ahead
from training.data.stream import Stream
from training.device import bfloat16_pays, mixed_precision, prepare, training_device
from training.encoders import embed, projection_head
from training.evaluation import judge, knn
from training.evaluation.features import size_note
from training.evaluation.judge import verdict
from training.initial import InitialWeights, apply_initial, load_initial
from training.lars import lars_groups
from training.loss import LOSSES, gather
from training.optimizers import OPTIMIZERS
from training.progress import RunBar
from training.recompute import recomputed
from training.schedule import cosine_schedule, scaled_lr
from training.watch import RunProblem, Watch
from training.zoo import build, check_architecture

CONFIG = "config.json"
FINAL_BANK, INTERIM_BANK = 50_000, 10_000  # largest kNN bank: before and after the run; during it
CALIBRATION_STEPS = 8
RESIDENT_SHARE = 0.5  # largest share of a GPU's free memory that the pictures may take
COMPILE_FROM_STEPS, COMPILE_FROM_MIN = 2000, 5.0  # shortest run compiled on a CPU, where compiling takes half a minute
HOW_TO_RESUME = "Run the same command with --resume to continue."


class SimCLR(pl.LightningModule):
    """f, g and one training step. `history` has one row per epoch; `facts` go into the model card."""

    def __init__(
        self,
        settings: PretrainSettings,
        train: PixelStore | Stream,
        test: PixelStore | Stream | None,
        start: InitialWeights | None = None,
    ):
        super().__init__()
        torch.manual_seed(settings.seed)
        self.settings, self.train_store, self.test_store = settings, train, test
        self.encoder = build(settings.encoder, settings.width, settings.size_px)
        self.projector = projection_head(self.encoder.dimension, settings.head_layers, settings.head_dimension)
        origin = apply_initial(start, self.encoder, self.projector, train.pixels) if start else ""
        self.to(memory_format=torch.channels_last)
        self.render, self.project = render, lambda views: self.projector(self.encoder(views))
        self.history: list[dict] = []
        self.judged = bool(settings.init)  # whether the result is compared with the weights that it started from
        self.start: dict[str, Tensor] = {}  # these weights, if it is
        self.facts: dict[str, Any] = {
            "data": train.source,
            "images": len(train.pixels),
            "commit": commit(),
            "origin": origin,
        }

    @property
    def steps_per_epoch(self) -> int:
        return len(self.train_store.pixels) // self.settings.batch_size

    def training_step(self, images: Tensor, batch_index: int) -> Tensor:
        loss = self.loss(images, self.global_step)
        self.loss_value = loss.detach()  # for Watch; a tensor, since reading its value would wait for the device
        self.loss_sum += self.loss_value
        self.log("loss", self.loss_value)
        return loss

    def loss(self, images: Tensor, step: int) -> Tensor:
        """images (N, S, S, 3) uint8 -> the loss over the batches of all processes together, ()."""
        n, size = len(images), self.settings.chunk_size or len(images)
        draws = self.draws(images, step)
        if size >= n:
            z_a, z_b = self.pairs(images, draws)  # (N, d) each
        else:
            parts = [slice(start, start + size) for start in range(0, n, size)]
            chunk_draws = [Draws(*(torch.cat([d[:n][part], d[n:][part]]) for d in draws)) for part in parts]
            chunks = [
                recomputed(self.pairs, self, images[p], drawn) for p, drawn in zip(parts, chunk_draws, strict=True)
            ]
            z_a, z_b = (torch.cat(z) for z in zip(*chunks, strict=True))
        # For Watch: about 1 if projections have independent directions, 0 if they are equal.
        self.spread = F.normalize(z_a.detach().float(), dim=1).std(dim=0).norm()
        return LOSSES[self.settings.loss].function(gather(z_a), gather(z_b), self.settings.temperature)

    def draws(self, images: Tensor, step: int) -> Draws:
        """The random numbers of both views of each image: a function of seed, step and process."""
        generator = torch.Generator(images.device)
        generator.manual_seed((self.settings.seed << 40) + step * 4096 + self.global_rank)
        n, height, width, _ = images.shape
        return draw(2 * n, height, width, self.settings.augment, generator)

    def pairs(self, images: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """z of both views, which share their batch norm statistics: (N, d) each."""
        views = self.render(images.repeat(2, 1, 1, 1), draws, self.settings.size_px)  # (2N, 3, S, S)
        return self.project(views.contiguous(memory_format=torch.channels_last)).chunk(2)

    def compile_parts(self, images: Tensor) -> None:
        """Compile the augmentation, and on a GPU f and g. If that fails, print why and train uncompiled."""
        render_fast = torch.compile(render, dynamic=False, fullgraph=True)
        try:
            with mixed_precision(images.device, self):  # another autocast state than training's would compile it twice
                render_fast(images.repeat(2, 1, 1, 1), self.draws(images, 0), self.settings.size_px)
        except Exception as error:  # no C++ compiler, most often
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            print(f"training without torch.compile, which would be faster: {reason}")
            return
        self.render = render_fast
        if images.is_cuda:
            self.project = torch.compile(self.project, dynamic=False)

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
        scheduler = cosine_schedule(optimizer, s.warmup, s.epochs * self.steps_per_epoch)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def train_dataloader(self) -> "Batches":
        return Batches(self)

    def on_train_start(self) -> None:
        if self.settings.compile:
            local = self.settings.chunk_size or self.settings.batch_size // self.trainer.world_size
            self.compile_parts(self.first_images(local))
        if not self.history:
            self.facts["before"] = self.measure(FINAL_BANK)
            if self.judged:
                self.start = {name: value.cpu().clone() for name, value in self.encoder.state_dict().items()}

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        if self.settings.head_first:
            self.encoder.requires_grad_(self.global_step >= self.settings.head_first)
        if self.settings.freeze_statistics:
            for module in self.encoder.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()

    def on_train_epoch_start(self) -> None:
        self.loss_sum = torch.zeros((), device=self.device)
        self.encoder.centre.zero_()

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
        if epoch == self.settings.epochs or self.global_step == self.trainer.max_steps:
            self.facts |= {"epochs": epoch, "after": self.measure(FINAL_BANK)}
            row |= self.facts["after"]
            if self.judged:
                found = verdict(self.facts["origin"], self.facts["before"], self.facts["after"])
                self.facts["verdict"] = {"better": found.better, "sentence": found.sentence}
        elif epoch % self.settings.knn_epochs == 0:
            row |= self.measure(INTERIM_BANK)
        self.history.append(row)
        self.log_dict({key: float(row[key]) for key in ("knn", "views_matched", "images_per_s") if key in row})
        if self.trainer.is_global_zero:
            write_metrics(Path(self.trainer.default_root_dir) / "metrics.csv", self.history)

    def measure(self, max_bank: int) -> dict:
        """kNN accuracy, or without labels the share of views matched, with at most `max_bank` images in the bank.

        Sets f's centre first, to the mean of the features of some training images.
        """
        self.encoder.set_centre(self.train_store.pixels)
        figures = knn.metrics(self.encoder, self.train_store, self.test_store, self.settings, max_bank)
        if self.judged:
            judged = (self.test_store or self.train_store).pixels
            pixels = np.array(judged[: judge.PICTURES])
            figures |= {"found_again": judge.found_again(partial(embed, self.encoder), pixels), "judged": len(pixels)}
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
        checkpoint["start"] = self.start

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.facts, self.history = checkpoint["facts"], checkpoint["history"]
        self.start = checkpoint.get("start", {})


class Batches:
    """An epoch's batches as uint8 tensors (N, S, S, 3), shuffled by (seed, epoch); an incomplete last one is dropped.

    Each process takes its own share of every batch. Pictures that fit into GPU memory are copied there once
    (`resident`); others are read or decoded while the previous step runs.
    """

    def __init__(self, module: SimCLR, resident: bool | None = None):
        self.module = module
        pixels, device = module.train_store.pixels, module.device
        if resident is None:
            resident = (
                device.type == "cuda"
                and isinstance(pixels, np.ndarray)
                and pixels.nbytes < torch.cuda.mem_get_info(device)[0] * RESIDENT_SHARE
            )
        self.resident = torch.tensor(pixels, device=device) if resident else None

    def __len__(self) -> int:
        return self.module.steps_per_epoch

    def __iter__(self) -> Iterator[Tensor]:
        trainer = self.module.trainer  # Lightning calls iter() before it sets the epoch, so read it at the first batch
        yield from self.epoch(trainer.current_epoch, trainer.global_rank, trainer.world_size)

    def epoch(self, epoch: int, rank: int = 0, world: int = 1) -> Iterator[Tensor]:
        """The share of process `rank` of `world` in each batch of an epoch."""
        settings, pixels = self.module.settings, self.module.train_store.pixels
        order = np.random.default_rng([settings.seed, epoch]).permutation(len(pixels))
        batches = order[: len(self) * settings.batch_size].reshape(len(self), settings.batch_size)
        shares = np.sort(batches[:, rank::world], axis=1)  # (steps, N): sorted, as they are on the disk
        if self.resident is not None:
            for share in torch.from_numpy(shares).to(self.resident.device):
                yield self.resident[share]
        else:
            for images in map_ahead(pixels.__getitem__, shares, ahead=2):
                images = torch.from_numpy(images)
                yield images.pin_memory() if torch.cuda.is_available() else images


class Stopped(Exception):
    """The user stopped the run. The message says how to resume it."""


def pretrain(settings: PretrainSettings) -> Path:
    """Train or resume a run and write its report. Returns the run's folder.

    raises  DataError, CheckpointError, ValueError; Stopped after Ctrl-C
    """
    prepare()
    devices, nodes = processes(settings)
    source = open_source(settings.data)
    settings = dataclasses.replace(settings, name=settings.name or f"{source.name}-{settings.preset}")
    run = RUNS / settings.name
    settings, saved, start = resolve_settings(settings, run, source, devices * nodes)
    judged = bool(settings.init) and (saved is None or bool(saved.get("start")))  # older runs did not keep their start
    train, test = open_pictures(settings, source, judged)
    settings = check_batch(settings, len(train.pixels), devices * nodes)
    if saved:
        if saved["facts"]["images"] != len(train.pixels):
            raise CheckpointError(
                f"{run} was trained on {saved['facts']['images']:,} images and {settings.data} now has "
                f"{len(train.pixels):,}: give another --name"
            )
        if saved["facts"].get("epochs") == settings.epochs:
            print(f"{run} is finished: {knn.sentence(saved['facts']['before'], saved['facts']['after'])}")
            return run
    else:
        settings = calibrate(settings, train, devices * nodes)
    module = SimCLR(settings, train, test, start)
    module.judged = judged
    write_folder(run, module)
    minutes = fit(module, run, bool(saved), devices, nodes)
    if module.global_rank == 0:
        report.write(run / "report.png", module)
        print(f"done in {minutes:.1f} min: {knn.sentence(module.facts['before'], module.facts['after'])}")
        if "verdict" in module.facts:
            print(f"the result is {module.facts['verdict']['sentence']}")
        print(f"report with curves, pairs of views and nearest neighbours: {run / 'report.png'}")
    return run


def processes(settings: PretrainSettings) -> tuple[int, int]:
    """Processes on each machine, one for each GPU, and machines. torchrun decides if it started this process."""
    if by_torchrun():
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        return local, int(os.environ["WORLD_SIZE"]) // local
    return settings.devices or max(1, torch.cuda.device_count()), 1


def by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def resolve_settings(
    settings: PretrainSettings, run: Path, source: Source, world: int
) -> tuple[PretrainSettings, dict | None, InitialWeights | None]:
    """The run's settings; the checkpoint that it resumes from, or None; the weights of --init, or None.

    raises  CheckpointError: the run exists and --resume was not given, or it has other settings
    """
    if int(os.environ.get("LOCAL_RANK", 0)) > 0 and not by_torchrun():  # the first process has written its settings
        settings = PretrainSettings.from_dict(json.loads((run / CONFIG).read_text()) | {"resume": True})
    last = run / "checkpoints" / checkpoint.NAME
    if last.exists():
        if not settings.resume:
            raise CheckpointError(f"{run} already contains a run: continue it with --resume, or give another --name")
        saved = checkpoint.load(last)
        if "optimizer_states" not in saved:
            raise CheckpointError(f"{run} is not a pretraining run: start from it with --init {run} and another --name")
        batch_size = largest_batch(settings, saved["facts"]["images"], world)
        settings = dataclasses.replace(settings, batch_size=batch_size)
        return resumed_settings(settings, checkpoint.settings_of(saved), run), saved, None
    settings, start = dataclasses.replace(settings, resume=False), None
    if settings.init:
        settings, start = starting_point(settings)
        if note := size_note(settings.init, settings.size_px, source.pictures):
            print(f"note: {note}")
    else:
        check_architecture(settings.encoder, settings.width)
    return settings, None, start


def resumed_settings(requested: PretrainSettings, saved: PretrainSettings, run: Path) -> PretrainSettings:
    """A resumed run's own settings. The requested ones must be equal to them or to the preset's defaults.

    raises  CheckpointError
    """
    defaults = PRESETS[requested.preset][1]
    for field in dataclasses.fields(requested):
        name = field.name
        value, own = getattr(requested, name), getattr(saved, name)
        if name not in ("name", "resume", "max_steps", "devices") and value not in (own, getattr(defaults, name)):
            flag = f"--{name.replace('_', '-')}"
            raise CheckpointError(
                f"{run} was started with {flag} {own}, not {value}: leave {flag} out, or give another --name"
            )
    return dataclasses.replace(saved, max_steps=requested.max_steps, devices=requested.devices)


def starting_point(requested: PretrainSettings) -> tuple[PretrainSettings, InitialWeights]:
    """The settings with the architecture and size of --init, unless others than the preset's are given; its weights.

    raises  like load_initial
    """
    defaults, names = PRESETS[requested.preset][1], ("encoder", "width", "size_px")
    encoder, width, size_px = (
        None if (value := getattr(requested, name)) == getattr(defaults, name) else value for name in names
    )
    if defaults.init:  # a preset for weights of others has a size of its own
        size_px = requested.size_px
    start = load_initial(requested.init, encoder, width, size_px, requested.seed)
    settings = dataclasses.replace(requested, **{name: getattr(start.settings, name) for name in names})
    if settings != requested:
        print(f"this run is {settings.architecture} at {settings.size_px} px, like {requested.init}")
    return settings, start


def open_pictures(
    settings: PretrainSettings, source: Source, judged: bool
) -> tuple[PixelStore | Stream, PixelStore | Stream | None]:
    """The training split, and the test split or None. raises DataError.

    judged  hold out a test split, if there is none, for pictures by which the result is compared with its start
    """
    preprocessing, test = settings.preprocessing, None
    if judged:
        source = with_test_split(source, judge.PICTURES, settings.seed)
    train = stream.load(source, preprocessing, "train", stream=settings.stream)
    if any(picture.split == "test" for picture in source.pictures):
        test = stream.load(source, preprocessing, "test", stream=settings.stream)
    return train, test


def check_batch(settings: PretrainSettings, images: int, world: int) -> PretrainSettings:
    """Reduce the batch size to the number of images.

    raises  DataError for a single image, ValueError for a batch that the processes cannot share equally
    """
    if images < 2:
        raise DataError(
            f"{settings.data} has 1 picture that can be read; SimCLR compares pictures and needs at least 2"
        )
    if (most := largest_batch(settings, images, world)) < settings.batch_size:
        print(f"batch size {settings.batch_size} -> {most}: {settings.data} has only {images} pictures")
        settings = dataclasses.replace(settings, batch_size=most)
    if settings.batch_size % world or settings.batch_size < 2 * world:
        raise ValueError(
            f"--batch-size {settings.batch_size} cannot be shared by {world} processes: give a multiple of {world}, "
            "with at least 2 images per process"
        )
    return settings


def largest_batch(settings: PretrainSettings, images: int, world: int) -> int:
    """The batch size; with fewer images, all of them, the same number in every process."""
    return settings.batch_size if images >= settings.batch_size else images // world * world


def calibrate(settings: PretrainSettings, train: PixelStore | Stream, world: int) -> PretrainSettings:
    """Decide whether to compile, and how many epochs fit into --minutes. raises ValueError for several processes."""
    if settings.compile is None:
        settings = dataclasses.replace(settings, compile=compiling_pays(settings, len(train.pixels)))
    if settings.minutes and world > 1:
        raise ValueError(f"--minutes works with one process only: give --epochs for {world} processes")
    if settings.minutes:
        settings = dataclasses.replace(settings, epochs=epochs_in(settings.minutes, settings, train))
    return settings


def compiling_pays(settings: PretrainSettings, images: int) -> bool:
    if torch.cuda.is_available():
        return True
    if settings.minutes:
        return settings.minutes >= COMPILE_FROM_MIN
    return settings.epochs * (images // settings.batch_size) >= COMPILE_FROM_STEPS


def epochs_in(minutes: float, settings: PretrainSettings, train: PixelStore | Stream) -> int:
    """How many epochs fit in the time, by timing a few steps of a second model."""
    module = SimCLR(dataclasses.replace(settings, head_first=0), train, None).to(training_device())
    images = module.first_images(settings.batch_size)
    if settings.compile:
        module.compile_parts(images[: settings.chunk_size or None])
    optimizer = module.configure_optimizers()["optimizer"]
    seconds = []
    for step in range(CALIBRATION_STEPS):
        started = time.perf_counter()
        with mixed_precision(module.device, module):
            loss = module.loss(images, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for the device
        seconds.append(time.perf_counter() - started)
    # the fastest step: other work on the machine only makes steps slower
    return max(1, int(minutes * 60 / min(seconds) / module.steps_per_epoch))


def write_folder(run: Path, module: SimCLR) -> None:
    """Write config.json and skipped.csv."""
    run.mkdir(parents=True, exist_ok=True)
    (run / CONFIG).write_text(json.dumps(module.settings.to_dict(), indent=2))
    with open(run / "skipped.csv", "w", newline="", errors="surrogateescape") as file:
        rows = csv.writer(file)
        rows.writerow(["name", "reason"])
        for pictures in (module.train_store, module.test_store):
            rows.writerows(pictures.skipped if pictures else [])


def fit(module: SimCLR, run: Path, resume: bool, devices: int, nodes: int) -> float:
    """Train to the last epoch; with `resume` from the run's checkpoint. Returns minutes. raises Stopped."""
    settings, total_steps = module.settings, module.settings.epochs * module.steps_per_epoch
    print(
        f"{'continuing' if resume else 'pretraining'} {settings.architecture} on {module.facts['images']:,} images at "
        f"{settings.size_px} px: {settings.epochs} epochs, {total_steps:,} steps of {settings.batch_size} images, into "
        f"{run}"
    )
    started, gpu = time.monotonic(), torch.cuda.is_available()
    last = run / "checkpoints" / checkpoint.NAME
    if gpu and devices * nodes > 1:
        module.encoder = zoo.synchronised(module.encoder)
        module.projector = zoo.synchronised(module.projector)
    trainer = pl.Trainer(
        default_root_dir=run,
        accelerator="auto",
        devices=devices,
        num_nodes=nodes,
        # DDP would wait for the gradients of f, which has none while only g is trained
        strategy="ddp_find_unused_parameters_true" if settings.head_first and devices * nodes > 1 else "auto",
        precision="bf16-mixed" if bfloat16_pays(training_device(), module) else "32-true",
        max_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        logger=TensorBoardLogger(run, name="", version=""),
        log_every_n_steps=50,  # writing the loss waits for the device
        callbacks=[
            RunBar(total_steps, settings.batch_size),
            Watch(round(settings.warmup * total_steps)),
            EveryEpoch(last),
        ],
        plugins=[AtomicCheckpointIO()],
        enable_model_summary=False,
    )
    trainer.fit(module, ckpt_path=last if resume else None)
    epochs = len(module.history)
    if trainer.should_stop and epochs < settings.epochs:
        raise Stopped(f"Stopped after {epochs} of {settings.epochs} epochs. {HOW_TO_RESUME}")
    return (time.monotonic() - started) / 60


def write_metrics(path: Path, history: list[dict]) -> None:
    """A row for each epoch, with the columns of all rows."""
    columns = list(dict.fromkeys(name for row in history for name in row))
    with open(path, "w", newline="") as file:
        rows = csv.DictWriter(file, columns)
        rows.writeheader()
        rows.writerows(history)


def commit() -> str:
    """The commit of this code; empty outside a git checkout."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    sys.exit(f"error: stopped by SIGTERM, which launchers send when another process has ended. {HOW_TO_RESUME}")


def main() -> None:
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)  # hides its tips and device listings
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    if int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", 0))) > 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # only the first process prints
    signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        run = pretrain(parse())
    except (DataError, CheckpointError, RunProblem, ValueError) as error:
        sys.exit(f"error: {error}")
    except RuntimeError as error:
        if not (isinstance(error, torch.distributed.DistError) or "gloo" in str(error)):
            raise
        sys.exit(f"error: another process of this run has ended. {HOW_TO_RESUME}")
    except Stopped as stopped:
        print(stopped)
        sys.exit(130)
    except KeyboardInterrupt:  # before the first epoch
        print("\nStopped. The decoded pictures are kept.")
        sys.exit(130)
    print(f"next: python export/to_onnx.py {run}")


if __name__ == "__main__":
    main()
