r"""LARS as google-research/simclr runs it (You et al. 2017, arXiv:1708.03888; lars_optimizer.py there).

For each weight w with gradient g, per step:

    g     = g + weight_decay w
    trust = trust_coefficient |w| / |g|        1 where either norm is 0; no epsilon
    v     = momentum v + lr trust g            the learning rate inside the buffer: classic momentum
    w     = w - v

It differs from other published versions: the denominator is the norm of the decayed gradient, not |g| + wd |w| (timm,
apex); nothing is clipped (LARC); there is no Nesterov momentum; and a weight decay of 0 does not switch the adaptation
off.
"""

from collections.abc import Callable, Iterable
from typing import overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class LARS(Optimizer):
    """Layer-wise adaptive SGD.

    params        parameters or groups. `adapt: False` makes a group plain momentum SGD at the full learning rate, with
                  the group's weight decay. `lars_groups` makes the two groups of the paper.
    lr            >= 0; scale it with the batch, see training.schedule
    momentum      in [0, 1)
    weight_decay  >= 0
    trust         > 0, the paper's eta

    Runs as `_foreach` kernels over all parameters and never waits for the device. Raises ValueError.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        trust: float = 1e-3,
    ):
        if not lr >= 0:
            raise ValueError(f"lr must be at least 0, not {lr}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), not {momentum}")
        if not weight_decay >= 0:
            raise ValueError(f"weight_decay must be at least 0, not {weight_decay}")
        if not trust > 0:
            raise ValueError(f"trust must be above 0, not {trust}")
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust, "adapt": True}
        )

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [w for w in group["params"] if w.grad is not None]
            if weights:
                self._step(weights, group)
        return loss

    def _step(self, weights: list[Tensor], group: dict) -> None:
        for w in weights:
            if "momentum" not in self.state[w]:
                self.state[w]["momentum"] = torch.zeros_like(w)
        buffers = [self.state[w]["momentum"] for w in weights]
        gradients = [w.grad for w in weights if w.grad is not None]  # none is None: step() leaves those out
        gradients = torch._foreach_add(gradients, weights, alpha=group["weight_decay"])  # new tensors
        if group["adapt"]:
            w_norm = torch.stack(torch._foreach_norm(weights))
            g_norm = torch.stack(torch._foreach_norm(gradients))
            trust = torch.where((w_norm > 0) & (g_norm > 0), group["trust"] * w_norm / g_norm, 1.0)
            torch._foreach_mul_(gradients, list(trust.unbind()))
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, gradients, alpha=group["lr"])
        torch._foreach_sub_(weights, buffers)


def lars_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: matrices and kernels are adapted and decayed; biases and batch norm, of rank 1 or less, are not.

    Chosen by rank and not by name, which also catches `downsample.1` and the head's batch norms.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "adapt": True, "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "adapt": False, "weight_decay": 0.0},
    ]
