"""Group-column pruning: which strips of all layers to keep for a budget of time.

A *strip* is one column of one row group: the unit in which blocks grow. Within a layer strips are ranked by their mean
energy. Between layers they compete by group-LAMP (after Lee et al. 2021, arXiv 2010.07611): a strip's energy as a share
of what its layer would keep down to it, over what it costs there. One threshold on the bare energy would empty whole
layers; this share is 1 for the first strip of any layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from fxsparse.errors import FxsparseError
from fxsparse.regrouping.assignment import assign
from fxsparse.regrouping.partition import cluster_rows, consecutive_rows
from fxsparse.regrouping.weight_matrix import BoolArray, FloatArray, IntArray

PARTITIONERS = ("consecutive", "clustering")


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """What a layer costs, in the unit of the budget, milliseconds or multiply-adds.

    Attributes:
        dense: of the layer with all its weights.
        fixed: of the layer in blocks, whatever their area.
        per_weight: of one weight in a block, besides.
    """

    dense: float
    fixed: float
    per_weight: float

    def of(self, area: float, size: float) -> float:
        """Return the cost with `area` of `size` weights in blocks; never more than dense, which is always possible."""
        return self.dense if area >= size else min(self.dense, self.fixed + self.per_weight * area)


@dataclasses.dataclass(frozen=True)
class Strips:
    """The strips of one layer.

    Attributes:
        labels: int64 [O]: the row group of every row.
        sizes: int64 [G]: rows of every group.
        energy: float64 [G, K]: of every strip.
        cost: of the layer.
    """

    labels: IntArray
    sizes: IntArray
    energy: FloatArray
    cost: LayerCost

    @classmethod
    def of(cls, energy: FloatArray, labels: IntArray, cost: LayerCost) -> Strips:
        """Sum an energy matrix [O, K] over the row groups."""
        sizes = np.bincount(labels)
        sums = np.zeros((sizes.size, energy.shape[1]))
        np.add.at(sums, labels, energy)
        return cls(labels, sizes, sums, cost)

    @property
    def size(self) -> int:
        """Number of weights."""
        return int(self.sizes.sum()) * int(self.energy.shape[1])


def row_groups(energy: FloatArray, groups: int, group_rows: int, partitioner: str, seed: int) -> IntArray:
    """Partition the rows of a layer.

    Args:
        energy: [O, K].
        groups: convolution groups; row groups stay inside one.
        group_rows: rows of one row group.
        partitioner: "consecutive", which needs no permutation and keeps the kernels simple, or "clustering", balanced
            k-means of the rows' magnitudes.
        seed: of the clustering.

    Returns:
        int64 [O], 0 to G - 1.
    """
    rows = energy.shape[0]
    labels = consecutive_rows(np.ones(rows, dtype=bool), groups, group_rows)
    each = rows // groups
    if partitioner == "consecutive" or each <= group_rows:
        return labels
    clustered = np.empty(rows, dtype=np.int64)
    first = 0
    for number in range(groups):
        part = slice(number * each, (number + 1) * each)
        inside = _clustered(np.sqrt(energy[part]), group_rows, seed)
        clustered[part] = inside + first
        first += int(inside.max()) + 1
    return clustered


def _clustered(magnitudes: FloatArray, group_rows: int, seed: int) -> IntArray:
    norms = np.maximum(np.linalg.norm(magnitudes, axis=1, keepdims=True), 1e-30)
    unit = magnitudes / norms
    # Whole numbers, so that no sum depends on the order in which a BLAS adds.
    cosines: FloatArray = np.rint((unit @ unit.T) * 2.0**24)
    labels = cluster_rows(cosines, group_rows, seed)
    # Once more by the rows themselves: each row where the group's columns hold most of it.
    centres = np.stack([magnitudes[labels == g].mean(axis=0) for g in range(int(labels.max()) + 1)])
    scores: FloatArray = np.rint(unit @ (centres / np.linalg.norm(centres, axis=1, keepdims=True)).T * 2.0**24)
    return assign(scores, np.bincount(labels))


def choose(layers: Mapping[str, Strips], budget: float) -> dict[str, BoolArray]:
    """Choose the strips to keep in every layer.

    The best strip of every row group is kept, so no layer and no output channel is emptied. A layer that would take no
    less time in blocks stays dense.

    Args:
        layers: by name.
        budget: what all layers together may cost.

    Returns:
        By name, bool [G, K].

    Raises:
        FxsparseError: even the least that every layer keeps costs more.
    """
    ranked = {name: _ranked(strips) for name, strips in layers.items()}

    def at(threshold: float) -> tuple[float, dict[str, int]]:
        total, counts = 0.0, {}
        for name, (scores, _, areas) in ranked.items():
            count = int(np.searchsorted(-scores, -threshold, side="right"))
            strips = layers[name]
            cost = strips.cost.of(areas[count - 1], strips.size)
            counts[name] = scores.size if cost >= strips.cost.dense else count
            total += cost
        return total, counts

    least, counts = at(np.inf)
    if least > budget:
        raise FxsparseError(
            f"The budget leaves {budget:.4g} for the convolutions that may be pruned; the least that they take is "
            f"{least:.4g}. Raise the budget, or exclude fewer layers."
        )
    thresholds = np.unique(np.concatenate([scores[np.isfinite(scores)] for scores, _, _ in ranked.values()]))
    low, high = 0, thresholds.size  # the first threshold that the budget allows
    while low < high:
        middle = (low + high) // 2
        if at(float(thresholds[middle]))[0] <= budget:
            high = middle
        else:
            low = middle + 1
    if low < thresholds.size:
        _, counts = at(float(thresholds[low]))
    chosen = {}
    for name, (_, order, _) in ranked.items():
        columns = np.zeros(order.size, dtype=bool)
        columns[order[: counts[name]]] = True
        chosen[name] = columns.reshape(layers[name].energy.shape)
    return chosen


def total_cost(layers: Mapping[str, Strips], chosen: Mapping[str, BoolArray]) -> float:
    """Return what the chosen strips of all layers cost."""
    return sum(s.cost.of(float((chosen[n] * s.sizes[:, None]).sum()), s.size) for n, s in layers.items())


def mask_of(strips: Strips, chosen: BoolArray, shape: Sequence[int]) -> BoolArray:
    """Return the chosen strips as a mask of the weight's shape."""
    mask: BoolArray = chosen[strips.labels].reshape(tuple(shape))
    return mask


def _ranked(strips: Strips) -> tuple[FloatArray, IntArray, FloatArray]:
    """Return the strips' scores, falling, their indices in this order, and the areas up to and including each."""
    groups, columns = strips.energy.shape
    rows = np.repeat(strips.sizes, columns).astype(np.float64)
    energy = strips.energy.ravel()
    best = np.arange(groups) * columns + strips.energy.argmax(axis=1)
    order = np.argsort(-energy / rows, kind="stable")
    above = np.maximum(np.cumsum(energy[order]), 1e-300)
    scores = np.empty(order.size)
    scores[order] = np.minimum.accumulate(energy[order] / above / (rows[order] * max(strips.cost.per_weight, 1e-30)))
    scores[best] = np.inf
    order = order[np.argsort(-scores[order], kind="stable")]
    return scores[order], order, np.cumsum(rows[order])
