"""The files of a run's folder, except its checkpoints (checkpoint.py) and its figure (report.py)."""

import csv
import json
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.spreadsheet import save_rows

if TYPE_CHECKING:
    from training.config import PretrainSettings
    from training.resumable import ResumableSettings
    from training.simclr import SimCLR

CONFIG = "config.json"


def write_folder(run: Path, module: "SimCLR") -> None:
    """Write config.json and skipped.csv."""
    run.mkdir(parents=True, exist_ok=True)
    write_config(run, module.settings)
    stores = [store for store in (module.train_store, module.test_store) if store]
    save_rows(run / "skipped.csv", [("name", "reason"), *(row for store in stores for row in store.skipped)])


def write_config(run: Path, settings: "PretrainSettings | ResumableSettings") -> None:
    """Write the settings, where they are not there yet."""
    path, content = run / CONFIG, json.dumps(settings.to_dict(), indent=2)
    if not path.exists() or path.read_text() != content:
        path.write_text(content)


def write_metrics(path: Path, history: list[dict]) -> None:
    """A row for each epoch, with the columns of all rows."""
    columns = list(dict.fromkeys(name for row in history for name in row))
    with open(path, "w", newline="") as file:
        rows = csv.DictWriter(file, columns)
        rows.writeheader()
        rows.writerows(history)


def other_setting(run: Path, name: str, own: Any, value: Any) -> str:
    """Why a run cannot be resumed with a setting, and what to do. own: the run's value, None if it was not given."""
    flag = f"--{name.replace('_', '-')}"
    own, value = (" ".join(map(str, one)) if isinstance(one, (tuple, list)) else one for one in (own, value))
    if own is None:
        return f"{run} was started without {flag}: leave it out, or give another --name"
    return (
        f"{run} was started with {flag} {own}{'' if value is None else f', not {value}'}: give that, or another --name"
    )


def commit() -> str:
    """The commit of this code; empty outside a git checkout."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
