"""Pretrain an encoder with SimCLR (Chen et al. 2020, arXiv:2002.05709) into runs/NAME.

    python training/pretrain.py --data ~/Pictures --minutes 15

Per step: a batch of N images, two views of each in one batch of 2N, h = f(view), z = g(h), NT-Xent, LARS. Everything
random is drawn from (seed, step), so a run that is continued goes on as if it had never stopped.

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
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor

from export.artifact import Preprocessing
from training import checkpoint, report
from training.augment import Draws, draw, render
from training.checkpoint import AtomicCheckpointIO, CheckpointError, EveryEpoch
from training.config import PRESETS, RUNS, PretrainSettings, parse
from training.data import stream
from training.data.sources import DataError, open_source
from training.data.store import PixelStore
from training.data.stream import Stream, ahead
from training.device import mixed_precision, prepare, training_device
from training.encoders import Encoder, projection_head
from training.evaluation import knn
from training.evaluation.features import size_note
from training.initial import Initial, begin_from, initial
from training.lars import LARS, lars_groups
from training.loss import gather, nt_xent
from training.progress import RunBar
from training.recompute import recomputed
from training.schedule import scaled_lr, warmup_cosine
from training.watch import RunProblem, Watch

FINAL, PASSING = 50_000, 10_000  # images in the bank of the measurements at both ends of a run, and of those between
CALIBRATION_STEPS = 8
RESIDENT_SHARE = 0.5  # of a GPU's free memory, at most, for the pictures
COMPILE_FROM_STEPS, COMPILE_FROM_MIN = 2000, 5.0  # of a run on a CPU, where compiling takes half a minute


class SimCLR(pl.LightningModule):
    """f, g and one training step. `history` is a row an epoch; `facts` is what a model card wants to know."""

    def __init__(
        self,
        settings: PretrainSettings,
        train: PixelStore | Stream,
        test: PixelStore | Stream | None,
        start: Initial | None = None,
    ):
        super().__init__()
        torch.manual_seed(settings.seed)
        self.settings, self.train_store, self.test_store = settings, train, test
        self.encoder = Encoder(settings.encoder, settings.width, settings.size_px)
        self.projector = projection_head(self.encoder.dimension, settings.head_layers, settings.head_dimension)
        origin = begin_from(start, self.encoder, self.projector, train.pixels) if start else ""
        self.to(memory_format=torch.channels_last)
        self.render, self.project = render, lambda views: self.projector(self.encoder(views))
        self.history: list[dict] = []
        self.facts = {"data": train.source, "images": len(train.pixels), "commit": commit(), "origin": origin}

    @property
    def steps_per_epoch(self) -> int:
        return len(self.train_store.pixels) // self.settings.batch_size

    def training_step(self, images: Tensor, batch_index: int) -> Tensor:
        loss = self.loss(images, self.global_step)
        self.loss_value = loss.detach()  # what is measured stays on the device: reading it would wait
        self.loss_sum += self.loss_value
        self.log("loss", self.loss_value)
        return loss

    def loss(self, images: Tensor, step: int) -> Tensor:
        """images (N, S, S, 3) uint8 -> NT-Xent over the batches of all processes together."""
        n, size = len(images), self.settings.chunk_size or len(images)
        draws = self.draws(images, step)
        if size >= n:
            z_a, z_b = self.pairs(images, draws)  # (N, d) each
        else:
            parts = [slice(start, start + size) for start in range(0, n, size)]
            of_both = [Draws(*(torch.cat([d[:n][part], d[n:][part]]) for d in draws)) for part in parts]
            chunks = [recomputed(self.pairs, self, images[p], drawn) for p, drawn in zip(parts, of_both, strict=True)]
            z_a, z_b = (torch.cat(z) for z in zip(*chunks, strict=True))
        self.spread = F.normalize(z_a.detach().float(), dim=1).std(dim=0).norm()  # 1 where directions are independent
        return nt_xent(gather(z_a), gather(z_b), self.settings.temperature)

    def draws(self, images: Tensor, step: int) -> Draws:
        """The random numbers of both views of each image: a function of seed, step and process."""
        generator = torch.Generator(images.device)
        generator.manual_seed((self.settings.seed << 40) + step * 4096 + self.global_rank)
        n, height, width, _ = images.shape
        return draw(2 * n, height, width, self.settings.augment, generator)

    def pairs(self, images: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """z of both views, which share the batch norm's statistics: (N, d) each."""
        views = self.render(images.repeat(2, 1, 1, 1), draws, self.settings.size_px)  # (2N, 3, S, S)
        return self.project(views.contiguous(memory_format=torch.channels_last)).chunk(2)

    def compile_parts(self, images: Tensor) -> None:
        """torch.compile the augmentation, and on a GPU f and g. Where that fails, say so and go on without."""
        render_fast = torch.compile(render, dynamic=False, fullgraph=True)
        try:
            with mixed_precision(images.device):  # as in training: another state would be compiled anew
                render_fast(images.repeat(2, 1, 1, 1), self.draws(images, 0), self.settings.size_px)
        except Exception as error:  # no C++ compiler, most often
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            print(f"going on without torch.compile, which speeds training up: {reason}")
            return
        self.render = render_fast
        if images.is_cuda:
            self.project = torch.compile(self.project, dynamic=False)

    def configure_optimizers(self):
        s = self.settings
        lr = scaled_lr(s.lr, s.batch_size, s.lr_scaling)
        groups = lars_groups(self, s.weight_decay)
        if s.optimizer == "lars":
            optimizer = LARS(groups, lr=lr, momentum=s.momentum)
        else:
            groups = [{key: value for key, value in group.items() if key != "adapt"} for group in groups]
            if s.optimizer == "sgd":
                optimizer = torch.optim.SGD(groups, lr=lr, momentum=s.momentum)
            else:
                optimizer = torch.optim.AdamW(groups, lr=lr)
        total = s.epochs * self.steps_per_epoch
        warmup = round(s.warmup * total)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, warmup, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def train_dataloader(self):
        return Batches(self)

    def on_train_start(self):
        if self.settings.compile:
            local = self.settings.chunk_size or self.settings.batch_size // self.trainer.world_size
            self.compile_parts(torch.from_numpy(self.train_store.pixels[:local].copy()).to(self.device))
        if not self.history:
            self.facts["before"] = self.measure(FINAL)

    def on_train_epoch_start(self):
        self.loss_sum = torch.zeros((), device=self.device)

    def on_train_epoch_end(self):
        bar = self.trainer.progress_bar_callback
        epoch = self.current_epoch + 1
        row = {
            "epoch": epoch,
            "step": self.global_step,
            "loss": self.loss_sum.item() / max(1, bar.steps),
            "lr": self.lr_schedulers().get_last_lr()[0],
            "images_per_s": round(bar.images_per_s, 1),
            "wait_share": round(bar.wait_share, 4),
        }
        if epoch == self.settings.epochs or self.global_step == self.trainer.max_steps:
            self.facts |= {"epochs": epoch, "after": self.measure(FINAL)}
            row |= self.facts["after"]
        elif epoch % self.settings.knn_epochs == 0:
            row |= self.measure(PASSING)
        self.history.append(row)
        self.log_dict({key: float(row[key]) for key in ("knn", "views_matched", "images_per_s") if key in row})
        if self.trainer.is_global_zero:
            write_metrics(Path(self.trainer.default_root_dir) / "metrics.csv", self.history)

    def measure(self, most: int) -> dict:
        return knn.figures(self.encoder, self.train_store, self.test_store, self.settings, most)

    def last_figure(self) -> dict[str, str]:
        for row in reversed([self.facts.get("before", {}), *self.history]):
            for name in ("knn", "views_matched"):
                if name in row:
                    return {name: f"{row[name]:.1%}"}
        return {}

    def on_save_checkpoint(self, saved: dict) -> None:
        saved |= {"settings": self.settings.to_dict(), "facts": self.facts, "history": self.history}

    def on_load_checkpoint(self, saved: dict) -> None:
        self.facts, self.history = saved["facts"], saved["history"]


class Batches:
    """An epoch's batches as uint8 tensors (N, S, S, 3), in an order that (seed, epoch) decides; the rest is dropped.

    Each process takes its own share of every batch. Pictures that fit into the GPU are put there once (`resident`);
    others are gathered, or decoded, while the step before them runs.
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

    def __iter__(self):
        trainer = self.module.trainer  # asked for its epoch when the first batch is: Lightning calls iter() before
        yield from self.epoch(trainer.current_epoch, trainer.global_rank, trainer.world_size)

    def epoch(self, epoch: int, rank: int = 0, world: int = 1):
        settings, pixels = self.module.settings, self.module.train_store.pixels
        order = np.random.default_rng([settings.seed, epoch]).permutation(len(pixels))
        batches = order[: len(self) * settings.batch_size].reshape(len(self), settings.batch_size)
        shares = np.sort(batches[:, rank::world], axis=1)  # (steps, N): neighbours on the disk are read together
        if self.resident is not None:
            for share in torch.from_numpy(shares).to(self.resident.device):
                yield self.resident[share]
        else:
            for images in ahead(shares, pixels):
                images = torch.from_numpy(images)
                yield images.pin_memory() if torch.cuda.is_available() else images


class Stopped(Exception):
    """The user ended the run; the message says how to go on."""


def pretrain(settings: PretrainSettings) -> Path:
    """Train, or continue, and report. Returns the run's folder.

    raises  DataError, CheckpointError, ValueError; Stopped where Ctrl-C ended it
    """
    prepare()
    devices, nodes = processes(settings)
    if int(os.environ.get("LOCAL_RANK", 0)) > 0 and not by_torchrun():  # started by the first, which has prepared all
        settings = PretrainSettings.from_dict(json.loads((RUNS / settings.name / "config.json").read_text()))
    source = open_source(settings.data)
    name = settings.name or f"{source.name}-{settings.preset}"
    run = RUNS / name
    last = run / "checkpoints" / checkpoint.NAME
    saved = None
    if last.exists():
        if not settings.resume:
            raise CheckpointError(f"{run} holds a run already: continue it with --resume, or give another --name")
        saved = checkpoint.load(last)
        if "optimizer_states" not in saved:
            raise CheckpointError(f"{run} is no pretraining: start from it with --init {run}, and another --name")
        asked = dataclasses.replace(settings, batch_size=fitting(settings, saved["facts"]["images"], devices * nodes))
        settings = continued(asked, checkpoint.settings_of(saved), run)
    start = None
    if settings.init and not saved:
        settings, start = starting_point(settings)
        if note := size_note(settings.init, settings.size_px, source.pictures):
            print(f"note: {note}")

    preprocessing = Preprocessing(settings.size_px)
    train = stream.load(source, preprocessing, "train", stream=settings.stream)
    test = None
    if any(p.split == "test" for p in source.pictures):
        test = stream.load(source, preprocessing, "test", stream=settings.stream)
    if len(train.pixels) < 2:
        raise DataError(
            f"{settings.data} has 1 picture that can be read; SimCLR compares pictures and needs at least 2"
        )
    world = devices * nodes
    if (most := fitting(settings, len(train.pixels), world)) < settings.batch_size:
        print(
            f"batch size {settings.batch_size} -> {most}: {settings.data} has no more than {len(train.pixels)} pictures"
        )
        settings = dataclasses.replace(settings, batch_size=most)
    if settings.batch_size % world or settings.batch_size < 2 * world:
        raise ValueError(f"--batch-size {settings.batch_size} does not divide among {world} processes, two images each")
    if saved and saved["facts"]["images"] != len(train.pixels):
        raise CheckpointError(
            f"{run} was trained on {saved['facts']['images']:,} images and {settings.data} now has "
            f"{len(train.pixels):,}: give another --name"
        )
    if saved and saved["facts"].get("epochs") == settings.epochs:
        print(f"{run} is finished: {knn.sentence(saved['facts']['before'], saved['facts']['after'])}")
        return run

    if settings.compile is None:
        settings = dataclasses.replace(settings, compile=compiling_pays(settings, len(train.pixels)))
    if settings.minutes and not saved:
        if world > 1:
            raise ValueError(f"--minutes is for one process; give --epochs to these {world}")
        settings = dataclasses.replace(settings, epochs=epochs_in(settings.minutes, settings, train))
    settings = dataclasses.replace(settings, name=name, resume=False)
    module = SimCLR(settings, train, test, start)
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.json").write_text(json.dumps(settings.to_dict(), indent=2))
    write_skipped(run / "skipped.csv", train, test)
    total = settings.epochs * module.steps_per_epoch
    print(
        f"{'continuing' if saved else 'pretraining'} {settings.architecture} on {len(train.pixels):,} images at "
        f"{settings.size_px} px: {settings.epochs} epochs, {total:,} steps of {settings.batch_size} images, into {run}"
    )
    started = time.monotonic()
    trainer = make_trainer(settings, run, total, devices, nodes)
    trainer.fit(module, ckpt_path=last if saved else None)
    epochs = len(module.history)
    if trainer.should_stop and epochs < settings.epochs:
        raise Stopped(f"Stopped after {epochs} of {settings.epochs} epochs. The same command with --resume goes on.")
    if trainer.is_global_zero:
        report.write(run / "report.png", module)
        minutes = (time.monotonic() - started) / 60
        print(f"done in {minutes:.1f} min: {knn.sentence(module.facts['before'], module.facts['after'])}")
        print(f"curves, pairs and neighbours: {run / 'report.png'}")
    return run


def starting_point(asked: PretrainSettings) -> tuple[PretrainSettings, Initial]:
    """What --init names, and the settings with its architecture, where other than the preset's was not asked for."""
    defaults, names = PRESETS[asked.preset][1], ("encoder", "width", "size_px")
    own = [None if (value := getattr(asked, name)) == getattr(defaults, name) else value for name in names]
    start = initial(asked.init, *own, asked.seed)
    settings = dataclasses.replace(asked, **{name: getattr(start.settings, name) for name in names})
    if settings != asked:
        print(f"{asked.init} is {settings.architecture} at {settings.size_px} px, and so is this run")
    return settings, start


def fitting(settings: PretrainSettings, images: int, world: int) -> int:
    """The batch size: at most all the images, the same number in every process."""
    return settings.batch_size if images >= settings.batch_size else images // world * world


def by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def processes(settings: PretrainSettings) -> tuple[int, int]:
    """Processes on each machine, one a GPU, and machines. torchrun decides where it started this one."""
    if by_torchrun():
        here = int(os.environ["LOCAL_WORLD_SIZE"])
        return here, int(os.environ["WORLD_SIZE"]) // here
    return settings.devices or max(1, torch.cuda.device_count()), 1


def make_trainer(settings: PretrainSettings, run: Path, total_steps: int, devices: int, nodes: int) -> pl.Trainer:
    gpu = torch.cuda.is_available()
    return pl.Trainer(
        default_root_dir=run,
        accelerator="auto",
        devices=devices,
        num_nodes=nodes,
        precision="bf16-mixed" if gpu else "32-true",
        sync_batchnorm=gpu,
        max_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        logger=TensorBoardLogger(run, name="", version=""),
        log_every_n_steps=50,  # writing the loss waits for the device
        callbacks=[
            RunBar(total_steps, settings.batch_size),
            Watch(round(settings.warmup * total_steps)),
            EveryEpoch(run / "checkpoints" / checkpoint.NAME),
        ],
        plugins=[AtomicCheckpointIO()],
        enable_model_summary=False,
    )


def continued(asked: PretrainSettings, saved: PretrainSettings, run: Path) -> PretrainSettings:
    """A run goes on with its own settings. What was asked for must be those, or the preset's defaults."""
    defaults = PRESETS[asked.preset][1]
    for field in dataclasses.fields(asked):
        name = field.name
        value, own = getattr(asked, name), getattr(saved, name)
        if name not in ("name", "resume", "max_steps", "devices") and value not in (own, getattr(defaults, name)):
            flag = f"--{name.replace('_', '-')}"
            raise CheckpointError(
                f"{run} was begun with {flag} {own}, not {value}: leave {flag} out, or give another --name"
            )
    return dataclasses.replace(saved, max_steps=asked.max_steps, devices=asked.devices)


def compiling_pays(settings: PretrainSettings, images: int) -> bool:
    if torch.cuda.is_available():
        return True
    if settings.minutes:
        return settings.minutes >= COMPILE_FROM_MIN
    return settings.epochs * (images // settings.batch_size) >= COMPILE_FROM_STEPS


def epochs_in(minutes: float, settings: PretrainSettings, train: PixelStore | Stream) -> int:
    """How many epochs fit, by timing a few steps of a model that is then thrown away."""
    module = SimCLR(settings, train, None).to(training_device())
    if settings.compile:
        module.compile_parts(
            torch.from_numpy(train.pixels[: settings.chunk_size or settings.batch_size].copy()).to(module.device)
        )
    optimizer = module.configure_optimizers()["optimizer"]
    images = torch.from_numpy(train.pixels[: settings.batch_size].copy()).to(module.device)  # the store is read-only
    seconds = []
    for step in range(CALIBRATION_STEPS):
        started = time.perf_counter()
        with mixed_precision(module.device):
            loss = module.loss(images, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for the device
        seconds.append(time.perf_counter() - started)
    return max(1, int(minutes * 60 / min(seconds) / module.steps_per_epoch))  # others' work only makes steps longer


def write_metrics(path: Path, history: list[dict]) -> None:
    columns = list(dict.fromkeys(name for row in history for name in row))
    with open(path, "w", newline="") as file:
        rows = csv.DictWriter(file, columns)
        rows.writeheader()
        rows.writerows(history)


def write_skipped(path: Path, *stores: PixelStore | Stream | None) -> None:
    with open(path, "w", newline="", errors="surrogateescape") as file:
        rows = csv.writer(file)
        rows.writerow(["name", "reason"])
        for part in stores:
            rows.writerows(part.skipped if part else [])


def commit() -> str:
    """Of this code, where it is a git checkout."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _told_to_stop(number, frame) -> None:
    sys.exit(
        "error: told to stop, as launchers do when another process has ended. The same command with --resume goes on."
    )


def main() -> None:
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)  # its tips and device listings
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    if int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", 0))) > 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the first process speaks for all
    signal.signal(signal.SIGTERM, _told_to_stop)
    try:
        run = pretrain(parse())
    except (DataError, CheckpointError, RunProblem, ValueError) as error:
        sys.exit(f"error: {error}")
    except RuntimeError as error:
        if not (isinstance(error, torch.distributed.DistError) or "gloo" in str(error)):
            raise
        sys.exit("error: another process of this run has ended. The same command with --resume goes on.")
    except Stopped as stopped:
        print(stopped)
        sys.exit(130)
    except KeyboardInterrupt:  # before the first epoch
        print("\nStopped. What was decoded is kept.")
        sys.exit(130)
    print(f"next: python export/to_onnx.py {run}")


if __name__ == "__main__":
    main()
