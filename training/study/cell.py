"""One cell of a study: a run of pretrain.py and measurements of its h and z. Results are kept and reused.

    runs/studies/KEY/  the run's files, log.txt, one JSON file per kind of measurement, and cost.json: processor seconds
                       and the commit of the code

KEY is a hash of the settings and the pictures.
"""

import contextlib
import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from export.artifact import Preprocessing
from training import checkpoint
from training.augment import augment
from training.config import RUNS, PretrainSettings
from training.data import store
from training.data.labelled import bank_and_queries
from training.data.sources import Source, open_source
from training.device import training_device
from training.encoders import embed, head_for_h
from training.evaluation import linear
from training.evaluation.knn import default_k, knn_predict, views_matched
from training.initial import load_initial
from training.pretrain import pretrain
from training.run_folder import commit
from training.study import factors

FOLDER, COST, COMMIT = "studies", "cost.json", "commit"
DECAY = 1e-3  # of every linear evaluation
HELD_OUT = 0.2  # without a test split: share of each class that is held out as queries
MATCHED = 1000  # most pictures whose two views are matched
BINS = 16  # bins of a channel's histogram
RUN_ONLY = ("preset", "name", "resume", "devices", "data", "knn_epochs")  # settings that do not change the results


@dataclass(frozen=True)
class StudyPictures:
    """Labelled pictures: the bank, and the queries."""

    settings: PretrainSettings
    source: Source
    pixels: np.ndarray  # uint8 (M, S, S, 3)
    labels: np.ndarray  # (M,) int64
    queries: np.ndarray  # uint8 (Q, S, S, 3)
    query_labels: np.ndarray  # (Q,) int64
    names: tuple[list[str], list[str]]  # of bank and queries


@dataclass(frozen=True)
class TrainedCell(StudyPictures):
    """The pictures, and f and g of the trained run."""

    encoder: nn.Module
    projector: nn.Module
    """As `head_for_h` makes it."""

    def h_and_z(self, pixels: np.ndarray | Tensor) -> tuple[Tensor, Tensor]:
        """(N, d) float32 each."""
        h = embed(self.encoder, pixels)
        return h, project(self.projector, h)


def project(projector: nn.Module, h: Tensor) -> Tensor:
    """z of h, in evaluation mode, on the CPU."""
    device = next((weight.device for weight in projector.parameters()), h.device)
    with torch.no_grad():
        return projector.eval()(h.to(device)).cpu()


def cell_key(settings: PretrainSettings) -> str:
    """Hash of the settings and of the names, sizes and times of the pictures."""
    pictures = _pictures(settings.data, settings.size_px)
    facts = {name: value for name, value in settings.to_dict().items() if name not in RUN_ONLY}
    return hashlib.sha256(json.dumps([pictures, facts], sort_keys=True).encode()).hexdigest()[:16]


@cache
def _pictures(data: str, size_px: int) -> str:
    source = open_source(data)
    return store.store_folder(source, source.pictures, Preprocessing(size_px), "all", Path("data")).name


def check_pictures(settings: PretrainSettings, kinds: tuple[str, ...]) -> None:
    """raises DataError when the pictures cannot be used for these measurements, before anything is trained"""
    pictures = load_pictures(settings)
    if "factors" in kinds:
        factors.table(pictures)


def run_cell(settings: PretrainSettings, kinds: tuple[str, ...]) -> dict:
    """Train and measure, or read existing results. Returns figures by name, processor seconds, and COMMIT.

    kinds   keys of MEASURES
    raises  DataError; CheckpointError, RunProblem, Stopped of pretrain.py
    """
    name = f"{FOLDER}/{cell_key(settings)}"
    folder = RUNS / name
    missing = [kind for kind in kinds if not (folder / f"{kind}.json").exists()]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "log.txt", "a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            warnings.filterwarnings("ignore", module="pytorch_lightning")
            began = time.process_time()
            pretrain(replace(settings, name=name, resume=True))
            start = load_initial(str(folder), None, None, None, settings.seed)
            g = head_for_h(start.projector, start.encoder) if start.projector else nn.Identity()
            f, g = (m.to(training_device()) for m in (start.encoder, g))
            cell = TrainedCell(**vars(load_pictures(settings)), encoder=f, projector=g)
            figures = {kind: MEASURES[kind](cell) for kind in missing}
        earlier = _read(folder / COST) if (folder / COST).exists() else {}
        cpu_s = round(earlier.get("cpu_s", 0.0) + time.process_time() - began, 1)
        _write(folder / COST, {"cpu_s": cpu_s, COMMIT: commit()})
        for kind in missing:
            _write(folder / f"{kind}.json", figures[kind])
    files = (COST, *(f"{kind}.json" for kind in kinds))
    return {name: value for file in files for name, value in _read(folder / file).items()}


def load_pictures(settings: PretrainSettings) -> StudyPictures:
    """raises DataError: fewer than two classes, or no queries"""
    source = open_source(settings.data)
    train, test = store.load_splits(source, settings.preprocessing)
    bank, query_store, queries = bank_and_queries(train, test, HELD_OUT, 0, settings.data)
    present, labels = np.unique(train.labels[bank], return_inverse=True)
    return StudyPictures(
        settings,
        source,
        train.pixels[bank],
        labels,
        query_store.pixels[queries],
        np.searchsorted(present, query_store.labels[queries]),
        ([train.names[i] for i in bank], [query_store.names[i] for i in queries]),
    )


def quality(cell: TrainedCell) -> dict[str, float]:
    """Linear evaluation of h and of z, kNN of h, share of views whose nearest z is the other view's; all in [0, 1]."""
    labels, query_labels = torch.from_numpy(cell.labels), torch.from_numpy(cell.query_labels)
    bank, queries = cell.h_and_z(cell.pixels), cell.h_and_z(cell.queries)
    figures = {}
    for name, x, x_queries in zip("hz", bank, queries, strict=True):
        predicted = linear.fit(x, labels, DECAY).predict(x_queries)
        figures[f"linear {name}"] = (predicted == query_labels).double().mean().item()
    nearest = knn_predict(bank[0], labels, queries[0], default_k(len(labels)))
    figures["kNN h"] = (nearest == query_labels).double().mean().item()
    figures["views matched z"] = views_matched(*(cell.h_and_z(view)[1] for view in _views(cell)))
    saved = checkpoint.load(checkpoint.find(RUNS / FOLDER / cell_key(cell.settings)))
    return figures | {"steps": saved["global_step"]}


def histograms(cell: TrainedCell) -> dict[str, float]:
    """Share of views that are matched by the colour histograms of their channels alone (Fig. 6)."""
    return {"views matched by histogram": views_matched(*(histogram(view) for view in _views(cell)))}


def histogram(views: Tensor) -> Tensor:
    """(N, 3, S, S) in [0, 1] -> (N, 3 BINS): roots of the counts, whose cosine is the Bhattacharyya coefficient."""
    places = (views.flatten(2) * BINS).long().clamp(max=BINS - 1)  # (N, 3, S S)
    counts = torch.zeros(*places.shape[:2], BINS).scatter_add_(2, places, torch.ones(places.shape))
    return counts.flatten(1).sqrt()


def _views(cell: TrainedCell) -> list[Tensor]:
    """Two augmented views of each of up to MATCHED queries: (N, 3, S, S) each."""
    chosen = np.sort(np.random.default_rng(0).permutation(len(cell.queries))[:MATCHED])
    pixels, generator = torch.from_numpy(cell.queries[chosen]), torch.Generator().manual_seed(cell.settings.seed)
    return [augment(pixels, cell.settings.augment, generator, cell.settings.size_px) for _ in range(2)]


def _read(path: Path) -> dict:
    return json.loads(path.read_text())


def _write(path: Path, figures: dict) -> None:
    new = path.with_suffix(".new")
    new.write_text(json.dumps(figures, indent=1))
    os.replace(new, path)


MEASURES: dict[str, Callable[[TrainedCell], dict[str, float]]] = {
    "quality": quality,
    "histograms": histograms,
    "factors": factors.measure,
}
