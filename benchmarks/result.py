"""Output of a benchmark: a table for people, JSON for records, and `name: value` lines for scripts."""

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from training.evaluation.table import aligned

ROOT = Path(__file__).resolve().parent.parent


def publish(name: str, rows: list[dict], figures: dict[str, float]) -> None:
    """Print `rows` as a table, write everything to $OUT/NAME.json (default benchmarks/out), and print the figures."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    table = [columns, *([_text(row.get(column, "")) for column in columns] for row in rows)]
    print("\n" + aligned(table))
    path = Path(os.environ.get("OUT", ROOT / "benchmarks" / "out")) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": _commit(), "hardware": hardware()}
    facts |= {"command": " ".join(["python", *sys.argv]), "rows": rows, "figures": figures}
    path.write_text(json.dumps(facts, indent=1))
    print(f"\non {hardware()}; written to {path}")
    for figure, value in figures.items():
        print(f"{figure}: {value:.4g}")


def hardware() -> str:
    model = platform.processor() or platform.machine()
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    torch = sys.modules.get("torch")
    gpu = f", {torch.cuda.get_device_name()}" if torch and torch.cuda.is_available() else ""
    return f"{len(os.sched_getaffinity(0))} cores of {model}{gpu}"


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _commit() -> str:
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip()
