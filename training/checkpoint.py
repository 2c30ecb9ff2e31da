"""A run's checkpoint: one file of plain tensors, numbers and dicts, written atomically."""

import io
import os
import pickle
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.plugins.io import CheckpointIO

from export.artifact import CARD
from export.suggest import program
from training.config import PretrainSettings
from training.encoders import Encoder
from training.zoo import build

if TYPE_CHECKING:
    from training.simclr import SimCLR

NAME, BEST = "last.ckpt", "best.ckpt"
HALFWAY = "halfway.ckpt"  # unfinished fine-tuning or distillation (training/resumable.py)
EVERY_S = 30.0  # least time between two checkpoints


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, written or used. The message names the file and what to do."""


class AtomicCheckpointIO(CheckpointIO):
    """Writes a new file, flushes it to the disk and renames it: a killed process leaves the old file or the new one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
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
            kept = "; the previous one is kept" if path.exists() else ""
            raise CheckpointError(
                f"{path} could not be written: {error.strerror}{kept}. Free disk space, then continue with --resume."
            ) from error

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> dict:
        return load(path)

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)


class EveryEpoch(Checkpoint):
    """Saves after epochs, at most every EVERY_S seconds and at the end. Lightning calls it after the module's own hook.

    BEST is the epoch with the best measurement so far, and epoch-NNNN.ckpt that of every `keep_every` epochs.
    Ctrl-C ends the run after the current epoch, with a checkpoint; a second Ctrl-C ends it at once.
    """

    def __init__(self, path: Path, keep_every: int = 0):
        self.path, self.keep_every = path, keep_every
        self.saved_at = 0.0
        self.stopping = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGINT, self._interrupted)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Ctrl-C and the time of the next checkpoint may reach one process before an epoch's end and another after it.
        # They decide together: if only some saved a checkpoint, they would wait for the others for ever.
        any_of_all = partial(trainer.strategy.reduce_boolean_decision, all=False)
        trainer.should_stop = any_of_all(self.stopping or trainer.should_stop)
        due = any_of_all(time.monotonic() - self.saved_at > EVERY_S)
        last = trainer.current_epoch + 1 == trainer.max_epochs or trainer.global_step == trainer.max_steps
        module = cast("SimCLR", pl_module)
        epoch, facts = trainer.current_epoch + 1, module.facts
        if stopped := "stopped" in facts:
            trainer.should_stop = True
        if last or trainer.should_stop or due:
            with module.budget.ending("saving"):
                trainer.save_checkpoint(self.path)
            self.saved_at = time.monotonic()
        if facts.get("best", {}).get("epoch") == epoch and not stopped:
            trainer.save_checkpoint(self.path.with_name(BEST))
        if self.keep_every and epoch % self.keep_every == 0:
            trainer.save_checkpoint(self.path.with_name(f"epoch-{epoch:04d}.ckpt"))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if hasattr(self, "before"):
            signal.signal(signal.SIGINT, self.before)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        if self.stopping:
            raise SystemExit(
                "\nStopped at once. Run the same command with --resume to continue from the last checkpoint."
            )
        self.stopping = True
        print("\nStopping at the end of this epoch; press Ctrl-C again to stop at once.", file=sys.stderr, flush=True)


def load(path: Path | str) -> dict:
    """Load a checkpoint. raises CheckpointError: no such file, or not a checkpoint."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a checkpoint that can be read: {type(error).__name__}") from error
    if not isinstance(checkpoint, dict) or "settings" not in checkpoint:
        raise CheckpointError(f"{path} is not a checkpoint of training/pretrain.py")
    return checkpoint


def find(run: Path) -> Path:
    """The path of a run's checkpoint, from the run's folder or the path itself. raises CheckpointError."""
    run = Path(run)
    path = run / "checkpoints" / NAME if run.is_dir() else run
    if not path.is_file():
        if (run / CARD).exists():
            raise CheckpointError(
                f"{run} is the folder of an exported encoder, not a run; a name stands for such a folder first"
            )
        raise CheckpointError(f"{run} contains no checkpoint; train one with `{program('training/pretrain.py')}`")
    if path.name == HALFWAY:
        raise CheckpointError(f"{path} is from an unfinished run: finish it with --resume, then give its folder")
    return path


def settings_of(checkpoint: dict) -> PretrainSettings:
    return PretrainSettings.from_dict(checkpoint["settings"])


def keeps_start(checkpoint: dict) -> bool:
    """Whether the run found its result no better than the weights that it started from, and has kept these."""
    verdict = checkpoint["facts"].get("verdict")
    return bool(checkpoint.get("start") and verdict) and not verdict["better"]


def start_note(name: str, checkpoint: dict) -> str:
    """For the user, who gave this name of a run that keeps its start."""
    return f"note: {name} stands for {checkpoint['facts']['origin']} as it was, which that run did not improve"


def encoder_of(checkpoint: dict, result: bool = False) -> Encoder:
    """f alone, on the CPU, in evaluation mode: the better one of the run's result and its start, see `keeps_start`.

    result  f as the run ended, also if its start was better
    raises  CheckpointError if weights and settings do not match
    """
    settings = settings_of(checkpoint)
    encoder = build(settings.encoder, settings.width, settings.size_px)
    prefix = "encoder."
    weights = {key.removeprefix(prefix): w for key, w in checkpoint["state_dict"].items() if key.startswith(prefix)}
    try:
        encoder.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(
            f"the checkpoint of {settings.name or settings.data} holds weights of another architecture than its "
            f"settings, {settings.architecture} for {settings.size_px} px"
        ) from error
    if keeps_start(checkpoint) and not result:
        encoder.load_state_dict(checkpoint["start"])
    return encoder.eval()
