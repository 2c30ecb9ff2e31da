"""Which pictures of a collection to label first, so that few labels say much about all pictures.

    central   the picture in the middle of each of k clusters (k-means), the largest cluster first
    typical   the picture of each of k clusters that is nearest to its neighbours: TypiClust (Hacohen et al. 2022)
    covering  the picture that has most pictures around it that no other one covers: ProbCover (Yehuda et al. 2022)
    diverse   the picture farthest from all picked ones: k-centre greedy (Sener and Savarese 2018)

Pictures that have a label count as picked before.
"""

import warnings
from collections.abc import Callable
from typing import get_args

import numpy as np
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning

from serving.protocol.queries import PickMethod

MOST_CLUSTERS = 500
NEIGHBOURS = 20  # that say how typical a picture is; as in the paper
CLUSTER_SAMPLE = 4096  # pictures of a cluster that are compared with each other
COVER_SAMPLE = 10_000  # pictures of a collection that are compared with each other
QUICK = 100_000  # rows times clusters of a k-means that takes little time
BALLS = 500  # pictures around which the radius of a ball is measured
RADII = np.geomspace(0.0005, 0.5, 20)  # as shares of all distances
PURE = 0.7  # least share of a ball's pictures that are of its centre's cluster, on average


def pick(
    vectors: np.ndarray, k: int, method: PickMethod = "central", labelled: np.ndarray | None = None, seed: int = 0
) -> np.ndarray:
    """Returns k rows without a label, or all if there are fewer; the most useful come first.

    vectors   (n, d) float32, rows of length 1
    labelled  (n,) bool: which have a label; by default none
    returns   (min(k, unlabelled),) int64
    """
    labelled = np.zeros(len(vectors), bool) if labelled is None else labelled
    k = min(k, int((~labelled).sum()))
    if k < 1:
        return np.empty(0, np.int64)
    return METHODS[method](vectors, k, labelled, seed)


def balanced(count: int, groups: np.ndarray) -> np.ndarray:
    """Divides `count` among groups as evenly as their sizes allow.

    groups   (g,) int, sizes
    returns  (g,) int: how many of each, together min(count, all)
    """
    shares = np.zeros(len(groups), np.int64)
    for _ in range(min(count, int(groups.sum()))):
        shares[np.where(shares < groups, shares, groups.sum()).argmin()] += 1
    return shares


def central(vectors: np.ndarray, k: int, labelled: np.ndarray, seed: int) -> np.ndarray:
    def to_centre(rows: np.ndarray, centre: np.ndarray) -> np.ndarray:
        return rows[np.argsort(-(vectors[rows] @ centre), kind="stable")]

    return _of_clusters(vectors, k, labelled, seed, to_centre)


def typical(vectors: np.ndarray, k: int, labelled: np.ndarray, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)

    def by_typicality(rows: np.ndarray, _: np.ndarray) -> np.ndarray:
        rows = rng.permutation(rows)
        near = min(NEIGHBOURS, len(rows), CLUSTER_SAMPLE)
        some = rows[:CLUSTER_SAMPLE]
        distance = np.sqrt(np.maximum(0, 2 - 2 * vectors[some] @ vectors[some].T))  # (s, s); itself too, at 0
        order = np.partition(distance, near - 1, axis=1)[:, :near].mean(axis=1).argsort(kind="stable")
        return np.concatenate([some[order], rows[CLUSTER_SAMPLE:]])

    return _of_clusters(vectors, k, labelled, seed, by_typicality)


def _of_clusters(
    vectors: np.ndarray,
    k: int,
    labelled: np.ndarray,
    seed: int,
    sort: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> np.ndarray:
    """Picks from the cluster with the fewest labels, the largest of those, again and again.

    sort  (rows of a cluster, its centre) -> the rows, best first
    """
    clusters, centres = _clusters(vectors, k + int(labelled.sum()), seed)
    sizes = np.bincount(clusters, minlength=len(centres))
    labels = np.bincount(clusters[labelled], minlength=len(centres))
    left: dict[int, list[int]] = {}
    picked = []
    while len(picked) < k:
        order = np.lexsort((-sizes, labels))
        for c in order[labels[order] == labels[order[0]]].tolist():
            if c not in left:
                rows = np.flatnonzero((clusters == c) & ~labelled)
                left[c] = sort(rows, centres[c])[::-1].tolist() if len(rows) else []
            labels[c] += 1
            if left[c]:
                picked.append(left[c].pop())
            if len(picked) == k:
                break
    return np.array(picked)


def covering(vectors: np.ndarray, k: int, labelled: np.ndarray, seed: int) -> np.ndarray:
    rows = np.random.default_rng(seed).permutation(np.flatnonzero(~labelled))[: max(COVER_SAMPLE, k)]
    free = vectors[rows]
    distance = 1 - free @ free.T
    np.fill_diagonal(distance, 0)
    clusters, _ = _clusters(free, k + int(labelled.sum()), seed)
    radius = _radius(distance[:BALLS], clusters)
    near = distance <= radius
    is_open = np.ones(len(rows), bool)  # no picked picture is near
    for row in np.flatnonzero(labelled):
        is_open &= 1 - free @ vectors[row] > radius
    gain = near[:, is_open].sum(axis=1)
    picked: list[int] = []
    for _ in range(k):
        picked.append(int(gain.argmax()))
        covered = near[picked[-1]] & is_open
        gain -= near[:, covered].sum(axis=1)
        is_open &= ~covered
        gain[picked] = -1 - len(rows)
    return rows[picked]


def _radius(distance: np.ndarray, clusters: np.ndarray) -> float:
    """Returns the largest radius at which PURE of a ball's pictures are of the same cluster as its centre, on average;
    each cluster counts the same.

    distance  (b, n), from the first b rows to all
    """
    own = clusters[: len(distance)]
    same = own[:, None] == clusters
    weights = 1 / np.bincount(own)[own]
    best = 0.0
    for radius in np.quantile(distance, RADII):
        near = distance <= radius
        if np.average((near & same).sum(axis=1) / near.sum(axis=1), weights=weights) >= PURE:
            best = float(radius)
    return best


def diverse(vectors: np.ndarray, k: int, labelled: np.ndarray, seed: int) -> np.ndarray:
    farthest = np.full(len(vectors), 3, np.float32)  # 1 - cosine to the nearest picked picture
    for row in np.flatnonzero(labelled):
        farthest = np.minimum(farthest, 1 - vectors @ vectors[row])
    picked = []
    while len(picked) < k:
        row = int(np.where(labelled, -np.inf, farthest).argmax())
        picked.append(row)
        farthest = np.minimum(farthest, 1 - vectors @ vectors[row])
        farthest[picked] = -np.inf
    return np.array(picked)


METHODS = dict(zip(get_args(PickMethod), (central, typical, covering, diverse), strict=True))


def _clusters(vectors: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the cluster of each row (n,), and the centres (c, d), c at most `count`."""
    count = min(count, MOST_CLUSTERS, len(vectors))
    tries = 5 if len(vectors) * count <= QUICK else 1  # with few pictures, k-means may miss a heap
    means = KMeans(count, n_init=tries, max_iter=30, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # there are fewer different pictures than clusters
        return means.fit_predict(vectors), means.cluster_centers_
