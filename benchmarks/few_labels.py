"""What pretraining is worth when labels are few: fine-tuned from a run, and trained from nothing on the same labels.

    python benchmarks/few_labels.py --run runs/clothing-tiny --data clothing.zip

Both by finetune.py's defaults. A seed draws which labels are used, the same for both, and the order and views. A gain
is the difference of the two on the same labels and seed, in points of the test split's accuracy. The intervals say how
other seeds would differ, not other test pictures.
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
from training import checkpoint, finetune
from training.recipes import FinetuneSettings
from training.study.verdict import RunRow, halfwidth

CORES = os.cpu_count() or 1


@dataclass(frozen=True)
class Options:
    run: Path
    """A pretrained run, runs/NAME."""
    data: str
    """Labelled pictures with a test split."""
    shares: tuple[float, ...] = (0.01, 0.1)
    """Of each class's labels."""
    seeds: int = 5
    """Of each."""
    epochs: int = 100
    """Of every training, from the run and from nothing."""
    quick: bool = False
    """Five epochs and two seeds."""


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
    with ProcessPoolExecutor(CORES, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        found = list(pool.map(accuracy, each))
    n, rows, gains = len(seeds), [], {}
    for i, share in enumerate(options.shares):
        labels, values = zip(*found[2 * i * n : 2 * (i + 1) * n], strict=True)
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
    """How many labels were learnt from, and the share of the test split that is right."""
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as quiet:
        finetune.RUNS = Path(folder)
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            result = json.loads((finetune.finetune(settings) / "result.json").read_text())
    if "test" not in result["after"]:
        sys.exit(f"error: {settings.data} has no labelled test split")
    return result["images"], result["after"]["test"]["accuracy"]


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
