"""From row groups to blocks and residual, by the cost rule.

A column joins the block of a group of R rows when it is cheaper there than as residual weights:
``ceil(R / lanes) * lanes * block_cost < kept weights of the column in the group * residual_cost``. So a
block's padded area is less than ``residual_cost / block_cost`` times the kept weights in it. The growth rule
of Chen et al. 2022 (arXiv 2202.04736) bounds a group's leftovers instead and takes no cost; we keep its idea,
densest columns first.
"""

from __future__ import annotations

import numpy as np

from fxsparse.regrouping.assignment import rank_in_segment
from fxsparse.regrouping.partition import compact, row_patterns
from fxsparse.regrouping.regrouping import Block, Regrouping
from fxsparse.regrouping.target import Target
from fxsparse.regrouping.weight_matrix import BoolArray, FloatArray, IntArray, alive_rows


def column_counts(matrix: BoolArray, labels: IntArray) -> tuple[IntArray, IntArray]:
    """Return the kept weights of every column in every group, [G, K], and the groups' rows, [G].

    Args:
        matrix: the mask, [O, K].
        labels: int64 [O], 0 to G - 1 without gaps, or -1.
    """
    order = np.argsort(labels, kind="stable")
    order = order[np.searchsorted(labels[order], 0) :]
    if not order.size:
        return np.zeros((0, matrix.shape[1]), dtype=np.int64), np.zeros(0, dtype=np.int64)
    sizes = np.bincount(labels[order])
    starts = np.r_[0, np.cumsum(sizes)[:-1]]
    counts = np.add.reduceat(matrix[order].view(np.uint8), starts, axis=0, dtype=np.int64)
    return counts, sizes


def saved(counts: IntArray | FloatArray, sizes: IntArray, target: Target) -> FloatArray:
    """Return what each column saves in the block against residual, in MAC units, [G, K]; may be negative."""
    padded = -(-sizes // target.lanes) * target.lanes
    gains: FloatArray = counts * target.residual_cost - (padded * target.block_cost)[:, None]
    return gains


def group_gains(matrix: BoolArray, labels: IntArray, target: Target) -> tuple[FloatArray, BoolArray]:
    """Return what each group saves against residual, [G], and its block columns, bool [G, K]."""
    gains = saved(*column_counts(matrix, labels), target)
    columns = gains > 0
    return np.where(columns, gains, 0.0).sum(axis=1), columns


def trim_rows(matrix: BoolArray, labels: IntArray, target: Target) -> IntArray:
    """Drop the rows that cost more in their block than as residual; the total cost never grows.

    First the rows that are not worth their lanes with the block's columns as they are, then whole panels
    where the fewer rows, with columns chosen anew, save more. Groups that save nothing are dropped.
    """
    labels = compact(labels)
    while (labels >= 0).any():
        gains, columns = group_gains(matrix, labels, target)
        rows = np.flatnonzero(labels >= 0)
        rows = rows[gains[labels[rows]] > 0]
        hits = _hits(matrix, labels, columns, rows)
        order = rows[np.lexsort((rows, -hits, labels[rows]))]
        keys = labels[order]
        rank = rank_in_segment(keys)
        wanted = np.full(labels.shape, -1, dtype=np.int64)
        kept = order[rank < _worthwhile(hits[np.searchsorted(rows, order)], keys, rank, columns, target)[keys]]
        wanted[kept] = labels[kept]
        # one panel less, with columns chosen anew
        sizes = np.bincount(keys, minlength=gains.size)
        fewer = wanted.copy()
        full = ((sizes - 1) // target.lanes * target.lanes)[keys]
        fewer[order] = np.where(rank < full, keys, -1)
        best = _padded_gains(matrix, wanted, gains.size, target)
        pick = _padded_gains(matrix, fewer, gains.size, target) > best
        take = (labels >= 0) & pick[labels]
        wanted[take] = fewer[take]
        wanted = compact(wanted)
        if np.array_equal(wanted, labels):
            break
        labels = wanted
    return labels


def fill_lanes(matrix: BoolArray, labels: IntArray, target: Target) -> IntArray:
    """Put rows without a group into lanes that blocks pay for but do not use, where they have kept weights.

    For one convolution group: ``matrix`` [n, K]. Each row goes to its best block with a free lane; best rows
    first.
    """
    labels = labels.copy()
    while True:
        free = np.flatnonzero((labels < 0) & alive_rows(matrix))
        _, columns = group_gains(matrix, labels, target)
        sizes = np.bincount(labels[labels >= 0], minlength=columns.shape[0])
        room = np.minimum(-sizes % target.lanes, np.maximum(target.group_rows - sizes, 0))
        open_groups = np.flatnonzero(room)
        if not free.size or not open_groups.size:
            return labels
        hits = matrix[free].astype(np.float32) @ columns[open_groups].T.astype(np.float32)
        best = hits.argmax(axis=1)
        value = hits[np.arange(free.size), best]
        choice = open_groups[best]
        order = np.lexsort((free, -value, choice))
        order = order[value[order] > 0]
        order = order[rank_in_segment(choice[order]) < room[choice[order]]]
        if not order.size:
            return labels
        labels[free[order]] = choice[order]


def build(matrix: BoolArray, groups: int, labels: IntArray, columns: BoolArray) -> Regrouping:
    """Make the regrouping of a mask from its row groups and their block columns.

    Groups of one convolution group with the same columns are merged, which never costs lanes. Blocks are in
    the order of their first rows.

    Args:
        matrix: the mask, [O, K].
        groups: convolution groups.
        labels: int64 [O], 0 to G - 1 or -1.
        columns: bool [G, K]; a group without columns makes no block.
    """
    rows = np.flatnonzero(labels >= 0)
    rows = rows[alive_rows(columns)[labels[rows]]]
    blocks: list[Block] = []
    inside = np.zeros(matrix.shape, dtype=bool)
    if rows.size:
        present, index = np.unique(labels[rows], return_inverse=True)
        conv_group = np.empty(present.size, dtype=np.int64)
        conv_group[index] = rows // (matrix.shape[0] // groups)
        merged = row_patterns(columns[present], conv_group)[index.reshape(-1)]
        order = np.argsort(merged, kind="stable")
        row_lists = np.split(rows[order], np.flatnonzero(np.diff(merged[order])) + 1)
        row_lists.sort(key=lambda indices: int(indices[0]))
        blocks = [Block(indices, np.flatnonzero(columns[labels[indices[0]]])) for indices in row_lists]
        inside[rows] = columns[labels[rows]]
    fill_in = int((inside & ~matrix).sum())
    residual_rows, residual_columns = np.nonzero(matrix & ~inside)
    return Regrouping(
        (matrix.shape[0], matrix.shape[1]), groups, tuple(blocks), residual_rows, residual_columns, fill_in
    )


def _hits(matrix: BoolArray, labels: IntArray, columns: BoolArray, rows: IntArray) -> IntArray:
    """Kept weights of each row inside its own group's columns."""
    hits: IntArray = (matrix[rows] & columns[labels[rows]]).sum(axis=1)
    return hits


def _worthwhile(hits: IntArray, keys: IntArray, rank: IntArray, columns: BoolArray, target: Target) -> IntArray:
    """How many of each group's rows, sorted by hits, are best kept with the columns fixed, [G]."""
    counts = np.zeros(columns.shape[0], dtype=np.int64)
    if not keys.size:
        return counts
    starts = np.flatnonzero(rank == 0)
    running = np.cumsum(hits)
    before = np.repeat((running - hits)[starts], np.diff(np.r_[starts, keys.size]))
    padded = -(-(rank + 1) // target.lanes) * target.lanes
    value = (running - before) * target.residual_cost - padded * columns.sum(axis=1)[keys] * target.block_cost
    top = np.repeat(np.maximum.reduceat(value, starts), np.diff(np.r_[starts, keys.size]))
    reached = np.flatnonzero(value == top)
    first = reached[rank_in_segment(keys[reached]) == 0]
    counts[keys[first]] = np.where(value[first] > 0, rank[first] + 1, 0)
    return counts


def _padded_gains(matrix: BoolArray, labels: IntArray, groups: int, target: Target) -> FloatArray:
    """Group gains for labels that may have gaps, [groups]."""
    gains = np.zeros(groups)
    present = np.unique(labels[labels >= 0])
    gains[present] = group_gains(matrix, compact(labels), target)[0]
    return gains
