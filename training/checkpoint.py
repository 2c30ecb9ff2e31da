"""A run's checkpoint: one file of plain tensors, numbers and dicts, replaced whole or not at all."""

import io
import os
import pickle
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path

import torch
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.plugins.io import CheckpointIO

from training.config import PretrainSettings
from training.encoders import Encoder

NAME = "last.ckpt"
HALFWAY = "halfway.ckpt"  # of what is no pretraining (training/halfway.py)
EVERY_S = 30.0  # epochs that end sooner after the last checkpoint make none


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written. The message names the file and what to do."""


class AtomicCheckpointIO(CheckpointIO):
    """Write beside, flush to the disk, rename: whoever is killed at any moment leaves the old file or the new one."""

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()  # torch's own writer hides the operating system's error on a full disk
        torch.save(checkpoint, content)
        fresh = path.with_name(f".{path.name}.new")
        try:
            with open(fresh, "wb") as file:
                file.write(content.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(path)
        except OSError as error:
            fresh.unlink(missing_ok=True)
            kept = "; the one before it is kept" if path.exists() else ""
            raise CheckpointError(
                f"{path} could not be written: {error.strerror}{kept}. Make room, then continue with --resume."
            ) from error

    def load_checkpoint(self, path, map_location=None, weights_only=None):
        return load(path)

    def remove_checkpoint(self, path):
        Path(path).unlink(missing_ok=True)


class EveryEpoch(Checkpoint):
    """Saves at each epoch's end, after the module's own hook (as Lightning runs its Checkpoint callbacks).

    Ctrl-C ends the run there, with a checkpoint; a second one ends it at once, with the last that was written.
    """

    def __init__(self, path: Path):
        self.path = path
        self.saved_at = 0.0
        self.stopping = False

    def on_train_start(self, trainer, module):
        if threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGINT, self._interrupted)

    def on_train_epoch_end(self, trainer, module):
        # One process may hear of Ctrl-C, or see its clock pass, before an epoch's end and another after it. They agree:
        # a checkpoint that not all of them write would keep them waiting for each other for ever.
        any_says = partial(trainer.strategy.reduce_boolean_decision, all=False)
        trainer.should_stop = any_says(self.stopping)
        due = any_says(time.monotonic() - self.saved_at > EVERY_S)
        last = trainer.current_epoch + 1 == trainer.max_epochs or trainer.global_step == trainer.max_steps
        if last or trainer.should_stop or due:
            trainer.save_checkpoint(self.path)
            self.saved_at = time.monotonic()

    def on_train_end(self, trainer, module):
        if hasattr(self, "before"):
            signal.signal(signal.SIGINT, self.before)

    def on_exception(self, trainer, module, exception):
        self.on_train_end(trainer, module)

    def _interrupted(self, number, frame):
        if self.stopping:
            raise SystemExit("\nStopped at once. The same command with --resume goes on from the last checkpoint.")
        self.stopping = True
        print("\nStopping at the end of this epoch; Ctrl-C once more stops at once.", file=sys.stderr, flush=True)


def load(path: Path) -> dict:
    """raises CheckpointError where there is none, or it is none."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such checkpoint")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a checkpoint that can be read: {type(error).__name__}") from error
    if not isinstance(checkpoint, dict) or "settings" not in checkpoint:
        raise CheckpointError(f"{path} is not a checkpoint of training/pretrain.py")
    return checkpoint


def find(run: Path) -> Path:
    """A run's folder, or a checkpoint's own path -> the checkpoint's path. raises CheckpointError."""
    run = Path(run)
    path = run / "checkpoints" / NAME if run.is_dir() else run
    if not path.is_file():
        raise CheckpointError(f"{run} holds no checkpoint; train one with `python training/pretrain.py`")
    if path.name == HALFWAY:
        raise CheckpointError(f"{path} is of a run on its way: end it with --resume, and give the run")
    return path


def settings_of(checkpoint: dict) -> PretrainSettings:
    return PretrainSettings.from_dict(checkpoint["settings"])


def encoder_of(checkpoint: dict) -> Encoder:
    """f alone, on the CPU, in evaluation mode. raises CheckpointError where the weights are not of its settings."""
    settings = settings_of(checkpoint)
    encoder = Encoder(settings.encoder, settings.width, settings.size_px)
    prefix = "encoder."
    weights = {key.removeprefix(prefix): w for key, w in checkpoint["state_dict"].items() if key.startswith(prefix)}
    try:
        encoder.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(
            f"a checkpoint of {settings.name or settings.data} holds weights of another architecture than its "
            f"settings, {settings.architecture} for {settings.size_px} px"
        ) from error
    return encoder.eval()
