"""Repeat a study of Chen et al. 2020 (arXiv:2002.05709): a table, a figure, and whether its claims held.

    python training/ablate.py projection-head --data ~/Labelled --seeds 3

Each cell of a study is a run of pretrain.py with one thing changed, two seeds or more, and as many runs at once as
there are cores. A run that is done is kept under runs/studies, so a study that was stopped goes on where it was. The
default scale is small, for two cores; on a GPU: --data cifar10 --encoder resnet18 --size-px 32 --epochs 100
--batch-size 512.

    OUT/STUDY.md  STUDY.json  STUDY.png
"""

if __name__ == "__main__" and not __package__:
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import json
import logging
import math
import multiprocessing
import os
import platform
import shlex
import signal
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Literal

import matplotlib
import torch
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from export.artifact import Preprocessing
from training.checkpoint import CheckpointError
from training.config import PRESETS, PretrainSettings
from training.data import store
from training.data.sources import DataError, open_source
from training.pretrain import Stopped
from training.study import cell as cells_of
from training.study.studies import STUDIES, Study
from training.study.verdict import RunRow, halfwidth, judge

EVERY_EPOCH = 10**9  # kNN is measured at both ends of a run only


@dataclass(frozen=True)
class AblateSettings:
    """Repeat a study of the SimCLR paper on your pictures."""

    study: tyro.conf.Positional[
        Literal["projection-head", "what-g-forgets", "augmentations", "batch-size", "temperature", "colour"]
    ]
    """Which."""
    data: str = "shapes"
    """Labelled pictures: a folder, a .zip, shards, a torchvision name, or shapes (what-g-forgets wants those)."""
    out: Path = Path("docs/studies")
    """Where the table and the figure are written."""
    seeds: int = 2
    """Runs of each cell; the intervals are over these."""
    quick: bool = False
    """One epoch and one seed, to see that it works; without spread there is no verdict."""
    encoder: Literal["tiny", "resnet18", "resnet34", "resnet50"] = "tiny"
    size_px: int = 36
    """Above 32 the encoder shrinks pictures at once, which is faster."""
    epochs: int = 4
    """Of each run (batch-size: of the middle ones)."""
    batch_size: int = 64

    def __post_init__(self):
        if not self.seeds >= 1:
            raise ValueError(f"--seeds must be at least 1, not {self.seeds}")

    def base(self) -> PretrainSettings:
        """What every cell has but for its own change. raises ValueError."""
        return replace(
            PRESETS["tiny"][1],
            data=os.path.abspath(self.data) if os.path.exists(self.data) else self.data,
            encoder=self.encoder,
            size_px=self.size_px,
            epochs=1 if self.quick else self.epochs,
            batch_size=self.batch_size,
            knn_epochs=EVERY_EPOCH,
            compile=False,
            devices=1,
        )


def ablate(settings: AblateSettings) -> dict:
    """Run what is missing, write, and return what the JSON holds. raises DataError, CheckpointError, ValueError."""
    study, base = STUDIES[settings.study], settings.base()
    source = open_source(base.data)
    splits = {"train", *(picture.split for picture in source.pictures)}  # decoded here once, and not by every process
    n = len({split: store.load(source, Preprocessing(base.size_px), split) for split in splits}["train"])
    if n < base.batch_size:
        print(f"batch size {base.batch_size} -> {n}: {settings.data} has no more pictures to learn from")
        base = replace(base, batch_size=n)
    cells = study.cells(base)
    if (largest := max(cell.settings.batch_size for cell in cells)) > n:
        raise DataError(
            f"this study compares batches of up to {largest} pictures, and {settings.data} has {n} to learn from"
        )
    cells_of.check(base, study.measures)
    seeds = 1 if settings.quick else settings.seeds
    found = run_all([[replace(cell.settings, seed=seed) for seed in range(seeds)] for cell in cells], study.measures)
    rows = study.rows(cells, found)
    judged = study.judged(cells, found) if study.judged else rows
    verdicts = [judge(claim, judged) for claim in study.claims]
    facts = {
        "study": settings.study,
        "title": study.title,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": ", ".join(sorted({one.get(cells_of.COMMIT, "") for seeds in found for one in seeds} - {""})),
        "command": shlex.join(["python", *sys.argv]),
        "hardware": hardware(),
        "cpu_minutes": round(sum(one["cpu_s"] for seeds in found for one in seeds) / 60, 1),
        "data": source.name,
        "base": base.to_dict() | {"data": source.name},
        "seeds": seeds,
        "claims": verdicts,
        "rows": [{**row.labels, **row.values} for row in rows],
    }
    settings.out.mkdir(parents=True, exist_ok=True)
    path = settings.out / settings.study
    path.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")
    path.with_suffix(".md").write_text(page(study, rows, facts))
    draw(path.with_suffix(".png"), study, rows, facts)
    print("\n" + table(study, rows))
    print("\n".join(verdict["sentence"] for verdict in verdicts))
    print(f"\nwritten to {path}.md, .json and .png")
    return facts


def run_all(grid: list[list[PretrainSettings]], kinds: tuple[str, ...]) -> list[list[dict]]:
    """grid: of each cell, its settings once a seed -> the figures in the same places. The same settings run once."""
    different = {cells_of.key(one): one for seeds in grid for one in seeds}
    at_once = processes(len(different))
    threads = max(1, (os.cpu_count() or 1) // at_once)
    found: dict[str, dict] = {}
    began = time.monotonic()
    with ProcessPoolExecutor(at_once, multiprocessing.get_context("spawn"), _quiet, (threads,)) as pool:
        # Ctrl-C reaches all: workers, born to ignore it, end a run in training at its epoch's end
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        waiting = {pool.submit(cells_of.run, one, kinds): key for key, one in different.items()}
        signal.signal(signal.SIGINT, before)
        try:
            for done in as_completed(waiting):
                found[waiting[done]] = done.result()
                minutes = (time.monotonic() - began) / 60
                print(f"{len(found)} of {len(different)} runs after {minutes:.1f} min", flush=True)
        except BaseException:  # what has not begun is not begun; what runs ends by itself, and is kept
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [[found[cells_of.key(one)] for one in seeds] for seeds in grid]


def processes(runs: int) -> int:
    """One a core; a GPU has one at a time."""
    if torch.cuda.is_available():
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, runs))


def _quiet(threads: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def table(study: Study, rows: Sequence[RunRow]) -> str:
    """Markdown. Figures are means in percent, with lowest and highest; +- is half of the interval of the mean."""
    shown = ["chance", *study.figures] if "chance" in rows[0].values else list(study.figures)
    labels = [name for name in rows[0].labels if name != "length"]
    lines = [[*labels, *shown], ["---"] * (len(labels) + len(shown))]
    for row in rows:
        cells = [str(row.labels[name]) for name in labels]
        lines.append(cells + [_cell(row.values[name], halfwidth(rows, name, len(row.values[name]))) for name in shown])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(values: list[float], half: float) -> str:
    if max(values) > 1:  # a count
        return f"{fmean(values):,.0f}"
    if math.isnan(half):
        return f"{100 * fmean(values):.1f}"
    return f"{100 * fmean(values):.1f} ±{100 * half:.1f} ({100 * min(values):.1f}-{100 * max(values):.1f})"


def page(study: Study, rows: Sequence[RunRow], facts: dict) -> str:
    base, seeds = facts["base"], range(facts["seeds"])
    said = "\n".join(f"- {verdict['sentence']}" for verdict in facts["claims"])
    return f"""# {study.title}

`{facts["command"]}`

{facts["date"][:10]}, commit {facts["commit"] or "none"}, {facts["hardware"]}: {facts["cpu_minutes"]} CPU minutes.
{base["encoder"]} at {base["size_px"]} px on {facts["data"]}; but for what the table changes {base["epochs"]} epochs of
batches of {base["batch_size"]}, tau {base["temperature"]}, {base["optimizer"]}, seeds {", ".join(map(str, seeds))}.

![{study.title}]({facts["study"]}.png)

{said}

Accuracies in %. After ± half of the 95 % interval of the mean over seeds, by one deviation pooled over the table's
rows; in brackets the lowest and the highest seed.

{table(study, rows)}
"""


def draw(path: Path, study: Study, rows: Sequence[RunRow], facts: dict) -> None:
    figure = plt.figure(figsize=(10, 6.5), layout="constrained")
    base = facts["base"]
    figure.suptitle(
        f"{study.title}\n{base['encoder']} at {base['size_px']} px, {facts['data']}, {base['epochs']} epochs, "
        f"{facts['seeds']} seeds",
        fontsize=11,
    )
    study.draw(figure, rows)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def hardware() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} cores of {platform.machine()}"


def _stop(number, frame) -> None:
    """The first Ctrl-C waits for the runs in training, which end with their epoch; a second one waits for nothing."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # the workers end with this process
    raise KeyboardInterrupt


def main() -> None:
    signal.signal(signal.SIGINT, _stop)
    try:
        ablate(tyro.cli(AblateSettings, description=__doc__.partition("\n\n")[0]))
    except (DataError, CheckpointError, ValueError) as error:
        sys.exit(f"error: {error}")
    except BrokenProcessPool:
        sys.exit("error: a run's process was ended, for want of memory most often. The same command goes on from there")
    except (KeyboardInterrupt, Stopped):
        print("\nStopped. The runs that are done are kept; the same command goes on from there.")
        sys.exit(130)


if __name__ == "__main__":
    main()
