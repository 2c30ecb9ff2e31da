"""A cell of a study: a run of pretrain.py, and what its h and z are worth. Nothing is done twice.

    runs/studies/KEY/  a run's files, log.txt, a JSON file a kind of measurement, and cost.json: processor seconds, and
                       the code's commit

KEY is of the settings and the pictures.
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
from training.augment import AugmentSettings, augment
from training.config import RUNS, PretrainSettings
from training.data import store
from training.data.labelled import check_classes, hold_out
from training.data.sources import DataError, Source, open_source
from training.device import training_device
from training.encoders import embed
from training.evaluation import linear
from training.evaluation.knn import default_k, knn_predict, views_matched
from training.initial import initial
from training.pretrain import commit, pretrain
from training.study import factors

FOLDER, COST, COMMIT = "studies", "cost.json", "commit"
DECAY = 1e-3  # of the linear evaluation of every h and z
HELD_OUT = 0.2
MATCHED = 1000  # pictures whose two views look for each other
BINS = 16  # of a channel's histogram
RUN_ONLY = ("preset", "name", "resume", "devices", "data", "knn_epochs")  # settings that no figure depends on


@dataclass(frozen=True)
class Pictures:
    """With labels, known and asked about."""

    settings: PretrainSettings
    source: Source
    pixels: np.ndarray  # uint8 (M, S, S, 3)
    labels: np.ndarray  # (M,) int64
    asked: np.ndarray  # uint8 (Q, S, S, 3)
    asked_labels: np.ndarray  # (Q,) int64
    names: tuple[list[str], list[str]]  # of both


@dataclass(frozen=True)
class Bench(Pictures):
    """What a measurement has before it: the pictures, and the run's f and g."""

    encoder: nn.Module
    projector: nn.Module

    def h_and_z(self, pixels) -> tuple[Tensor, Tensor]:
        """(N, d) float32 each."""
        h = embed(self.encoder, pixels)
        return h, project(self.projector, h)


def project(projector: nn.Module, h: Tensor) -> Tensor:
    device = next((weight.device for weight in projector.parameters()), h.device)
    with torch.no_grad():
        return projector.eval()(h.to(device)).cpu()


def key(settings: PretrainSettings) -> str:
    """Of what decides the figures: the settings, and the pictures by names, sizes and times."""
    pictures = _pictures(settings.data, settings.size_px)
    facts = {name: value for name, value in settings.to_dict().items() if name not in RUN_ONLY}
    return hashlib.sha256(json.dumps([pictures, facts], sort_keys=True).encode()).hexdigest()[:16]


@cache
def _pictures(data: str, size_px: int) -> str:
    source = open_source(data)
    return store.place(source, source.pictures, Preprocessing(size_px), "all", Path("data")).name


def check(settings: PretrainSettings, kinds: tuple[str, ...]) -> None:
    """Whether these pictures can serve, before anything is trained. raises DataError."""
    pictures = labelled(settings)
    if "factors" in kinds:
        factors.table(pictures)


def run(settings: PretrainSettings, kinds: tuple[str, ...]) -> dict:
    """Train, measure, and keep both; what is there already is read. Flat: name of the figure to value, and COMMIT.

    kinds   keys of MEASURES
    raises  DataError; CheckpointError, RunProblem, Stopped of pretrain.py
    """
    name = f"{FOLDER}/{key(settings)}"
    folder = RUNS / name
    missing = [kind for kind in kinds if not (folder / f"{kind}.json").exists()]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "log.txt", "a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            warnings.filterwarnings("ignore", module="pytorch_lightning")
            began = time.process_time()
            pretrain(replace(settings, name=name, resume=True))
            start = initial(str(folder), None, None, None, settings.seed)
            f, g = (m.to(training_device()) for m in (start.encoder, start.projector or nn.Identity()))
            bench = Bench(**vars(labelled(settings)), encoder=f, projector=g)
            found = {kind: MEASURES[kind](bench) for kind in missing}
        earlier = _read(folder / COST) if (folder / COST).exists() else {}
        cpu_s = round(earlier.get("cpu_s", 0.0) + time.process_time() - began, 1)
        _write(folder / COST, {"cpu_s": cpu_s, COMMIT: commit()})
        for kind in missing:
            _write(folder / f"{kind}.json", found[kind])
    return {
        name: value for file in (COST, *(f"{k}.json" for k in kinds)) for name, value in _read(folder / file).items()
    }


def labelled(settings: PretrainSettings) -> Pictures:
    """raises DataError where there is nothing to learn, or to ask about"""
    source = open_source(settings.data)
    preprocessing = Preprocessing(settings.size_px)
    train, test = store.load(source, preprocessing, "train"), None
    if any(picture.split == "test" for picture in source.pictures):
        test = store.load(source, preprocessing, "test")
    tested = test is not None and (test.labels >= 0).any()
    check_classes(train.labels, test.labels if tested else None, train.classes, settings.data)
    if tested:
        known, asked = np.flatnonzero(train.labels >= 0), np.flatnonzero(test.labels >= 0)
    else:
        test, (known, asked) = train, hold_out(train.labels, HELD_OUT, 0)
    if not len(asked):
        raise DataError(f"{settings.data}: each class has one picture, so there is nothing to ask about")
    present, labels = np.unique(train.labels[known], return_inverse=True)
    return Pictures(
        settings,
        source,
        train.pixels[known],
        labels,
        test.pixels[asked],
        np.searchsorted(present, test.labels[asked]),
        ([train.names[i] for i in known], [test.names[i] for i in asked]),
    )


def quality(bench: Bench) -> dict[str, float]:
    """Linear evaluation of h and of z, kNN of h, and how often the z of two views find each other; all in [0, 1]."""
    known, asked = torch.from_numpy(bench.labels), torch.from_numpy(bench.asked_labels)
    bank, queries = bench.h_and_z(bench.pixels), bench.h_and_z(bench.asked)
    found = {}
    for name, of_known, of_asked in zip("hz", bank, queries, strict=True):
        best = linear.fit(of_known, known, DECAY)
        found[f"linear {name}"] = (best.predict(of_asked) == asked).double().mean().item()
    nearest = knn_predict(bank[0], known, queries[0], default_k(len(known)))
    found["kNN h"] = (nearest == asked).double().mean().item()
    found["views matched z"] = views_matched(*(bench.h_and_z(view)[1] for view in _views(bench)))
    saved = checkpoint.load(checkpoint.find(RUNS / FOLDER / key(bench.settings)))
    return found | {"steps": saved["global_step"]}


def histograms(bench: Bench) -> dict[str, float]:
    """How often two views find each other by nothing but the histograms of their channels (Fig. 6)."""
    return {"views matched by histogram": views_matched(*(histogram(view) for view in _views(bench)))}


def histogram(views: Tensor) -> Tensor:
    """(N, 3, S, S) in [0, 1] -> (N, 3 BINS): square roots, so that a cosine is Bhattacharyya's coefficient."""
    places = (views.flatten(2) * BINS).long().clamp(max=BINS - 1)  # (N, 3, S S)
    counts = torch.zeros(*places.shape[:2], BINS).scatter_add_(2, places, torch.ones(places.shape))
    return counts.flatten(1).sqrt()


def _views(bench: Bench) -> list[Tensor]:
    """Two of each of some pictures, as the run saw them: (N, 3, S, S) each."""
    chosen = np.sort(np.random.default_rng(0).permutation(len(bench.asked))[:MATCHED])
    pixels, generator = torch.from_numpy(bench.asked[chosen]), torch.Generator().manual_seed(bench.settings.seed)
    how: AugmentSettings = bench.settings.augment
    return [augment(pixels, how, generator, bench.settings.size_px) for _ in range(2)]


def _read(path: Path) -> dict:
    return json.loads(path.read_text())


def _write(path: Path, found: dict) -> None:
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(found, indent=1))
    os.replace(fresh, path)


MEASURES: dict[str, Callable[[Bench], dict[str, float]]] = {
    "quality": quality,
    "histograms": histograms,
    "factors": factors.measure,
}
