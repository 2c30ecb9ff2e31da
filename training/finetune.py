"""Adapt an encoder to labelled pictures: a classifier in runs/NAME.

    python training/finetune.py --init runs/PRETRAINED --data ~/Labelled --label-share 0.1

Per step: a batch of labelled pictures, cropped and flipped, cross-entropy, SGD or LARS. Everything random is drawn from
(seed, step), so what was interrupted goes on with --resume as if it had never stopped. With --held-out the epoch that
is best there is kept; the test split is asked about once, at the end.

    runs/NAME/  config.json  metrics.csv  result.json  report.png  checkpoints/last.ckpt (see training/classifier.py)
"""

if __name__ == "__main__" and not __package__:
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import copy
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from export.artifact import BundleError, Preprocessing
from training import checkpoint, classifier, recipes
from training.augment import augment
from training.checkpoint import CheckpointError
from training.classifier import Classifier
from training.config import RUNS
from training.data import store
from training.data.labelled import alone, check_classes, few, hold_out
from training.data.sources import DataError, open_source
from training.data.store import PixelStore
from training.data.stream import StreamedRows
from training.device import mixed_precision, prepare, training_device
from training.encoders import embed
from training.evaluation import gallery
from training.evaluation.bootstrap import interval
from training.evaluation.features import size_note
from training.halfway import Halfway, State, check_same
from training.initial import initial
from training.lars import LARS, lars_groups
from training.pretrain import commit, write_metrics
from training.recipes import FinetuneSettings
from training.schedule import scaled_lr, warmup_cosine
from training.zoo import ZooError

UNEQUAL = 3  # times the smallest class's size, from which on the largest is remarked upon


class Task:
    """The pictures of a fine-tuning: learnt from, held out, asked about. Labels are places in `classes`."""

    def __init__(self, settings: FinetuneSettings, train: PixelStore, test: PixelStore | None):
        """raises DataError for classes and shares that cannot work."""
        tested = test is not None and (test.labels >= 0).any()
        check_classes(train.labels, test.labels if tested else None, train.classes, settings.data)
        used = few(train.labels, train.classes, settings.label_share, settings.labels_per_class, settings.seed)
        present = np.unique(train.labels[used])
        self.classes = [train.classes[label] for label in present]
        self.pixels = train.pixels
        self.labels = np.searchsorted(present, train.labels)
        self.learnt, self.held = used, np.empty(0, np.int64)  # (n,) places in train
        if settings.held_out:
            if single := alone(train.labels[used], train.classes):
                raise DataError(
                    f"class {single[0]} has 1 labelled picture: none can be held out of it. Give --held-out 0, or more "
                    "labels"
                )
            kept, held = hold_out(train.labels[used], settings.held_out, settings.seed)
            self.learnt, self.held = used[kept], used[held]
        if tested:
            rows = np.flatnonzero(test.labels >= 0)
            self.test = StreamedRows(test.pixels, rows), np.searchsorted(present, test.labels[rows])
        else:
            self.test = None
        self.sizes = np.bincount(self.labels[self.learnt], minlength=len(present))


def finetune(settings: FinetuneSettings) -> Path:
    """Train, keep the best, judge. Returns the run's folder.

    raises  DataError, CheckpointError, BundleError, ZooError, ValueError
    """
    prepare()
    device = training_device()
    start = initial(settings.init, settings.encoder, settings.width, settings.size_px, settings.seed)
    hidden = None
    if settings.mode == "head":
        if start.projector is None:
            raise CheckpointError(f"--mode head wants a pretrained run: {settings.init or 'nothing'} has no head g")
        hidden = classifier.first_layer(start.projector)
    source = open_source(settings.data)
    if settings.init and (note := size_note(settings.init, start.settings.size_px, source.pictures)):
        print(f"note: {note}")
    preprocessing = Preprocessing(start.settings.size_px)
    train, test = store.load(source, preprocessing, "train"), None
    if any(picture.split == "test" for picture in source.pictures):
        test = store.load(source, preprocessing, "test")
    task = Task(settings, train, test)
    origin = Path(settings.init).stem.partition(":")[0] or "scratch"
    run = RUNS / (settings.name or f"{source.name}-{settings.preset}-{origin}")
    if (run / "checkpoints" / checkpoint.NAME).exists():
        if settings.resume:
            _, saved = classifier.load(run / "checkpoints" / checkpoint.NAME)
            check_same(run, saved["classifier"]["settings"], settings)
            print(f"{run} is finished")
            return run
        raise CheckpointError(f"{run} holds a run already: give another --name")
    halfway = Halfway(run, settings, len(task.learnt))
    halfway.begin()
    if task.sizes.max() > UNEQUAL * task.sizes.min() and settings.balance == "none":
        print(
            f"note: {task.classes[task.sizes.argmax()]} has {task.sizes.max()} pictures and "
            f"{task.classes[task.sizes.argmin()]} {task.sizes.min()}: --balance loss or sampling gives both a say"
        )
    print(
        f"fine-tuning {start.settings.architecture} from {start.origin} ({settings.mode}) on {len(task.learnt):,} "
        f"labelled pictures of {len(task.classes)} classes, {len(task.held):,} held out, into {run}"
    )
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.json").write_text(json.dumps(settings.to_dict(), indent=2))
    network = Classifier(start.encoder, hidden, len(task.classes)).to(device, memory_format=torch.channels_last)
    began = time.monotonic()
    history = train_classifier(network, task, settings, halfway)
    best = max(history, key=score) if len(task.held) else history[-1]
    facts = {
        "data": source.name,
        "images": len(task.learnt),
        "epochs": best["epoch"],
        "commit": commit(),
        "minutes": (time.monotonic() - began) / 60,
    }
    after = {"held_out": best["held_out"]} if len(task.held) else {}
    pictures, labels = task.test or (StreamedRows(task.pixels, task.held), task.labels[task.held])
    if len(labels):
        guess = embed(network, pictures).argmax(dim=1).numpy()
        words = "test" if task.test else "held-out"
        after |= {words: figures(guess, labels, task.classes)}
    facts["after"] = after
    (run / "result.json").write_text(json.dumps(facts, indent=1))
    about = {"classes": task.classes, "origin": start.origin, "settings": settings.to_dict()}
    classifier.save(run / "checkpoints" / checkpoint.NAME, network, start.settings, facts, history, about)
    halfway.end()
    if len(labels):
        found = after[words]
        line = f"{words} accuracy {found['accuracy']:.1%} ({found['low']:.1%} to {found['high']:.1%})"
        gallery.write_predictions(
            run / "report.png", [gallery.Predictions(f"{run.name}: {line}", pictures, labels, guess, task.classes)]
        )
        flattering = "" if task.test else "; it chose the epoch too, so this flatters"
        print(f"{line}, mean of the classes' {found['balanced']:.1%}, {len(labels):,} pictures{flattering}")
    if len(history) < settings.epochs:
        print(f"stopped after {len(history)} of {settings.epochs} epochs: the best was {best['epoch']}, and is kept")
    return run


def train_classifier(
    network: Classifier, task: Task, settings: FinetuneSettings, halfway: Halfway | None = None
) -> list[dict]:
    """Train in place, or go on; in the end the network is as it was at its best epoch. A row an epoch."""
    device = next(network.parameters()).device
    n = len(task.learnt)
    batch = min(settings.batch_size, n)
    steps = n // batch
    optimizer, scheduler = optimizers(network, settings, batch, settings.epochs * steps)
    weights = torch.tensor(task.sizes.sum() / (len(task.sizes) * task.sizes), dtype=torch.float32, device=device)
    state = halfway.load(network, optimizer, scheduler) if halfway else State([])
    step = len(state.history) * steps
    bar = tqdm(range(len(state.history) + 1, settings.epochs + 1), desc="fine-tuning", unit="epoch", dynamic_ncols=True)
    for epoch in bar:
        if len(task.held) and epoch - 1 - state.since >= settings.patience:
            break
        set_mode(network, settings)
        total = 0.0
        for rows in order(task, settings, epoch, batch).reshape(steps, batch):
            generator = torch.Generator(device).manual_seed((settings.seed << 40) + step)
            pixels = torch.from_numpy(task.pixels[rows]).to(device)
            views = augment(pixels, settings.augment, generator, pixels.shape[1])  # (B, 3, S, S)
            with mixed_precision(device):
                logits = network(views.contiguous(memory_format=torch.channels_last)).float()
            labels = torch.from_numpy(task.labels[rows]).to(device)
            loss = F.cross_entropy(logits, labels, weights if settings.balance == "loss" else None)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            total, step = total + loss.item(), step + 1
        row = {"epoch": epoch, "loss": total / steps, "lr": scheduler.get_last_lr()[0]}
        if not np.isfinite(total):
            raise ValueError(
                f"the loss is no number any more in epoch {epoch}: give a smaller --lr than {settings.learning_rate}"
            )
        if len(task.held):
            row |= judge_held(network, task, settings)
            if score(row) > state.best:
                state.best, state.kept, state.since = score(row), copy.deepcopy(network.state_dict()), epoch
            bar.set_postfix(loss=f"{row['loss']:.3f}", held_out=f"{row['held_out']:.1%}")
        state.history.append(row)
        if halfway:
            write_metrics(halfway.run / "metrics.csv", state.history)
            halfway.save(network, optimizer, scheduler, state)
    bar.close()
    if state.kept:
        network.load_state_dict(state.kept)
    network.eval()
    return state.history


def optimizers(network: Classifier, settings: FinetuneSettings, batch: int, steps: int):
    """LARS or Nesterov SGD, and the cosine. What is frozen is in neither; the classifier is never adapted."""
    body = nn.ModuleList([network.hidden] if settings.mode == "linear" else [network.encoder, network.hidden])
    groups = lars_groups(body, settings.weight_decay)
    head = [{**group, "adapt": False} for group in lars_groups(network.classifier, settings.weight_decay)]
    groups = [group for group in (*groups, *head) if group["params"]]
    lr = scaled_lr(settings.learning_rate, batch, settings.lr_scaling)
    if settings.optimizer == "lars":
        optimizer = LARS(groups, lr=lr, momentum=settings.momentum)
    else:
        groups = [{key: value for key, value in group.items() if key != "adapt"} for group in groups]
        optimizer = torch.optim.SGD(groups, lr=lr, momentum=settings.momentum, nesterov=True)
    warmup = round(settings.warmup * steps)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, warmup, steps))


def set_mode(network: Classifier, settings: FinetuneSettings) -> None:
    """All learns, or the classifier on an encoder whose batch norm stays as it is too."""
    network.train()
    if settings.mode == "linear":
        network.encoder.eval().requires_grad_(False)


def order(task: Task, settings: FinetuneSettings, epoch: int, batch: int) -> np.ndarray:
    """Places of an epoch's pictures, a whole number of batches: shuffled, or each class equally often."""
    rng, n = np.random.default_rng([settings.seed, epoch]), len(task.learnt)
    most = n // batch * batch
    if settings.balance == "sampling":
        share = 1 / task.sizes[task.labels[task.learnt]]
        return rng.choice(task.learnt, most, p=share / share.sum())
    return rng.permutation(task.learnt)[:most]


def judge_held(network: Classifier, task: Task, settings: FinetuneSettings) -> dict:
    labels = torch.from_numpy(task.labels[task.held])
    logits = embed(network, StreamedRows(task.pixels, task.held))
    right = (logits.argmax(dim=1) == labels).double()
    held_out = right.mean().item() if settings.balance == "none" else balanced(right, labels)
    return {"held_out": held_out, "held_out_loss": F.cross_entropy(logits, labels).item()}


def score(row: dict) -> tuple[float, float]:
    """Of an epoch: its accuracy on the held-out part, and of equals the one of less loss."""
    return row["held_out"], -row["held_out_loss"]


def balanced(right: Tensor, labels: Tensor) -> float:
    """The mean of the classes' accuracies: right (N,) 0 or 1, labels (N,)."""
    return float(np.mean([right[labels == label].mean().item() for label in labels.unique()]))


def figures(guess: np.ndarray, labels: np.ndarray, classes: list[str]) -> dict:
    """Of predictions, (Q,) int64 each: accuracy with its interval, mean of the classes', each class's."""
    right = (guess == labels).astype(np.float64)
    low, high = interval(right)
    return {
        "accuracy": right.mean().item(),
        "low": low,
        "high": high,
        "balanced": balanced(torch.from_numpy(right), torch.from_numpy(labels)),
        "pictures": len(labels),
        "per class": {classes[label]: right[labels == label].mean().item() for label in np.unique(labels)},
    }


def main() -> None:
    try:
        run = finetune(recipes.parse())
    except (DataError, CheckpointError, BundleError, ZooError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\nStopped. The same command with --resume goes on.")
        sys.exit(130)
    print(f"next: python training/evaluate.py {run} --data YOUR_PICTURES")


if __name__ == "__main__":
    main()
