import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxsparse.errors import FxsparseError
from fxsparse.regrouping import Regrouping, Target, regroup
from fxsparse.regrouping.partition import cluster_rows, similarity


@st.composite
def problems(draw):
    groups = draw(st.sampled_from([1, 1, 2, 3, 8]))
    rows = groups * draw(st.integers(1, 40))
    columns = draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    density = draw(st.sampled_from([0.0, 0.02, 0.1, 0.3, 0.6, 0.9, 1.0]))
    mask = rng.random((rows, columns)) < density
    if draw(st.booleans()):  # shared column lists with noise
        lists = rng.random((draw(st.integers(1, 4)), columns)) < max(density, 0.1)
        mask = lists[rng.integers(len(lists), size=rows)] ^ (rng.random(mask.shape) < draw(st.sampled_from([0, 0.05])))
    target = Target(
        group_rows=draw(st.sampled_from([1, 3, 8, 16, 32])),
        block_cost=draw(st.sampled_from([0.5, 1.0])),
        residual_cost=draw(st.sampled_from([1.0, 3.5, 20.0])),
        lanes=draw(st.sampled_from([1, 4, 16])),
        partitioner=draw(st.sampled_from(["consecutive", "clustering"])),
        seed=draw(st.integers(0, 3)),
    )
    return mask, groups, target


def check_exact(mask, result):
    """Blocks and residual hold the kept weights, once each, and zeros only as counted fill-in."""
    result.validate()
    times = np.zeros(mask.shape, int)
    for block in result.blocks:
        times[np.ix_(block.rows, block.columns)] += 1
    fill_in = int(times[~mask].sum())
    times[result.residual_rows, result.residual_columns] += 1
    assert times[mask].tolist() == [1] * int(mask.sum())
    assert times.max(initial=0) <= 1
    assert mask[result.residual_rows, result.residual_columns].all()
    assert result.fill_in == fill_in
    assert result.kept == mask.sum()
    assert result.block_area == int(times.sum()) - result.residual_count
    assert math.isclose(result.density, mask.mean())
    assert result.covers(mask)
    np.testing.assert_array_equal(result.to_mask().numpy(), times > 0)


def consecutive_cost(mask, groups, target):
    """Cost of ``group_rows`` rows in order and the column rule, written plainly."""
    size = mask.shape[0] // groups
    total = 0.0
    for start in range(0, mask.shape[0], size):
        part = mask[start : start + size]
        part = part[part.any(axis=1)]
        for first in range(0, len(part), target.group_rows):
            rows = part[first : first + target.group_rows]
            column = target.padded(len(rows)) * target.block_cost
            total += np.minimum(column, rows.sum(axis=0) * target.residual_cost).sum()
    return total


@settings(max_examples=150, deadline=None)
@given(problems())
def test_blocks_and_residual_are_exactly_the_mask_and_never_cost_more_than_the_plain_choices(problem):
    mask, groups, target = problem
    result = regroup(mask, target, groups=groups)
    assert result.shape == mask.shape
    assert result.groups == groups
    check_exact(mask, result)
    cost = result.cost(target)
    slack = 1e-9 * mask.size
    assert cost <= mask.sum() * target.residual_cost + slack
    assert cost <= consecutive_cost(mask, groups, target) + slack
    assert cost <= Regrouping.from_identical_rows(mask, groups).cost(target) + slack
    for block in result.blocks:
        kept = mask[np.ix_(block.rows, block.columns)]
        padded = target.padded(block.rows.size) * target.block_cost
        assert (padded < kept.sum(axis=0) * target.residual_cost).all()
        assert kept.any(axis=1).all(), "a row without a kept weight in the block has no place in it"


@settings(max_examples=40, deadline=None)
@given(problems())
def test_the_same_mask_gives_the_same_blocks_again(problem):
    mask, groups, target = problem
    assert regroup(mask, target, groups=groups) == regroup(mask.copy(), target, groups=groups)


@pytest.mark.parametrize("partitioner", ["consecutive", "clustering"])
@pytest.mark.parametrize(("groups", "rows", "columns"), [(1, 32, 50), (5, 32, 300), (16, 32, 1152), (8, 16, 200)])
def test_planted_groups_are_recovered_without_residual_and_without_fill_in(planted, partitioner, groups, rows, columns):
    mask = planted(groups, rows, columns)
    result = regroup(mask, Target(partitioner=partitioner))
    check_exact(mask, result)
    assert len(result.blocks) == groups
    assert result.residual_count == 0
    assert result.fill_in == 0
    for block in result.blocks:
        assert block.rows.size == rows
        np.testing.assert_array_equal(np.flatnonzero(mask[block.rows[0]]), block.columns)


def test_clustering_itself_finds_planted_groups(planted):
    mask = planted(16, 32, 576)
    labels = cluster_rows(similarity(mask), 32, seed=0)
    assert np.bincount(labels).tolist() == [32] * 16
    for label in range(16):
        assert (mask[labels == label] == mask[labels == label][0]).all()


def test_planted_groups_are_recovered_under_noise(planted):
    clean = planted(8, 32, 400, density=0.15, seed=2)
    noise = np.random.default_rng(3).random(clean.shape)
    mask = (clean & (noise > 0.05)) | (noise > 0.995)
    result = regroup(mask)
    check_exact(mask, result)
    assert sorted(block.rows.size for block in result.blocks) == [32] * 8
    for block in result.blocks:
        assert (clean[block.rows] == clean[block.rows[0]]).all()
        np.testing.assert_array_equal(np.flatnonzero(clean[block.rows[0]]), block.columns)


def test_identical_rows_stay_together_beside_unstructured_ones(planted):
    structured = planted(4, 32, 300)
    loose = np.random.default_rng(5).random((100, 300)) < 0.15
    mask = np.vstack([structured, loose])[np.random.default_rng(6).permutation(228)]
    result = regroup(mask)
    check_exact(mask, result)
    exact = [b for b in result.blocks if mask[np.ix_(b.rows, b.columns)].all() and b.rows.size >= 32]
    assert len(exact) == 4
    assert result.cost() < Regrouping.from_identical_rows(mask).cost()


def test_planted_groups_inside_convolution_groups_are_recovered(planted):
    mask = np.vstack([planted(2, 32, 90, 0.2, seed) for seed in range(3)])
    result = regroup(mask.reshape(192, 10, 3, 3), groups=3)
    check_exact(mask, result)
    assert len(result.blocks) == 6
    assert result.residual_count == result.fill_in == 0


@pytest.mark.parametrize("affinity", [0.0, 0.6])
def test_clustering_beats_consecutive_rows_on_trained_like_masks(trained_like, affinity):
    mask = trained_like(affinity=affinity)
    plain = regroup(mask, Target(partitioner="consecutive")).cost()
    clustered = regroup(mask).cost()
    assert clustered < (0.95 if affinity else 0.99) * plain
    assert clustered < (0.85 if affinity else 0.95) * 3.5 * mask.sum()


def test_an_empty_mask_has_no_blocks():
    result = regroup(torch.zeros(48, 8, 3, 3))
    check_exact(np.zeros((48, 72), bool), result)
    assert result.blocks == ()
    assert result.cost() == 0
    assert result.density == 0


@pytest.mark.parametrize("rows", [16, 32, 100, 513])
def test_a_full_mask_is_one_block_and_rows_that_do_not_pay_for_a_panel_are_residual(rows):
    result = regroup(torch.ones(rows, 4, 3, 3))
    check_exact(np.ones((rows, 36), bool), result)
    assert len(result.blocks) == 1
    rest = rows % 16
    assert result.blocks[0].rows.size == (rows if rest * 3.5 > 16 or not rest else rows - rest)


@pytest.mark.parametrize(
    ("shape", "groups"),
    [((1, 9), 1), ((3, 40), 1), ((17, 1), 1), ((129, 64), 1), ((64, 1, 3, 3), 64), ((96, 2), 3)],
)
def test_odd_sizes_are_exact(shape, groups):
    mask = torch.from_numpy(np.random.default_rng(1).random(shape) < 0.5)
    check_exact(mask.reshape(shape[0], -1).numpy(), regroup(mask, groups=groups))


def test_one_kept_weight_is_residual():
    mask = np.zeros((40, 20), bool)
    mask[7, 11] = True
    result = regroup(mask)
    assert result.blocks == ()
    assert (result.residual_rows.tolist(), result.residual_columns.tolist()) == ([7], [11])
    assert result.cost() == 3.5


def test_depthwise_rows_are_blocks_only_where_lanes_are_cheap():
    mask = torch.from_numpy(np.random.default_rng(2).random((1024, 1, 3, 3)) < 0.5)
    assert regroup(mask, groups=1024).blocks == ()
    cheap = regroup(mask, Target(lanes=1, group_rows=4), groups=1024)
    check_exact(mask.reshape(1024, 9).numpy(), cheap)
    assert cheap.residual_count == 0
    assert len(cheap.blocks) == int(mask.flatten(1).any(1).sum())


def test_empty_rows_are_in_no_block():
    mask = np.zeros((64, 30), bool)
    mask[::2, :12] = True
    result = regroup(mask)
    assert len(result.blocks) == 1
    assert result.blocks[0].rows.tolist() == list(range(0, 64, 2))
    assert result.blocks[0].columns.tolist() == list(range(12))


def test_a_row_that_only_adds_a_panel_is_left_to_the_residual():
    mask = np.ones((17, 10), bool)
    result = regroup(mask)
    assert result.blocks[0].rows.size == 16
    assert result.residual_count == 10
    assert regroup(mask, Target(residual_cost=20)).residual_count == 0


def test_groups_are_larger_than_group_rows_only_for_identical_columns():
    mask = np.ones((96, 10), bool)
    assert [b.rows.size for b in regroup(mask, Target(group_rows=16)).blocks] == [96]
    rng = np.random.default_rng(0)
    result = regroup(rng.random((96, 200)) < 0.5, Target(group_rows=16))
    assert result.blocks
    assert max(b.rows.size for b in result.blocks) <= 16


def test_numbers_tensors_and_arrays_read_alike():
    weight = torch.randn(40, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    weight[weight.abs() < 0.8] = 0
    expected = regroup(weight != 0)
    assert expected.kept == int((weight != 0).sum()) > 0
    for form in (
        weight,
        weight.bfloat16(),
        weight.double().numpy(),
        (weight != 0).int(),
        weight.flatten(1),
        -weight,
    ):
        assert regroup(form) == expected
    assert regroup(weight.to(memory_format=torch.channels_last)) == expected
    assert regroup(weight.requires_grad_()) == expected


@pytest.mark.parametrize(
    ("mask", "groups", "message"),
    [
        ([[1, 0]], 1, "Mask is a list. Give a torch.Tensor or a numpy.ndarray."),
        (np.ones(3), 1, r"Mask has shape \(3,\). Give a Conv2d weight's"),
        (torch.ones(2, 3, 4), 1, r"Mask has shape \(2, 3, 4\)"),
        (np.ones((0, 3)), 1, r"Mask has shape \(0, 3\), which holds no weight"),
        (np.array([[1.0, np.nan]]), 1, "Mask holds NaN. Give numbers"),
        (
            torch.ones(2, 2, dtype=torch.complex64),
            1,
            "Mask has dtype complex64. Give bool, integers or real numbers.",
        ),
        (np.array([["a"]]), 1, "Mask has dtype <U1"),
        (np.ones((6, 2)), 4, "Groups is 4, which does not divide the 6 rows"),
        (np.ones((6, 2)), 0, "Groups is 0. Give the convolution's groups"),
        (np.ones((6, 2)), 1.0, "Groups is 1.0. Give the convolution's groups"),
    ],
)
def test_an_argument_that_cannot_be_read_is_an_error(mask, groups, message):
    with pytest.raises(FxsparseError, match=message):
        regroup(mask, groups=groups)


def test_progress_draws_a_bar(capsys):
    regroup(np.random.default_rng(0).random((80, 30)) < 0.3, progress=True)
    assert "regroup" in capsys.readouterr().err
    regroup(np.random.default_rng(0).random((80, 30)) < 0.3)
    assert capsys.readouterr().err == ""
