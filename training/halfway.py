"""A fine-tuning or distillation on its way: kept after an epoch, so that after any interruption it goes on as if there
had been none.

runs/NAME/checkpoints/halfway.ckpt  network, optimizer, schedule, history, the best epoch so far; gone at the end
"""

import time
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from training import checkpoint
from training.checkpoint import AtomicCheckpointIO, CheckpointError
from training.recipes import FinetuneSettings


@dataclass
class State:
    """What training has found so far; the history's length is the number of epochs done."""

    history: list[dict]
    best: tuple[float, float] = (-1.0, 0.0)
    since: int = 0
    """The best epoch."""
    kept: dict | None = None
    """The network's state dict then."""


def check_same(run: Path, own: dict, asked: FinetuneSettings) -> None:
    """raises CheckpointError where a run is continued with other settings than its own."""
    for name, value in asked.to_dict().items():
        if name not in ("name", "resume") and value != own.get(name, value):
            flag = f"--{name.replace('_', '-')}"
            raise CheckpointError(f"{run} was begun with {flag} {own[name]}, not {value}: give that, or another --name")


class Halfway:
    """Of the run in this folder. It saves every checkpoint.EVERY_S seconds at most: what came since is done again."""

    def __init__(self, run: Path, settings: FinetuneSettings, pictures: int):
        self.run, self.settings, self.pictures = run, settings, pictures
        self.path = run / "checkpoints" / checkpoint.HALFWAY
        self.saved_at = 0.0

    def begin(self) -> None:
        """raises CheckpointError where there is one already and --resume was not given, or one of other settings."""
        if not self.path.exists():
            return
        run = self.run
        if not self.settings.resume:
            raise CheckpointError(f"{run} holds a run on its way: continue it with --resume, or give another --name")
        saved = checkpoint.load(self.path)
        check_same(run, saved["settings"], self.settings)
        if saved["pictures"] != self.pictures:
            raise CheckpointError(
                f"{run} was begun on {saved['pictures']:,} pictures and {self.settings.data} now has "
                f"{self.pictures:,}: give another --name"
            )

    def load(self, network: nn.Module, optimizer, scheduler) -> State:
        """Put all three where they were; a State without history where nothing was kept."""
        if not self.path.exists():
            return State([])
        saved = checkpoint.load(self.path)
        network.load_state_dict(saved["state_dict"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        return State(saved["history"], tuple(saved["best"]), saved["since"], saved["kept"])

    def save(self, network: nn.Module, optimizer, scheduler, state: State) -> None:
        if time.monotonic() - self.saved_at < checkpoint.EVERY_S:
            return
        content = {"settings": self.settings.to_dict(), "pictures": self.pictures, "state_dict": network.state_dict()}
        content |= {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
        content |= {"history": state.history, "best": state.best, "since": state.since, "kept": state.kept}
        AtomicCheckpointIO().save_checkpoint(content, self.path)
        self.saved_at = time.monotonic()

    def end(self) -> None:
        self.path.unlink(missing_ok=True)
