r"""Distil a trained encoder or classifier into a smaller one, on pictures without labels: the student in runs/NAME.

    python training/distil.py --teacher runs/LARGE --encoder tiny --data ~/Pictures

Both see the same view of a picture. Of a classifier the student learns its answers (Chen et al. 2020, arXiv:2006.10029,
Eq. 2); t and s are the logits, tau the temperature:

    loss = - sum_y softmax(t / tau)_y log softmax(s / tau)_y

Of an encoder it learns who is near to whom: the same loss over each picture's cosines to the others of its batch, as in
CompRess (Koohpayegani et al. 2020, arXiv:2010.14713), which takes a queue of earlier pictures instead of the batch.
Cosines of h are compared with cosines of h: neither has to be as wide as the other, and nothing stands between h and
the loss.

    runs/NAME/  config.json  metrics.csv  result.json  checkpoints/last.ckpt

What reads a pretrained run's checkpoint, or a fine-tuned one's, reads its student's.
"""

if __name__ == "__main__" and not __package__:
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import copy
import dataclasses
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from tqdm import tqdm

from training import checkpoint, classifier
from training.augment import AugmentSettings, draw, render
from training.checkpoint import AtomicCheckpointIO, CheckpointError
from training.classifier import Classifier
from training.config import RUNS, check_settings
from training.data.sources import DataError, open_source
from training.device import mixed_precision, prepare, training_device
from training.evaluate import print_table
from training.evaluation.features import ENCODER_ERRORS, EncoderError
from training.halfway import Halfway, check_same
from training.initial import initial
from training.lars import LARS, lars_groups
from training.pretrain import commit, write_metrics
from training.schedule import scaled_lr, warmup_cosine
from training.teacher import Teacher, compare, load_both, notes, of_network, open_teacher

ANSWERS_TAU, NEIGHBOURS_TAU = 1.0, 0.1
WARMUP, MOMENTUM, WEIGHT_DECAY = 0.05, 0.9, 1e-4  # share of the steps; of LARS; on matrices and kernels only
CALIBRATION_STEPS = 8


@dataclass(frozen=True)
class DistilSettings:
    """Distil a trained encoder or classifier into a smaller one, on pictures without labels, into runs/NAME."""

    teacher: str
    """What is learnt from: a run or checkpoint, pretrained or fine-tuned, an exported bundle, or the features of a
    model of torchvision (resnet50, resnet50:IMAGENET1K_V1, resnet50:FILE.pth)."""
    data: str = "shapes"
    """Pictures, whose labels are not learnt from: a folder, a .zip, shards, a torchvision name, or shapes."""
    name: str = ""
    """The run's folder is runs/NAME. By default of data, student and teacher."""
    resume: bool = False
    """Continue runs/NAME from where it was interrupted (a finished run is left as it is)."""

    init: str = ""
    """What the student starts from: whatever finetune.py's --init takes. By default nothing."""
    encoder: Literal["tiny", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152"] | None = None
    """The student's architecture, where it starts from nothing (by default tiny)."""
    width: Literal[1, 2, 4] | None = None
    """Where it starts from nothing."""
    size_px: int | None = None
    """Of the pictures that the student sees; by default the teacher's, or what the student was trained at."""

    temperature: float | None = None
    """tau; lower, and a classifier's first answer or an encoder's nearest pictures count for more. By default 1 for
    answers and 0.1 for neighbours."""
    augment: AugmentSettings = field(
        default_factory=lambda: AugmentSettings(crop_area=(0.25, 1.0), jitter=0.0, grey=0.0, blur=0.0)
    )
    """Of the view that both see: crops and flips."""
    epochs: int = 100
    """Passes over the pictures."""
    minutes: float | None = None
    """Instead of --epochs: as many epochs as fit in this time, by the speed of the first steps."""
    batch_size: int = 128
    """At most all the pictures."""
    lr: float = 0.15
    """Learning rate of LARS, times the square root of the batch size."""
    seed: int = 0
    """Of weights, order, and augmentation."""

    def __post_init__(self):
        check_settings(self, ("size_px", "temperature", "epochs", "minutes", "lr"))
        if not self.batch_size >= 2:
            raise ValueError(f"--batch-size must be at least 2, not {self.batch_size}")

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)


def answers_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of the softened answers, the mean over N: logits (N, C) each -> () float32 in nats."""
    with torch.autocast(student.device.type, enabled=False):
        soft = F.softmax(teacher.float() / temperature, dim=1)
        return -(soft * F.log_softmax(student.float() / temperature, dim=1)).sum(dim=1).mean()


def neighbours_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The same of each picture's cosines to the N - 1 others: h (N, d) and (N, d') float, N >= 2."""
    n = len(student)
    others = ~torch.eye(n, dtype=torch.bool, device=student.device)
    with torch.autocast(student.device.type, enabled=False):
        unit = [F.normalize(h.float(), dim=1) for h in (student, teacher)]
        ours, theirs = ((h @ h.T)[others].view(n, n - 1) for h in unit)
    return answers_loss(ours, theirs, temperature)


class Lesson:
    """A step: a view of some pictures, what the teacher makes of it, and what the student does."""

    def __init__(self, teacher: Teacher, pixels: np.ndarray, size_px: int, settings: DistilSettings):
        """pixels: uint8 (N, S, S, 3), S the larger of teacher's and student's size."""
        self.teacher, self.pixels, self.size_px, self.settings = teacher, pixels, size_px, settings
        self.loss = answers_loss if teacher.classes else neighbours_loss
        self.temperature = settings.temperature or (ANSWERS_TAU if teacher.classes else NEIGHBOURS_TAU)
        self.batch = min(settings.batch_size, len(pixels))
        self.steps = len(pixels) // self.batch  # of an epoch

    def order(self, epoch: int) -> np.ndarray:
        """Places of an epoch's pictures, (steps, batch)."""
        rng = np.random.default_rng([self.settings.seed, epoch])
        return rng.permutation(len(self.pixels))[: self.steps * self.batch].reshape(self.steps, self.batch)

    def __call__(self, network: nn.Module, rows: np.ndarray, step: int) -> Tensor:
        """The loss. raises EncoderError where the teacher gives no numbers."""
        device = next(network.parameters()).device
        generator = torch.Generator(device).manual_seed((self.settings.seed << 40) + step)
        images = torch.from_numpy(self.pixels[rows]).to(device)
        draws = draw(len(rows), *images.shape[1:3], self.settings.augment, generator)
        views = render(images, draws, self.size_px)  # (B, 3, S, S)
        same = self.teacher.size_px == self.size_px
        shown = views if same else render(images, draws, self.teacher.size_px)
        shown = (shown.permute(0, 2, 3, 1) * 255).round().to(torch.uint8)  # as pictures reach any encoder
        with mixed_precision(device):
            taught = self.teacher.answer(shown.contiguous().cpu().numpy()).to(device)
            learnt = network(views.contiguous(memory_format=torch.channels_last))
        if not taught.isfinite().all():
            raise EncoderError(f"--teacher {self.settings.teacher} gives values that are no numbers (NaN or infinite)")
        return self.loss(learnt, taught, self.temperature)


def distil(settings: DistilSettings) -> Path:
    """Train and judge. Returns the run's folder.

    raises  DataError, EncoderError, CheckpointError, BundleError, ZooError, ValueError
    """
    prepare()
    device = training_device()
    teacher = open_teacher(settings.teacher)
    size_px = settings.size_px or (None if settings.init else teacher.size_px)
    start = initial(settings.init, settings.encoder, settings.width, size_px, settings.seed)
    architecture, size_px = start.settings.architecture, start.settings.size_px
    taught_by = Path(settings.teacher).stem.partition(":")[0]
    source = open_source(settings.data)
    run = RUNS / (settings.name or f"{source.name}-{architecture}-of-{taught_by}")
    last = run / "checkpoints" / checkpoint.NAME
    if last.exists() and settings.resume:
        continued(run, last, settings)
        print(f"{run} is finished")
        return run
    if last.exists():
        raise CheckpointError(f"{run} holds a run already: give another --name")
    stores = {px: load_both(source, px) for px in {size_px, teacher.size_px}}
    pixels = stores[max(stores)][0].pixels
    if len(pixels) < 2:
        raise DataError(f"{settings.data} has one picture that can be read; to learn who is near takes two")
    for note in notes(teacher, start.encoder, size_px, source):
        print(f"note: {note}")
    network = Classifier(start.encoder, None, len(teacher.classes)) if teacher.classes else start.encoder
    network = network.to(device, memory_format=torch.channels_last)
    halfway = Halfway(run, settings, len(pixels))
    if settings.resume and halfway.path.exists():
        halfway.settings = settings = continued(run, halfway.path, settings)
    elif settings.minutes and not halfway.path.exists():
        epochs = epochs_in(settings.minutes, network, Lesson(teacher, pixels, size_px, settings))
        halfway.settings = settings = dataclasses.replace(settings, epochs=epochs)
    halfway.begin()
    print(
        f"distilling {settings.teacher} ({f'{len(teacher.classes)} classes' if teacher.classes else 'an encoder'}, "
        f"{teacher.size_px} px) into {architecture} at {size_px} px on {len(pixels):,} pictures: {settings.epochs} "
        f"epochs, into {run}"
    )
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.json").write_text(json.dumps(settings.to_dict(), indent=2))
    began = time.monotonic()
    history = train_student(network, Lesson(teacher, pixels, size_px, settings), halfway)
    facts = {"data": source.name, "images": len(pixels), "epochs": settings.epochs, "commit": commit()}
    facts["minutes"] = (time.monotonic() - began) / 60
    student = of_network(run.name, network, size_px, teacher.classes)
    facts["after"] = compare(student, teacher, stores[size_px], stores[teacher.size_px])
    about = {"origin": f"{start.origin}, taught by {taught_by}", "settings": settings.to_dict()}
    (run / "result.json").write_text(json.dumps(facts, indent=1))
    if teacher.classes:
        classifier.save(last, network, start.settings, facts, history, about | {"classes": teacher.classes})
    else:
        weights = {f"encoder.{key}": value.cpu() for key, value in network.state_dict().items()}
        content = {"settings": start.settings.to_dict(), "facts": facts, "history": history, "state_dict": weights}
        AtomicCheckpointIO().save_checkpoint(content | {"distillation": about}, last)
    halfway.end()
    print_table(facts["after"]["rows"])
    what = "answers of {:,} pictures" if teacher.classes else "ten nearest of each of {:,} pictures"
    print(f"\nthey agree on {facts['after']['agreement']:.1%} of the {what.format(facts['after']['pictures'])}")
    return run


def continued(run: Path, path: Path, asked: DistilSettings) -> DistilSettings:
    """What was asked for, which must be the run's own. How many epochs --minutes are was decided when it began."""
    saved = checkpoint.load(path)
    own = (saved.get("classifier") or saved.get("distillation") or saved)["settings"]
    if "teacher" not in own:
        raise CheckpointError(f"{run} is no distillation: give another --name")
    if asked.minutes:
        asked = dataclasses.replace(asked, epochs=own["epochs"])
    check_same(run, own, asked)
    return asked


def epochs_in(minutes: float, network: nn.Module, lesson: Lesson) -> int:
    """How many fit, by timing a few steps of a copy."""
    trial, rows = copy.deepcopy(network).train(), np.arange(lesson.batch)
    seconds = []
    for step in range(CALIBRATION_STEPS):
        began = time.perf_counter()
        loss = lesson(trial, rows, step)
        loss.backward()
        loss.item()  # waits for the device
        seconds.append(time.perf_counter() - began)
    return max(1, int(minutes * 60 / min(seconds) / lesson.steps))  # others' work only makes steps longer


def train_student(network: nn.Module, lesson: Lesson, halfway: Halfway) -> list[dict]:
    """Train in place, or go on. A row an epoch."""
    settings, total = lesson.settings, lesson.settings.epochs * lesson.steps
    lr = scaled_lr(settings.lr, lesson.batch, "sqrt")
    optimizer = LARS(lars_groups(network, WEIGHT_DECAY), lr=lr, momentum=MOMENTUM)
    warmup = round(WARMUP * total)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, warmup, total))
    state = halfway.load(network, optimizer, scheduler)
    step = len(state.history) * lesson.steps
    network.train()
    bar = tqdm(range(len(state.history) + 1, settings.epochs + 1), desc="distilling", unit="epoch", dynamic_ncols=True)
    for epoch in bar:
        losses = 0.0
        for rows in lesson.order(epoch):
            loss = lesson(network, rows, step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses, step = losses + loss.item(), step + 1
        row = {"epoch": epoch, "loss": losses / lesson.steps, "lr": scheduler.get_last_lr()[0]}
        if not np.isfinite(losses):
            raise ValueError(f"the loss is no number any more in epoch {epoch}: give a smaller --lr than {settings.lr}")
        bar.set_postfix(loss=f"{row['loss']:.3f}")
        state.history.append(row)
        write_metrics(halfway.run / "metrics.csv", state.history)
        halfway.save(network, optimizer, scheduler, state)
    network.eval()
    return state.history


def main() -> None:
    try:
        run = distil(tyro.cli(DistilSettings))
    except (DataError, *ENCODER_ERRORS, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\nStopped. The same command with --resume goes on.")
        sys.exit(130)
    print(f"next: python export/to_onnx.py {run}")


if __name__ == "__main__":
    main()
