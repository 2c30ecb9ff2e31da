"""A run's report.png: its curves, some pairs of views, and some pictures with their nearest neighbours."""

from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import SubFigure

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from training.augment import augment
from training.encoders import embed
from training.evaluation import tiles
from training.loss import LOSSES

if TYPE_CHECKING:
    from training.simclr import SimCLR

NAME = "report.png"
PAIRS, QUERIES, NEIGHBOURS = 6, 6, 7
BANK = 5000  # neighbours are searched among at most this many pictures


def write(path: Path, module: "SimCLR") -> None:
    """Write the report of a trained module."""
    settings, pixels = module.settings, module.train_store.pixels
    figure = plt.figure(figsize=(11, 14), layout="constrained")
    curves, pairs, neighbours = figure.subfigures(3, 1, squeeze=False, height_ratios=[1.1, 1.9, 4.2])[:, 0]
    figure.suptitle(f"{settings.name}: {settings.architecture}, {len(pixels):,} images, {settings.epochs} epochs")
    _curves(curves, module)

    chosen = np.random.default_rng(settings.seed).permutation(len(pixels))[:BANK]
    bank = torch.from_numpy(pixels[chosen])  # (M, S, S, 3)
    generator = torch.Generator().manual_seed(settings.seed)
    doubled = bank[:PAIRS].repeat(2, 1, 1, 1)
    views = augment(doubled, settings.augment, generator, settings.size_px)  # (2 PAIRS, 3, S, S)
    h_a, h_b = embed(module.encoder, views).chunk(2)
    similarity = F.cosine_similarity(h_a, h_b)  # (PAIRS,)
    pictures = views.permute(0, 2, 3, 1).numpy()
    pairs.suptitle("pairs of views and the cosine of their h")
    cosines = [f"{value:.2f}" for value in similarity]
    rows = [pictures[: len(cosines)], pictures[len(cosines) :]]
    tiles.draw(pairs.subplots(), rows, [cosines, [""] * len(cosines)], (2, PAIRS))

    h = F.normalize(embed(module.encoder, bank), dim=1)
    near = (h[:QUERIES] @ h.T).topk(min(NEIGHBOURS + 1, len(h)), dim=1)  # the picture itself comes first
    neighbours.suptitle("pictures (left) and their nearest neighbours by h")
    cosines = [["", *(f"{value:.2f}" for value in row[1:])] for row in near.values]
    rows = [pixels[chosen[row]] for row in near.indices]
    tiles.draw(neighbours.subplots(), rows, cosines, (QUERIES, 1 + NEIGHBOURS))
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _curves(figure: SubFigure, module: "SimCLR") -> None:
    history, contrastive = module.history, LOSSES[module.settings.loss]
    loss, rate, quality = figure.subplots(1, 3)
    epochs = [row["epoch"] for row in history]
    loss.plot(epochs, [row["loss"] for row in history])
    loss.axhline(contrastive.chance(module.settings.batch_size), color="grey", linestyle=":", label="chance")
    loss.set(title=f"{contrastive.title}, nats", xlabel="epoch")
    loss.legend()
    rate.plot(epochs, [row["lr"] for row in history])
    rate.set(title="learning rate", xlabel="epoch")
    name = "knn" if "knn" in module.facts["before"] else "views_matched"
    measured = [(0, module.facts["before"][name]), *((row["epoch"], row[name]) for row in history if name in row)]
    quality.plot(*zip(*measured, strict=True), marker="o")
    quality.set(title={"knn": "kNN accuracy", "views_matched": "views matched"}[name], xlabel="epoch", ylim=(0, 1))
