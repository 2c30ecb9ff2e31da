"""Training from shards larger than memory: images per second, share of time spent waiting for data, and memory when the
set grows tenfold.

    python benchmarks/stream.py

The shards are generated: JPEG files of 500 x 375 and about 95 KB, similar to ImageNet's. The larger set consists of ten
hard links to each shard of the smaller one, so that it needs no more disk space; an epoch of it still follows a true
shuffle of all members. Each row is a process of its own. `wait share` is the share of the time spent between the end of
a step and the next batch. On a CPU the decoding threads also slow down the steps themselves, which shows in comparison
with `alone`: images per second of the same steps on one fixed batch. Memory is the process's peak, on Linux.
"""

if __name__ == "__main__" and not __package__:
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dataclasses
import io
import os
import resource
import tarfile
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from tqdm import tqdm

from benchmarks.photograph import jpeg
from benchmarks.result import publish
from export.artifact import Preprocessing
from training.batches import Batches
from training.config import PRESETS
from training.data import stream
from training.data.sources import open_source
from training.device import mixed_precision, prepare, training_device
from training.simclr import SimCLR

GPU = torch.cuda.is_available()
GROWTH = 10
WARMUP_STEPS = 2  # before the measurement


@dataclass(frozen=True)
class Options:
    encoder: Literal["tiny", "resnet18", "resnet50"] = "resnet50" if GPU else "resnet18"
    """Architecture of f."""
    size_px: int = 224
    """Side of the encoder's square input."""
    batch_size: int = 512 if GPU else 16
    """Images per step."""
    images: int = 4000
    """Images in the smaller set; the larger has ten times as many."""
    seconds: float = 60.0
    """Seconds of measurement per set."""
    quick: bool = False
    """The tiny encoder on 200 images, for a few seconds each."""


def main(options: Options) -> None:
    if options.quick:
        options = dataclasses.replace(options, encoder="tiny", batch_size=16, images=200, seconds=5.0)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        small, large = make_shards(Path(folder), options.images)
        for data in (small, large):
            with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
                rows.append(fresh.submit(measure, data, options, Path(folder)).result())
    growth = rows[1]["peak MiB"] - rows[0]["peak MiB"]
    publish("stream", rows, {"memory_growth_mib": growth, "wait_share": rows[1]["wait share"]})


def make_shards(folder: Path, images: int) -> tuple[str, str]:
    """Globs of the smaller and of the larger set."""
    per_shard = max(1, images // 4)
    shards = []
    for first in tqdm(range(0, images, per_shard), desc="making shards", unit="shard"):
        shards.append(folder / "small" / f"{first:06d}.tar")
        shards[-1].parent.mkdir(exist_ok=True)
        with tarfile.open(shards[-1], "w") as archive:
            for i in range(first, min(first + per_shard, images)):
                content = jpeg(i)
                member = tarfile.TarInfo(f"{i:06d}.jpg")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    (folder / "large").mkdir()
    for copy in range(GROWTH):
        for shard in shards:
            os.link(shard, folder / "large" / f"{copy}-{shard.name}")
    return str(folder / "small" / "*.tar"), str(folder / "large" / "*.tar")


def measure(data: str, options: Options, cache: Path) -> dict:
    """The row of one set."""
    prepare()
    source = open_source(data, cache)
    preset = PRESETS["imagenet"][1]
    settings = dataclasses.replace(
        preset, encoder=options.encoder, size_px=options.size_px, batch_size=options.batch_size
    )
    pictures = stream.load(source, Preprocessing(settings.size_px), "train", cache, stream=True)
    module = SimCLR(settings, pictures, None).to(training_device())
    optimizer = module.configure_optimizers()["optimizer"]
    batches = Batches(module)
    endless = (images for epoch in range(10**6) for images in batches.epoch(epoch))

    def step(images: torch.Tensor, number: int) -> None:
        with mixed_precision(module.device, module):
            loss = module.loss(images.to(module.device, non_blocking=True), number)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if GPU:
            torch.cuda.synchronize()  # to separate waiting for data from waiting for the device

    if GPU:
        module.compile_parts(next(endless).to(module.device))
    for number in range(WARMUP_STEPS):
        step(next(endless), number)
    started, waited, steps = time.perf_counter(), 0.0, 0
    while time.perf_counter() - started < options.seconds:
        began = time.perf_counter()
        images = next(endless)
        waited += time.perf_counter() - began
        step(images, steps)
        steps += 1
    seconds = time.perf_counter() - started
    endless.close()
    alone = time.perf_counter()
    for number in range(max(1, steps // 4)):
        step(images, number)
    alone = time.perf_counter() - alone
    return {
        "images": len(pictures.pixels),
        "KB a file": round(np.mean([len(source.pictures[i].read()) for i in range(0, len(source), 97)]) / 1000),
        "encoder": settings.architecture,
        "px": settings.size_px,
        "batch": settings.batch_size,
        "images/s": steps * settings.batch_size / seconds,
        "alone": max(1, steps // 4) * settings.batch_size / alone,
        "wait share": waited / seconds,
        "peak MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
