"""Whether --minutes is a budget: the time of whole commands, by the clock, over the minutes that they were given.

python benchmarks/minutes.py

Other work on all cores begins midway in one case, ends midway in another, and comes and goes in a third. Target:
over_budget at most 1.10, and no command that ends after less than 0.90 of its minutes.
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
LOADS = {  # whether other work runs, at a share of the minutes
    "alone": lambda share: False,
    "load from midway on": lambda share: share > 0.5,
    "load until midway": lambda share: share < 0.5,
    "load now and then": lambda share: int(6 * share) % 2 == 0,
}
CHECK_S = 0.1


@dataclass(frozen=True)
class Options:
    data: str = "shapes"
    """Pictures to train on."""
    minutes: float = 2.0
    """Given to each command."""
    quick: bool = False
    """Half a minute each, and only pretraining."""


def timed(command: list[str], folder: Path, minutes: float, load: str) -> float:
    """The minutes that a command takes beside a load of LOADS."""
    began, others = time.monotonic(), []
    process = subprocess.Popen(
        [sys.executable, *command, "--minutes", str(minutes)], cwd=folder, stdout=subprocess.DEVNULL
    )
    try:
        while process.poll() is None:
            busy = LOADS[load]((time.monotonic() - began) / 60 / minutes)
            if busy and not others:
                others = [subprocess.Popen([sys.executable, "-c", WORK]) for _ in range(os.cpu_count() or 1)]
            elif not busy:
                stop(others)
            time.sleep(CHECK_S)
    finally:
        stop([process, *others])
    if process.returncode:
        sys.exit(f"error: {' '.join(command)} ended with status {process.returncode}")
    return (time.monotonic() - began) / 60


def stop(processes: list[subprocess.Popen]) -> None:
    while processes:
        process = processes.pop()
        process.kill()
        process.wait()


def main(options: Options) -> None:
    minutes = 0.5 if options.quick else options.minutes
    pretrain = [str(ROOT / "training" / "pretrain.py"), "--data", options.data, "--name"]
    distil = [str(ROOT / "training" / "distil.py"), "--data", options.data, "--encoder", "tiny", "--teacher"]
    cases = [("pretrain", [*pretrain, load.replace(" ", "-")], load) for load in LOADS]
    if not options.quick:
        cases += [
            ("adapt", [*pretrain, "adapted", "--preset", "adapt"], "alone"),
            ("distil from lite0", [*distil, "lite0", "--size-px", "64"], "alone"),
        ]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, command, load in cases:
            took = timed(command, Path(folder), minutes, load)
            rows.append({"command": name, "other work": load, "minutes": took, "of those given": took / minutes})
    shares = [row["of those given"] for row in rows]
    publish("minutes", rows, {"shortest": min(shares), "over_budget": max(shares)})


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
