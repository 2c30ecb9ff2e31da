"""The training runs beside the service: what is known of each, its settings and its curves.

Read from the files in a run's folder alone, so that neither training's code nor torch is loaded. Runs lie where
TWINVIEW_RUNS says, ./runs by default, and one folder deeper where their names have a slash.

    config.json  its settings     metrics.csv  a row an epoch     result.json  what fine-tuning reached

No answer holds a path: of the data, and of what a run started from, the last part of the name is told.
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
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Query
from fastapi.responses import Response
from pydantic import BaseModel, Field, PositiveInt, ValidationError

from serving.errors import NotFound, documented

router = APIRouter(generate_unique_id_function=lambda route: route.name)

PLACE = "TWINVIEW_RUNS"
CONFIG, METRICS, RESULT = "config.json", "metrics.csv", "result.json"
MOST_BYTES = 2**23  # of a file that is read
MOST_ROWS = 2000  # of the curves in an answer
FIRST_EPOCH_S = 600  # without a sign of life, before anything is known of a run's speed
QUIET_EPOCHS, QUIET_S = 3, 60  # the same later: so many epochs, and what measuring and saving may take
PLACES = ("data", "init", "teacher")  # settings that name a file or folder
FIGURES = ("knn", "views_matched", "held_out")  # columns of metrics.csv that judge

Metrics = dict[str, list[float | None]]


class Run(BaseModel):
    name: str = Field(description="Of its folder below runs/.")
    kind: Literal["pretraining", "fine-tuning", "distillation"]
    state: Literal["training", "finished", "stopped"]
    epoch: int = Field(description="Epochs done.")
    epochs: int = Field(description="Epochs in all.")
    data: str
    encoder: str = Field(description="Its architecture; empty where it is that of what the run started from.")
    init: str = Field(description="What it started from, or was taught by; empty for nothing.")
    figures: dict[str, float] = Field(
        description="The last of each: knn, views_matched, held_out, accuracy; shares of 1."
    )
    changed: float = Field(description="When it last wrote something, in seconds since 1970.")


class Runs(BaseModel):
    count: int = Field(description="Of all.")
    runs: list[Run] = Field(description="The newest first.")


class _Settings(BaseModel):
    """Of a config.json, what the answers are made of. Of all kinds."""

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
    def kind(self) -> str:
        if self.teacher:
            return "distillation"
        return "fine-tuning" if self.mode else "pretraining"


class RunDetails(Run):
    settings: dict[str, Any] = Field(description="As in its config.json.")
    chance: float | None = Field(description="Loss of a pretraining that has learnt nothing: log(2N - 1), in nats.")
    metrics: Metrics = Field(description="Columns by name, a value an epoch; null where none was measured.")


@router.get("/runs", response_model=Runs, responses=documented(400))
def runs(limit: Annotated[int, Query(ge=1, le=500)] = 100) -> Response:
    """The training runs that this service can see, pretraining and fine-tuning."""
    folders = list(_folders(_place()))
    newest = sorted(folders, key=lambda folder: _changed(folder[1]), reverse=True)[:limit]
    found = [_about(*folder) for folder in newest]
    return _json({"count": len(folders), "runs": [run for run in found if run]})


@router.get("/runs/{name:path}", response_model=RunDetails, responses=documented(404))
def run(name: str) -> Response:
    """One run with its settings and its curves."""
    for there, folder in _folders(_place()):  # only what is found by looking is read, whatever is asked for
        if there == name and (about := _about(name, folder)):
            files = _files(folder)
            chance = math.log(2 * files.of.batch_size - 1) if files.of.kind == "pretraining" else None
            settings = {key: _public(value) if key in PLACES else value for key, value in files.settings.items()}
            return _json(about | {"settings": settings, "chance": chance, "metrics": files.thinned()})
    raise NotFound(f"there is no run {name}; /runs lists what there is", "name")


def _place() -> Path:
    return Path(os.environ.get(PLACE) or "runs").expanduser()


def _folders(root: Path) -> Iterator[tuple[str, Path]]:
    """Name and folder of each run."""
    for pattern in (f"*/{CONFIG}", f"*/*/{CONFIG}"):
        for config in root.glob(pattern):
            name = config.parent.relative_to(root).as_posix()
            if name.isprintable():  # others could not be told in JSON
                yield name, config.parent


def _changed(folder: Path) -> float:
    """When the run last wrote something: also TensorBoard's events, of every few steps."""
    latest = 0.0
    for file in (folder / CONFIG, folder / METRICS, *folder.glob("events.out.*"), *folder.glob("checkpoints/*")):
        try:
            latest = max(latest, file.stat().st_mtime)
        except OSError:  # not there yet, or replaced just now
            continue
    return latest


@dataclass(frozen=True)
class _Files:
    """What a run's files say. Nobody changes it: it is kept."""

    settings: dict[str, Any]
    of: _Settings
    metrics: Metrics
    result: dict[str, Any]

    def last(self, column: str) -> float | None:
        return next((value for value in reversed(self.metrics.get(column, [])) if value is not None), None)

    def thinned(self) -> Metrics:
        """At most about MOST_ROWS rows: the last, and from there back every so many; what judges stays."""
        rows = len(self.metrics.get("epoch", []))
        every = math.ceil(rows / MOST_ROWS) or 1
        judged = [self.metrics[name] for name in FIGURES if name in self.metrics]

        def stays(i: int) -> bool:
            return (rows - 1 - i) % every == 0 or any(column[i] is not None for column in judged)

        kept = [i for i in range(rows) if stays(i)][-2 * MOST_ROWS :]
        return {name: [column[i] for i in kept] for name, column in self.metrics.items()}


def _files(folder: Path) -> _Files | None:
    """None where its settings cannot be read."""
    return _read(folder, *(_stamp(folder / name) for name in (CONFIG, METRICS, RESULT)))


def _stamp(file: Path) -> tuple[int, int]:
    try:
        facts = file.stat()
    except OSError:
        return 0, 0
    return facts.st_mtime_ns, facts.st_size


@lru_cache(512)
def _read(folder: Path, *stamps: tuple[int, int]) -> _Files | None:
    settings, result = (_object(_text(folder / name)) for name in (CONFIG, RESULT))
    try:
        return _Files(settings, _Settings.model_validate(settings), _columns(_text(folder / METRICS)), result)
    except ValidationError:
        return None


def _text(file: Path) -> str:
    """Empty where there is none that can be read."""
    try:
        if file.stat().st_size > MOST_BYTES:
            return ""
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _object(text: str) -> dict:
    try:
        told = json.loads(text)
    except ValueError:  # also one that is being written
        return {}
    return told if isinstance(told, dict) else {}


def _columns(text: str) -> Metrics:
    """Of a CSV that may be in the middle of being written: rows that are whole, numbers that are finite."""
    names, *rows = list(csv.reader(text.splitlines())) or [[]]
    whole = [row for row in rows if len(row) == len(names)]
    return {name: [_number(row[i]) for row in whole] for i, name in enumerate(names)}


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _about(name: str, folder: Path) -> dict | None:
    """What `Run` holds; None where its settings cannot be read."""
    files = _files(folder)
    if files is None:
        return None
    of, epoch, changed = files.of, int(files.last("epoch") or 0), _changed(folder)
    origin = of.teacher or of.init
    encoder = of.encoder or ("" if origin else "tiny")
    figures = {column: value for column in FIGURES if (value := files.last(column)) is not None}
    return {
        "name": name,
        "kind": of.kind,
        "state": _state(files, epoch, changed),
        "epoch": epoch,
        "epochs": of.epochs,
        "data": _public(of.data),
        "encoder": f"{encoder}-{of.width}x" if encoder and (of.width or 1) > 1 else encoder,
        "init": _public(origin),
        "figures": figures | _accuracy(files.result),
        "changed": changed,
    }


def _accuracy(result: dict) -> dict[str, float]:
    """Of a fine-tuning, on the pictures that it was judged on in the end."""
    try:
        after = result["after"]
        return {"accuracy": float((after.get("test") or after["held-out"])["accuracy"])}
    except (KeyError, TypeError, ValueError, AttributeError):  # without labels held out there is none
        return {}


def _state(files: _Files, epoch: int, changed: float) -> str:
    """Whether a run that is not finished still goes on shows in the age of its files alone: it may run elsewhere."""
    of, step, speed = files.of, files.last("step"), files.last("images_per_s")
    if files.result or epoch >= of.epochs or (of.max_steps and (step or 0) >= of.max_steps):
        return "finished"
    quiet_s = FIRST_EPOCH_S
    if step and speed and epoch:
        quiet_s = QUIET_S + QUIET_EPOCHS * step / epoch * of.batch_size / speed
    return "training" if time.time() - changed < quiet_s else "stopped"


def _public(place: str) -> str:
    """The last part that says something: clothing.zip of /home/me/clothing.zip, shards of shards/*.tar."""
    path = Path(place)
    return path.parent.name if "*" in path.name and path.parent.name else path.name


def _json(content: dict) -> Response:
    return Response(orjson.dumps(content), media_type="application/json")
