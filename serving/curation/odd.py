"""Which pictures of a collection are odd among their neighbours.

outlier_factors  how far a picture is from its neighbours, compared with what is usual among all pictures, and around
                 these neighbours, as in the local outlier factor (Breunig et al. 2000, LOF: Identifying Density-Based
                 Local Outliers). The second alone misses alien pictures that resemble each other, and the first alone
                 those outside of dense groups.
label_doubts     how much the labels of a picture's neighbours speak for another label than its own. Each neighbour
                 votes with the weight exp(cosine / TEMPERATURE), as in the kNN classifier of Wu et al. 2018
                 (arXiv:1805.01978). A label that usually gets few votes from its own pictures needs few: its share of
                 the votes counts relative to that usual share.
"""

from typing import NamedTuple

import numpy as np

from serving.curation.neighbours import centred, neighbours

NEIGHBOURS = 100
LEAST = 20  # pictures that can be compared
SHARE = 4  # of fewer than NEIGHBOURS * SHARE pictures, a quarter counts as a picture's neighbours
SMALLEST = 0.1  # times the median distance: shorter distances, as between copies, count as this one
TEMPERATURE = 0.1
FEW_VOTES = 0.01  # added to each share of the votes, so that a ratio of two small ones says little
USUAL_OF = 10  # pictures' worth of the average of all labels is in the usual share of each: some labels are rare
SHARES = 2**24  # pictures times labels that are computed at once: 128 MiB


class LabelDoubts(NamedTuple):
    suggested: np.ndarray
    """(n,) int64: the label that the neighbours speak most for."""
    score: np.ndarray
    """(n,) float64: how many times as much they speak for it as for the picture's own label; 1 if it is the same."""


def outlier_factors(vectors: np.ndarray) -> np.ndarray:
    """Returns (n,) float32: the geometric mean of two ratios, of a picture's mean distance to its neighbours to the
    median of all pictures, and to the average of these neighbours. 1 is ordinary.

    vectors  (n, d) float32, n >= LEAST, rows of length 1
    """
    rows, cosines = neighbours(vectors, min(NEIGHBOURS, len(vectors) // SHARE))
    distance = np.sqrt(np.maximum(0, 2 - 2 * cosines)).mean(axis=1)  # (n,)
    usual = max(float(np.median(distance)), 1e-6)
    around = np.maximum(distance[rows].mean(axis=1), SMALLEST * usual)
    return distance / np.sqrt(usual * around)


def label_doubts(vectors: np.ndarray, labels: np.ndarray) -> LabelDoubts:
    """vectors  (n, d) float32, n >= 2, rows of length 1
    labels   (n,) int, 0 to the number of labels - 1; each occurs
    """
    n, sizes = len(labels), np.bincount(labels)
    rows, cosines = neighbours(centred(vectors, vectors.mean(axis=0)), min(NEIGHBOURS, n - 1))
    weights = np.exp((cosines - cosines[:, :1]) / TEMPERATURE)  # (n, k)
    weights /= weights.sum(axis=1, keepdims=True)
    own = np.where(labels[rows] == labels[:, None], weights, 0).sum(axis=1)  # (n,)
    usual = (np.bincount(labels, own) + USUAL_OF * own.mean()) / (sizes + USUAL_OF)
    suggested, score = np.empty(n, np.int64), np.empty(n)
    size = max(1, SHARES // len(sizes))
    for start in range(0, n, size):
        block = slice(start, start + size)
        one = np.arange(len(labels[block]))
        places = (one[:, None] * len(sizes) + labels[rows[block]]).ravel()
        shares = np.bincount(places, weights[block].ravel(), len(one) * len(sizes)).reshape(len(one), -1)
        relative = (shares + FEW_VOTES) / (usual + FEW_VOTES)
        suggested[block] = relative.argmax(axis=1)
        score[block] = relative.max(axis=1) / relative[one, labels[block]]
    return LabelDoubts(suggested, score)
