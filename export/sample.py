"""What an export measures on pictures: the mean of h, which it subtracts, and how good h then is on them."""

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from export.artifact import Preprocessing, UnreadableImage, read_pixels
from training.data.sources import DataError, open_source
from training.encoders import CENTRE_IMAGES
from training.evaluation import judge
from training.evaluation.knn import default_k, knn_predict

BATCH = 32
QUERIES = 0.2  # share of the labelled pictures that are kNN queries against the others


class Sample(NamedTuple):
    centre: Tensor
    """Mean of h: (d,) float32."""
    measured: dict
    """Figures of h minus its mean, for the card, with the name of the `data`."""


def sample(data: str, preprocessing: Preprocessing, encode: Callable[[np.ndarray], Tensor]) -> Sample:
    """Measure an encoder on up to CENTRE_IMAGES pictures.

    data    pictures, as --data of pretrain.py
    encode  uint8 (n, S, S, 3) -> h (n, d)
    raises  DataError
    """
    source = open_source(data)
    order, kept, labels, rows = np.random.default_rng(0).permutation(len(source)), [], [], []
    for start in range(0, min(len(order), CENTRE_IMAGES), BATCH):
        pixels = []
        for i in order[start : start + BATCH]:
            try:
                pixels.append(read_pixels(source.pictures[i].read(), preprocessing))
            except (UnreadableImage, OSError):
                continue
            labels.append(source.pictures[i].label)
        if pixels:
            rows.append(encode(np.stack(pixels)))
            kept += pixels[: judge.PICTURES - len(kept)]
    if not rows:
        raise DataError(f"--centre-on {data} has no picture that can be read")
    h = torch.cat(rows)
    centre = h.double().mean(dim=0).float()
    figures = _by_labels(h - centre, labels) or _by_changed_views(lambda x: encode(x) - centre, np.stack(kept))
    return Sample(centre, {"data": source.name, **figures} if figures else {})


def _by_labels(h: Tensor, labels: list[str | None]) -> dict:
    """kNN accuracy; empty without two classes, of which one has several pictures."""
    sizes = Counter(label for label in labels if label is not None)
    if len(sizes) < 2 or max(sizes.values()) < 2:
        return {}
    number = {label: i for i, label in enumerate(sizes)}
    labelled = [i for i, label in enumerate(labels) if label is not None]
    known = torch.tensor([number[label] for label in labels if label is not None])
    count = max(1, int(QUERIES * len(labelled)))
    h, k = h[labelled], default_k(len(labelled) - count)
    right = knn_predict(h[count:], known[count:], h[:count], k) == known[:count]
    return {"knn": right.double().mean().item(), "k": k, "queries": count, "bank": len(labelled) - count}


def _by_changed_views(encode: Callable[[np.ndarray], Tensor], pixels: np.ndarray) -> dict:
    """Share of pictures that come first among all when searched by a changed view; empty for a single picture."""
    if len(pixels) < 2:
        return {}

    def in_batches(pixels: np.ndarray) -> Tensor:
        return torch.cat([encode(pixels[start : start + BATCH]) for start in range(0, len(pixels), BATCH)])

    first = judge.ranks(in_batches, pixels) == 1
    return {"found_first": first.double().mean().item(), "judged": len(pixels)}
