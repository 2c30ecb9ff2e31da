"""Batches too large for memory: encode chunk by chunk and keep only z; the backward pass encodes each chunk again.

GradCache (Gao et al. 2021, arXiv:2101.06983), by torch's activation checkpointing of each chunk. The loss gets the z
of the whole batch, so the gradient is that of one pass, except for batch norm: its statistics come from one chunk (both
views together), as without SyncBN they come from one GPU's share. Without batch norm, or with it in evaluation mode,
the gradients are equal.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def recomputed(function: Callable[..., tuple[Tensor, ...]], module: nn.Module, *inputs: Any) -> tuple[Tensor, ...]:
    """function(*inputs) without stored activations: the backward pass calls the function a second time.

    module  owns the batch norms used by `function`; only the first call updates their running statistics
    The function must return the same values twice: random numbers must be among its inputs.
    """
    return checkpoint(
        function,
        *inputs,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=lambda: (nullcontext(), _frozen_statistics(module)),
    )


@contextmanager
def _frozen_statistics(module: nn.Module) -> Iterator[None]:
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    before = [(m.momentum, m.get_buffer("num_batches_tracked")) for m in norms]
    for m, (_, count) in zip(norms, before, strict=True):
        m.momentum, m.num_batches_tracked = 0.0, count.clone()
    try:
        yield
    finally:
        for m, (momentum, count) in zip(norms, before, strict=True):
            m.momentum, m.num_batches_tracked = momentum, count
