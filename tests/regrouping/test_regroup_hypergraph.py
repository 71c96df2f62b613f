import sys

import numpy as np
import pytest

from fxsparse.errors import FxsparseError
from fxsparse.regrouping import Target, hypergraph, regroup, regroup_masks

TARGET = Target(partitioner="hypergraph")


@pytest.fixture
def without_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "mtkahypar", None)
    hypergraph.mtkahypar.cache_clear()
    yield
    hypergraph.mtkahypar.cache_clear()


def test_a_missing_package_is_an_error_that_says_what_to_do(without_package):
    message = r"'hypergraph' needs the package mtkahypar.*Run `pip install fxsparse\[hypergraph\]`"
    with pytest.raises(FxsparseError, match=message):
        regroup(np.ones((4, 4)), TARGET)
    with pytest.raises(FxsparseError, match=message):
        regroup_masks({"a": np.ones((4, 4))}, TARGET)


def test_the_package_is_not_needed_for_the_other_partitioners(without_package):
    assert regroup(np.ones((64, 4))).block_area == 256


def test_the_parts_are_balanced_and_follow_the_columns(planted):
    pytest.importorskip("mtkahypar")
    mask = planted(4, 32, 200)
    labels = hypergraph.partition_hypergraph(mask, 32, seed=0)
    assert np.bincount(labels).tolist() == [32] * 4
    assert sum(mask[labels == label].any(axis=0).sum() for label in range(4)) < 1.2 * mask.sum() / 32
    uneven = hypergraph.partition_hypergraph(mask[:100], 32, seed=0)
    assert np.bincount(uneven).tolist() == [32, 32, 32, 4]


def test_rows_that_share_no_column_are_partitioned_too():
    pytest.importorskip("mtkahypar")
    assert np.bincount(hypergraph.partition_hypergraph(np.eye(10, dtype=bool), 4, seed=0)).tolist() == [
        4,
        4,
        2,
    ]


def test_a_hypergraph_regrouping_is_exact_and_cheaper_than_residual(trained_like):
    pytest.importorskip("mtkahypar")
    mask = trained_like(128, 32, 9, 0.8)
    result = regroup(mask, TARGET)
    result.validate()
    assert result.covers(mask)
    assert result.kept == mask.sum()
    assert result.cost(TARGET) < 0.9 * 3.5 * mask.sum()
    assert result == regroup(mask, TARGET)


def test_planted_groups_are_recovered(planted):
    pytest.importorskip("mtkahypar")
    result = regroup(planted(4, 32, 200), TARGET)
    assert len(result.blocks) == 4
    assert result.residual_count == result.fill_in == 0
