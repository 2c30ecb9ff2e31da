"""Gain of pretraining with few labels: fine-tuning a pretrained run, and training from random weights.

    python benchmarks/few_labels.py --run runs/clothing-tiny --data clothing.zip

Both use finetune.py's defaults. A seed decides the labels, which are the same for both, the order and the views. A gain
is the difference of the two with the same labels and seed, in percentage points of the accuracy on the test split. The
intervals cover other seeds, not other test pictures.
"""

if __name__ == "__main__" and not __package__:
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import contextlib
import json
import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import torch
import tyro

from benchmarks.result import publish
from serving.limits import cores
from training import checkpoint, finetune
from training.recipes import FinetuneSettings
from training.study.verdict import RunRow, halfwidth


@dataclass(frozen=True)
class Options:
    run: Path
    """A pretrained run, runs/NAME."""
    data: str = "shapes"
    """Labelled pictures with a test split."""
    shares: tuple[float, ...] = (0.01, 0.1)
    """Shares of each class's labels that are used."""
    seeds: int = 5
    """Trainings for each share, with different seeds."""
    epochs: int = 100
    """Epochs of every training."""
    quick: bool = False
    """Five epochs and two seeds only."""


def main(options: Options) -> None:
    saved = checkpoint.settings_of(checkpoint.load(checkpoint.find(options.run)))
    common = FinetuneSettings(data=options.data, epochs=5 if options.quick else options.epochs)
    starts = {
        "the run": replace(common, init=str(options.run)),
        "nothing": replace(common, encoder=saved.encoder, width=saved.width, size_px=saved.size_px),
    }
    seeds = range(2 if options.quick else options.seeds)
    cells = [(share, start) for share in options.shares for start in starts]
    each = [replace(starts[start], label_share=share, seed=seed) for share, start in cells for seed in seeds]
    with ProcessPoolExecutor(cores(), multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        results = list(pool.map(accuracy, each))
    n, rows, gains = len(seeds), [], {}
    for i, share in enumerate(options.shares):
        labels, values = zip(*results[2 * i * n : 2 * (i + 1) * n], strict=True)
        run, nothing = values[:n], values[n:]
        gain = [more - less for more, less in zip(run, nothing, strict=True)]
        row = {"share": share, "labels": labels[0]}
        for name, figures in (("from the run", run), ("from nothing", nothing), ("gain", gain)):
            half = halfwidth([RunRow({}, {name: list(figures)})], name, n)
            row[name] = f"{100 * fmean(figures):.1f} +- {100 * half:.1f}"
        rows.append(row)
        gains[f"gain_at_{share:g}"] = 100 * fmean(gain)
    print(f"{n} seeds, accuracies in %, with 95 % intervals of the mean over seeds")
    publish("few_labels", rows, gains)


def accuracy(settings: FinetuneSettings) -> tuple[int, float]:
    """Number of labels trained on, and the accuracy on the test split."""
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as quiet:
        finetune.RUNS = Path(folder)
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            result = json.loads((finetune.finetune(settings) / "result.json").read_text())
    if "test" not in result["after"]:
        sys.exit(f"error: {settings.data} has no labelled test split")
    return result["images"], result["after"]["test"]["accuracy"]


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
