"""Partition the rows of a weight matrix into row groups.

A partition is ``labels``, int64 [O]: the row group of every row, -1 for a row in no group. Labels never span
convolution groups, and rows without a kept weight have none.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fxsparse.regrouping.assignment import assign, rank_in_segment
from fxsparse.regrouping.weight_matrix import BoolArray, FloatArray, IntArray


def compact(labels: IntArray) -> IntArray:
    """Renumber the labels 0, 1, ... in ascending order; -1 stays."""
    values, inverse = np.unique(labels, return_inverse=True)
    return inverse.reshape(labels.shape) - int(values.size > 0 and values[0] == -1)


def row_patterns(matrix: BoolArray, prefix: IntArray) -> IntArray:
    """Return a number of every row, int64 [O], equal where the row and its ``prefix`` are."""
    bits = np.packbits(matrix, axis=1)
    keys = np.ascontiguousarray(np.hstack([prefix.astype(np.int64)[:, None].view(np.uint8), bits]))
    _, inverse = np.unique(keys.view(np.dtype((np.void, keys.shape[1]))).ravel(), return_inverse=True)
    return inverse.reshape(-1).astype(np.int64)


def identical_rows(matrix: BoolArray, groups: int) -> IntArray:
    """Group the rows that have exactly the same columns, inside each of the ``groups`` convolution groups.

    Groups are numbered by their first row.
    """
    rows = matrix.shape[0]
    patterns = row_patterns(matrix, np.arange(rows) // (rows // groups))
    patterns[~matrix.any(axis=1)] = -1
    kept = np.flatnonzero(patterns >= 0)
    values, first = np.unique(patterns[kept], return_index=True)
    number = np.empty(values.size, dtype=np.int64)
    number[np.argsort(first, kind="stable")] = np.arange(values.size)
    labels = np.full(rows, -1, dtype=np.int64)
    labels[kept] = number[np.searchsorted(values, patterns[kept])]
    return labels


def consecutive_rows(alive: BoolArray, groups: int, group_rows: int) -> IntArray:
    """Group each ``group_rows`` rows in order, inside each convolution group.

    Args:
        alive: bool [O], the rows to group.
        groups: convolution groups.
        group_rows: rows of one group; the last one of a convolution group may have fewer.
    """
    rows = np.flatnonzero(alive)
    conv_group = rows // (alive.size // groups)
    chunk = rank_in_segment(conv_group) // group_rows
    labels = np.full(alive.size, -1, dtype=np.int64)
    labels[rows] = conv_group * (-(-alive.size // group_rows)) + chunk
    return compact(labels)


def group_sizes(rows: int, group_rows: int) -> IntArray:
    """Return the sizes of the groups of ``rows`` rows: ``group_rows`` each, the last one what is left."""
    sizes = np.full(-(-rows // group_rows), group_rows, dtype=np.int64)
    sizes[-1] = rows - group_rows * (sizes.size - 1)
    return sizes


def sorted_rows(matrix: BoolArray, group_rows: int) -> IntArray:
    """Group the rows of a matrix [n, K] by their number of kept weights, fullest first."""
    order = np.argsort(-matrix.sum(axis=1), kind="stable")
    labels = np.empty(order.size, dtype=np.int64)
    labels[order] = np.arange(order.size) // group_rows
    return labels


def similarity(matrix: BoolArray) -> FloatArray:
    """Return the cosines of all pairs of rows as whole numbers of about 2**24, float64 [n, n].

    Counts of shared columns are exact in float32 whatever order a BLAS adds them in, and row norms are
    rounded to whole weights. Every sum over these numbers is exact in float64 too, so a clustering that
    starts from them takes the same decisions with any number of threads.
    """
    kept = matrix.astype(np.float32)
    shared = (kept @ kept.T).astype(np.float64)
    norms = np.sqrt(np.maximum(np.diagonal(shared), 1.0))
    weights = np.rint(2.0**16 / norms)
    scaled: FloatArray = np.rint(shared * weights[:, None] * weights[None] / 2.0**8)
    return scaled


def cluster_rows(cosines: FloatArray, group_rows: int, seed: int, rounds: int = 12) -> IntArray:
    """Balanced spherical k-means of rows with the mean row taken out; k-means++ start.

    Works on the rows' products alone, so that a round costs n*n*k however wide the rows are.

    Args:
        cosines: ``similarity`` of the rows, [n, n].
        group_rows: rows of one group.
        seed: seed of the start.
        rounds: most rounds of (centroids, assignment).

    Returns:
        int64 [n], labels 0 to k - 1.
    """
    rows = cosines.shape[0]
    sizes = group_sizes(rows, group_rows)
    total = cosines.sum(axis=1)
    everything = total.sum()
    squared_norms = np.diagonal(cosines) - 2 * total / rows + everything / rows**2
    norms = np.sqrt(np.maximum(squared_norms, 1e-6 * np.diagonal(cosines) + 1e-30))
    rng = np.random.default_rng(seed)
    centres = [int(rng.integers(rows))]
    nearest = np.full(rows, -1.0)
    while len(centres) < sizes.size:
        last = centres[-1]
        product = cosines[:, last] - total / rows - total[last] / rows + everything / rows**2
        nearest = np.maximum(nearest, product / (norms * norms[last]))
        distance = 1 - np.minimum(nearest, 1.0) + 1e-9
        centres.append(int(rng.choice(rows, p=distance / distance.sum())))
    scores = cosines[:, centres] - total[:, None] / rows - total[centres] / rows + everything / rows**2
    labels = assign(scores / norms[centres], sizes, swap_rounds=8)
    for _ in range(rounds):
        updated = assign(_centroid_scores(cosines, labels, sizes.size), sizes, swap_rounds=8)
        if np.array_equal(updated, labels):
            break
        labels = updated
    return labels


def _centroid_scores(cosines: FloatArray, labels: IntArray, groups: int) -> FloatArray:
    rows = labels.size
    member: npt.NDArray[np.float64] = np.zeros((rows, groups))
    member[np.arange(rows), labels] = 1.0
    count = np.maximum(np.bincount(labels, minlength=groups), 1).astype(np.float64)
    total = cosines.sum(axis=1)
    everything = total.sum()
    row_dot_sum = cosines @ member
    sum_dot_all = member.T @ total
    sum_dot_sum = (member * row_dot_sum).sum(axis=0)
    product = row_dot_sum / count - total[:, None] / rows - sum_dot_all / (count * rows) + everything / rows**2
    squared = sum_dot_sum / count**2 - 2 * sum_dot_all / (count * rows) + everything / rows**2
    scores: FloatArray = product / np.sqrt(np.maximum(squared, 1.0))
    return scores
