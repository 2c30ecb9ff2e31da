"""The nearest neighbours of every vector, exactly: all are compared, in blocks."""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from threadpoolctl import threadpool_limits

from serving.limits import cores

BLOCK = 2**25  # cosines of one block: 128 MiB for each core
ROWS = 1024  # of a block at most
NOTHING = np.float32(-2)  # in place of a cosine: of a row with itself, and of columns that are not there


def neighbours(vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the k nearest other rows of each row, nearest first.

    vectors  (n, d) float32, rows of length 1
    k        1 to n - 1
    returns  (n, k) int32, their rows, and (n, k) float32, their cosines
    """
    n = len(vectors)
    if not 1 <= k < n:
        raise ValueError(f"k must be from 1 to {n - 1}, not {k}")
    rows, cosines = np.empty((n, k), np.int32), np.empty((n, k), np.float32)
    size = max(1, min(ROWS, BLOCK // n))

    def fill(start: int) -> None:
        block = slice(start, min(start + size, n))
        rows[block], cosines[block] = _block(vectors, block, k)

    with threadpool_limits(1), ThreadPoolExecutor(cores()) as pool:  # each block on one core, selection included
        try:
            list(pool.map(fill, range(0, n, size)))
        finally:
            pool.shutdown(cancel_futures=True)
    return rows, cosines


def centred(vectors: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Returns the vectors (n, d) minus the centre (d,), of length 1: with some encoders any two pictures have a large
    cosine."""
    moved = vectors - centre
    return moved / np.maximum(np.linalg.norm(moved, axis=1, keepdims=True), np.finfo(np.float32).tiny)


def _block(vectors: np.ndarray, block: slice, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns `neighbours` of the rows of a block.

    To partition all n cosines of a row would take as long as to compute them. So the columns are divided into groups,
    and only the k groups with the largest maxima are partitioned: a cosine in another group is at most these k maxima.
    """
    n, count = len(vectors), block.stop - block.start
    of_group = math.isqrt(n // k)
    groups = -(-n // of_group)  # more than k; column c is of group c % groups
    cosine = np.full((count, groups * of_group), NOTHING)
    np.matmul(vectors[block], vectors.T, out=cosine[:, :n])
    cosine[np.arange(count), np.arange(block.start, block.stop)] = NOTHING
    best = _largest(cosine.reshape(count, of_group, groups).max(axis=1), k)
    columns = (best[:, None] + groups * np.arange(of_group)[:, None]).reshape(count, -1)
    found = np.take_along_axis(cosine, columns, axis=1)
    first = _largest(found, k)
    first = np.take_along_axis(first, np.take_along_axis(found, first, 1).argsort(axis=1)[:, ::-1], 1)
    return np.take_along_axis(columns, first, 1), np.take_along_axis(found, first, 1)


def _largest(values: np.ndarray, k: int) -> np.ndarray:
    """Returns the columns (r, k) of the k largest values of each row of (r, c), in any order."""
    return np.argpartition(values, values.shape[1] - k, axis=1)[:, values.shape[1] - k :]
