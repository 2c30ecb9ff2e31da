"""Compare short runs of several recipes for CIFAR-10, to choose the one for a long run.

    python benchmarks/screen.py --data cifar10 --pictures 10000 --batch-size 128 --epochs 8       on a CPU
    python benchmarks/screen.py --encoder resnet18 --epochs 50 --seeds 1                          on a GPU

Each arm is the preset cifar-fast with the changes of ARMS, at the scale that the options give. Finished runs are kept
below --runs and not repeated, and a stopped one continues; best_options.txt has the best arm's options for a whole run.
The last line names the best arm and gives its mean kNN accuracy.
"""

if __name__ == "__main__" and not __package__:
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import numpy as np
import tyro

from benchmarks.result import ROOT, publish
from benchmarks.vectors import with_interval
from export.paths import local_path
from training import checkpoint
from training.config import PRESETS
from training.data.sources import open_source

# Settings that differ from the preset cifar-fast. SHARES multiplies the options' batch size and epochs.
ARMS: dict[str, dict[str, object]] = {
    "cifar-fast": {},
    "tau 0.2": {"temperature": 0.2},
    "SGD": {
        "optimizer": "sgd",
        "lr": 0.06,
        "lr-scaling": "linear",
        "weight-decay": 5e-4,
        "temperature": 0.5,
        "loss-scale": 1,
    },
    "DCL": {"loss": "dcl"},
    "four views, half the batch, a quarter of the epochs": {"views": 4},
    "four views, half the batch, half the epochs": {"views": 4},
}
SHARES = {  # of the batch and of the epochs
    "four views, half the batch, a quarter of the epochs": (0.5, 0.25),
    "four views, half the batch, half the epochs": (0.5, 0.5),
}


STOPPED = 130  # exit status of a run that Ctrl-C stopped


@dataclass(frozen=True)
class Options:
    data: str = "cifar10"
    """Labelled pictures with a test split."""
    pictures: int = 0
    """Training pictures, chosen at random; 0: all. A fifth as many test pictures are asked about."""
    encoder: str = "tiny"
    size_px: int = 32
    epochs: int = 8
    batch_size: int = 512
    ema: float = 0.99
    """Decay of the average of the weights, which is measured beside the last weights of every run."""
    seeds: int = 3
    arms: tuple[str, ...] = tuple(ARMS)
    """Names of arms: see ARMS in this file."""
    runs: Path = Path("runs/screen")
    """Where the runs and the chosen pictures are kept."""
    quick: bool = False
    """A hundred drawn pictures, one epoch and one seed, to show that it runs."""


def main(options: Options) -> None:
    if unknown := [arm for arm in options.arms if arm not in ARMS]:
        raise SystemExit(f"error: --arms: {unknown[0]!r} is none of {', '.join(ARMS)}")
    folder = local_path(options.runs).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if options.quick:
        options = Options("shapes", 100, options.encoder, 16, 2, 20, options.ema, 1, options.arms)
    data = some_of(options.data, options.pictures, folder) if options.pictures else options.data
    signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C reaches the run too, which keeps a checkpoint and ends
    results: dict[str, list[dict]] = {arm: [] for arm in options.arms}
    for seed in range(options.seeds):
        for arm in options.arms:
            results[arm].append(result_of(arm, seed, data, folder, options))
    rows = [row_of(arm, found) for arm, found in results.items()]
    best = max(results, key=lambda arm: mean(result["knn"] for result in results[arm]))
    whole = PRESETS["cifar-fast"][1]
    (folder / "best_options.txt").write_text("\n".join(recipe(best, whole.epochs, whole.batch_size)) + "\n")
    publish("screen", rows, {f"best_arm {best}": 100 * mean(result["knn"] for result in results[best])})


def row_of(arm: str, results: list[dict]) -> dict:
    return {
        "arm": arm,
        "last weights": with_interval([result["last"] for result in results]),
        "average": with_interval([result["average"] for result in results]),
        "minutes": round(mean(result["minutes"] for result in results), 1),
        "each seed": ", ".join(f"{result['last']:.1%}" for result in results),
    }


def result_of(arm: str, seed: int, data: str, folder: Path, options: Options) -> dict:
    """kNN accuracy of the last weights, of their average and of the better, in [0, 1], and the minutes that it took.

    raises  SystemExit: the run failed, or was stopped by Ctrl-C
    """
    run = folder / "runs" / f"{list(ARMS).index(arm)}-{seed}"
    last, minutes = run / "checkpoints" / checkpoint.NAME, run / "minutes.txt"
    if not (last.exists() and "after" in checkpoint.load(last)["facts"]):
        more = {"encoder": options.encoder, "size-px": options.size_px, "ema": options.ema, "seed": seed}
        command = [sys.executable, ROOT / "training" / "pretrain.py", "--data", data, "--name", run.name, "--resume"]
        command += [*recipe(arm, options.epochs, options.batch_size), *flags(more | {"knn-epochs": 10**6})]
        started = time.monotonic()
        status = subprocess.run(command, cwd=folder).returncode
        spent = (time.monotonic() - started) / 60
        if run.exists():
            minutes.write_text(str(spent + (float(minutes.read_text()) if minutes.exists() else 0)))
        if status:
            raise SystemExit("stopped: run it again" if status == STOPPED else f"error: the run of {arm} failed")
    facts = checkpoint.load(last)["facts"]
    average = facts["average"]
    return {
        "last": average["last"],
        "average": average["average"],
        "knn": facts["after"]["knn"],
        "minutes": float(minutes.read_text()),
    }


def recipe(arm: str, epochs: int, batch_size: int) -> list[str]:
    """Options of pretrain.py for an arm, when the preset itself trains for so many epochs with such a batch."""
    of_batch, of_epochs = SHARES.get(arm, (1.0, 1.0))
    scale = {"epochs": max(1, round(epochs * of_epochs)), "batch-size": round(batch_size * of_batch)}
    return ["--preset", "cifar-fast", *flags(scale | ARMS[arm])]


def flags(settings: dict[str, object]) -> list[str]:
    return [str(word) for name, value in settings.items() for word in (f"--{name}", value)]


def some_of(data: str, pictures: int, folder: Path) -> str:
    """A .zip with so many training pictures and a fifth as many test pictures of the data, made once."""
    path = folder / f"{pictures}.zip"
    if not path.exists():
        source = open_source(data).pictures
        with zipfile.ZipFile(path.with_suffix(".part"), "w") as archive:
            for split, count in (("train", pictures), ("test", max(1, pictures // 5))):
                some = [picture for picture in source if picture.split == split]
                for i in np.random.default_rng(0).permutation(len(some))[:count]:
                    archive.writestr(f"{split}/{some[i].label}/{Path(some[i].name).name}", some[i].read())
        path.with_suffix(".part").rename(path)
    return str(path)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
