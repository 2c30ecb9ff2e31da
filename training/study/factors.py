"""What can be read from h and from z of the factors that shapes are drawn from (Chen et al. 2020, Table 3).

A linear probe and an MLP of one hidden layer, on standardised features, as classification: numbers in 8 equally full
bins, so that chance is 1/8. Only outlines that look different at each angle are asked for their orientation.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.augment import GREY_WEIGHTS
from training.data import shapes
from training.data.sources import DataError
from training.evaluation import linear

BINS = 8
TURNING = ("arrow", "crescent", "heart")
NUMBERS = ("hue", "saturation", "value", "orientation_deg", "scale", "x", "y")
NAMES = ("class", "texture", "background")
GREY = "made grey"
DECAY = 1e-3
HIDDEN, EPOCHS, BATCH, LR = 256, 30, 128, 1e-3


def measure(bench) -> dict[str, float]:
    """'FACTOR: PROBE of H_OR_Z' -> accuracy in [0, 1], and 'FACTOR: chance'. bench: a Bench of cell.py on shapes.

    raises  DataError where the pictures are not shapes
    """
    rows = table(bench)
    known, asked = (np.array([rows["place"][name] for name in names]) for names in bench.names)
    features = list(zip(bench.h_and_z(bench.pixels), bench.h_and_z(bench.asked), strict=True))  # of h, of z
    found = {}
    for factor in (*NAMES, *NUMBERS):
        values = rows[factor]
        use = np.isin(rows["class"], TURNING) if factor == "orientation_deg" else np.ones(len(values), bool)
        a, b = use[known], use[asked]
        labels = _binned(values[known[a]], values[asked[b]])
        read = [(of_known[torch.from_numpy(a)], of_asked[torch.from_numpy(b)]) for of_known, of_asked in features]
        found |= _read(factor.removesuffix("_deg"), read, *labels, bench.settings.seed)
    grey = [_half_grey(pixels) for pixels in (bench.pixels, bench.asked)]
    read = list(zip(*(bench.h_and_z(pixels) for pixels, _ in grey), strict=True))
    return found | _read(GREY, read, grey[0][1], grey[1][1], bench.settings.seed)


def mlp(x: Tensor, labels: Tensor, seed: int) -> nn.Module:
    """Fit to standardised features: x (N, d) float32, labels (N,) int64."""
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


def _read(factor: str, rows: list, labels: Tensor, asked_labels: Tensor, seed: int) -> dict[str, float]:
    """rows: of h and of z, features of what is known and of what is asked about."""
    found = {f"{factor}: chance": (asked_labels == labels.mode().values).double().mean().item()}
    for name, (known, asked) in zip("hz", rows, strict=True):
        fitted = linear.fit(known, labels, DECAY)
        a, b = ((x - fitted.mean) / fitted.scale for x in (known, asked))
        with torch.no_grad():
            guesses = {"linear": fitted.predict(asked)}
        network = mlp(a, labels, seed)
        with torch.no_grad():
            guesses["mlp"] = network(b).argmax(dim=1)
        found |= {f"{factor}: {way} {name}": (g == asked_labels).double().mean().item() for way, g in guesses.items()}
    return found


def _binned(known: np.ndarray, asked: np.ndarray) -> tuple[Tensor, Tensor]:
    """Values to classes (N,) int64, by the known ones' quantiles where they are numbers."""
    if known.dtype.kind == "f":
        edges = np.quantile(known, np.arange(1, BINS) / BINS)
        return torch.from_numpy(np.searchsorted(edges, known)), torch.from_numpy(np.searchsorted(edges, asked))
    kinds = np.unique(known)
    return torch.from_numpy(np.searchsorted(kinds, known)), torch.from_numpy(np.searchsorted(kinds, asked))


def _half_grey(pixels: np.ndarray) -> tuple[np.ndarray, Tensor]:
    """Every other picture without its colour, and which: uint8 (N, S, S, 3), (N,) int64."""
    changed = np.array(pixels)
    luma = changed[1::2].astype(np.float32) @ np.array(GREY_WEIGHTS, np.float32)
    changed[1::2] = (luma + 0.5).astype(np.uint8)[..., None]
    return changed, torch.arange(len(changed)) % 2


def table(pictures) -> dict:
    """factors.csv of the pictures' folder, and `place`: the row of each name. pictures: Pictures of cell.py.

    raises  DataError where there is no such file, or a picture is not in it
    """
    data = pictures.settings.data
    path = next((p.path for p in pictures.source.pictures if p.path is not None), None)
    folder = next((f for f in path.parents if (f / "factors.csv").exists()), None) if path else None
    if folder is None:
        raise DataError(f"{data} has no factors.csv: this study wants shapes, whose factors are known")
    try:
        found = shapes.factors(folder)
    except (KeyError, ValueError, UnicodeDecodeError) as error:
        raise DataError(f"{folder / 'factors.csv'} is not of shapes: {error}") from error
    found["place"] = {name: row for row, name in enumerate(found["name"].tolist())}
    if strange := [name for names in pictures.names for name in names if name not in found["place"]]:
        raise DataError(f"{data}: {folder / 'factors.csv'} has no picture {strange[0]}; give the folder as it was made")
    return found
