"""Repeat a study of Chen et al. 2020 (arXiv:2002.05709): a table, a figure, and whether its claims held.

    python training/ablate.py projection-head --data ~/Labelled --seeds 3

Each cell of a study is a run of pretrain.py with one setting changed, repeated with two seeds or more; as many runs as
there are cores work at once. Finished runs are kept under runs/studies and reused, so an interrupted study can be
resumed by running it again. The default scale is small, for two cores; on a GPU: --data cifar10 --encoder resnet18
--size-px 32 --epochs 100 --batch-size 512.

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
from types import FrameType
from typing import Literal

import matplotlib
import torch
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from export.paths import parse_settings
from training.checkpoint import CheckpointError
from training.config import PRESETS, RUNS, PretrainSettings
from training.data import store
from training.data.sources import DataError, open_source
from training.pretrain import Stopped
from training.study.cell import COMMIT, cell_key, check_pictures, run_cell
from training.study.studies import STUDIES, Study
from training.study.verdict import POWER, RunRow, halfwidth, judge

NEVER = 10**9  # for --knn-epochs: kNN is measured only before and after training


@dataclass(frozen=True)
class AblateSettings:
    """Repeat a study of the SimCLR paper on your pictures."""

    study: tyro.conf.Positional[
        Literal["projection-head", "what-g-forgets", "augmentations", "batch-size", "temperature", "colour"]
    ]
    """Name of the study."""
    data: str = "shapes"
    """Labelled pictures: a folder, a .zip, shards, a torchvision name, or shapes (for what-g-forgets: shapes)."""
    out: Path = RUNS / "studies"
    """Folder for the table and the figure, beside the runs of the study."""
    seeds: int = 2
    """Number of runs of each combination of settings, with different seeds. The confidence intervals are over them."""
    quick: bool = False
    """For a trial: one epoch and one seed. A verdict needs at least two seeds."""
    encoder: Literal["tiny", "resnet18", "resnet34", "resnet50"] = "tiny"
    """Architecture of the encoder f."""
    size_px: int = 36
    """Side of the encoder's square input, in pixels. Above 32 the first layer downsamples, which is faster."""
    epochs: int = 4
    """Epochs of each run. The study batch-size also trains for half and for twice as many."""
    batch_size: int = 64
    """Images per step. The study batch-size compares its own batch sizes."""

    def __post_init__(self) -> None:
        if not self.seeds >= 1:
            raise ValueError(f"--seeds must be at least 1, not {self.seeds}")

    def base(self) -> PretrainSettings:
        """Settings of every cell before its own change. raises ValueError"""
        return replace(
            PRESETS["tiny"][1],
            data=os.path.abspath(self.data) if os.path.exists(self.data) else self.data,
            encoder=self.encoder,
            size_px=self.size_px,
            epochs=1 if self.quick else self.epochs,
            batch_size=self.batch_size,
            whiten=0.0,  # h as in the paper
            knn_epochs=NEVER,
            compile=False,
            devices=1,
        )


def ablate(settings: AblateSettings) -> dict:
    """Run missing cells, write the results, and return the content of the JSON file.

    raises  DataError, CheckpointError, ValueError
    """
    study, base = STUDIES[settings.study], settings.base()
    source = open_source(base.data)
    splits = {
        "train",
        *(picture.split for picture in source.pictures),
    }  # decoded here, so that not every process does it
    n = len({split: store.load(source, base.preprocessing, split) for split in splits}["train"])
    if n < base.batch_size:
        print(f"batch size {base.batch_size} -> {n}: {settings.data} has no more training pictures")
        base = replace(base, batch_size=n)
    cells = study.cells(base)
    if (largest := max(cell.settings.batch_size for cell in cells)) > n:
        raise DataError(
            f"this study compares batches of up to {largest} pictures, and {settings.data} has {n} training pictures"
        )
    check_pictures(base, study.measures)
    seeds = 1 if settings.quick else settings.seeds
    results = run_all([[replace(cell.settings, seed=seed) for seed in range(seeds)] for cell in cells], study.measures)
    rows = study.rows(cells, results)
    judged = study.judged(cells, results) if study.judged else rows
    verdicts = [judge(claim, judged) for claim in study.claims]
    facts = {
        "study": settings.study,
        "title": study.title,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": ", ".join(sorted({run.get(COMMIT, "") for seeds in results for run in seeds} - {""})),
        "command": shlex.join(["python", *sys.argv]),
        "hardware": hardware(),
        "cpu_minutes": round(sum(run["cpu_s"] for seeds in results for run in seeds) / 60, 1),
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
    """Results in the shape of `grid`, the settings of each cell and seed; equal settings are run once.

    All cells of one seed come before those of the next, so that an interrupted study has complete seeds."""
    unique = {cell_key(settings): settings for cells in zip(*grid, strict=True) for settings in cells}
    at_once = processes(len(unique))
    threads = max(1, (os.cpu_count() or 1) // at_once)
    results: dict[str, dict] = {}
    began = time.monotonic()
    with ProcessPoolExecutor(at_once, multiprocessing.get_context("spawn"), _start_worker, (threads,)) as pool:
        # Ctrl-C reaches all processes. Workers start with it ignored; a run in training stops at its epoch's end
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        waiting = {pool.submit(run_cell, settings, kinds): key for key, settings in unique.items()}
        signal.signal(signal.SIGINT, before)
        try:
            for done in as_completed(waiting):
                results[waiting[done]] = done.result()
                minutes = (time.monotonic() - began) / 60
                print(f"{len(results)} of {len(unique)} runs finished after {minutes:.1f} min", flush=True)
        except BaseException:  # start no more runs; those in training end by themselves and are kept
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [[results[cell_key(settings)] for settings in seeds] for seeds in grid]


def processes(runs: int) -> int:
    """How many runs to train at once: one per core, or one on a GPU."""
    if torch.cuda.is_available():
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, runs))


def _start_worker(threads: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)


def _end_with_parent() -> None:
    """End with the parent process: if it was killed, this worker would wait for work forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # only workers call this
    parent.join()
    os._exit(1)


def table(study: Study, rows: Sequence[RunRow]) -> str:
    """Markdown: means in percent, +- half their confidence interval, in brackets the lowest and the highest seed."""
    columns = ["chance", *study.figures] if "chance" in rows[0].values else list(study.figures)
    labels = [name for name in rows[0].labels if name != "length"]
    lines = [[*labels, *columns], ["---"] * (len(labels) + len(columns))]
    for row in rows:
        cells = [str(row.labels[name]) for name in labels]
        lines.append(
            cells + [_cell(row.values[name], halfwidth(rows, name, len(row.values[name]))) for name in columns]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(values: list[float], half: float) -> str:
    if max(values) > 1:  # a count
        return f"{fmean(values):,.0f}"
    if math.isnan(half):
        return f"{100 * fmean(values):.1f}"
    return f"{100 * fmean(values):.1f} ±{100 * half:.1f} ({100 * min(values):.1f}-{100 * max(values):.1f})"


def page(study: Study, rows: Sequence[RunRow], facts: dict) -> str:
    """The Markdown page of a study."""
    base, seeds = facts["base"], range(facts["seeds"])
    sentences = "\n".join(f"- {verdict['sentence']}" for verdict in facts["claims"])
    return f"""# {study.title}

`{facts["command"]}`

{facts["date"][:10]}, commit {facts["commit"] or "none"}, {facts["hardware"]}: {facts["cpu_minutes"]} CPU minutes.
{base["encoder"]} at {base["size_px"]} px on {facts["data"]}; unless the table says otherwise {base["epochs"]} epochs,
batch size {base["batch_size"]}, tau {base["temperature"]}, {base["optimizer"]}, seeds {", ".join(map(str, seeds))}.

![{study.title}]({facts["study"]}.png)

{sentences}

In brackets, the 95 % confidence interval; then the true difference that such a study finds in {POWER:.0%} of cases.

Accuracies in %. After ±, half the 95 % confidence interval of the mean over seeds, from a standard deviation pooled
over the table's rows; in brackets, the lowest and the highest seed.

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


def _stop(number: int, frame: FrameType | None) -> None:
    """Stop after the first Ctrl-C at the end of the current epochs, after a second one at once."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # the workers end with this process
    raise KeyboardInterrupt


def main() -> None:
    signal.signal(signal.SIGINT, _stop)
    try:
        ablate(parse_settings(AblateSettings, description=__doc__.partition("\n\n")[0]))
    except (DataError, CheckpointError, ValueError) as error:
        sys.exit(f"error: {error}")
    except BrokenProcessPool:
        sys.exit(
            "error: the process of a run was killed, usually for lack of memory. Run the same command again to continue"
        )
    except (KeyboardInterrupt, Stopped):
        print("\nStopped. Finished runs are kept; run the same command again to continue.")
        sys.exit(130)


if __name__ == "__main__":
    main()
