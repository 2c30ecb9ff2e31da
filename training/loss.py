r"""NT-Xent (Chen et al. 2020, arXiv:2002.05709, Eq. 1).

.. math:: \ell_{i,j} = -\log \frac{\exp(\mathrm{sim}(z_i, z_j)/\tau)}{\sum_{k \neq i} \exp(\mathrm{sim}(z_i, z_k)/\tau)}

The positive stays in the denominator. This is the paper's mean over all 2N anchors; google-research/simclr adds the
means of the two halves instead, which is twice this value.
"""

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor


def nt_xent(z_a: Tensor, z_b: Tensor, temperature: float) -> Tensor:
    """Mean NT-Xent over the 2N anchors of N positive pairs.

    z_a, z_b     (N, d) float, N >= 2; row i of each is a view of image i. Not yet normalised.
    temperature  > 0, the paper's tau.
    returns      () float32, in nats; log(2N - 1) when all rows are equal.
    raises       ValueError for another temperature, shape or N.

    Computed in float32 whatever autocast says: at tau = 0.1 half precision would round the logits by 0.04.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, not {temperature}")
    if z_a.shape != z_b.shape or z_a.ndim != 2:
        raise ValueError(f"z_a and z_b must be two (N, d) batches of one shape, not {z_a.shape} and {z_b.shape}")
    n = len(z_a)
    if n < 2:
        raise ValueError(f"NT-Xent needs at least 2 images for a negative, not {n}")
    with torch.autocast(z_a.device.type, enabled=False):
        z = F.normalize(torch.cat([z_a, z_b]).float(), dim=1)  # (2N, d)
        similarity = (z @ z.T) / temperature  # (2N, 2N)
        itself = torch.eye(2 * n, dtype=torch.bool, device=z.device)
        similarity = similarity.masked_fill(itself, float("-inf"))  # Eq. 1's indicator [k != i]
        partner = torch.arange(2 * n, device=z.device).roll(n)  # view i's partner is i + N mod 2N
        return F.cross_entropy(similarity, partner)


def gather(z: Tensor) -> Tensor:
    """All processes' rows, in the order of their ranks: (N, d) -> (world N, d), the gradient carried back to each.

    The backward sums what every process's loss says of a row. Under DDP, which averages gradients, each process
    computing the loss of the whole gathered batch then gives the gradient that one process would have had.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return z
    return _Gather.apply(z)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z: Tensor) -> Tensor:
        parts = [torch.empty_like(z) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, z.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # autograd may hand the same one to others
        torch.distributed.all_reduce(gradient)
        return gradient.chunk(torch.distributed.get_world_size())[torch.distributed.get_rank()]
