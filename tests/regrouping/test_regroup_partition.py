import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fxsparse.regrouping import Target
from fxsparse.regrouping.assignment import assign, rank_in_segment, swap
from fxsparse.regrouping.blocks import fill_lanes, group_gains, trim_rows
from fxsparse.regrouping.partition import compact, consecutive_rows, group_sizes, identical_rows, sorted_rows

SEEDS = st.integers(0, 2**32 - 1)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), SEEDS)
def test_assignment_fills_every_group_and_no_swap_of_two_rows_gains(sizes, seed):
    scores = np.random.default_rng(seed).integers(0, 30, (sum(sizes), len(sizes))).astype(float)
    labels = assign(scores, np.array(sizes), swap_rounds=1000)
    assert np.bincount(labels, minlength=len(sizes)).tolist() == sizes
    own = scores[np.arange(len(labels)), labels]
    swapped = scores[:, labels]
    assert (swapped + swapped.T <= own[:, None] + own[None]).all()


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_assignment_is_near_the_best_one_of_small_problems(seed):
    scores = np.random.default_rng(seed).random((6, 3))
    labels = assign(scores, np.array([2, 2, 2]))
    places = itertools.permutations([0, 0, 1, 1, 2, 2])
    best = max(sum(scores[row, place] for row, place in enumerate(order)) for order in places)
    assert scores[np.arange(6), labels].sum() > 0.9 * best


def test_swaps_undo_a_bad_assignment():
    scores = np.zeros((6, 3))
    scores[np.arange(6), np.arange(6) % 3] = 5.0
    assert swap(scores, np.array([1, 2, 0, 1, 2, 0]), 20).tolist() == [0, 1, 2, 0, 1, 2]


def test_ties_go_to_the_lower_row_and_group():
    assert assign(np.zeros((5, 2)), np.array([3, 2])).tolist() == [0, 0, 0, 1, 1]


def test_small_partitions_by_hand():
    assert rank_in_segment(np.array([0, 0, 2, 2, 2, 5])).tolist() == [0, 1, 0, 1, 2, 0]
    assert compact(np.array([7, -1, 3, 7])).tolist() == [1, -1, 0, 1]
    assert compact(np.array([4, 9])).tolist() == [0, 1]
    assert compact(np.array([-1, -1])).tolist() == [-1, -1]
    assert group_sizes(70, 32).tolist() == [32, 32, 6]
    assert group_sizes(64, 32).tolist() == [32, 32]
    alive = np.array([1, 0, 1, 1, 1, 1, 0, 1, 0, 0, 0, 0], bool)
    assert consecutive_rows(alive, 3, 2).tolist() == [0, -1, 0, 1, 2, 2, -1, 3, -1, -1, -1, -1]
    rows = np.array([[0, 1], [1, 1], [0, 0], [1, 0], [1, 1], [1, 0]], bool)
    assert identical_rows(rows, 1).tolist() == [0, 1, -1, 2, 1, 2]
    assert identical_rows(rows, 2).tolist() == [0, 1, -1, 2, 3, 2]
    assert sorted_rows(rows, 2).tolist() == [1, 0, 2, 1, 0, 2]


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 60),
    st.integers(1, 25),
    st.sampled_from([1, 4, 16]),
    st.sampled_from([1.5, 3.5, 10.0]),
    SEEDS,
)
def test_dropping_rows_and_filling_lanes_never_cost(rows, columns, lanes, price, seed):
    rng = np.random.default_rng(seed)
    lists = rng.random((3, columns)) < 0.5
    mask = lists[rng.integers(3, size=rows)] ^ (rng.random((rows, columns)) < 0.1)
    target = Target(group_rows=24, lanes=lanes, residual_cost=price)
    start = consecutive_rows(mask.any(axis=1), 1, 24)
    trimmed = trim_rows(mask, start, target)
    assert ((trimmed < 0) | (start >= 0)).all()
    filled = fill_lanes(mask, trimmed, target)
    assert (filled[trimmed >= 0] == trimmed[trimmed >= 0]).all()
    gains = [group_gains(mask, labels, target)[0] for labels in (start, trimmed, filled)]
    assert gains[0].sum() <= gains[1].sum() + 1e-9
    assert gains[1].sum() <= gains[2].sum() + 1e-9
    assert (gains[1] > 0).all()
    assert np.bincount(filled[filled >= 0], minlength=1).max() <= 24


def test_a_free_lane_takes_the_row_that_gains_most():
    mask = np.zeros((10, 6), bool)
    mask[:6, :4] = True
    mask[6, :2] = mask[7, :3] = mask[8, 5] = mask[9, :1] = True
    target = Target(lanes=8, group_rows=8)
    labels = np.where(np.arange(10) < 6, 0, -1)
    assert fill_lanes(mask, labels, target).tolist() == [0] * 8 + [-1, -1]
