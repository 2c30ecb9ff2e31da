"""The optimizers of pretraining: how each is built, and the learning rates at which it was seen to learn."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple

from torch.optim import SGD, AdamW, Optimizer

from training.lars import LARS


class OptimizerRow(NamedTuple):
    build: Callable[[list[dict], float, float], Optimizer]
    """(groups of lars_groups, learning rate, momentum). torch's own optimizers ignore a group's `adapt`."""
    sensible_lr: tuple[float, float]
    """Least and greatest peak learning rate that has been seen to learn; others cause a warning."""


# The ranges were measured on shapes (training/RECORDS.md). LARS changes every kernel by lr * trust / (1 - momentum) of
# its norm per step, here a hundredth of lr, for any batch size.
OPTIMIZERS = {
    "lars": OptimizerRow(lambda groups, lr, momentum: LARS(groups, lr=lr, momentum=momentum), (0.05, 15.0)),
    "sgd": OptimizerRow(lambda groups, lr, momentum: SGD(groups, lr=lr, momentum=momentum), (1e-3, 5.0)),
    "adamw": OptimizerRow(lambda groups, lr, momentum: AdamW(groups, lr=lr), (1e-5, 2e-2)),
}
if TYPE_CHECKING:
    OptimizerName = str
else:
    OptimizerName = Literal[tuple(OPTIMIZERS)]  # the command line's choices
