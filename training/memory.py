"""How much memory a training step needs, and what to change when a GPU has too little."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import psutil
import torch
from torch import Tensor

from training.watch import RunProblem

if TYPE_CHECKING:
    from training.simclr import SimCLR

MEASURED = 3  # images that are encoded to measure what a view needs
HEADROOM = 1.25  # for the loss, gradients of activations and the gaps between blocks
STATES = 4  # copies of the weights: themselves, gradients, momentum, and an update


def bytes_per_view(module: "SimCLR") -> float:
    """Bytes that one view keeps from the forward pass for the backward pass, in bfloat16, as GPUs train.

    Measured as the difference of a batch of MEASURED images and of one image, so that what a step needs once, such as
    weights in bfloat16, does not count.
    """
    images = module.first_images(MEASURED)
    with module.unchanged():
        many, one = (_bytes_kept(module, some) for some in (images, images[:1]))
    return (many - one) / ((len(images) - 1) * module.settings.views)


def _bytes_kept(module: "SimCLR", images: Tensor) -> int:
    kept: dict[int, Tensor] = {}  # by address: what shares a storage is counted once, and none is freed meanwhile

    def keep(value: Tensor) -> Tensor:
        kept[value.untyped_storage().data_ptr()] = value
        return value

    with (
        torch.autocast(images.device.type, torch.bfloat16, cache_enabled=False),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value),
    ):
        module.project_views(images, module.draws(images, 0))
    return sum(value.untyped_storage().nbytes() for value in kept.values())


def step_bytes(module: "SimCLR", images_per_step: int) -> float:
    """Bytes that a step of so many images on one device needs, with the weights and their optimiser's state."""
    at_once = min(images_per_step, module.settings.chunk_size or images_per_step)
    view = bytes_per_view(module)
    weights = sum(value.numel() * value.element_size() for value in module.parameters())
    return HEADROOM * at_once * module.settings.views * view + STATES * weights


@contextmanager
def explained(module: "SimCLR", images_per_step: int) -> Iterator[None]:
    """Turns a device that runs out of memory inside into a RunProblem that says what to change."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RunProblem(advice(module, images_per_step, capacity())) from error


def capacity() -> int:
    """Bytes of the training device's memory."""
    return torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else psutil.virtual_memory().total


def advice(module: "SimCLR", images_per_step: int, capacity: int) -> str:
    """What to change after a step of so many images did not fit into the memory of a device.

    capacity  of the device, in bytes
    """
    settings = module.settings
    module.cpu()  # the run is over, and the device is full
    view = bytes_per_view(module)
    at_once = min(images_per_step, settings.chunk_size or images_per_step)
    fitting = int(capacity / (HEADROOM * settings.views * view))
    chunk = 2 ** (min(fitting, at_once - 1).bit_length() - 1) if fitting >= 2 and at_once > 2 else 0
    said = (
        f"a step of {at_once:,} images at once does not fit into this device's memory of {capacity / 2**30:.1f} GiB: a "
        f"view at {settings.size_px} px takes {view / 2**20:.1f} MiB"
    )
    if chunk < 2:
        return f"{said}. Give a smaller --size-px or --encoder"
    return f"{said}. Give --chunk-size {chunk}, which encodes {chunk} images at once, or use more GPUs"
