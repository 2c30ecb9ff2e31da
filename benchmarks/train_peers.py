"""Speed and peak memory of SimCLR training: Twinview, lightly and stable-pretraining on the same machine.

    uv pip install -r benchmarks/peers.txt     into the environment of this project; one of them is enough
    python benchmarks/train_peers.py [--quick]

All use the same encoder, widths of the projection head, batch, 32 px images, ranges of the augmentation, float32 on a
CPU and bfloat16 autocast on a GPU. Everything else is as each library's documentation trains SimCLR on CIFAR-10.

    Twinview            uint8 pixels of the store, views made on the device, LARS, in Lightning's Trainer; also
                        with torch.compile, as in its long runs
    lightly             SimCLRTransform in DataLoader workers, SGD, in a plain loop (examples/pytorch/simclr.py)
    stable-pretraining  transforms in DataLoader workers, LARS, in Lightning's Trainer, after make_it_fast()
                        (benchmarks/cifar10/simclr-resnet18.py); on a GPU also with its gpu_transform (its README)

In doubt the other libraries are favoured: their pictures are decoded in memory and their epoch never ends, so that no
worker restarts; nothing is evaluated, logged or saved. They run with as many workers as cores, and with one fewer.
Every run is a process of its own; the runs alternate, so that other work on the machine slows all of them. The fastest
run of each library counts, by the median of its rounds. Memory is the peak of the training process (on a GPU the memory
allocated by torch), without the workers of the other libraries.

On a CPU a batch of ResNet-18 takes minutes: use --quick, or a small --batch-size.
"""

if __name__ == "__main__" and not __package__:
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import importlib.util
import itertools
import logging
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler

from benchmarks.result import publish
from serving.limits import cores
from training.augment import AugmentSettings
from training.config import PRESETS, PretrainSettings
from training.device import mixed_precision, prepare, training_device

if TYPE_CHECKING:
    import pytorch_lightning

CROP_RATIO = (1 / AugmentSettings.crop_aspect, AugmentSettings.crop_aspect)
AUGMENT = AugmentSettings(
    crop_area=(0.08, 1.0), strength=0.5, blur=0.0
)  # that of CIFAR in the paper and in both libraries
JITTER = dict.fromkeys(("brightness", "contrast", "saturation"), 0.8 * AUGMENT.strength) | {
    "hue": 0.2 * AUGMENT.strength
}
GPU = torch.cuda.is_available()
DEVICE = training_device()
WARMUP_STEPS = 4  # of a turn, before the measurement and after the batches that workers had prefetched
PREFETCHED = 2  # batches per worker: DataLoader's default
OFFLINE = {  # environment variables for the other libraries and their dependencies
    "HF_HUB_OFFLINE": "1",
    "LIGHTLY_DID_VERSION_CHECK": "True",
    "LOGURU_LEVEL": "ERROR",
    "WANDB_MODE": "disabled",
}


@dataclass(frozen=True)
class Options:
    quick: bool = False
    """A small encoder and batch, and two short rounds."""
    encoder: Literal["resnet18", "tiny"] | None = None
    """Architecture in all libraries: torchvision's ResNet-18 with the first layer for CIFAR, or Twinview's tiny with
    the same blocks. By default resnet18, with --quick tiny."""
    batch_size: int | None = None
    """Images (not views) per step. By default 512, with --quick 64."""


@dataclass(frozen=True)
class Problem:
    """Settings and pictures for all libraries. The pictures are noise, since their content does not affect the time."""

    settings: PretrainSettings  # all libraries use encoder, batch_size, size_px, head_dimension and temperature
    pixels: Path  # .npy, uint8 (N, S, S, 3)
    seconds: float  # measured per turn


@dataclass
class Contender:
    """A library, and a process that trains with it in its turns."""

    library: str
    augmentation: str
    workers: int
    train: Callable
    rates: list[float] = field(default_factory=list)
    memory_mib: float = 0.0

    def start(self, problem: Problem) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.connection, theirs = spawn.Pipe()
        self.process = spawn.Process(target=child, args=(self.train, problem, self.workers, theirs))
        self.process.start()
        theirs.close()

    def turn(self) -> None:
        rate, self.memory_mib = self.answer("go")
        self.rates.append(rate)

    def answer(self, question: str) -> Any:
        """The next message of the process; the first one is that it is ready."""
        try:
            self.connection.send(question)
            return self.connection.recv()
        except (EOFError, OSError):
            sys.exit(f"error: the process of {self.library} ended; see its messages above")

    def row(self) -> dict:
        rounds = {f"round {i}": rate for i, rate in enumerate(self.rates, 1)}
        return {
            "library": self.library,
            "version": "this" if self.library == "Twinview" else version(self.library),
            "augmentation": self.augmentation,
            "workers": self.workers,
            **rounds,
            "images/s": self.images_per_s,
            "memory MiB": round(self.memory_mib),
        }

    @property
    def images_per_s(self) -> float:
        return statistics.median(self.rates)


def main(options: Options) -> None:
    peers = []
    for name in ("stable-pretraining", "lightly"):
        if importlib.util.find_spec(name.replace("-", "_")):
            peers.append(name)
        else:
            print(f"{name} is left out because it is not installed: uv pip install -r benchmarks/peers.txt")
    os.environ.update(OFFLINE)
    try:
        settings = replace(
            PRESETS["cifar"][1],
            augment=AUGMENT,
            encoder=options.encoder or ("tiny" if options.quick else "resnet18"),
            batch_size=(64 if options.quick else 512) if options.batch_size is None else options.batch_size,
        )
    except ValueError as error:
        sys.exit(f"error: {error}")
    images, seconds, rounds = (5_000, 1.0, 2) if options.quick else (50_000, 5.0, 3)
    print(
        f"{settings.encoder} at {settings.size_px} px, batches of {settings.batch_size} images, on {DEVICE.type}",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        problem = Problem(settings, Path(folder) / "pixels.npy", seconds)
        shape = (max(images, settings.batch_size), settings.size_px, settings.size_px, 3)
        np.save(problem.pixels, np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
        contenders = all_contenders(peers, options.quick)
        take_turns(contenders, problem, rounds)
    fastest = {name: max(c.images_per_s for c in contenders if c.library == name) for name in ("Twinview", *peers)}
    over = {f"over_{peer.replace('-', '_')}": fastest["Twinview"] / fastest[peer] for peer in peers}
    publish("train_peers", [contender.row() for contender in contenders], {"images_per_s": fastest["Twinview"]} | over)


def all_contenders(peers: list[str], quick: bool) -> list[Contender]:
    """All contenders; with --quick without compilation and with one number of workers."""
    contenders = [Contender("Twinview", "by batch", 0, partial(train_twinview, compiled=False))]
    if not quick:
        contenders.append(Contender("Twinview", "by batch, compiled", 0, partial(train_twinview, compiled=True)))
    for workers in [cores()] if quick or cores() == 1 else [cores(), cores() - 1]:
        if "stable-pretraining" in peers:
            contenders.append(Contender("stable-pretraining", "in workers", workers, train_stable_pretraining))
            if GPU:
                by_batch = Contender("stable-pretraining", "by batch, kornia", workers, train_stable_pretraining_gpu)
                contenders.append(by_batch)
        if "lightly" in peers:
            contenders.append(Contender("lightly", "in workers", workers, train_lightly))
    return contenders


def take_turns(contenders: list[Contender], problem: Problem, rounds: int) -> None:
    started = []
    try:
        for contender in contenders:
            contender.start(problem)
            started.append(contender)
        for contender in contenders:
            contender.answer("ready?")
        for i, contender in itertools.product(range(rounds), contenders):
            contender.turn()
            name = f"{contender.library} (augments {contender.augmentation}; {contender.workers} workers)"
            print(f"round {i + 1}: {name}: {contender.rates[-1]:.0f} images/s", flush=True)
    finally:
        for contender in started:
            contender.connection.close()  # ends its process
        for contender in started:
            contender.process.join()


def child(train: Callable, problem: Problem, workers: int, connection: Connection) -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)  # tips of Lightning and messages of the other libraries
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)  # the default, for workers
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")  # as in Twinview
    train(problem, workers, lambda batches: Turns(batches, problem, workers, connection))
    os._exit(0)  # immediately, since ending the interpreter takes seconds


class Turns:
    """Yields batches as long as the parent process asks for another turn.

    A turn skips some steps and measures the following ones. It reports their overall rate, since workers deliver
    batches in bursts, and the median of single steps would only see fast ones.
    """

    def __init__(self, batches: Iterable, problem: Problem, workers: int, connection: Connection) -> None:
        self.batches, self.problem, self.workers, self.connection = batches, problem, workers, connection
        self.dataset = getattr(batches, "dataset", None)  # stable-pretraining looks here for its gpu_transform

    def __len__(self) -> int:
        return 1_000_000  # for Lightning and schedules; the parent decides

    def __iter__(self) -> Iterator:
        batches = iter(self.batches)
        if self.wait():
            self.connection.send("ready")
        while self.wait():
            yield from itertools.islice(batches, PREFETCHED * self.workers + WARMUP_STEPS)
            started, steps = now(), 0
            while time.perf_counter() - started < self.problem.seconds or steps % max(1, self.workers):
                yield next(batches)
                steps += 1
            rate = steps * self.problem.settings.batch_size / (now() - started)
            self.connection.send((rate, peak_memory_mib()))
            torch.cuda.empty_cache()  # for the next contender; no effect without a GPU

    def wait(self) -> bool:
        """Wait for the parent process to ask for a turn; False if it asks for no more."""
        try:
            return bool(self.connection.recv())
        except EOFError:  # closed
            return False


def now() -> float:
    """Time in seconds, after the device has finished."""
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory_mib() -> float:
    if GPU:
        return torch.cuda.max_memory_allocated() / 2**20
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def train_twinview(problem: Problem, workers: int, turns: Callable, compiled: bool) -> None:
    import pytorch_lightning as pl

    from training.batches import Batches
    from training.simclr import SimCLR

    prepare()
    pixels = np.load(problem.pixels, mmap_mode="r")
    store = SimpleNamespace(source="noise", pixels=pixels, labels=np.full(len(pixels), -1))
    model = SimCLR(problem.settings, store, None).to(DEVICE)
    batches = Batches(model)
    if compiled:
        model.compile_parts(next(iter(batches.epoch(0))).to(DEVICE))

    class Steps(pl.LightningModule):  # SimCLR without its measurements
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, images: Tensor, batch_index: int) -> Tensor:
            return self.model.loss(images, self.global_step)

        def configure_optimizers(self):
            return self.model.configure_optimizers()["optimizer"]

    trainer(pl).fit(Steps(), turns(itertools.chain.from_iterable(map(batches.epoch, itertools.count()))))


def train_lightly(problem: Problem, workers: int, turns: Callable) -> None:
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead
    from lightly.transforms.simclr_transform import SimCLRTransform

    from training.encoders import ResNetEncoder

    settings = problem.settings
    torch.backends.cudnn.benchmark = True  # as in stable-pretraining's make_it_fast
    transform = SimCLRTransform(
        input_size=settings.size_px,
        cj_prob=AUGMENT.jitter,
        cj_strength=AUGMENT.strength,
        min_scale=AUGMENT.crop_area[0],
        random_gray_scale=AUGMENT.grey,
        gaussian_blur=AUGMENT.blur,
        hf_prob=AUGMENT.flip,
    )
    encoder = ResNetEncoder(settings.encoder, settings.width, settings.size_px)
    d = encoder.dimension
    model = nn.Sequential(encoder, SimCLRProjectionHead(d, d, settings.head_dimension, num_layers=3)).to(DEVICE)
    criterion = NTXentLoss(settings.temperature)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06)
    for (x0, x1), _ in turns(endless(Pictures(problem.pixels, transform), problem, workers)):
        with mixed_precision(DEVICE, model):
            z0 = model(x0.to(DEVICE, non_blocking=True))
            z1 = model(x1.to(DEVICE, non_blocking=True))
            loss = criterion(z0, z1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def train_stable_pretraining(problem: Problem, workers: int, turns: Callable) -> None:
    import stable_pretraining as spt
    from stable_pretraining.data import transforms

    size = problem.settings.size_px
    view = transforms.Compose(
        transforms.RGB(),
        transforms.RandomResizedCrop((size, size), scale=AUGMENT.crop_area, ratio=CROP_RATIO),
        transforms.RandomHorizontalFlip(p=AUGMENT.flip),
        transforms.ColorJitter(**JITTER, p=AUGMENT.jitter),
        transforms.RandomGrayscale(p=AUGMENT.grey),
        transforms.ToImage(**spt.data.static.CIFAR10),
    )
    dataset = spt.data.FromTorchDataset(
        Pictures(problem.pixels),
        names=["image", "label"],
        transform=transforms.MultiViewTransform([view, view]),
    )
    fit_stable_pretraining(problem, turns(endless(dataset, problem, workers)))


def train_stable_pretraining_gpu(problem: Problem, workers: int, turns: Callable) -> None:
    import stable_pretraining as spt
    from stable_pretraining.data import gpu_transforms, transforms

    views = gpu_transforms.GPUCompose(
        [
            gpu_transforms.GPURandomResizedCrop(problem.settings.size_px, scale=AUGMENT.crop_area, ratio=CROP_RATIO),
            gpu_transforms.GPURandomHorizontalFlip(p=AUGMENT.flip),
            gpu_transforms.GPUColorJitter(**JITTER, p=AUGMENT.jitter),
            gpu_transforms.GPURandomGrayscale(p=AUGMENT.grey),
            gpu_transforms.GPUNormalize(**spt.data.static.CIFAR10),
        ],
        compile=False,  # would compile only the normalisation, and needs a C compiler
    )
    dataset = spt.data.FromTorchDataset(
        Pictures(problem.pixels),
        names=["image", "label"],
        transform=transforms.ToImage(rgb=True, scale=True),
        gpu_transform=gpu_transforms.StackedMultiView(views, n_views=2),
    )
    fit_stable_pretraining(problem, turns(endless(dataset, problem, workers)))


def fit_stable_pretraining(problem: Problem, batches: Iterable) -> None:
    import lightning.pytorch as pl
    import stable_pretraining as spt
    from stable_pretraining import forward
    from stable_pretraining.callbacks.registry import ModuleRegistryCallback

    from training.encoders import ResNetEncoder

    spt.make_it_fast(verbose=False)
    settings = problem.settings
    encoder = ResNetEncoder(settings.encoder, settings.width, settings.size_px)
    d = encoder.dimension
    module = spt.Module(
        backbone=encoder,
        projector=nn.Sequential(
            nn.Linear(d, d),
            nn.BatchNorm1d(d),
            nn.ReLU(inplace=True),
            nn.Linear(d, d),
            nn.BatchNorm1d(d),
            nn.ReLU(inplace=True),
            nn.Linear(d, settings.head_dimension),
        ),
        forward=forward.simclr,
        simclr_loss=spt.losses.NTXEntLoss(temperature=settings.temperature),
        optim={
            "optimizer": {"type": "LARS", "lr": 5, "weight_decay": 1e-6},
            "scheduler": {"type": "LinearWarmupCosineAnnealing"},
            "interval": "epoch",
        },
    )
    training = trainer(pl)  # the package adds callbacks that print and monitor
    training.callbacks = [callback for callback in training.callbacks if isinstance(callback, ModuleRegistryCallback)]
    training.fit(module, batches)


def trainer(pl: ModuleType) -> "pytorch_lightning.Trainer":
    """A Trainer without extras. pl: pytorch_lightning or lightning.pytorch, which are two packages."""
    return pl.Trainer(
        max_epochs=1,
        accelerator="auto",
        devices=1,
        precision="bf16-mixed" if GPU else "32-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


class Pictures(Dataset):
    """PIL images and labels from an array in memory, like torchvision's CIFAR10."""

    def __init__(self, pixels: Path, transform: Callable | None = None) -> None:
        self.pixels, self.transform = np.load(pixels), transform

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, i: int) -> tuple[Image.Image | Tensor, int]:
        image = Image.fromarray(self.pixels[i])
        return (self.transform(image) if self.transform else image), 0


def endless(dataset: Dataset, problem: Problem, workers: int) -> DataLoader:
    """Shuffled batches in one epoch that is longer than the measurement."""
    sampler = RandomSampler(dataset, replacement=True, num_samples=10**9)
    n = problem.settings.batch_size
    return DataLoader(dataset, n, sampler=sampler, drop_last=True, num_workers=workers, pin_memory=GPU)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
