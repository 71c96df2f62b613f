"""Regroup a mask without loss: blocks and residual hold exactly the kept weights, at the least cost found."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from fxsparse.regrouping import cache as disk
from fxsparse.regrouping.ascent import ascend
from fxsparse.regrouping.blocks import build, fill_lanes, group_gains, saved, trim_rows
from fxsparse.regrouping.hypergraph import mtkahypar, partition_hypergraph
from fxsparse.regrouping.partition import (
    cluster_rows,
    compact,
    consecutive_rows,
    identical_rows,
    similarity,
    sorted_rows,
)
from fxsparse.regrouping.regrouping import Regrouping
from fxsparse.regrouping.target import Target
from fxsparse.regrouping.weight_matrix import (
    BoolArray,
    FloatArray,
    IntArray,
    alive_rows,
    as_groups,
    as_mask_matrix,
)

log = logging.getLogger(__name__)

TRIES = 2
"""k-means starts of one convolution group."""

WORTHWHILE = 0.01
"""Identical rows are set apart from the others if that alone saves this share of the residual cost."""

SOFTENING = (3.0, 1.5, 1.0)
"""Ascents run at these multiples of the residual's price in turn: at first more columns have a say."""


def regroup(
    mask: Any,
    target: Target | None = None,
    *,
    groups: int = 1,
    cache: bool | str | Path | None = None,
    progress: bool = False,
) -> Regrouping:
    """Split a mask into dense blocks and residual weights, exactly.

    Several partitions of the rows are tried in every convolution group: rows with identical columns,
    consecutive rows, the target's partitioner, and the partitioner on the rows that are left beside identical
    ones. The cheapest stays, and where no block saves anything there is none. A column is in a block when it
    is cheaper there than as residual, and a row when it is worth its lane.

    The result depends on the arguments alone: not on the process, the hash seed or the number of threads.

    Args:
        mask: torch tensor or ndarray, the weight's [O, C / groups, kh, kw] or [O, K], bool or numbers;
            non-zero means kept.
        target: the prices; None takes ``Target()``.
        groups: the convolution's groups. Blocks stay inside one.
        cache: where results are kept between processes. True: the folder of
            ``fxsparse.regrouping.cache.folder``; a path: that folder; False: nowhere; None: as True if
            ``FXSPARSE_CACHE_DIR`` is set, else nowhere.
        progress: show a bar over the convolution groups.

    Raises:
        FxsparseError: the mask or ``groups`` cannot be read, or the partitioner's package is missing.
    """
    target = target or Target()
    matrix = as_mask_matrix(mask)
    groups = as_groups(groups, matrix.shape[0])
    if target.partitioner == "hypergraph":
        mtkahypar()
    place = disk.folder(cache)
    key = disk.key(matrix, groups, target) if place else ""
    if place:
        known = disk.load(place, key, matrix, groups)
        if known is not None:
            return known
    labels = _best_labels(matrix, groups, target, progress)
    _, columns = group_gains(matrix, labels, target)
    result = build(matrix, groups, labels, columns)
    if place:
        disk.store(place, key, result)
    return result


def _best_labels(matrix: BoolArray, groups: int, target: Target, progress: bool) -> IntArray:
    """Choose the cheapest partition in every convolution group."""
    rows = matrix.shape[0]
    conv_group = np.arange(rows) // (rows // groups)
    alive = alive_rows(matrix)
    identical = identical_rows(matrix, groups)
    consecutive = consecutive_rows(alive, groups, target.group_rows)
    candidates = [identical, consecutive]
    if target.partitioner != "consecutive":
        candidates.append(_partitioned(matrix, groups, alive, target, progress))
        gains, _ = group_gains(matrix, identical, target)
        worth = gains[gains > 0].sum() > WORTHWHILE * target.residual_cost * matrix.sum()
        fixed = alive & (gains > 0)[identical] if worth else np.zeros_like(alive)
        if fixed.any() and (alive & ~fixed).any():
            mixed = _partitioned(matrix, groups, alive & ~fixed, target, progress)
            mixed[fixed] = identical[fixed] + mixed.max() + 1
            candidates.append(mixed)
    best_labels = np.full(rows, -1, dtype=np.int64)
    best = np.zeros(groups)
    offset = 0
    for candidate in candidates:
        labels = trim_rows(matrix, candidate, target)
        if not (labels >= 0).any():
            continue
        gains, _ = group_gains(matrix, labels, target)
        owner = np.zeros(gains.size, dtype=np.int64)
        owner[labels[labels >= 0]] = conv_group[labels >= 0]
        total = np.bincount(owner, weights=gains, minlength=groups)
        better = (total > best)[conv_group]
        best = np.maximum(best, total)
        best_labels[better] = np.where(labels >= 0, labels + offset, -1)[better]
        offset += gains.size
    return compact(best_labels)


def _partitioned(matrix: BoolArray, groups: int, chosen: BoolArray, target: Target, progress: bool) -> IntArray:
    """Partition the chosen rows; convolution groups of up to ``group_rows`` rows are one row group each."""
    labels = consecutive_rows(chosen, groups, target.group_rows)
    conv_group = np.arange(chosen.size) // (chosen.size // groups)
    large = np.flatnonzero(np.bincount(conv_group[chosen], minlength=groups) > target.group_rows)
    for number in tqdm(large, desc="regroup", unit="group", disable=not progress, leave=False):
        rows = np.flatnonzero(chosen & (conv_group == number))
        part = _partition_one(matrix[rows], target)
        labels[rows] = np.where(part >= 0, part + labels.max() + 1, -1)
    return compact(labels)


def _partition_one(matrix: BoolArray, target: Target) -> IntArray:
    """Partition the rows of one convolution group, [n, K], n > group_rows, none of them empty."""
    if target.partitioner == "hypergraph":
        starts = [partition_hypergraph(matrix, target.group_rows, target.seed)]
    else:
        cosines = similarity(matrix)
        starts = [cluster_rows(cosines, target.group_rows, target.seed + t) for t in range(TRIES)]
        starts.append(sorted_rows(matrix, target.group_rows))
    values = matrix.astype(np.float32)

    best, best_gain = starts[0], -1.0
    for labels in starts:
        gain = 0.0
        for softening in SOFTENING:
            softened = replace(target, residual_cost=target.residual_cost * softening)
            labels, gain = ascend(values, labels, partial(_select, softened))
        if gain > best_gain:
            best, best_gain = labels, gain
    trimmed = trim_rows(matrix, best, target)
    return fill_lanes(matrix, trimmed, target)


def _select(target: Target, counts: FloatArray, sizes: IntArray) -> tuple[BoolArray, float]:
    """Choose the columns that save something, and say how much they save."""
    gains = saved(counts, sizes, target)
    columns: BoolArray = gains > 0
    return columns, float(gains[columns].sum())
