"""Quality of h without further training: weighted kNN accuracy, and whether two views of a picture find each other."""

from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.augment import augment
from training.config import PretrainSettings
from training.data.store import PixelStore
from training.data.stream import Stream, StreamedRows
from training.encoders import embed

Pictures = TypeVar("Pictures", bound=PixelStore | Stream)


def knn_predict(bank: Tensor, labels: Tensor, queries: Tensor, k: int, temperature: float = 0.1) -> Tensor:
    """Weighted k-nearest-neighbour classification (Wu et al. 2018, arXiv:1805.01978, Sec. 3.4).

    bank, queries  (M, d), (Q, d) float; normalised here, so similarity is the cosine
    labels         (M,) int64, >= 0
    returns        (Q,) int64: the class with the greatest sum of exp(similarity / temperature) over the k nearest,
                   where the query's greatest similarity is subtracted from all so that exp cannot overflow
    raises         ValueError: k is not between 1 and M
    """
    if not 1 <= k <= len(bank):
        raise ValueError(f"k must be between 1 and the bank's {len(bank)} rows, not {k}")
    bank, queries = F.normalize(bank, dim=1), F.normalize(queries, dim=1)
    classes = int(labels.max()) + 1
    predictions = []
    for rows in queries.split(1024):
        similarity, nearest = (rows @ bank.T).topk(k, dim=1)  # (q, k)
        votes = torch.zeros(len(rows), classes)
        votes.scatter_add_(1, labels[nearest], ((similarity - similarity[:, :1]) / temperature).exp())
        predictions.append(votes.argmax(dim=1))
    return torch.cat(predictions)


def default_k(bank_size: int) -> int:
    """Number of neighbours: 200 as in the literature, fewer for a bank of less than 10,000."""
    return max(1, min(200, bank_size // 50))


def views_matched(h_a: Tensor, h_b: Tensor) -> float:
    """Share of N pictures whose view a has its own view b as its nearest among all N; 1/N by chance.

    h_a, h_b  (N, d) float; row i of each is a view of picture i
    """
    nearest = (F.normalize(h_a, dim=1) @ F.normalize(h_b, dim=1).T).argmax(dim=1)
    return (nearest == torch.arange(len(h_a))).float().mean().item()


def metrics(
    encoder: nn.Module,
    train: PixelStore | Stream,
    test: PixelStore | Stream | None,
    settings: PretrainSettings,
    max_bank: int,
) -> dict:
    """Quality of an encoder on these images, as a flat dict for the log and the model card.

    With labels: `knn` in [0, 1], accuracy of the test set with the training set as the bank; if no test picture has a
    label, a tenth of the training set are the queries and the rest is the bank. Without labels: `views_matched`, in
    [0, 1].
    max_bank  largest bank, with up to a fifth as many queries; larger sets are sampled, always in the same way
    """
    if len(np.unique(train.labels[train.labels >= 0])) < 2:
        chosen = np.sort(np.random.default_rng(0).permutation(len(train.labels))[: min(1000, max_bank)])
        pixels = torch.from_numpy(train.pixels[chosen])
        generator = torch.Generator().manual_seed(0)
        h_a, h_b = (embed(encoder, augment(pixels, settings.augment, generator, settings.size_px)) for _ in range(2))
        return {"views_matched": views_matched(h_a, h_b), "pictures": len(chosen)}
    bank, query_store, queries = split_bank_and_queries(train, test, max_bank)
    k = default_k(len(bank))
    predicted = knn_predict(
        embed(encoder, StreamedRows(train.pixels, bank)),
        torch.from_numpy(train.labels[bank]),
        embed(encoder, StreamedRows(query_store.pixels, queries)),
        k,
    )
    right = (predicted == torch.from_numpy(query_store.labels[queries])).float().mean().item()
    return {"knn": right, "k": k, "bank": len(bank), "queries": len(queries)}


def figure(figures: dict) -> float:
    """The one number of a result of `metrics` by which encoders are compared: kNN accuracy, else views matched."""
    return figures.get("knn", figures.get("views_matched", 0.0))


def split_bank_and_queries(
    train: Pictures, test: Pictures | None, max_bank: int
) -> tuple[np.ndarray, Pictures, np.ndarray]:
    """Rows of the bank in `train`; the queries' store, and their rows in it. max_bank: as in `metrics`."""
    order = np.random.default_rng(0).permutation(len(train.labels))
    bank, query_store = order[train.labels[order] >= 0], train
    if test is not None and (test.labels >= 0).any():
        query_store = test
        queries = np.random.default_rng(0).permutation(np.flatnonzero(test.labels >= 0))
    else:
        queries, bank = np.split(bank, [max(1, len(bank) // 10)])
    return np.sort(bank[:max_bank]), query_store, np.sort(queries[: max(1, max_bank // 5)])


def sentence(before: dict, after: dict) -> str:
    """Describes two results of `metrics`, before and after training."""
    if "knn" in after:
        return (
            f"kNN accuracy {before['knn']:.1%} before training, {after['knn']:.1%} after "
            f"(k = {after['k']}, {after['queries']:,} queries against {after['bank']:,} images)"
        )
    return (
        f"two views of a picture find each other among {after['pictures']:,} pictures in {before['views_matched']:.1%} "
        f"of cases before training, {after['views_matched']:.1%} after"
    )
