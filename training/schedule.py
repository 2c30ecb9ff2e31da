"""The learning rate: scaling with the batch size, linear warm-up, cosine to 0 (arXiv:2002.05709, App. B.6-B.9)."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from training.budget import Budget


def scaled_lr(lr: float, batch_size: int, scaling: str) -> float:
    """The peak learning rate. batch_size counts images, not views. Raises ValueError for another scaling.

    linear  lr * batch_size / 256        (lr 0.3 in the paper)
    sqrt    lr * sqrt(batch_size)        (lr 0.075: better for small batches and short training)
    none    lr
    """
    scales = {"linear": batch_size / 256, "sqrt": math.sqrt(batch_size), "none": 1.0}
    if scaling not in scales:
        raise ValueError(f"scaling must be one of {', '.join(scales)}, not {scaling!r}")
    return lr * scales[scaling]


def cosine_schedule(optimizer: Optimizer, warmup: float, total_steps: int, budget: Budget | None = None) -> LambdaLR:
    """warmup_cosine for an optimizer built with the peak learning rate. warmup: share of the steps, in [0, 1).

    budget  with --minutes the rate is a function of the share of the time that is over, instead of the steps
    """
    if budget and budget.minutes:
        return LambdaLR(optimizer, lambda step: warmup_cosine(budget.share, warmup, 1))
    warmup_steps = round(warmup * total_steps)
    return LambdaLR(optimizer, lambda step: warmup_cosine(step, warmup_steps, total_steps))


def warmup_cosine(step: float, warmup_steps: float, total_steps: float) -> float:
    """Share of the peak learning rate at a step: 0 at step 0, 1 at the end of the warm-up, 0 at total_steps."""
    if step < warmup_steps:
        return step / warmup_steps
    progress = (step - warmup_steps) / ((total_steps - warmup_steps) or 1)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
