"""An exponential moving average of f's weights, which is often a better encoder than the last weights."""

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from training.encoders import Encoder


class Average:
    """Averages the weights and batch norm's statistics of an encoder f.

    Not a module, so that it is neither trained nor saved as a part of SimCLR; see `state` and `load`.
    """

    def __init__(self, encoder: Encoder, decay: float):
        self._model = AveragedModel(encoder, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)

    @property
    def weights(self) -> dict[str, Tensor]:
        return self._model.module.state_dict()

    @torch.no_grad()
    def update(self, encoder: Encoder) -> None:
        """After a step. The first one copies the weights."""
        self._model.update_parameters(encoder)

    def state(self) -> dict[str, Tensor]:
        return self._model.state_dict()

    def load(self, state: dict[str, Tensor]) -> None:
        self._model.load_state_dict(state)
