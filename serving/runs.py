"""Reads training runs from the files in their folders, without training's code or torch.

    config.json  settings     metrics.csv  one row per epoch     result.json  final accuracy of a fine-tuning

Runs are the folders in TWINVIEW_RUNS (by default ./runs), and the folders one level below, with names like a/b. No
reply contains a path: data and encoders are named by the last part of their path.
"""

import csv
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, PositiveInt, ValidationError

from export.paths import local_path
from serving.protocol.replies import Run, RunDetails, RunKind, Runs, RunState

CONFIG, METRICS, RESULT = "config.json", "metrics.csv", "result.json"
MAX_FILE_BYTES = 2**23  # larger files are not read
MAX_ROWS = 2000  # of the curves, in one reply
FIRST_EPOCH_S = 600  # in its first epoch, a run that has written nothing for this long counts as stopped
QUIET_EPOCHS, QUIET_S = 3, 60  # later: for the time of this many epochs, plus this for evaluating and saving
PATH_SETTINGS = ("data", "init", "teacher")
FIGURES = ("knn", "views_matched", "held_out")  # columns of metrics.csv that measure quality

Metrics = dict[str, list[float | None]]


def runs_folder() -> Path:
    return local_path(os.environ.get("TWINVIEW_RUNS") or "runs")


def list_runs(limit: int) -> Runs:
    """The `limit` runs that were changed last, newest first. Folders with an unreadable config.json are left out."""
    folders = list(_folders(runs_folder()))
    newest = sorted(folders, key=lambda folder: _changed(folder[1]), reverse=True)[:limit]
    runs = [_run(name, folder, files) for name, folder in newest if (files := _files(folder))]
    return Runs(len(folders), runs)


def read_run(name: str) -> RunDetails | None:
    """Returns None if there is no such run. `name` is compared with the listed folders and never used as a path."""
    folder = dict(_folders(runs_folder())).get(name)
    files = folder and _files(folder)
    if not files:
        return None
    settings = {key: _last_part(value) if key in PATH_SETTINGS else value for key, value in files.settings.items()}
    run = _run(name, folder, files)
    return RunDetails(**vars(run), settings=settings, chance=files.last("chance"), metrics=files.thinned())


def _folders(root: Path) -> Iterator[tuple[str, Path]]:
    """Name and folder of each run."""
    for pattern in (f"*/{CONFIG}", f"*/*/{CONFIG}"):
        for config in root.glob(pattern):
            name = config.parent.relative_to(root).as_posix()
            if name.isprintable():  # JSON cannot hold all others
                yield name, config.parent


def _changed(folder: Path) -> float:
    """Returns when the run last wrote a file, in Unix seconds. TensorBoard's events are written every few steps."""
    latest = 0.0
    for file in (folder / CONFIG, folder / METRICS, *folder.glob("events.out.*"), *folder.glob("checkpoints/*")):
        try:
            latest = max(latest, file.stat().st_mtime)
        except OSError:  # missing, or just being replaced
            continue
    return latest


class _Config(BaseModel):
    """The settings in a config.json that the answers need, of pretraining, fine-tuning and distillation."""

    data: str
    epochs: PositiveInt
    batch_size: PositiveInt
    encoder: str | None = None
    width: PositiveInt | None = None
    init: str = ""
    max_steps: PositiveInt | None = None
    mode: str | None = None
    teacher: str | None = None

    @property
    def kind(self) -> RunKind:
        if self.teacher:
            return "distillation"
        return "fine-tuning" if self.mode else "pretraining"


@dataclass(frozen=True)
class _Files:
    """Contents of a run's files. Cached: callers must not change them."""

    settings: dict[str, Any]
    config: _Config
    metrics: Metrics
    result: dict[str, Any]

    def last(self, column: str) -> float | None:
        return next((value for value in reversed(self.metrics.get(column, [])) if value is not None), None)

    def thinned(self) -> Metrics:
        """About MAX_ROWS rows at most: every n-th, counted from the last, and all rows with figures."""
        count = len(self.metrics.get("epoch", []))
        step = math.ceil(count / MAX_ROWS) or 1
        figures = [self.metrics[name] for name in FIGURES if name in self.metrics]

        def stays(i: int) -> bool:
            return (count - 1 - i) % step == 0 or any(column[i] is not None for column in figures)

        rows = [i for i in range(count) if stays(i)][-2 * MAX_ROWS :]
        return {name: [column[i] for i in rows] for name, column in self.metrics.items()}


def _files(folder: Path) -> _Files | None:
    """None if the settings cannot be read."""
    return _read_files(folder, *(_stamp(folder / name) for name in (CONFIG, METRICS, RESULT)))


def _stamp(file: Path) -> tuple[int, int]:
    """Returns a value that changes with the file."""
    try:
        stat = file.stat()
    except OSError:
        return 0, 0
    return stat.st_mtime_ns, stat.st_size


@lru_cache(512)
def _read_files(folder: Path, *stamps: tuple[int, int]) -> _Files | None:
    settings, result = (_json_object(_text(folder / name)) for name in (CONFIG, RESULT))
    try:
        return _Files(settings, _Config.model_validate(settings), _columns(_text(folder / METRICS)), result)
    except ValidationError:
        return None


def _text(file: Path) -> str:
    """Empty if the file is missing, unreadable or too large."""
    try:
        if file.stat().st_size > MAX_FILE_BYTES:
            return ""
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:  # perhaps just being written
        return {}
    return value if isinstance(value, dict) else {}


def _columns(text: str) -> Metrics:
    """Columns of a CSV, whose last row may be incomplete because it is just being written."""
    names, *rows = list(csv.reader(text.splitlines())) or [[]]
    complete = [row for row in rows if len(row) == len(names)]
    return {name: [_number(row[i]) for row in complete] for i, name in enumerate(names)}


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _run(name: str, folder: Path, files: _Files) -> Run:
    config, epoch, changed = files.config, int(files.last("epoch") or 0), _changed(folder)
    origin = config.teacher or config.init
    encoder = config.encoder or ("" if origin else "tiny")
    figures = {column: value for column in FIGURES if (value := files.last(column)) is not None}
    return Run(
        name=name,
        kind=config.kind,
        state=_state(files, epoch, changed),
        epoch=epoch,
        epochs=config.epochs,
        data=_last_part(config.data),
        encoder=f"{encoder}-{config.width}x" if encoder and (config.width or 1) > 1 else encoder,
        init=_last_part(origin),
        figures=figures | _accuracy(files.result),
        changed=changed,
    )


def _accuracy(result: dict[str, Any]) -> dict[str, float]:
    """Final accuracy of a fine-tuning: on test pictures if there were any, otherwise on held-out ones."""
    try:
        after = result["after"]
        return {"accuracy": float((after.get("test") or after["held-out"])["accuracy"])}
    except (KeyError, TypeError, ValueError, AttributeError):  # not measured
        return {}


def _state(files: _Files, epoch: int, changed: float) -> RunState:
    """Decides by the age of the files whether a run is still training, since its process may be on another machine."""
    config, step, speed = files.config, files.last("step"), files.last("images_per_s")
    if files.result or epoch >= config.epochs or (config.max_steps and (step or 0) >= config.max_steps):
        return "finished"
    quiet_s = FIRST_EPOCH_S
    if step and speed and epoch:
        quiet_s = QUIET_S + QUIET_EPOCHS * step / epoch * config.batch_size / speed
    return "training" if time.time() - changed < quiet_s else "stopped"


def _last_part(path: str) -> str:
    """clothing.zip for /home/me/clothing.zip, shards for shards/*.tar."""
    parts = Path(path)
    return parts.parent.name if "*" in parts.name and parts.parent.name else parts.name
