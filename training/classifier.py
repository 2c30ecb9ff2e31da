"""A classifier: an encoder with a linear layer on top; and its checkpoint.

    settings    the encoder's settings, as in a pretraining run's checkpoint
    facts       data, images (number of labelled training images), epochs, commit, and `after`: the measurements
    history     one row per epoch
    state_dict  encoder.*, classifier.*, and hidden.* if fine-tuning began at the projection head's first layer
    classifier  classes (names, in the order of the logits), hidden (whether it has hidden.*), origin (the encoder's
                initial weights), settings (of the fine-tuning or distillation)

Whatever reads the encoder of a pretraining run also reads this one: evaluate.py, export/to_onnx.py, --init.
"""

from pathlib import Path

from torch import Tensor, nn

from export.suggest import program
from training import checkpoint
from training.checkpoint import AtomicCheckpointIO, CheckpointError
from training.config import PretrainSettings
from training.encoders import Encoder, projection_head
from training.zoo import build


class Classifier(nn.Module):
    """(N, 3, S, S) float in [0, 1] -> logits (N, C). The linear layer starts at zero, as published.

    hidden  layers between h and the linear layer: None, or the projection head's [Linear, BN, ReLU]
    """

    def __init__(self, encoder: Encoder, hidden: nn.Module | None, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.hidden = hidden or nn.Identity()
        self.classifier = nn.Linear(encoder.dimension, classes)
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.hidden(self.encoder(x)))


def first_layer(projector: nn.Module) -> nn.Sequential:
    """The head's [Linear, BN, ReLU]. raises CheckpointError for a head without a hidden layer."""
    if not isinstance(projector, nn.Sequential) or len(projector) < 5:
        raise CheckpointError("--mode head needs a run with --head-layers 2 or 3: this head has no hidden layer")
    return projector[:3]


def save(path: Path, network: Classifier, settings: PretrainSettings, facts: dict, history: list, about: dict) -> None:
    """about: the entries of `classifier` except `hidden`."""
    about = about | {"hidden": not isinstance(network.hidden, nn.Identity)}
    weights = {key: value.cpu() for key, value in network.state_dict().items()}
    content = {"settings": settings.to_dict(), "facts": facts, "history": history}
    AtomicCheckpointIO().save_checkpoint(content | {"state_dict": weights, "classifier": about}, path)


def load(path: Path) -> tuple[Classifier, dict]:
    """The network, on the CPU in evaluation mode, and the whole checkpoint. raises CheckpointError."""
    saved = checkpoint.load(path)
    if "classifier" not in saved:
        raise CheckpointError(f"{path} contains no classifier: make one with `{program('training/finetune.py')}`")
    settings, about = checkpoint.settings_of(saved), saved["classifier"]
    encoder = build(settings.encoder, settings.width, settings.size_px)
    hidden = first_layer(projection_head(encoder.dimension, 2, 1)) if about["hidden"] else None
    network = Classifier(encoder, hidden, len(about["classes"]))
    network.load_state_dict(saved["state_dict"])
    return network.eval(), saved
