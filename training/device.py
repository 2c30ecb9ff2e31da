"""The device that trains, and how it computes: a GPU in bfloat16 where there is one, or the CPU in float32."""

import ctypes
import sys

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


def training_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def mixed_precision(on: torch.device) -> torch.autocast:
    """What a step's forward runs in: bfloat16 on a GPU, nothing else than usual on a CPU."""
    return torch.autocast(
        on.type, torch.bfloat16, enabled=on.type == "cuda", cache_enabled=False
    )  # as the trainer does


def prepare() -> None:
    """Set the process up for training.

    GPU  float32 products in TF32, and of cuDNN's kernels the fastest, found by trying.
    CPU  Every step wants the same tensors, and fetching zeroed pages for them from the system, each time anew, takes a
         fifth of a step and more: glibc is told to keep what is freed. Elsewhere nothing happens.
    """
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    if sys.platform == "linux" and not torch.cuda.is_available():
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
        if mallopt:
            mallopt(M_MMAP_MAX, 0)
            mallopt(M_TRIM_THRESHOLD, -1)
