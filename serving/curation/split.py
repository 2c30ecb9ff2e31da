r"""Divides pictures into parts such as train and test; pictures that stay together are in the same part.

Sets of such pictures are placed one after the other, the largest first, each where it adds least to

    \sum_{p,l} (n_pl - t_pl)^2 / t_pl  +  L \sum_p (n_p - t_p)^2 / t_p

n_pl  pictures of label l in part p;  t_pl = share of p times all pictures of l
n_p   pictures in part p;             t_p  = share of p times all pictures
L     number of labels, so that a picture too many counts as much in a part as in a label of average size

For single pictures of one label it is the method of Sainte-Laguë: the next one goes to the part with the largest
t_p / (2 n_p + 1). The last sets fill parts that are still empty.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

Links = tuple[np.ndarray, np.ndarray]  # (p,) and (p,) rows: each pair stays together


class WrongShares(ValueError):
    """The shares of the parts are not those of one whole."""


def as_one(shares: Mapping[str, float]) -> dict[str, float]:
    """Returns the shares with the sum 1. They may be rounded, as three times 0.333. Raises WrongShares."""
    total = sum(shares.values())
    if not abs(total - 1) < 0.005:
        raise WrongShares(f"the shares add up to {total:g}, not to 1")
    return {name: share / total for name, share in shares.items()}


def sets(count: int, links: Iterable[Links]) -> np.ndarray:
    """Returns the number of each row's set, (count,) int32 from 0: the connected components of all links."""
    first, second = (np.concatenate([np.empty(0, np.int64), *ends]) for ends in zip(([], []), *links, strict=True))
    graph = coo_array((np.ones(len(first), bool), (first, second)), shape=(count, count))
    return connected_components(graph, directed=False)[1]


def links_of(values: Sequence[Hashable | None]) -> Links:
    """Returns links of all rows with the same value; a row whose value is None has none."""
    first: dict[Hashable, int] = {}
    rows = np.array([row for row, value in enumerate(values) if value is not None], np.int64)
    return np.array([first.setdefault(values[row], row) for row in rows.tolist()], np.int64), rows


def divide(together: np.ndarray, labels: Sequence[str | None], shares: Sequence[float], seed: int = 0) -> np.ndarray:
    """Returns the part of each row, (n,) int64 from 0.

    together  (n,) int from 0: the set of each row
    labels    of n rows; those without a label are divided like those of one more label
    shares    of the parts, each above 0, 1 together
    seed      of the order of sets of the same size
    """
    codes: dict[str | None, int] = {}
    label = np.array([codes.setdefault(one, len(codes)) for one in labels], np.int64)
    kinds = len(codes)
    rng = np.random.default_rng(seed)
    sizes = np.bincount(together)
    order = rng.permutation(len(sizes))
    order = order[np.argsort(-sizes[order], kind="stable")]
    rows = np.split(np.argsort(together, kind="stable"), np.cumsum(sizes)[:-1])
    target = np.outer(shares, np.append(np.bincount(label), len(label)))  # (parts, labels + 1), the last for all
    scale = target / np.append(np.ones(kinds), kinds)
    placed = np.zeros_like(target)
    parts = np.empty(len(label), np.int64)
    for left, one in zip(range(len(order), 0, -1), order.tolist(), strict=True):
        of, new = np.unique(label[rows[one]], return_counts=True)
        of, new = np.append(of, kinds), np.append(new, sizes[one])
        added = (new * (2 * (placed[:, of] - target[:, of]) + new) / scale[:, of]).sum(axis=1)
        empty = placed[:, kinds] == 0
        part = int(np.where(empty | (left > empty.sum()), added, np.inf).argmin())
        placed[part, of] += new
        parts[rows[one]] = part
    return parts
