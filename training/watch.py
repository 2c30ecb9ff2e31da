"""Says early of a run that it cannot work: numbers that are none, a loss at chance, collapse, a learning rate that is
far off."""

import math

import pytorch_lightning as pl

from training.schedule import scaled_lr

FIRST_LOOK, EVERY = 10, 100  # steps; a look waits for the device
PATIENCE = 200  # steps after the warm-up before a loss at chance is reported
AT_CHANCE = 0.02  # of log(2N - 1)
COLLAPSED = 0.1  # of the spread that rows of independent directions have

# Peak learning rates between which runs have been seen to learn. LARS moves every kernel by lr * trust / (1 - momentum)
# of its length a step, here a hundredth of lr, whatever the batch.
SENSIBLE_LR = {"lars": (0.05, 15.0), "sgd": (1e-3, 5.0), "adamw": (1e-5, 2e-2)}


class RunProblem(ValueError):
    """A run that was ended because it could not work. The message says why and what to change."""


class Watch(pl.Callback):
    """Looks at `module.loss_value` and `module.spread`, tensors () on the device, from time to time."""

    def __init__(self, warmup_steps: int):
        self.warmup_steps = warmup_steps
        self.said: set[str] = set()

    def on_train_start(self, trainer, module):
        if said := lr_sentence(module.settings):
            self._say("lr", trainer, said)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_index):
        step = trainer.global_step
        if step == FIRST_LOOK or step % EVERY == 0:
            self.look(trainer, module)

    def on_train_epoch_end(self, trainer, module):
        self.look(trainer, module)  # before the checkpoint of this epoch is written

    def look(self, trainer, module) -> None:
        """raises RunProblem where the loss is not finite."""
        step, loss, spread = trainer.global_step, module.loss_value.item(), module.spread.item()
        settings = module.settings
        if not math.isfinite(loss):
            raise RunProblem(
                f"the loss is {loss} at step {step:,}, so the run was ended; its last checkpoint is from before. "
                f"Try a lower --lr than {settings.lr:g}, a longer --warmup, or a higher --temperature."
            )
        chance = math.log(2 * settings.batch_size - 1)
        if spread < COLLAPSED:
            self._say(
                "collapse",
                trainer,
                f"the projections of all pictures point the same way (spread {spread:.3f} of 1 at step {step:,}): the "
                f"encoder is collapsing. Try a lower --lr, or a --head-layers of 2 or 3, whose batch norm prevents it.",
            )
        elif step > self.warmup_steps + PATIENCE and loss > (1 - AT_CHANCE) * chance:
            self._say(
                "chance",
                trainer,
                f"the loss, {loss:.3f} at step {step:,}, is still at its chance level log(2N - 1) = {chance:.3f}: "
                f"nothing is being learnt. Are the pictures all alike, or the views too different? Try a gentler "
                f"augmentation, another --lr, or a lower --temperature.",
            )

    def _say(self, what: str, trainer, sentence: str) -> None:
        """Once a run."""
        if what not in self.said:
            self.said.add(what)
            if trainer.is_global_zero:
                trainer.progress_bar_callback.print(f"warning: {sentence}")


def lr_sentence(settings) -> str | None:
    """Of a peak learning rate that is out of range; None for one within."""
    peak = scaled_lr(settings.lr, settings.batch_size, settings.lr_scaling)
    low, high = SENSIBLE_LR[settings.optimizer]
    if low <= peak <= high:
        return None
    return (
        f"the peak learning rate is {peak:g} (--lr {settings.lr:g} with --lr-scaling {settings.lr_scaling} at batch "
        f"size {settings.batch_size}); {settings.optimizer} has been seen to learn between {low:g} and {high:g}."
    )
