"""How well the factors that shapes are drawn from can be read from h and from z (Chen et al. 2020, Table 3).

A linear probe and an MLP with one hidden layer classify standardised features; numbers are put into 8 equally full
bins, so that chance is 1/8. Orientation is read only of outlines that look different at each angle.
"""

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.augment import GREY_WEIGHTS
from training.data import shapes
from training.data.sources import DataError
from training.evaluation import linear

if TYPE_CHECKING:
    from training.study.cell import StudyPictures, TrainedCell

BINS = 8
ORIENTED = ("arrow", "crescent", "heart")
NUMBERS = ("hue", "saturation", "value", "orientation_deg", "scale", "x", "y")
NAMES = ("class", "texture", "background")
GREY = "made grey"
DECAY = 1e-3
HIDDEN, EPOCHS, BATCH, LR = 256, 30, 128, 1e-3


def measure(cell: "TrainedCell") -> dict[str, float]:
    """Accuracies in [0, 1] named 'FACTOR: PROBE h' and 'FACTOR: PROBE z', and 'FACTOR: chance'.

    raises  DataError when the pictures are not shapes
    """
    rows = table(cell)
    bank, queries = (np.array([rows["place"][name] for name in names]) for names in cell.names)
    features = list(zip(cell.h_and_z(cell.pixels), cell.h_and_z(cell.queries), strict=True))  # of h, of z
    figures = {}
    for factor in (*NAMES, *NUMBERS):
        values = rows[factor]
        used = np.isin(rows["class"], ORIENTED) if factor == "orientation_deg" else np.ones(len(values), bool)
        a, b = used[bank], used[queries]
        labels = _classes(values[bank[a]], values[queries[b]])
        both = [(x[torch.from_numpy(a)], x_queries[torch.from_numpy(b)]) for x, x_queries in features]
        figures |= _probe(factor.removesuffix("_deg"), both, *labels, cell.settings.seed)
    (pixels, grey), (query_pixels, query_grey) = (_half_grey(pixels) for pixels in (cell.pixels, cell.queries))
    both = list(zip(cell.h_and_z(pixels), cell.h_and_z(query_pixels), strict=True))
    return figures | _probe(GREY, both, grey, query_grey, cell.settings.seed)


def mlp(x: Tensor, labels: Tensor, seed: int) -> nn.Module:
    """An MLP fitted to standardised features: x (N, d) float32, labels (N,) int64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(
            nn.Linear(x.shape[1], HIDDEN), nn.ReLU(), nn.Dropout(), nn.Linear(HIDDEN, int(labels.max()) + 1)
        )
        optimizer = torch.optim.AdamW(network.parameters(), lr=LR, weight_decay=0.01)
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(x)).split(BATCH):
                optimizer.zero_grad()
                F.cross_entropy(network(x[rows]), labels[rows]).backward()
                optimizer.step()
    return network.eval()


def _probe(factor: str, features: list, labels: Tensor, query_labels: Tensor, seed: int) -> dict[str, float]:
    """features: for h and for z, those of the bank and those of the queries."""
    figures = {f"{factor}: chance": (query_labels == labels.mode().values).double().mean().item()}
    for name, (bank, queries) in zip("hz", features, strict=True):
        fitted = linear.fit(bank, labels, DECAY)
        a, b = ((x - fitted.mean) / fitted.scale for x in (bank, queries))
        predicted = {"linear": fitted.predict(queries)}
        network = mlp(a, labels, seed)
        with torch.no_grad():
            predicted["mlp"] = network(b).argmax(dim=1)
        for probe, guess in predicted.items():
            figures[f"{factor}: {probe} {name}"] = (guess == query_labels).double().mean().item()
    return figures


def _classes(bank: np.ndarray, queries: np.ndarray) -> tuple[Tensor, Tensor]:
    """Values as class numbers (N,) int64; numbers are binned by the quantiles of the bank."""
    edges = np.quantile(bank, np.arange(1, BINS) / BINS) if bank.dtype.kind == "f" else np.unique(bank)
    return torch.from_numpy(np.searchsorted(edges, bank)), torch.from_numpy(np.searchsorted(edges, queries))


def _half_grey(pixels: np.ndarray) -> tuple[np.ndarray, Tensor]:
    """The pictures with every second one made grey, and 1 for those: uint8 (N, S, S, 3), (N,) int64."""
    changed = np.array(pixels)
    luma = changed[1::2].astype(np.float32) @ np.array(GREY_WEIGHTS, np.float32)
    changed[1::2] = (luma + 0.5).astype(np.uint8)[..., None]
    return changed, torch.arange(len(changed)) % 2


def table(pictures: "StudyPictures") -> dict:
    """Columns of the pictures' factors.csv, and `place`: the row of each name.

    raises  DataError when there is no such file, or a picture is not in it
    """
    data = pictures.settings.data
    path = next((p.path for p in pictures.source.pictures if p.path is not None), None)
    folder = next((f for f in path.parents if (f / "factors.csv").exists()), None) if path else None
    if folder is None:
        raise DataError(f"{data} has no factors.csv: this study needs shapes, whose factors are known")
    try:
        columns = shapes.factors(folder)
    except (KeyError, ValueError, UnicodeDecodeError) as error:
        raise DataError(f"{folder / 'factors.csv'} is not of shapes: {error}") from error
    places = {name: row for row, name in enumerate(columns["name"].tolist())}
    if missing := [name for names in pictures.names for name in names if name not in places]:
        raise DataError(f"{data}: {folder / 'factors.csv'} has no picture {missing[0]}; give the whole folder")
    return columns | {"place": places}
