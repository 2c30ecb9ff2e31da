"""The device that trains and its precision: bfloat16 on a GPU and on a CPU that is faster in it, otherwise float32."""

import ctypes
import sys
from typing import TypeVar

import torch
from torch import nn

Network = TypeVar("Network", bound=nn.Module)

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


def training_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def to_training_device(network: Network) -> Network:
    """Move a network to the training device, with its convolutions in channels-last memory format."""
    # torch's stub of `to` lacks memory_format
    return network.to(training_device(), memory_format=torch.channels_last)  # pyrefly: ignore[no-matching-overload]


def mixed_precision(on: torch.device, network: nn.Module) -> torch.autocast:
    """The autocast context of a forward pass of the network: bfloat16 where `bfloat16_pays`, otherwise off."""
    # Lightning's trainer switches the cache off too.
    return torch.autocast(on.type, torch.bfloat16, enabled=bfloat16_pays(on, network), cache_enabled=False)


def bfloat16_pays(on: torch.device, network: nn.Module) -> bool:
    """Whether the network trains faster in bfloat16: on a GPU, and on a CPU with instructions for it.

    On a CPU the gradient of depthwise convolutions is several times slower in bfloat16 (training/RECORDS.md).
    """
    if on.type == "cuda":
        return True
    if not any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16")):
        return False
    return not any(isinstance(module, nn.Conv2d) and module.groups > 1 for module in network.modules())


def prepare() -> None:
    """Set the process up for training.

    GPU  Float32 products use TF32, and cuDNN tries its kernels to find the fastest.
    CPU  glibc keeps freed memory (on Linux): every step allocates the same tensors, and getting zeroed pages for them
         from the system takes a fifth of a step and more.
    """
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    if sys.platform == "linux" and not torch.cuda.is_available():
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
        if mallopt:
            mallopt(M_MMAP_MAX, 0)
            mallopt(M_TRIM_THRESHOLD, -1)
