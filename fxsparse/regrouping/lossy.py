"""New masks made of blocks alone: the lossy form of regrouping, for a model that is trained again afterwards.

The rows of a layer are partitioned into row groups; a *strip* is one column of one group. The new mask is the
union of the best strips, by kept weights or by energy, up to the layer's budget (Chen et al. 2022, arXiv
2202.04736, with the budget in place of a growth rule).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from fxsparse.errors import FxsparseError
from fxsparse.regrouping.ascent import ascend
from fxsparse.regrouping.blocks import column_counts, group_gains
from fxsparse.regrouping.hypergraph import mtkahypar, partition_hypergraph
from fxsparse.regrouping.partition import (
    cluster_rows,
    compact,
    consecutive_rows,
    identical_rows,
    similarity,
    sorted_rows,
)
from fxsparse.regrouping.target import Target
from fxsparse.regrouping.weight_matrix import (
    AnyArray,
    BoolArray,
    FloatArray,
    IntArray,
    alive_rows,
    as_energy_matrix,
    as_groups,
    as_mask_matrix,
)

log = logging.getLogger(__name__)


def regroup_masks(
    masks: Mapping[str, torch.Tensor],
    target: Target | None = None,
    *,
    budget: float | Mapping[str, float] | None = None,
    weights: Mapping[str, torch.Tensor] | None = None,
    groups: Mapping[str, int] | None = None,
    progress: bool = False,
) -> dict[str, torch.Tensor]:
    """Replace each mask by dense blocks of about the same area; the model must be trained again.

    Strips are taken by their kept weights per row (with ``weights``, by the energy |w|^2 of the kept weights)
    until the next would pass the budget. A layer that keeps a weight keeps at least one strip, even if that
    is over the budget; a layer without one stays empty, and rows without a kept weight stay empty. Each new
    mask consists of
    blocks: ``Regrouping.from_identical_rows`` finds them without residual and without fill-in, and so does
    ``regroup`` wherever the rows of the groups fill their lanes (a last group of 1 to 4 rows is cheaper as
    residual).

    Args:
        masks: by layer name, as in ``regroup``; one mask for all layers of one weight.
        target: group size, lanes, prices and partitioner; None takes ``Target()``.
        budget: the share of a layer's weights to keep, in (0, 1], one for all or by layer name. None, and
            layers that the mapping leaves out, keep as many weights as their mask does.
        weights: weights of the masks' shapes, by layer name; layers left out are ranked by counts.
        groups: convolution groups by layer name; layers left out have 1.
        progress: show a bar over the layers.

    Returns:
        bool tensors of the masks' shapes, on their devices, in the masks' order.

    Raises:
        FxsparseError: an argument cannot be read, names a layer without a mask, or the partitioner's package
            is missing.
    """
    if not isinstance(masks, Mapping):
        raise FxsparseError(f"Masks is a {type(masks).__name__}. Give a mapping from layer names to masks.")
    target = target or Target()
    if target.partitioner == "hypergraph":
        mtkahypar()
    for what, mapping in (("Budget", budget), ("Weight", weights), ("Groups", groups)):
        for name in mapping if isinstance(mapping, Mapping) else ():
            if name not in masks:
                raise FxsparseError(f"{what} names the layer {name!r}, which has no mask. Layers: {', '.join(masks)}.")
    result = {}
    for name, mask in tqdm(masks.items(), desc="regroup", unit="layer", disable=not progress, leave=False):
        matrix = as_mask_matrix(mask, name)
        area = _area(budget.get(name) if isinstance(budget, Mapping) else budget, matrix, name)
        conv_groups = as_groups((groups or {}).get(name, 1), matrix.shape[0], name)
        weight = (weights or {}).get(name)
        energy = None if weight is None else as_energy_matrix(weight, matrix, name)
        kept = _regroup_layer(matrix, energy, area, conv_groups, target)
        log.debug("Mask %r: %d weights kept of %d, now %d in blocks", name, matrix.sum(), matrix.size, kept.sum())
        tensor = torch.from_numpy(kept).reshape(tuple(mask.shape))
        result[name] = tensor.to(mask.device) if isinstance(mask, torch.Tensor) else tensor
    return result


def choose_strips(
    energies: FloatArray, counts: FloatArray | IntArray, sizes: IntArray, area: int
) -> tuple[BoolArray, float]:
    """Choose strips up to an area, best energy per row first; at least one.

    Args:
        energies: what each strip keeps, [G, K].
        counts: kept weights of each strip, [G, K]: breaks ties, and a strip with none is never taken.
        sizes: rows of each group, [G].
        area: weights that the strips may cover together.

    Returns:
        bool [G, K], True where the strip is taken, and the energy that these keep.
    """
    rows = np.repeat(sizes, energies.shape[1])
    order = np.lexsort((-counts.ravel() / rows, -energies.ravel() / rows))
    order = order[counts.ravel()[order] > 0]
    taken = max(1, int(np.searchsorted(np.cumsum(rows[order]), area, side="right")))
    columns = np.zeros(energies.size, dtype=bool)
    columns[order[:taken]] = True
    return columns.reshape(energies.shape), float(energies.ravel()[order[:taken]].sum())


def _area(share: Any, matrix: BoolArray, name: str) -> int:
    kept = int(matrix.sum())
    if share is None:
        return kept
    if isinstance(share, bool) or not isinstance(share, (int, float, np.integer, np.floating)):
        raise FxsparseError(f"Budget of {name!r} is {share!r}. Give the share of weights to keep, in (0, 1].")
    if not (math.isfinite(share) and 0 < share <= 1):
        raise FxsparseError(f"Budget of {name!r} is {share}. Give the share of weights to keep, in (0, 1].")
    return round(float(share) * matrix.size)


def _regroup_layer(matrix: BoolArray, energy: FloatArray | None, area: int, groups: int, target: Target) -> BoolArray:
    """Return the union of the best strips of the best partition, [O, K]."""
    alive = alive_rows(matrix)
    kept = np.zeros_like(matrix)
    if not np.any(alive):
        return kept
    values = matrix.astype(np.float32) if energy is None else energy
    rows = matrix.shape[0]
    identical = identical_rows(matrix, groups)
    gains, _ = group_gains(matrix, identical, target)
    fixed = alive & (gains > 0)[identical]
    candidates = [_partition(matrix, values, alive, area, groups, target)]
    if np.any(fixed):  # rows that are blocks already stay blocks
        mixed = _partition(matrix, values, alive & ~fixed, area, groups, target)
        mixed[fixed] = identical[fixed] + mixed.max() + 1
        candidates.append(compact(mixed))
    best = -1.0
    for labels in candidates:
        counts, sizes = column_counts(matrix, labels)
        sums = counts.astype(np.float64)
        if energy is not None:
            order = np.argsort(labels, kind="stable")[rows - int(sizes.sum()) :]
            sums = np.add.reduceat(energy[order], np.r_[0, np.cumsum(sizes)[:-1]], axis=0)
        columns, score = choose_strips(sums, counts, sizes, area)
        if score > best:
            best = score
            kept = columns[labels] & (labels >= 0)[:, None]
    return kept


def _partition(
    matrix: BoolArray, values: AnyArray, chosen: BoolArray, area: int, groups: int, target: Target
) -> IntArray:
    """Partition the chosen rows of a layer; -1 for the others."""
    labels = consecutive_rows(chosen, groups, target.group_rows)
    if target.partitioner == "consecutive":
        return labels
    conv_group = np.arange(chosen.size) // (chosen.size // groups)
    total = int(matrix.sum())
    for number in np.flatnonzero(np.bincount(conv_group[chosen], minlength=groups) > target.group_rows):
        rows = np.flatnonzero(chosen & (conv_group == number))
        share = area * int(matrix[rows].sum()) // total
        labels[rows] = labels.max() + 1 + _partition_one(matrix[rows], values[rows], share, target)
    return compact(labels)


def _partition_one(matrix: BoolArray, values: AnyArray, area: int, target: Target) -> IntArray:
    """Partition the rows of one convolution group, [n, K], n > group_rows, none of them empty."""
    if target.partitioner == "hypergraph":
        return partition_hypergraph(matrix, target.group_rows, target.seed)
    starts = [
        cluster_rows(similarity(matrix), target.group_rows, target.seed),
        sorted_rows(matrix, target.group_rows),
    ]
    best, best_score = starts[0], -1.0
    for start in starts:
        labels, score = ascend(values, start, lambda sums, sizes: choose_strips(sums, sums, sizes, area))
        if score > best_score:
            best, best_score = labels, score
    return best
