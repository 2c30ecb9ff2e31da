r"""Distil a trained encoder or classifier into a smaller one, on pictures without labels: the student in runs/NAME.

    python training/distil.py --teacher runs/LARGE --encoder tiny --data ~/Pictures
    python training/distil.py --teacher lite0 --init lite0 --size-px 128 --data ~/Pictures --minutes 20

From a classifier the student learns its class probabilities for the same view of a picture (Chen et al. 2020,
arXiv:2006.10029, Eq. 2); t and s are the logits, tau the temperature:

    loss = - sum_y softmax(t / tau)_y log softmax(s / tau)_y

From an encoder it learns which pictures are near to each other: the same loss over each picture's cosines to the others
of its batch and to those of earlier batches of the epoch, as the student encoded them then, after CompRess
(Koohpayegani et al. 2020, arXiv:2010.14713) with its queue of earlier pictures. Cosines of h are compared with cosines
of h, so teacher and student may differ in dimension, and no layer is needed between h and the loss. The teacher encodes
every picture once, as a whole, and the student sees another view of it in each epoch: so a large teacher costs one pass
over the pictures.

With --init the student of an encoder starts from weights that already know much, and learns gently: AdamW at a low
learning rate, the statistics of batch norm as they are. So an encoder can learn, for smaller pictures, from itself at
its own size. The result is compared with the initial weights, by kNN accuracy if there are labels and otherwise by the
neighbours shared with the teacher. The better of the two is exported.

    runs/NAME/  config.json  metrics.csv  result.json  checkpoints/last.ckpt

The checkpoint has the format of a pretrained run's, or of a fine-tuned one's if the teacher is a classifier.
"""

if __name__ == "__main__" and not __package__:
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import copy
import dataclasses
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from export.paths import parse_settings
from export.suggest import command
from training import budget, checkpoint, classifier
from training.augment import AugmentSettings, draw, generator_at, render
from training.budget import Budget, process_began
from training.checkpoint import AtomicCheckpointIO
from training.classifier import Classifier
from training.config import RUNS, check_settings
from training.data import store
from training.data.sources import DataError, open_source
from training.data.store import PixelStore
from training.data.stream import StreamedRows
from training.device import mixed_precision, prepare, to_training_device
from training.encoders import CENTRE_IMAGES, Encoder, freeze_statistics
from training.evaluate import print_table
from training.evaluation.features import ENCODER_ERRORS, EncoderError
from training.evaluation.judge import verdict
from training.initial import load_initial
from training.lars import LARS, lars_groups
from training.resumable import ResumableRun, ResumableSettings, is_finished, train_epochs
from training.schedule import cosine_schedule, scaled_lr
from training.teacher import BANK_SIZE, TIMED, TIMED_S, Teacher, compare, notes, open_teacher, teacher_of
from training.zoo import short_name

CLASSES_TAU, NEIGHBOURS_TAU = 1.0, 0.1  # default temperatures for a classifier and for an encoder
SCRATCH_LR, PRETRAINED_LR = 0.15, 1e-4  # of LARS, before scaling with the batch size; of AdamW
EARLIER = 16_384  # most pictures of earlier batches with which a picture is compared
WARMUP, MOMENTUM, WEIGHT_DECAY = 0.05, 0.9, 1e-4  # share of the steps; of LARS; on matrices and kernels only
TEACHING, COMPARING = 0.3, 0.1  # most of --minutes for the teacher's pass over the pictures; for comparing at the end
COMPARED = 1.4  # pictures that a comparison encodes by each encoder, for each one of its bank


@dataclass(frozen=True, kw_only=True)
class DistilSettings(ResumableSettings):
    """Distil a trained encoder or classifier into a smaller one, on pictures without labels, into runs/NAME."""

    teacher: str
    """Encoder or classifier to learn from: a run or checkpoint, pretrained or fine-tuned, an exported bundle, or an
    encoder that others trained (lite0, timm:NAME, torchvision:NAME, also with :FILE)."""
    temperature: float | None = None
    """Temperature tau; lower values give more weight to a classifier's most likely class, or to an encoder's nearest
    pictures. By default 1 for a classifier and 0.1 for an encoder."""
    minutes: float | None = None
    """Instead of --epochs: the whole command takes this long, by the clock, and the learning rate follows the time."""
    augment: AugmentSettings = field(
        default_factory=lambda: AugmentSettings(crop_area=(0.25, 1.0), strength=0.5, grey=0.0, blur=0.0)
    )
    """Augmentation of the student's view, by default crops, flips and mild colour jitter."""
    batch_size: int = 128
    """Pictures per step. Reduced if there are fewer pictures."""
    lr: float | None = None
    """Peak learning rate. By default 0.15, which is multiplied by the square root of the batch size, of LARS. With
    --init and an encoder as the teacher 1e-4, of AdamW, so that the student keeps most of what it knows; initial
    weights that know little need a higher one."""

    def __post_init__(self) -> None:
        check_settings(self, ("size_px", "temperature", "epochs", "minutes", "lr"))
        if not self.batch_size >= 2:
            raise ValueError(f"--batch-size must be at least 2, not {self.batch_size}")


def soft_cross_entropy(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of softmax(logits / temperature), mean over N: logits (N, C) each -> () float32 in nats."""
    with torch.autocast(student.device.type, enabled=False):
        soft = F.softmax(teacher.float() / temperature, dim=1)
        return -(soft * F.log_softmax(student.float() / temperature, dim=1)).sum(dim=1).mean()


class NeighboursLoss:
    """soft_cross_entropy of each picture's cosines to the others of its batch and to earlier ones, the last EARLIER.

    No picture may come twice before `forget`, which is called at the start of an epoch: so a resumed run compares the
    same pictures as an uninterrupted one.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self.earlier: list[Tensor] = []  # (M, d) and (M, d'): unit h of student and teacher

    def __call__(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """h (N, d) and (N, d') float, N >= 2 -> () float32 in nats."""
        n = len(student)
        others = ~torch.eye(n, dtype=torch.bool, device=student.device)
        with torch.autocast(student.device.type, enabled=False):
            unit = [F.normalize(h.float(), dim=1) for h in (student, teacher)]
            earlier = self.earlier or [h[:0] for h in unit]
            ours, theirs = (
                torch.cat([(h @ h.T)[others].view(n, n - 1), h @ old.T], dim=1)  # (N, N - 1 + M)
                for h, old in zip(unit, earlier, strict=True)
            )
        self.earlier = [torch.cat([old, h])[-EARLIER:].detach() for h, old in zip(unit, earlier, strict=True)]
        return soft_cross_entropy(ours, theirs, temperature)


class DistilStep:
    """One training step: a view of some pictures, the teacher's output for it, and the student's loss."""

    def __init__(
        self,
        teacher: Teacher,
        pixels: np.ndarray | StreamedRows,
        size_px: int,
        settings: DistilSettings,
        targets: Tensor | None = None,
    ) -> None:
        """
        pixels   uint8 (N, S, S, 3); for a classifier S is the larger of the teacher's and the student's size
        size_px  the student's
        targets  h of an encoder for the N pictures (N, d); None for a classifier
        """
        self.targets = targets
        self.teacher, self.pixels, self.size_px, self.settings = teacher, pixels, size_px, settings
        self.neighbours = NeighboursLoss()
        self.temperature = settings.temperature or (CLASSES_TAU if teacher.classes else NEIGHBOURS_TAU)
        self.batch = min(settings.batch_size, len(pixels))
        self.steps_per_epoch = len(pixels) // self.batch

    def epoch(self, network: nn.Module, epoch: int) -> Iterator[Tensor]:
        """The loss of each step of an epoch; epochs are counted from 1."""
        self.neighbours.forget()
        rng = np.random.default_rng([self.settings.seed, epoch])
        order = rng.permutation(len(self.pixels))[: self.steps_per_epoch * self.batch]
        for i, rows in enumerate(order.reshape(self.steps_per_epoch, self.batch)):
            yield self(network, rows, (epoch - 1) * self.steps_per_epoch + i)

    def __call__(self, network: nn.Module, rows: np.ndarray, step: int) -> Tensor:
        """raises EncoderError when the teacher's output is NaN or infinite"""
        device = next(network.parameters()).device
        generator = generator_at(device, self.settings.seed, step)
        images = torch.from_numpy(self.pixels[rows]).to(device)
        n, height, width, _ = images.shape
        draws = draw(n, height, width, self.settings.augment, generator)
        views = render(images, draws, self.size_px)  # (B, 3, S, S)
        if self.targets is not None:
            with mixed_precision(device, network):
                output = network(views.contiguous(memory_format=torch.channels_last))
            return self.neighbours(output, self.targets[torch.from_numpy(rows)].to(device), self.temperature)
        same = self.teacher.size_px == self.size_px
        teacher_views = views if same else render(images, draws, self.teacher.size_px)
        teacher_views = (
            (teacher_views.permute(0, 2, 3, 1) * 255).round().to(torch.uint8)
        )  # the format that any encoder takes
        with mixed_precision(device, network):
            target = self.teacher.output(teacher_views.contiguous().cpu().numpy()).to(device)
            output = network(views.contiguous(memory_format=torch.channels_last))
        if not target.isfinite().all():
            raise EncoderError(f"--teacher {self.settings.teacher} gives values that are NaN or infinite")
        return soft_cross_entropy(output, target, self.temperature)


def distil(settings: DistilSettings, began: float | None = None) -> Path:
    """Train the student and compare it with the teacher. Returns the run's folder.

    began   when the time of --minutes began, on budget.clock; by default now
    raises  DataError, EncoderError, CheckpointError, BundleError, ZooError, ValueError
    """
    began = budget.clock() if began is None else began
    prepare()
    teacher = open_teacher(settings.teacher)
    size_px = settings.size_px or (None if settings.init else teacher.size_px)
    start = load_initial(settings.init, settings.encoder, settings.width, size_px, settings.seed)
    if not settings.init:  # a new student sees the part of a picture that its teacher sees
        start = start._replace(settings=dataclasses.replace(start.settings, crop=teacher.encoder.preprocessing.crop))
    architecture, size_px = start.settings.architecture, start.settings.size_px
    teacher_name = short_name(settings.teacher)
    source = open_source(settings.data)
    folder = RUNS / (settings.name or f"{source.name}-{short_name(settings.init or architecture)}-of-{teacher_name}")
    if is_finished(folder, settings):
        return folder
    ours, theirs = start.settings.preprocessing, teacher.encoder.preprocessing
    stores = {how: store.load_splits(source, how) for how in {ours, theirs}}
    seen = max(ours, theirs, key=lambda how: how.size_px) if teacher.classes else ours
    pixels = stores[seen][0].pixels
    if len(pixels) < 2:
        raise DataError(f"{settings.data} has one picture that can be read; distillation compares at least two")
    for note in notes(teacher, start.encoder, size_px, source):
        print(f"note: {note}")
    network = Classifier(start.encoder, None, len(teacher.classes)) if teacher.classes else start.encoder
    network = to_training_device(network)
    run = ResumableRun(folder, settings, len(pixels))
    run.budget = Budget(settings.minutes, began, run.saved and run.saved.get("budget"))
    initial = None  # of an encoder, to compare the result with
    if settings.init and isinstance(network, Encoder):
        network.set_centre(pixels)  # the teacher's h are centred too
        initial = copy.deepcopy(network)
    student = teacher_of("student", network, ours, teacher.classes)
    timed = ((teacher, theirs), (student, ours)) if settings.minutes else ()
    seconds = [encoding_s(one, stores[how][0]) for one, how in timed] or [0.0, 0.0]
    count, h = run.budget.affordable(TEACHING, seconds[0], len(pixels)), None
    encodes_all = count == len(pixels) and not teacher.classes  # then the comparison has the teacher's h of its bank
    students = 2 if initial else 1
    each_s = COMPARED * students * seconds[1] + (COMPARED - encodes_all) * seconds[0]
    bank = run.budget.affordable(COMPARING, each_s, BANK_SIZE)
    compared, centring = min(bank, len(pixels)), min(CENTRE_IMAGES, len(pixels))
    run.budget.ending_s["comparing"] = each_s * compared + (students + 1) * TIMED_S + centring * seconds[1]
    targets, taught = None, pixels
    if not teacher.classes:
        rows = np.sort(np.random.default_rng(settings.seed).permutation(len(pixels))[:count])
        if not encodes_all:
            taught = StreamedRows(pixels, rows)
            print(f"note: in --minutes {settings.minutes:g} the teacher encodes {count:,} of {len(pixels):,} pictures")
        whole = stores[theirs][0]
        h = teacher.encoder(StreamedRows(whole.pixels, rows), [whole.names[row] for row in rows])
        targets = h - h.mean(dim=0)
    step = DistilStep(teacher, taught, size_px, settings, targets)
    length = f"{settings.epochs} epoch{'s' * (settings.epochs > 1)}"
    if settings.minutes:
        length = f"{settings.minutes:g} min in all"
    print(
        f"distilling {settings.teacher} ({f'{len(teacher.classes)} classes' if teacher.classes else 'an encoder'}, "
        f"{teacher.size_px} px) into {architecture} at {size_px} px on {len(taught):,} pictures: {length}, "
        f"into {folder}"
    )
    run.begin()
    history = train_student(network, step, run)
    if isinstance(network, Encoder):
        network.set_centre(pixels)
    facts = run.facts(source.name, len(history))
    trained = ({"start": initial} if initial else {}) | {"student": network}
    models = {name: (teacher_of(name, one, ours, teacher.classes), stores[ours]) for name, one in trained.items()}
    figures = compare(models | {"teacher": (teacher, stores[theirs])}, bank, h if encodes_all else None)
    facts |= {"after": figures["student"], "teacher": figures["teacher"]}
    if initial:
        found = verdict(start.origin, figures["start"], figures["student"])
        facts |= {"origin": start.origin, "before": figures["start"], "verdict": found._asdict()}
    (folder / "result.json").write_text(json.dumps(facts, indent=1))
    last = folder / "checkpoints" / checkpoint.NAME
    about = {"origin": f"{start.origin}, taught by {teacher_name}", "settings": run.settings.to_dict()}
    if isinstance(network, Classifier):
        classifier.save(last, network, start.settings, facts, history, about | {"classes": teacher.classes})
    else:
        weights = {f"encoder.{key}": value.cpu() for key, value in network.state_dict().items()}
        content = {"settings": start.settings.to_dict(), "facts": facts, "history": history, "state_dict": weights}
        content |= {"start": {key: value.cpu() for key, value in initial.state_dict().items()}} if initial else {}
        AtomicCheckpointIO().save_checkpoint(content | {"distillation": about}, last)
    run.end()
    print_table([{"encoder": name} | row for name, row in figures.items()])
    print(f"\n{run.budget.outcome()}")
    agreement, pictures = facts["after"]["agreement"], facts["after"]["pictures"]
    if teacher.classes:
        print(f"student and teacher give {agreement:.1%} of {pictures:,} pictures the same class")
    else:
        print(f"student and teacher share {agreement:.1%} of the ten nearest of each of {pictures:,} pictures")
    if "verdict" in facts:
        print(f"the result is {facts['verdict']['sentence']}")
    return folder


def encoding_s(model: Teacher, pictures: PixelStore) -> float:
    """Seconds that encoding one picture takes."""
    sample = np.array(pictures.pixels[:TIMED])
    return budget.item_s(lambda: model.encoder.encode(sample), len(sample))


def train_student(network: nn.Module, step: DistilStep, run: ResumableRun) -> list[dict]:
    """Train in place, or resume. Returns one row per epoch."""
    settings, groups = step.settings, lars_groups(network, WEIGHT_DECAY)
    gently = settings.init and isinstance(network, Encoder)
    lr = settings.lr or (PRETRAINED_LR if gently else SCRATCH_LR)
    if gently:
        optimizer: Optimizer = AdamW(groups, lr=lr)
    else:
        optimizer = LARS(groups, lr=scaled_lr(lr, step.batch, "sqrt"), momentum=MOMENTUM)
    scheduler = cosine_schedule(optimizer, WARMUP, settings.epochs * step.steps_per_epoch, run.budget)
    network.train()
    if gently:
        freeze_statistics(network)
    return train_epochs(network, optimizer, scheduler, settings, lr, partial(step.epoch, network), run)


def main() -> None:
    try:
        run = distil(parse_settings(DistilSettings), process_began())
    except (DataError, *ENCODER_ERRORS, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\nStopped. Run the same command with --resume to continue.")
        sys.exit(130)
    print(f"next: {command('export/to_onnx.py', run)}")


if __name__ == "__main__":
    main()
