"""Whether --minutes is a budget: the time of whole commands, by the clock, over the minutes that they were given.

python benchmarks/minutes.py

One case has other work on all cores from the middle on. Target: over_budget at most 1.10.
"""

if __name__ == "__main__" and not __package__:
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmarks.result import ROOT, publish

WORK = "while True: pass"


@dataclass(frozen=True)
class Options:
    data: str = "shapes"
    """Pictures to train on."""
    minutes: float = 2.0
    """Given to each command."""
    quick: bool = False
    """Half a minute each, and only pretraining."""


def timed(command: list[str], folder: Path, minutes: float, load: bool) -> float:
    """The minutes that a command takes. load: other work begins on all cores when half of its time is over."""
    began, others = time.monotonic(), []
    process = subprocess.Popen(
        [sys.executable, *command, "--minutes", str(minutes)], cwd=folder, stdout=subprocess.DEVNULL
    )
    try:
        if load:
            time.sleep(30 * minutes)
            others = [subprocess.Popen([sys.executable, "-c", WORK]) for _ in range(os.cpu_count() or 1)]
        if process.wait():
            sys.exit(f"error: {' '.join(command)} ended with status {process.returncode}")
    finally:
        for other in (process, *others):
            other.kill()
    return (time.monotonic() - began) / 60


def main(options: Options) -> None:
    minutes = 0.5 if options.quick else options.minutes
    pretrain = [str(ROOT / "training" / "pretrain.py"), "--data", options.data, "--name"]
    distil = [str(ROOT / "training" / "distil.py"), "--data", options.data, "--encoder", "tiny", "--teacher"]
    cases = {"pretrain": [*pretrain, "alone"], "pretrain, with load midway": [*pretrain, "loaded"]}
    if not options.quick:
        cases |= {
            "adapt": [*pretrain, "adapted", "--preset", "adapt"],
            "distil from lite0": [*distil, "lite0", "--size-px", "64"],
        }
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, command in cases.items():
            took = timed(command, Path(folder), minutes, "load" in name)
            rows.append({"command": name, "minutes given": minutes, "minutes": took, "over": took / minutes})
    publish("minutes", rows, {"over_budget": max(row["over"] for row in rows)})


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
