"""Improve a partition by coordinate ascent: rows choose groups by columns, groups choose columns by rows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fxsparse.regrouping.assignment import assign
from fxsparse.regrouping.weight_matrix import AnyArray, BoolArray, FloatArray, IntArray

Select = Callable[[FloatArray, IntArray], tuple[BoolArray, float]]
"""(sums [k, K] of each column in each group, group sizes [k]) -> (columns chosen, bool [k, K]; the score)."""


SWAP_ROUNDS = 8
"""Rounds of swaps in one assignment of an ascent."""

LEAST_GAIN = 1e-2
"""An ascent ends with the first round that improves the score by less than this share."""


def ascend(values: AnyArray, labels: IntArray, select: Select, rounds: int = 12) -> tuple[IntArray, float]:
    """Return better labels and their score; group sizes stay.

    Args:
        values: what keeping each weight is worth, [n, K]: whole numbers as float32 or float64 whose row and
            group sums the dtype holds exactly, so that results do not depend on the number of threads.
        labels: int64 [n], 0 to k - 1.
        select: chooses every group's columns and scores the choice; more is better.
        rounds: most rounds.
    """
    sizes = np.bincount(labels)
    columns, best = select(column_sums(values, labels, sizes.size), sizes)
    best_labels = labels
    for _ in range(rounds):
        hits: FloatArray = (values @ columns.T.astype(values.dtype)).astype(np.float64)
        labels = assign(hits, sizes, swap_rounds=SWAP_ROUNDS)
        columns, score = select(column_sums(values, labels, sizes.size), sizes)
        enough = best + LEAST_GAIN * abs(best)
        if score > best:
            best, best_labels = score, labels
        if score <= enough:
            break
    return best_labels, best


def column_sums(values: AnyArray, labels: IntArray, groups: int) -> FloatArray:
    """Return the sum of ``values`` [n, K] over the rows of each group, float64 [groups, K]."""
    member = np.zeros((groups, labels.size), dtype=values.dtype)
    member[labels, np.arange(labels.size)] = 1
    sums: FloatArray = (member @ values).astype(np.float64)
    return sums
