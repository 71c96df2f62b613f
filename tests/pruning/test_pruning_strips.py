"""Which strips are kept: ranked by energy, shared over the layers by what they cost."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxsparse import FxsparseError
from fxsparse.pruning.strips import LayerCost, Strips, choose, mask_of, row_groups, total_cost

RNG = np.random.default_rng(0)


def layer(rows: int = 32, columns: int = 24, scale: float = 1.0, cost: LayerCost | None = None) -> Strips:
    energy = scale * RNG.random((rows, columns)) ** 4
    labels = row_groups(energy, 1, 16, "consecutive", 0)
    size = rows * columns
    return Strips.of(energy, labels, cost or LayerCost(size, 0.0, 1.0))


def test_the_best_strips_of_a_layer_are_kept_up_to_the_budget() -> None:
    strips = layer()
    kept = choose({"a": strips}, 0.25 * strips.size)["a"]
    assert kept.sum() * 16 == 0.25 * strips.size
    assert strips.energy[kept].min() >= strips.energy[~kept].max()


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 1000), st.floats(0.1, 0.95))
def test_the_budget_is_kept_and_no_row_group_is_emptied(seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    layers = {}
    for i in range(3):
        rows, columns = 16 * int(rng.integers(1, 5)), int(rng.integers(8, 60))
        dense = float(rng.uniform(1, 5)) * rows * columns
        cost = LayerCost(dense, 0.02 * dense, dense / rows / columns * float(rng.uniform(0.3, 2)))
        energy = 10.0 ** rng.uniform(-6, 2) * rng.random((rows, columns)) ** 6
        layers[str(i)] = Strips.of(energy, row_groups(energy, 1, 16, "consecutive", 0), cost)
    budget = share * sum(strips.cost.dense for strips in layers.values())
    try:
        kept = choose(layers, budget)
    except FxsparseError:
        least = sum(s.cost.of(float(s.sizes.sum()), s.size) for s in layers.values())
        assert least > budget
        return
    assert total_cost(layers, kept) <= budget * (1 + 1e-9)
    assert all(columns.any(axis=1).all() for columns in kept.values())


def test_a_layer_of_tiny_weights_is_not_emptied_by_one_of_large_ones() -> None:
    layers = {"large": layer(scale=1e6), "tiny": layer(scale=1e-6)}
    kept = choose(layers, 0.5 * 2 * layers["tiny"].size)
    assert 0.3 < kept["tiny"].mean() < 0.7


def test_the_dearer_layer_keeps_less() -> None:
    same = layer()
    dear = Strips(same.labels, same.sizes, same.energy, LayerCost(8.0 * same.size, 0.0, 8.0))
    kept = choose({"cheap": same, "dear": dear}, 3.0 * same.size)
    assert kept["dear"].mean() < kept["cheap"].mean()


def test_a_layer_that_gains_nothing_in_blocks_stays_dense() -> None:
    small = layer(cost=LayerCost(10.0, 12.0, 0.01))
    other = layer()
    kept = choose({"small": small, "other": other}, 10.0 + 0.3 * other.size)
    assert kept["small"].all() and kept["other"].mean() == pytest.approx(0.3, abs=0.03)


def test_a_budget_below_the_least_is_refused() -> None:
    with pytest.raises(FxsparseError, match=r"leaves 10 for the convolutions.*the least that they take is 32"):
        choose({"a": layer()}, 10.0)


def test_clustering_brings_rows_with_the_same_columns_together_within_conv_groups() -> None:
    energy = np.full((64, 40), 1e-6)
    half = RNG.permutation(32)[:16]
    for offset in (0, 32):
        energy[offset + half, :20] = 1.0
        energy[offset + np.setdiff1d(np.arange(32), half), 20:] = 1.0
    labels = row_groups(energy, 2, 16, "clustering", 0)
    assert len(set(labels[half])) == 1 and len(set(labels[32 + half])) == 1
    assert set(labels[:32]) == {0, 1} and set(labels[32:]) == {2, 3}
    assert np.bincount(labels).tolist() == [16] * 4


def test_a_mask_has_the_groups_columns_in_every_row() -> None:
    strips = layer(rows=32, columns=18)
    kept = choose({"a": strips}, 0.3 * strips.size)["a"]
    mask = mask_of(strips, kept, (32, 2, 3, 3))
    assert mask.shape == (32, 2, 3, 3)
    assert (mask.reshape(32, 18)[:16] == kept[0]).all() and (mask.reshape(32, 18)[16:] == kept[1]).all()
