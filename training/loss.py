r"""The contrastive losses, NT-Xent and its decoupled form, in one table with their chance levels.

NT-Xent (Chen et al. 2020, arXiv:2002.05709, Eq. 1), with i's positive j:

.. math:: \ell_{i,j} = -\log \frac{\exp(\mathrm{sim}(z_i, z_j)/\tau)}{\sum_{k \neq i} \exp(\mathrm{sim}(z_i, z_k)/\tau)}

The positive stays in the denominator. This is the paper's mean over all 2N anchors; google-research/simclr adds the
means of the two halves instead, which is twice this value (--loss-scale 2 gives its gradients).

DCL (Yeh et al. 2022, arXiv:2110.06848, Eq. 6, L_DC) leaves the positive out: the sum is over the 2N - 2 views k other
than i and j. This is the plain form, not the weighted DCLW, and again the mean over all 2N anchors.

A new loss is a function and a row of LOSSES: the setting, the watch, metrics.csv and the report read that table.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor

DENSE_ROWS = 8192  # 2N up to which all (2N, 2N) similarities are in memory: 256 MiB, and a few copies of them
CHUNK_BYTES = 16 << 20  # above that: similarities at a time, and two copies. malloc returns 32 MiB and more at once


def nt_xent(z_a: Tensor, z_b: Tensor, temperature: float) -> Tensor:
    """Mean NT-Xent over the 2N anchors of N positive pairs.

    z_a, z_b     (N, d) float, N >= 2; row i of each is a view of image i. Not yet normalised.
    temperature  > 0, the paper's tau.
    returns      () float32, in nats; log(2N - 1) when all rows are equal.
    raises       ValueError for another temperature, shape or N.

    Computed in float32 whatever autocast says, with TF32's products on a GPU: at tau = 0.1 half precision would round
    the logits by 0.04, and TF32 rounds them by 0.005.
    Above DENSE_ROWS rows the memory grows with N d, not with N^2, and there is no second derivative.
    """
    return _contrastive(z_a, z_b, temperature, decoupled=False)


def dcl(z_a: Tensor, z_b: Tensor, temperature: float) -> Tensor:
    """Mean decoupled contrastive loss. Arguments, errors, precision and memory are those of nt_xent.

    returns  () float32, in nats; log(2N - 2) when all rows are equal, below 0 when positives are much nearer than
             negatives.
    """
    return _contrastive(z_a, z_b, temperature, decoupled=True)


class ContrastiveLoss(NamedTuple):
    title: str
    function: Callable[[Tensor, Tensor, float], Tensor]  # (z_a, z_b, temperature) -> ()
    chance: Callable[[int], float]  # N images -> the loss in nats when all rows are equal


LOSSES = {
    "nt_xent": ContrastiveLoss("NT-Xent", nt_xent, lambda n: math.log(2 * n - 1)),
    "dcl": ContrastiveLoss("DCL", dcl, lambda n: math.log(2 * n - 2)),
}
if TYPE_CHECKING:
    LossName = str
else:
    LossName = Literal[tuple(LOSSES)]  # the command line's choices


def _contrastive(z_a: Tensor, z_b: Tensor, temperature: float, decoupled: bool) -> Tensor:
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, not {temperature}")
    if z_a.shape != z_b.shape or z_a.ndim != 2:
        raise ValueError(f"z_a and z_b must be two (N, d) batches of one shape, not {z_a.shape} and {z_b.shape}")
    n = len(z_a)
    if n < 2:
        raise ValueError(f"a contrastive loss needs at least 2 images for a negative, not {n}")
    with torch.autocast(z_a.device.type, enabled=False):
        z = F.normalize(torch.cat([z_a, z_b]).float(), dim=1)  # (2N, d)
        z = z / math.sqrt(temperature)  # so that the product of two rows is sim / tau
        partner = torch.arange(2 * n, device=z.device).roll(n)  # view i's partner is i + N mod 2N
        if 2 * n > DENSE_ROWS:
            return _Chunked.apply(z, partner, decoupled)
        return _losses(_similarity(z, slice(0, 2 * n)), partner, decoupled, "mean")


def _similarity(z: Tensor, rows: slice) -> Tensor:
    """Similarities of the anchors z[rows] with all rows: (2N, d) -> (rows, 2N), a new tensor."""
    similarity = z[rows] @ z.T
    similarity.diagonal(rows.start).fill_(float("-inf"))  # Eq. 1's indicator [k != i]
    return similarity


def _losses(similarity: Tensor, partner: Tensor, decoupled: bool, reduction: str) -> Tensor:
    """The anchors' losses (rows,), or with reduction "mean" their mean ()."""
    if not decoupled:
        return F.cross_entropy(similarity, partner, reduction=reduction)
    positive = similarity.gather(1, partner[:, None])[:, 0]
    losses = _without_positive(similarity, partner).logsumexp(dim=1) - positive
    return losses.mean() if reduction == "mean" else losses


def _without_positive(similarity: Tensor, partner: Tensor) -> Tensor:
    return similarity.scatter(1, partner[:, None], float("-inf"))


def _chunks(rows: int) -> list[slice]:
    size = max(1, CHUNK_BYTES // (4 * rows))
    return [slice(start, start + size) for start in range(0, rows, size)]


class _Chunked(torch.autograd.Function):
    r"""The mean loss, computed for a chunk of anchors at a time.

    As in Inf-CL (Cheng et al. 2024, arXiv:2410.17243) an anchor keeps only its logsumexp for the backward pass,
    which computes the similarities s = z z^T again. The gradient needs rows and columns of the softmax P,

    .. math:: 2N \, \partial L / \partial z = (P + P^T) z - 2 z_{partner}, \quad P_{ik} = \exp(s_{ik} - lse_i)

    and since s is symmetric both come from one chunk of it: P^T_{ik} = exp(s_ik - lse_k). Decoupled, P is 0 at the
    partner, as s is -inf there.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, partner: Tensor, decoupled: bool) -> Tensor:
        losses, log_sums = z.new_empty(len(z)), z.new_empty(len(z))  # (2N,) each
        for rows in _chunks(len(z)):
            similarity = _similarity(z, rows)
            positive = similarity.gather(1, partner[rows, None])[:, 0]
            losses[rows] = _losses(similarity, partner[rows], decoupled, "none")
            log_sums[rows] = losses[rows] + positive
        ctx.save_for_backward(z, partner, log_sums)
        ctx.decoupled = decoupled
        return losses.mean()

    @staticmethod
    # torch calls it with one gradient per output; its stub allows any number
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # pyrefly: ignore[bad-override]
        if torch.is_grad_enabled():  # create_graph=True, which once_differentiable misses where `gradient` is constant
            raise RuntimeError(f"the loss of more than {DENSE_ROWS} rows has no second derivative (create_graph=True)")
        z, partner, log_sums = ctx.saved_tensors
        z_gradient = torch.empty_like(z)
        with torch.autocast(z.device.type, enabled=False):
            for rows in _chunks(len(z)):
                similarity = _similarity(z, rows)
                if ctx.decoupled:
                    similarity = _without_positive(similarity, partner[rows])
                both = (similarity - log_sums).exp_()  # P^T
                both += similarity.sub_(log_sums[rows, None]).exp_()  # P
                z_gradient[rows] = both @ z
        return z_gradient.sub_(z[partner], alpha=2).mul_(gradient / len(z)), None, None


def gather(z: Tensor) -> Tensor:
    """Rows of all processes in the order of their ranks, with gradients: (N, d) -> (world N, d).

    The backward pass sums the gradients that all processes' losses have in a row. DDP then averages over processes, so
    when each of them computes the loss of the whole gathered batch, the result is the gradient of a single process.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return z
    return _Gather.apply(z)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        parts = [torch.empty_like(z) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, z.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyrefly: ignore[bad-override]  # as above
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # autograd may hand the same one to others
        torch.distributed.all_reduce(gradient)
        return gradient.chunk(torch.distributed.get_world_size())[torch.distributed.get_rank()]
