"""A batch too large for the memory, encoded in chunks: only z is kept, and backward encodes each chunk again.

GradCache (Gao et al. 2021, arXiv:2101.06983) in torch's own terms: a checkpoint around each chunk. The loss sees the z
of the whole batch, so the gradient is that of one pass, with one difference that no such scheme escapes: batch norm
takes its statistics from a chunk (both views of it together), as it takes them from a GPU's share without SyncBN.
Where batch norm is in evaluation mode or absent, the gradients are equal.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def recomputed(function: Callable[..., tuple[Tensor, ...]], module: nn.Module, *inputs) -> tuple[Tensor, ...]:
    """function(*inputs), without keeping what its backward needs: backward calls it a second time.

    module  owns the batch norms that `function` runs through; their running statistics are updated by the first call
            only
    The function must give the same values twice: whatever it draws at random has to be among the inputs.
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
    before = [(m.momentum, m.num_batches_tracked) for m in norms]
    for m in norms:
        m.momentum, m.num_batches_tracked = 0.0, m.num_batches_tracked.clone()
    try:
        yield
    finally:
        for m, (momentum, count) in zip(norms, before, strict=True):
            m.momentum, m.num_batches_tracked = momentum, count
