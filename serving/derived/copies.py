"""Pairs where many vectors are identical: m of them would have m * m / 2 pairs with each other.

Of identical vectors the first COMPARED are compared with everything, as `near_pairs` does. Each other one has a pair
with these, and with whatever the first one is near to, but none with the others of its kind. This is enough to find
every group of near-duplicates: whatever is near to the first one is near to all.
"""

from hashlib import blake2b

import numpy as np

from serving.derived.pairs import NearPairs, refuse_too_many

COMPARED = 10  # as many of them can be deleted before the rest has to be compared again


def first_identical(vectors: np.ndarray) -> np.ndarray:
    """Returns for each row the first row with the same bits, (n,) int64.

    vectors  (n, d) float32
    """
    rows: dict[bytes, int] = {}
    digests = (blake2b(vector.tobytes(), digest_size=16).digest() for vector in vectors)
    return np.array([rows.setdefault(digest, row) for row, digest in enumerate(digests)], np.int64)


def compared_rows(first: np.ndarray) -> np.ndarray:
    """Returns the rows to compare, (m,) int64, ascending: all but those with COMPARED identical ones before them.

    first  (n,) from `first_identical`
    """
    order = np.argsort(first, kind="stable")
    starts = np.searchsorted(first[order], first[order])
    return np.sort(order[np.arange(len(first)) - starts < COMPARED])


def with_identical(pairs: NearPairs, compared: np.ndarray, first: np.ndarray, threshold: float) -> NearPairs:
    """Returns the pairs of all rows, as the top of this file says.

    pairs     of the compared rows, numbered from 0
    compared  (m,) from `compared_rows`
    first     (n,) from `first_identical`
    raises    TooManyPairs
    """
    a, b = compared[pairs.first], compared[pairs.second]
    rest = np.setdiff1d(np.arange(len(first)), compared)
    if not len(rest):
        return pairs
    rest = rest[np.argsort(first[rest], kind="stable")]
    leaders, starts = np.unique(first[rest], return_index=True)
    by_a, by_b = np.isin(a, leaders), np.isin(b, leaders)
    leader, near = np.concatenate([a[by_a], b[by_b]]), np.concatenate([b[by_a], a[by_b]])
    order = np.argsort(leader, kind="stable")
    leader, near, cosine = leader[order], near[order], np.concatenate([pairs.cosine[by_a], pairs.cosine[by_b]])[order]
    parts, count = [(a, b, pairs.cosine)], len(a)
    for row, copies in zip(leaders, np.split(rest, starts[1:]), strict=True):
        start, end = np.searchsorted(leader, [row, row + 1])
        others, cosines = np.append(near[start:end], row), np.append(cosine[start:end], np.float32(1))
        count += len(copies) * len(others)
        refuse_too_many(count, threshold)
        parts.append((np.repeat(copies, len(others)), np.tile(others, len(copies)), np.tile(cosines, len(copies))))
    a, b, cosine = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    return NearPairs(np.minimum(a, b).astype(np.int32), np.maximum(a, b).astype(np.int32), cosine)
