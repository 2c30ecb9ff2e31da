"""The batches of an epoch: a function of seed and epoch, shared out among the processes."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from training.data.store import map_ahead
from training.memory import step_bytes

if TYPE_CHECKING:
    from training.simclr import SimCLR


class Batches:
    """An epoch's batches as uint8 tensors (N, S, S, 3), shuffled by (seed, epoch); an incomplete last one is dropped.

    Each process takes its own share of every batch. Pictures that fit into GPU memory beside a step are copied there
    once (`resident`); others are read or decoded while the previous step runs.
    """

    def __init__(self, module: "SimCLR", resident: bool | None = None):
        self.module = module
        pixels, device = module.train_store.pixels, module.device
        if resident is None:
            resident = (
                device.type == "cuda"
                and isinstance(pixels, np.ndarray)
                and pixels.nbytes < torch.cuda.mem_get_info(device)[0] - step_bytes(module, module.local_batch)
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
        rng = np.random.default_rng([settings.seed, epoch])
        order = self.module.mixture.order(self.module.train_store, rng)
        batches = order[: len(self) * settings.batch_size].reshape(len(self), settings.batch_size)
        shares = np.sort(batches[:, rank::world], axis=1)  # (steps, N): sorted, as they are on the disk
        if self.resident is not None:
            for share in torch.from_numpy(shares).to(self.resident.device):
                yield self.resident[share]
        else:
            for images in map_ahead(pixels.__getitem__, shares, ahead=2):
                images = torch.from_numpy(images)
                yield images.pin_memory() if torch.cuda.is_available() else images
