"""Speed of filling a collection, relative to a bare loop on the same cores.

    python benchmarks/bulk.py [--quick]

`bulk` is the `run` of serving/bulk.py with a new index: listing, reading and hashing files, decoding, encoding,
thumbnails, durable writes, and maintenance at the end. `bare` (benchmarks/serving.py) decodes and encodes the same
files from memory, in the faster of two arrangements. Loading the encoder is not counted. The two alternate, each in a
process of its own, and a ratio is the median of the rounds' ratios. `by_cpu` is CPU time per image in the bare loop
over that in bulk, which other work on the machine does not affect.

The encoder is an untrained ResNet-18: at 224 px on JPEG files of 500 x 375, and at 32 px on files of 32 x 32 with the
same first layer, so that the network takes a small part of the time.
"""

if __name__ == "__main__" and not __package__:
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import contextlib
import os
import shutil
import tempfile
import time
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import tyro

from benchmarks.load import Turn
from benchmarks.photograph import jpeg
from benchmarks.result import publish
from benchmarks.serving import PICTURES, Case, fastest_loop, prepare

CASES = (
    (Case("224", 224, 224, (500, 375), seconds=10), 1000),
    (Case("32", 32, 224, (32, 32), seconds=5), 8000),
)


@dataclass(frozen=True)
class Options:
    quick: bool = False
    """One short round on a fifth of the files."""


def main(options: Options) -> None:
    spawn = get_context("spawn")
    rows, figures = [], {}
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(1, spawn) as worker,
        ProcessPoolExecutor(1, spawn) as filler,
    ):
        for case, files in reversed(CASES):  # so that the last figure is that of the larger pictures
            if options.quick:
                case, files = case.quick(), files // 5
            more_rows, more_figures = compare(case, files, Path(folder) / case.name, worker, filler)
            rows += more_rows
            figures |= more_figures
    publish("bulk", rows, figures)


def compare(case: Case, files: int, folder: Path, worker: Executor, filler: Executor) -> tuple[list, dict]:
    """Rows and figures of one case."""
    pictures = worker.submit(prepare, case, folder).result()
    filler.submit(write, case, files, folder / "pictures").result()
    alone = fastest_loop(folder, pictures, case.seconds / 2, worker)
    filler.submit(fill, folder, PICTURES).result()  # warms up imports and the disk's cache
    rates = []
    for i in range(case.rounds):
        alone.turns.append(alone.measure(case.seconds))
        rates.append(filler.submit(fill, folder, files).result())
        print(f"{case.name}, round {i + 1}: bare {alone.turns[-1].images_per_s:.0f}, bulk {rates[-1].images_per_s:.0f}")
    over = median(bulk.images_per_s / bare.images_per_s for bulk, bare in zip(rates, alone.turns, strict=True))
    rows = [
        {"px": case.name, "what": f"bare, {alone.request}", "images/s": alone.median("images_per_s"), "over bare": 1.0},
        {"px": case.name, "what": "bulk", "images/s": median(turn.images_per_s for turn in rates), "over bare": over},
    ]
    for row, turns in zip(rows, (alone.turns, rates), strict=True):
        row["CPU ms"] = median(turn.cpu_ms for turn in turns)
    figure = "bulk_over_bare" if case.name == "224" else f"bulk_over_bare_{case.name}"
    return rows, {f"{figure}_by_cpu": rows[0]["CPU ms"] / rows[1]["CPU ms"], figure: over}


def write(case: Case, files: int, folder: Path) -> None:
    """Write `files` different pictures, and copies of some for the warm-up."""
    for i in range(files):
        path = folder / str(i % 10) / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(i, *case.picture))
        if i < PICTURES:
            (folder.parent / "warm-up").mkdir(exist_ok=True)
            shutil.copy(path, folder.parent / "warm-up")


def fill(folder: Path, files: int) -> Turn:
    """Fill an index from the pictures, without counting the time in which the encoder is loaded."""
    from serving import bulk

    loading, batch_encoder = [0.0, 0.0], bulk.batch_encoder

    def timed(bundle):
        wall, cpu = time.perf_counter(), time.process_time()
        encoder = batch_encoder(bundle)
        loading[:] = time.perf_counter() - wall, time.process_time() - cpu
        return encoder

    data, index = folder / ("warm-up" if files == PICTURES else "pictures"), folder / "index"
    shutil.rmtree(index, ignore_errors=True)
    bulk.batch_encoder = timed
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        with open(os.devnull, "w") as devnull, contextlib.redirect_stdout(devnull):
            tally = bulk.run(bulk.BulkSettings(data=str(data), encoder=str(folder / "encoder"), index=str(index)))
    finally:
        bulk.batch_encoder = batch_encoder
    seconds, cpu = time.perf_counter() - wall - loading[0], time.process_time() - cpu - loading[1]
    if tally.indexed != files:
        raise SystemExit(f"error: only {tally.indexed} of {files} files were indexed")
    return Turn(files / seconds, 1e3 * cpu / files)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
