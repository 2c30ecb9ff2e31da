"""Memory and time of NT-Xent, forward and backward: all similarities at once, and by chunks of anchors.

    python benchmarks/loss_memory.py

Each row is a process of its own (Linux; the first CUDA device if there is one). `extra MiB` is the peak above the
memory in use after the libraries and the two views are loaded, including gradients and temporaries. `difference` is the
greatest relative difference between the two methods, of the loss and of any row of its gradient.
"""

if __name__ == "__main__" and not __package__:
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from benchmarks.result import publish
from training import loss
from training.device import training_device

TEMPERATURE = 0.2
DIMENSION = 128
FULL = (1024, 4096, 16_384, 65_536)  # images, the paper's N
QUICK = (1024, 4096, 8192)
DENSE = 4096  # largest N for which all similarities at once are measured, too
MIB = 1 << 20


@dataclass(frozen=True)
class Options:
    quick: bool = False
    """At most 8,192 images."""


def main(options: Options) -> None:
    sizes = QUICK if options.quick else FULL
    runs = [(n, way) for n in sizes for way in ("dense", "chunks") if way == "chunks" or n <= DENSE]
    rows = []
    for n, way in tqdm(runs, desc="measuring", unit="run"):
        with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
            rows.append({"N": n, "way": way} | fresh.submit(measure, n, way).result())
        if way == "chunks" and n <= DENSE:
            rows[-1]["difference"] = difference(n)
    greatest = max(row["difference"] for row in rows if "difference" in row)
    publish("loss_memory", rows, {"max_difference": greatest, "extra_mib": rows[-1]["extra MiB"]})


def measure(n: int, way: str) -> dict[str, float]:
    """Extra peak memory and seconds of one forward and backward pass, in a fresh process."""
    step(way, *views(4))  # loads libraries
    z_a, z_b = views(n)
    before = restart_peak()
    start = time.perf_counter()
    step(way, z_a, z_b)
    seconds = time.perf_counter() - start
    return {"extra MiB": (peak() - before) / MIB, "seconds": seconds}


def difference(n: int) -> float:
    """Greatest relative difference between the two methods, of the loss and of the gradient of any row."""
    z = views(n)
    (dense, rows), (chunked, chunk_rows) = step("dense", *z), step("chunks", *z)
    lengths = (chunk_rows - rows).norm(dim=1) / rows.norm(dim=1)  # (2N,)
    return max(((chunked - dense) / dense).abs().item(), lengths.max().item())


def views(n: int) -> tuple[Tensor, Tensor]:
    """Two similar views, (n, DIMENSION) each, made in place, since freed temporaries would count as memory in use."""
    device = training_device()
    generator = torch.Generator(device).manual_seed(0)
    z_a, z_b = (torch.randn(n, DIMENSION, device=device, generator=generator) for _ in range(2))
    z_b.div_(2).add_(z_a)
    return z_a.requires_grad_(), z_b.requires_grad_()


def step(way: str, z_a: Tensor, z_b: Tensor) -> tuple[Tensor, Tensor]:
    """The loss and its gradient, (), (2N, d), after the device has finished."""
    loss.DENSE_ROWS = 2 * len(z_a) if way == "dense" else 0
    value = loss.nt_xent(z_a, z_b, TEMPERATURE)
    gradients = torch.autograd.grad(value, (z_a, z_b))
    if z_a.is_cuda:
        torch.cuda.synchronize()
    return value.detach(), torch.cat(gradients)


def restart_peak() -> int:
    """Reset the peak; returns the bytes in use."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to VmRSS
    return peak()


def peak() -> int:
    """Peak bytes since the reset: of tensors on the device, or resident in memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))  # "VmHWM:  26180 kB"


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
