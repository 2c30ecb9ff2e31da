"""Fine-tune an encoder on labelled pictures: the classifier in runs/NAME.

    python training/finetune.py --init runs/PRETRAINED --data ~/Labelled --label-share 0.1
    python training/finetune.py --init lite0 --data ~/Pictures --labels to_label.csv

Each step: a batch of labelled pictures, cropped and flipped, cross-entropy, SGD or LARS. All random numbers are drawn
from (seed, step), so that an interrupted run continued with --resume gives the same result. With --held-out the epoch
with the best held-out accuracy is kept; the test split is used once, at the end.

    runs/NAME/  config.json  metrics.csv  result.json  report.png  checkpoints/last.ckpt (see training/classifier.py)
                next.csv  with --labels: the pictures without a label that the classifier is least sure of
"""

if __name__ == "__main__" and not __package__:
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import json
import shlex
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from export.artifact import BundleError
from export.suggest import command
from training import checkpoint, classifier, recipes
from training.augment import augment, generator_at
from training.checkpoint import CheckpointError
from training.classifier import Classifier
from training.config import RUNS
from training.data import store
from training.data.label_files import relabel, write_next
from training.data.labelled import check_classes, choose_labelled, hold_out, single_picture_classes
from training.data.sources import DataError, Source, open_source
from training.data.store import PixelStore
from training.data.stream import StreamedRows
from training.device import mixed_precision, prepare, to_training_device
from training.encoders import embed, head_for_h
from training.evaluation import gallery
from training.evaluation.bootstrap import interval
from training.evaluation.features import size_note
from training.evaluation.knn import default_k, knn_predict
from training.evaluation.words import compared
from training.initial import InitialWeights, load_initial
from training.lars import LARS, lars_groups
from training.recipes import FinetuneSettings
from training.resumable import ResumableRun, is_finished, score, train_epochs
from training.schedule import cosine_schedule, scaled_lr
from training.zoo import ZooError, short_name

UNEQUAL = 3  # a note is printed when the largest class is more than this many times as large as the smallest


class TaskData:
    """The labelled pictures of a fine-tuning: to train on, held out, and to test on.

    classes        names, without those that have no labelled picture
    labels         (N,) int64, index into `classes`, of all training pictures
    train_rows     (n,) int64, rows of `pixels` and `labels` to train on
    held_out_rows  (m,) int64
    unlabelled     (u,) int64, rows of `pixels` without a label
    class_sizes    (C,) int64, pictures of each class in train_rows
    test           pixels and labels of the test split; None without one
    """

    def __init__(self, settings: FinetuneSettings, train: PixelStore, test: PixelStore | None) -> None:
        """raises DataError for classes or shares that leave nothing to train on or to hold out."""
        tested = test is not None and (test.labels >= 0).any()
        check_classes(train.labels, test.labels if tested else None, train.classes, settings.data)
        used = choose_labelled(
            train.labels, train.classes, settings.label_share, settings.labels_per_class, settings.seed
        )
        present = np.unique(train.labels[used])
        self.classes = [train.classes[label] for label in present]
        self.pixels, self.names, self.unlabelled = train.pixels, train.names, np.flatnonzero(train.labels < 0)
        self.labels = np.searchsorted(present, train.labels)
        self.train_rows, self.held_out_rows = used, np.empty(0, np.int64)
        if settings.held_out:
            if single := single_picture_classes(train.labels[used], train.classes):
                raise DataError(
                    f"class {single[0]} has 1 labelled picture, so none can be held out. Give --held-out 0, or more "
                    "labels"
                )
            kept, held_out = hold_out(train.labels[used], settings.held_out, settings.seed)
            self.train_rows, self.held_out_rows = used[kept], used[held_out]
        self.test = None
        if tested:
            rows = np.flatnonzero(test.labels >= 0)
            self.test = StreamedRows(test.pixels, rows), np.searchsorted(present, test.labels[rows])
        self.class_sizes = np.bincount(self.labels[self.train_rows], minlength=len(present))


def finetune(settings: FinetuneSettings) -> Path:
    """Train, keep the best epoch, test. Returns the run's folder.

    raises  DataError, CheckpointError, BundleError, ZooError, ValueError
    """
    prepare()
    start = load_initial(settings.init, settings.encoder, settings.width, settings.size_px, settings.seed)
    hidden = None
    if settings.mode == "head":
        if start.projector is None:
            where = f"{settings.init} has no projection head" if settings.init else "give its folder as --init"
            raise CheckpointError(f"--mode head needs a pretrained run: {where}")
        hidden = classifier.first_layer(head_for_h(start.projector, start.encoder))
    source = open_source(settings.data)
    if settings.labels:
        source = relabel(source, settings.labels)
    if settings.init and (note := size_note(settings.init, start.settings.size_px, source.pictures)):
        print(f"note: {note}")
    task = TaskData(settings, *store.load_splits(source, start.settings.preprocessing))
    origin = short_name(settings.init) if settings.init else "scratch"
    folder = RUNS / (settings.name or f"{source.name}-{settings.preset}-{origin}")
    if is_finished(folder, settings):
        return folder
    run = ResumableRun(folder, settings, len(task.train_rows))
    print_task(task, settings, start, folder)
    run.begin()
    network = to_training_device(Classifier(start.encoder, hidden, len(task.classes)))
    before = right_before(network.encoder, task)
    history = train_classifier(network, task, settings, run)
    best = max(history, key=score) if len(task.held_out_rows) else history[-1]
    facts = run.facts(source.name, best["epoch"])
    facts["after"] = {"held_out": best["held_out"]} if len(task.held_out_rows) else {}
    facts["after"] |= evaluate_classifier(network, task, folder, before)
    (folder / "result.json").write_text(json.dumps(facts, indent=1))
    about = {"classes": task.classes, "origin": start.origin, "settings": settings.to_dict()}
    classifier.save(folder / "checkpoints" / checkpoint.NAME, network, start.settings, facts, history, about)
    if settings.labels and len(task.unlabelled):
        list_next(network, task, settings, source, folder / "next.csv")
    run.end()
    if len(history) < settings.epochs:
        print(
            f"stopped after {len(history)} of {settings.epochs} epochs; epoch {best['epoch']} was the best and is kept"
        )
    return folder


def print_task(task: TaskData, settings: FinetuneSettings, start: InitialWeights, folder: Path) -> None:
    sizes = task.class_sizes
    if sizes.max() > UNEQUAL * sizes.min() and settings.balance == "none":
        print(
            f"note: {task.classes[sizes.argmax()]} has {sizes.max()} pictures and {task.classes[sizes.argmin()]} "
            f"{sizes.min()}: --balance loss or sampling gives both the same weight"
        )
    print(
        f"fine-tuning {start.settings.architecture} from {start.origin} (--mode {settings.mode}) on "
        f"{len(task.train_rows):,} labelled pictures of {len(task.classes)} classes, {len(task.held_out_rows):,} held "
        f"out, into {folder}"
    )


def train_classifier(
    network: Classifier, task: TaskData, settings: FinetuneSettings, run: ResumableRun | None = None
) -> list[dict]:
    """Train in place, or resume `run`; keep the weights of the best epoch. Returns one row per epoch."""
    device = next(network.parameters()).device
    batch = min(settings.batch_size, len(task.train_rows))
    steps = len(task.train_rows) // batch
    sizes = task.class_sizes
    weights = torch.tensor(sizes.sum() / (len(sizes) * sizes), dtype=torch.float32, device=device)

    precision = mixed_precision(device, network)

    def losses(epoch: int) -> Iterator[Tensor]:
        set_mode(network, settings)
        for i, rows in enumerate(order(task, settings, epoch, batch).reshape(steps, batch)):
            generator = generator_at(device, settings.seed, (epoch - 1) * steps + i)
            pixels = torch.from_numpy(task.pixels[rows]).to(device)
            views = augment(pixels, settings.augment, generator, pixels.shape[1])  # (B, 3, S, S)
            with precision:
                logits = network(views.contiguous(memory_format=torch.channels_last)).float()
            labels = torch.from_numpy(task.labels[rows]).to(device)
            yield F.cross_entropy(logits, labels, weights if settings.balance == "loss" else None)

    optimizer, scheduler = optimizers(network, settings, batch, settings.epochs * steps)
    evaluate = partial(evaluate_held_out, network, task, settings) if len(task.held_out_rows) else None
    lr = settings.learning_rate
    return train_epochs(network, optimizer, scheduler, settings, lr, losses, run, evaluate, settings.patience)


def optimizers(network: Classifier, settings: FinetuneSettings, batch: int, steps: int) -> tuple[Optimizer, LambdaLR]:
    """LARS or Nesterov SGD, and the cosine schedule over `steps` steps.

    Frozen weights are in neither; LARS never adapts the rate of the classifier itself.
    """
    body = nn.ModuleList([network.hidden] if settings.mode == "linear" else [network.encoder, network.hidden])
    groups = lars_groups(body, settings.weight_decay)
    head = [{**group, "adapt": False} for group in lars_groups(network.classifier, settings.weight_decay)]
    groups = [group for group in (*groups, *head) if group["params"]]
    lr = scaled_lr(settings.learning_rate, batch, settings.lr_scaling)
    if settings.optimizer == "lars":
        optimizer = LARS(groups, lr=lr, momentum=settings.momentum)
    else:  # ignores `adapt`
        optimizer = torch.optim.SGD(groups, lr=lr, momentum=settings.momentum, nesterov=True)
    return optimizer, cosine_schedule(optimizer, settings.warmup, steps)


def set_mode(network: Classifier, settings: FinetuneSettings) -> None:
    """Put the network into training mode; with --mode linear the encoder and its batch norm statistics stay frozen."""
    network.train()
    if settings.mode == "linear":
        network.encoder.eval().requires_grad_(False)


def order(task: TaskData, settings: FinetuneSettings, epoch: int, batch: int) -> np.ndarray:
    """Rows of an epoch's pictures, a whole number of batches: shuffled, or each class drawn equally often."""
    rng, n = np.random.default_rng([settings.seed, epoch]), len(task.train_rows)
    most = n // batch * batch
    if settings.balance == "sampling":
        share = 1 / task.class_sizes[task.labels[task.train_rows]]
        return rng.choice(task.train_rows, most, p=share / share.sum())
    return rng.permutation(task.train_rows)[:most]


def evaluate_held_out(network: Classifier, task: TaskData, settings: FinetuneSettings) -> dict:
    """Accuracy (with --balance: mean over the classes) and loss on the held-out pictures."""
    labels = torch.from_numpy(task.labels[task.held_out_rows])
    logits = embed(network, StreamedRows(task.pixels, task.held_out_rows))
    right = (logits.argmax(dim=1) == labels).double()
    held_out = right.mean().item() if settings.balance == "none" else balanced_accuracy(right, labels)
    return {"held_out": held_out, "held_out_loss": F.cross_entropy(logits, labels).item()}


def balanced_accuracy(right: Tensor, labels: Tensor) -> float:
    """Mean of the classes' accuracies: right (N,) 0 or 1, labels (N,)."""
    return float(np.mean([right[labels == label].mean().item() for label in labels.unique()]))


def judged_pictures(task: TaskData) -> tuple[StreamedRows, np.ndarray]:
    """Those of the test split, or without one of the held-out part, and their labels (Q,) int64."""
    held_out = StreamedRows(task.pixels, task.held_out_rows), task.labels[task.held_out_rows]
    return task.test or held_out


def right_before(encoder: nn.Module, task: TaskData) -> np.ndarray:
    """Whether each judged picture has its label by the nearest labelled ones, of the encoder as it is: (Q,) 0 or 1."""
    pictures, labels = judged_pictures(task)
    if not len(labels):
        return np.empty(0)
    bank, known = StreamedRows(task.pixels, task.train_rows), torch.from_numpy(task.labels[task.train_rows])
    guess = knn_predict(embed(encoder, bank), known, embed(encoder, pictures), default_k(len(known)))
    return (guess.numpy() == labels).astype(np.float64)


def evaluate_classifier(network: Classifier, task: TaskData, folder: Path, before: np.ndarray) -> dict:
    """Measures on the judged pictures, and compares with `right_before`. Prints, draws and returns them."""
    pictures, labels = judged_pictures(task)
    if not len(labels):
        return {}
    name = "test" if task.test else "held-out"
    guess = embed(network, pictures).argmax(dim=1).numpy()
    figures = accuracies(guess, labels, task.classes)
    optimistic = "" if task.test else "; the best epoch was chosen on these pictures, so this is optimistic"
    line = f"{name} accuracy {figures['accuracy']:.1%} ({figures['low']:.1%} to {figures['high']:.1%})"
    predictions = gallery.Predictions(f"{folder.name}: {line}", pictures, labels, guess, task.classes)
    gallery.write_predictions(folder / "report.png", [predictions])
    print(f"{line}, mean of the classes {figures['balanced']:.1%}, {len(labels):,} pictures")
    right = (guess == labels).astype(np.float64)
    shares, start = (right.mean().item(), before.mean().item()), "the encoder before, by its nearest neighbours"
    sentence = compared("the classifier", start, f"{name} accuracy", shares, interval(right - before)) + optimistic
    print(sentence)
    return {name: figures | {"before": shares[1], "verdict": sentence}}


def list_next(network: Classifier, task: TaskData, settings: FinetuneSettings, source: Source, file: Path) -> None:
    """List the pictures without a label whose two likeliest classes have the most similar probabilities."""
    probabilities = embed(network, StreamedRows(task.pixels, task.unlabelled)).softmax(dim=1)  # (u, C)
    best, guess = probabilities.topk(2)
    margins = best[:, 0] - best[:, 1]
    least_sure = margins.argsort(stable=True)[: settings.next].numpy()
    by_name = {picture.name: picture for picture in source.pictures}
    pictures = [by_name[task.names[row]] for row in task.unlabelled[least_sure]]
    write_next(file, pictures, [task.classes[label] for label in guess[least_sure, 0]], margins[least_sure].tolist())
    print(
        f"the {len(pictures)} pictures that the classifier is least sure of are listed in {file}: fill in the column "
        f"label, and give it next time too: --labels {' '.join(map(shlex.quote, (*settings.labels, str(file))))}"
    )


def accuracies(guess: np.ndarray, labels: np.ndarray, classes: list[str]) -> dict:
    """guess, labels (Q,) int64 -> accuracy with its interval, mean of the classes' accuracies, and each class's."""
    right = (guess == labels).astype(np.float64)
    low, high = interval(right)
    return {
        "accuracy": right.mean().item(),
        "low": low,
        "high": high,
        "balanced": balanced_accuracy(torch.from_numpy(right), torch.from_numpy(labels)),
        "pictures": len(labels),
        "per class": {classes[label]: right[labels == label].mean().item() for label in np.unique(labels)},
    }


def main() -> None:
    try:
        run = finetune(recipes.parse())
    except (DataError, CheckpointError, BundleError, ZooError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\nStopped. Run the same command with --resume to continue.")
        sys.exit(130)
    print(f"next: {command('training/evaluate.py', run, '--data', 'YOUR_PICTURES')}")


if __name__ == "__main__":
    main()
