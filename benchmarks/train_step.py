"""Overhead of a training step: the rate of whole steps relative to that of the network's forward and backward passes
alone, on views that are already in memory.

    python benchmarks/train_step.py

The whole step: batch from the store, both augmentations, forward, NT-Xent, backward, LARS. `compute`: forward of f and
g, a sum instead of the loss, backward. The two alternate in one process; the figure is the ratio of the medians.
"""

if __name__ == "__main__" and not __package__:
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch
import tyro

from benchmarks.result import publish
from training.batches import Batches
from training.config import PRESETS, PretrainSettings
from training.device import mixed_precision, prepare, training_device
from training.simclr import SimCLR

GPU = torch.cuda.is_available()


@dataclass(frozen=True)
class Options:
    encoder: str = "resnet18"
    """Architecture of f."""
    size_px: int = 32
    """Side of the images, in pixels."""
    batch_size: int = 512 if GPU else 64
    """Images per step."""
    quick: bool = False
    """A few steps of the tiny encoder only."""


class NoiseStore:
    """Takes the place of a PixelStore: noise of the right shape."""

    source = "noise"

    def __init__(self, n: int, size_px: int) -> None:
        self.pixels = np.random.default_rng(0).integers(0, 256, (n, size_px, size_px, 3), dtype=np.uint8)
        self.labels = np.full(n, -1)


def main(options: Options) -> None:
    encoder = "tiny" if options.quick else options.encoder
    rounds, inner = (3, 3) if options.quick else (9, 20 if GPU else 2)
    rows = []
    prepare()
    for resident in (True, False) if GPU else (False,):
        settings = dataclasses.replace(
            PRESETS["cifar"][1], encoder=encoder, size_px=options.size_px, batch_size=options.batch_size, compile=True
        )
        whole, compute = steps(settings, resident, inner)
        seconds = [(timed(whole), timed(compute)) for _ in range(rounds)]
        step_s, compute_s = (median(times) / inner for times in zip(*seconds, strict=True))
        rows.append(
            {
                "encoder": settings.architecture,
                "px": settings.size_px,
                "batch": settings.batch_size,
                "store": "on the GPU" if resident else "memory",
                "step ms": 1e3 * step_s,
                "compute ms": 1e3 * compute_s,
                "images/s": settings.batch_size / step_s,
                "ratio": compute_s / step_s,
            }
        )
    figures = {"end_to_end_over_compute_from_memory": rows[-1]["ratio"]} if GPU else {}
    publish("train_step", rows, figures | {"end_to_end_over_compute": rows[0]["ratio"]})


def steps(settings: PretrainSettings, resident: bool, inner: int) -> tuple[Callable, Callable]:
    """Functions that run `inner` whole steps, and as many times the arithmetic alone."""
    device = training_device()
    module = SimCLR(settings, NoiseStore(20 * settings.batch_size, settings.size_px), None).to(device)
    optimizer = module.configure_optimizers()["optimizer"]
    batches = Batches(module, resident)
    module.compile_parts(next(iter(batches.epoch(0))))
    views = torch.rand(2 * settings.batch_size, 3, settings.size_px, settings.size_px, device=device)
    views = views.contiguous(memory_format=torch.channels_last)
    endless = (images for epoch in range(10**6) for images in batches.epoch(epoch))
    done = 0

    def whole() -> None:
        nonlocal done
        for _ in range(inner):
            with mixed_precision(device, module):
                loss = module.loss(next(endless).to(device, non_blocking=True), done)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            done += 1

    def compute() -> None:
        for _ in range(inner):
            with mixed_precision(device, module):
                total = module.project(views).float().sum()
            total.backward()
            module.zero_grad()

    whole(), compute()  # the first calls compile and choose kernels
    return whole, compute


def timed(work: Callable) -> float:
    """Seconds until the device has finished."""
    wait = torch.cuda.synchronize if GPU else lambda: None
    wait()
    started = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - started


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
