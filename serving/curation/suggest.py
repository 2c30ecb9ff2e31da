"""Which labels the pictures without one probably have: those of their nearest pictures with a label.

Each of the NEIGHBOURS nearest votes with the weight exp(cosine / TEMPERATURE), as in the kNN classifier of Wu et al.
2018 (arXiv:1805.01978).
"""

from dataclasses import dataclass

import numpy as np

from serving.collection.index import Index
from serving.collection.items import Item
from serving.curation.items import read_items
from serving.curation.neighbours import centred
from serving.protocol.filters import Filter

NEIGHBOURS = 20
TEMPERATURE = 0.1
MOST_KNOWN = 10_000  # pictures with a label that are compared; of more, a sample
ROWS = 1024  # pictures without a label that are compared at once
LABELLED = Filter.parse({"$not": {"label": None}})


@dataclass(frozen=True)
class SuggestedLabels:
    items: list[tuple[Item, str, float]]
    """Items without a label, with the suggestion and its share of the votes, 0 to 1; the surest first."""
    candidates: int
    """Number of items without a label that match the filter."""


class TooFewLabels(Exception):
    """The message completes the sentence "<collection> ..."."""


def suggest_labels(index: Index, k: int, where: Filter | None = None) -> SuggestedLabels:
    """The k items whose labels are surest.

    where   only for these; all labels of the collection are used
    raises  TooFewLabels, IndexProblem
    """
    known, known_vectors = read_items(index, LABELLED)
    names, labels = np.unique([str(item.label) for item in known], return_inverse=True)
    if len(names) < 2:
        raise TooFewLabels(
            f"has {f'no label but {names[0]}' if len(names) else 'no labels'}; label some pictures of two kinds or more"
        )
    items, vectors = read_items(index, where)
    free = [row for row, item in enumerate(items) if item.label is None]
    if not free:
        return SuggestedLabels([], 0)
    label, share = suggest(vectors[free], known_vectors, labels)
    surest = np.argsort(-share, kind="stable")[:k]
    found = [(items[free[row]], str(names[label[row]]), round(float(share[row]), 4)) for row in surest]
    return SuggestedLabels(found, len(free))


def suggest(vectors: np.ndarray, known: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the label (n,) int64 that gets most votes for each row, and its share of the votes (n,) float32.

    vectors  (n, d) float32, rows of length 1
    known    (m, d) float32, rows of length 1
    labels   (m,) int64 of `known`
    """
    if len(known) > MOST_KNOWN:
        sample = np.random.default_rng(0).permutation(len(known))[:MOST_KNOWN]
        known, labels = known[sample], labels[sample]
    near = min(NEIGHBOURS, len(known))
    centre = (vectors.sum(axis=0) + known.sum(axis=0)) / (len(vectors) + len(known))
    known = centred(known, centre)
    best, share = np.empty(len(vectors), np.int64), np.empty(len(vectors), np.float32)
    for start in range(0, len(vectors), ROWS):
        rows = slice(start, start + ROWS)
        cosine = centred(vectors[rows], centre) @ known.T  # (r, m)
        nearest = np.argpartition(cosine, len(known) - near, axis=1)[:, len(known) - near :]  # (r, near)
        cosine = np.take_along_axis(cosine, nearest, axis=1)
        weights = np.exp((cosine - cosine.max(axis=1, keepdims=True)) / TEMPERATURE)
        votes = np.zeros((len(cosine), labels.max() + 1), np.float32)
        np.add.at(votes, (np.arange(len(cosine))[:, None], labels[nearest]), weights)
        best[rows] = votes.argmax(axis=1)
        share[rows] = votes.max(axis=1) / votes.sum(axis=1)
    return best, share
