"""Assign rows to groups of given sizes so that the summed score is large: regret greedy, then swaps.

Deterministic: ties go to the lower group and the lower row. Every step is vectorised over rows; the loops are
over rounds.
"""

from __future__ import annotations

import numpy as np

from fxsparse.regrouping.weight_matrix import FloatArray, IntArray


def assign(scores: FloatArray, sizes: IntArray, swap_rounds: int = 32) -> IntArray:
    """Return the group of every row; group g gets exactly ``sizes[g]`` rows.

    In each round every free row asks for its best group that has room, and each group takes the rows that
    would lose most by their second choice. A group that turns a row away is full, so there are at most as
    many rounds as groups.

    Args:
        scores: float64 [n, k], the gain of row i in group g.
        sizes: int64 [k], summing to n.
        swap_rounds: how many rounds of pairwise swaps follow.
    """
    rows, groups = scores.shape
    labels = np.full(rows, -1, dtype=np.int64)
    room = sizes.astype(np.int64)
    free = np.arange(rows)
    while free.size:
        open_groups = np.flatnonzero(room > 0)
        offers = scores[np.ix_(free, open_groups)]
        best = offers.argmax(axis=1)
        regret = offers[np.arange(free.size), best]
        if open_groups.size > 1:
            regret = regret - np.partition(offers, -2, axis=1)[:, -2]
        choice = open_groups[best]
        order = np.lexsort((free, -regret, choice))
        taken = order[rank_in_segment(choice[order]) < room[choice[order]]]
        labels[free[taken]] = choice[taken]
        room -= np.bincount(choice[taken], minlength=groups)
        free = free[labels[free] < 0]
    return swap(scores, labels, swap_rounds)


def swap(scores: FloatArray, labels: IntArray, rounds: int) -> IntArray:
    """Return labels after swapping pairs of rows between groups while the summed score grows.

    One round finds the best swap of every pair of groups, and makes those that are the best of both groups at
    once: they touch different groups, so their gains add up.
    """
    rows, groups = scores.shape
    labels = labels.copy()
    if groups < 2:
        return labels
    for _ in range(rounds):
        gain = scores - scores[np.arange(rows), labels][:, None]
        order = np.argsort(labels, kind="stable")
        present, starts = np.unique(labels[order], return_index=True)
        move = np.full((groups, groups), -np.inf)
        move[present] = np.maximum.reduceat(gain[order], starts, axis=0)
        pair = move + move.T
        np.fill_diagonal(pair, -np.inf)
        partner = pair.argmax(axis=1)
        one = np.arange(groups)
        mutual = (partner[partner] == one) & (one < partner) & (pair[one, partner] > 1e-9)
        if not mutual.any():
            break
        for a, b in zip(one[mutual], partner[mutual], strict=True):
            in_a, in_b = np.flatnonzero(labels == a), np.flatnonzero(labels == b)
            to_b, to_a = in_a[gain[in_a, b].argmax()], in_b[gain[in_b, a].argmax()]
            labels[to_b], labels[to_a] = b, a
    return labels


def rank_in_segment(keys: IntArray) -> IntArray:
    """Return, for sorted ``keys``, each element's position among the elements of the same key."""
    if keys.size == 0:
        return np.zeros(0, dtype=np.int64)
    starts = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]])
    lengths = np.diff(np.r_[starts, keys.size])
    return np.arange(keys.size) - np.repeat(starts, lengths)
