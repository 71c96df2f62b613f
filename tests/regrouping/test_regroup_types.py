import dataclasses
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxsparse.errors import FxsparseError
from fxsparse.regrouping import Block, Regrouping, Target, regroup


def test_a_target_goes_through_json():
    target = Target(group_rows=np.int64(8), residual_cost=np.float32(2), partitioner="consecutive", seed=3)
    assert Target.from_dict(json.loads(json.dumps(target.to_dict()))) == target
    assert Target.from_dict({}) == Target()
    assert dataclasses.replace(target, seed=4) != target


def test_padding_goes_up_to_whole_panels():
    assert [Target().padded(rows) for rows in (1, 16, 17, 32, 33)] == [16, 16, 32, 32, 48]
    assert Target(lanes=1).padded(7) == 7


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"group_rows": 0}, "Target.group_rows is 0. Give an integer of at least 1."),
        ({"group_rows": 2.5}, "Target.group_rows is 2.5. Give an integer of at least 1."),
        ({"lanes": True}, "Target.lanes is True. Give an integer of at least 1."),
        ({"seed": -1}, "Target.seed is -1. Give an integer of at least 0."),
        ({"block_cost": 0}, "Target.block_cost is 0. Give a finite number above 0."),
        ({"residual_cost": float("inf")}, "Target.residual_cost is inf. Give a finite number above 0."),
        ({"residual_cost": "3"}, "Target.residual_cost is '3'. Give a finite number above 0."),
        ({"partitioner": "kmeans"}, "'kmeans'. Give one of consecutive, clustering, hypergraph."),
    ],
)
def test_a_target_refuses_what_it_cannot_use(values, message):
    with pytest.raises(FxsparseError, match=message):
        Target(**values)


def test_an_unknown_field_is_an_error():
    with pytest.raises(FxsparseError, match="Target has no field 'rows'. Its fields are group_rows, block_cost"):
        Target.from_dict({"rows": 3})


def test_cost_counts_padded_blocks_and_residual():
    regrouping = Regrouping((40, 10), 1, (Block(range(17), [1, 3]), Block([20, 21], [0])), [30, 39], [9, 0], 5)
    regrouping.validate()
    assert regrouping.block_area == 36
    assert regrouping.residual_count == 2
    assert regrouping.kept == 33
    assert regrouping.density == 33 / 400
    assert regrouping.dense_cost == 400
    assert regrouping.cost() == 32 * 2 + 16 + 2 * 3.5
    assert regrouping.cost(Target(lanes=1, block_cost=2, residual_cost=10)) == 36 * 2 + 20
    assert repr(regrouping) == (
        "Regrouping(40 x 10, groups=1, 33 kept: 2 blocks of area 36 with 5 filled in, 2 residual)"
    )
    assert repr(regrouping.blocks[0]) == "Block(17 rows, 2 columns)"


def test_overlapping_blocks_become_groups_of_rows_with_the_same_blocks():
    blocks = [([0, 1, 2], [0, 1]), ([2, 1, 5], [4, 1]), (np.array([7]), torch.tensor([3]))]
    regrouping = Regrouping.from_blocks(blocks, (8, 6))
    regrouping.validate()
    assert [(b.rows.tolist(), b.columns.tolist()) for b in regrouping.blocks] == [
        ([0], [0, 1]),
        ([1, 2], [0, 1, 4]),
        ([5], [1, 4]),
        ([7], [3]),
    ]
    assert regrouping.fill_in == regrouping.residual_count == 0
    assert regrouping.kept == 11


def test_groups_with_equal_columns_merge_whichever_blocks_they_came_from():
    blocks = [([0], [0, 1, 2]), ([3], [0, 2]), ([3], [1, 2]), ([9, 8], [2, 0, 1])]
    regrouping = Regrouping.from_blocks(blocks, (10, 1, 3, 1))
    assert [(b.rows.tolist(), b.columns.tolist()) for b in regrouping.blocks] == [([0, 3, 8, 9], [0, 1, 2])]


def test_blocks_are_split_at_convolution_groups():
    regrouping = Regrouping.from_blocks([(range(6), [0, 2])], (6, 3), groups=2)
    regrouping.validate()
    assert [(b.rows.tolist(), b.columns.tolist()) for b in regrouping.blocks] == [
        ([0, 1, 2], [0, 2]),
        ([3, 4, 5], [0, 2]),
    ]


def test_blocks_without_rows_or_columns_are_ignored():
    regrouping = Regrouping.from_blocks([([], [1]), ([1], []), ([2], [0])], (4, 2))
    assert [(b.rows.tolist(), b.columns.tolist()) for b in regrouping.blocks] == [([2], [0])]
    assert Regrouping.from_blocks([], (4, 2)).kept == 0


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 20), st.integers(1, 15), st.integers(0, 8), st.integers(0, 2**32 - 1))
def test_any_block_list_is_kept_exactly(groups, rows, columns, count, seed):
    rng = np.random.default_rng(seed)
    union = np.zeros((groups * rows, columns), bool)
    blocks = []
    for _ in range(count):
        r = rng.permutation(groups * rows)[: rng.integers(0, groups * rows + 1)]
        c = rng.permutation(columns)[: rng.integers(0, columns + 1)]
        blocks.append((r.tolist(), c))
        union[np.ix_(r, c)] = True
    regrouping = Regrouping.from_blocks(blocks, union.shape, groups)
    regrouping.validate()
    np.testing.assert_array_equal(regrouping.to_mask().numpy(), union)
    assert regrouping.kept == union.sum()
    assert regrouping.block_area == union.sum()
    lists = {(b.rows[0] // rows, b.columns.tobytes()) for b in regrouping.blocks}
    assert len(lists) == len(regrouping.blocks), "equal column lists in one convolution group are one block"


@pytest.mark.parametrize(
    ("blocks", "shape", "groups", "message"),
    [
        ([([0, 8], [0])], (8, 4), 1, "Block 0 has row 8; the weight matrix has rows 0 to 7."),
        (
            [([0], [0]), ([0], [-1])],
            (8, 4),
            1,
            "Block 1 has column -1; the weight matrix has columns 0 to 3.",
        ),
        ([([0, 2, 0], [0])], (8, 4), 1, "Block 0 has row 0 twice. Give each row once."),
        ([([0], [3, 3])], (8, 4), 1, "Block 0 has column 3 twice"),
        ([([0.5], [3])], (8, 4), 1, "Block 0 has rows of dtype float64. Give integer row indices."),
        ([([True], [3])], (8, 4), 1, "Block 0 has rows of dtype bool"),
        (
            [([[0, 1]], [3])],
            (8, 4),
            1,
            r"Block 0 has rows of shape \(1, 2\). Give a flat list of row indices.",
        ),
        ([[0]], (8, 4), 1, r"Block 0 is \[0\]. Give a pair \(rows, columns\)."),
        ([5], (8, 4), 1, "Block 0 is 5. Give a pair"),
        ([], (8, 4, 3), 1, r"Shape \(8, 4, 3\) has 3 dimensions"),
        ([], (8, 0), 1, r"Shape \(8, 0\) has a dimension below 1"),
        ([], (8, 2.0), 1, r"Shape \(8, 2.0\) has the dimension 2.0. Give integers."),
        ([], (8, 4), 3, "Groups is 3, which does not divide the 8 rows"),
    ],
)
def test_a_block_list_that_cannot_be_read_is_an_error(blocks, shape, groups, message):
    with pytest.raises(FxsparseError, match=message):
        Regrouping.from_blocks(blocks, shape, groups)


GOOD = {"shape": (8, 5), "groups": 2, "blocks": (Block([0, 1], [0, 1]),), "residual_rows": [0, 5]}
GOOD |= {"residual_columns": [4, 2]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": 3}, "Groups is 3, which does not divide the 8 rows"),
        ({"blocks": (Block([3, 4], [0]),)}, "The rows of block 0 are in more than one convolution group."),
        ({"blocks": (Block([0], [0]), Block([0], [1]))}, "Row 0 is in block 0 and in block 1."),
        ({"blocks": (Block([1, 0], [0]),)}, "The rows of block 0 are not ascending, each once."),
        ({"blocks": (Block([0, 8], [0]),)}, "The rows of block 0 leave the range 0 to 7."),
        ({"blocks": (Block([0], [5]),)}, "The columns of block 0 leave the range 0 to 4."),
        ({"blocks": (Block([0], []),)}, "The columns of block 0 are not a list of at least one index."),
        ({"residual_rows": [5]}, "The residual has not one column a row index."),
        ({"residual_rows": [0, 8]}, "The residual rows leave the range 0 to 7."),
        ({"residual_columns": [4, -1]}, "The residual columns leave the range 0 to 4."),
        ({"residual_rows": [5, 0]}, "The residual weights are not in row-major order, each once."),
        ({"residual_columns": [1, 2]}, "A residual weight lies in a block."),
        ({"fill_in": 5}, "The fill-in is 5, the block area 4."),
    ],
)
def test_validate_finds_each_broken_promise(change, message):
    Regrouping(**GOOD).validate()
    with pytest.raises(FxsparseError, match=message):
        Regrouping(**(GOOD | change)).validate()


def test_covers_says_whether_a_mask_is_inside():
    regrouping = Regrouping(**GOOD)
    mask = np.zeros((8, 5))
    assert regrouping.covers(mask)
    mask[1, 1] = mask[5, 2] = 2.0
    assert regrouping.covers(torch.from_numpy(mask))
    mask[7, 0] = 1
    assert not regrouping.covers(mask)
    with pytest.raises(FxsparseError, match=r"Mask is \[8, 4\] as a weight matrix; the regrouping is \[8, 5\]"):
        regrouping.covers(mask[:, :4])


def test_equality_is_by_content_and_arrays_are_read_only():
    one, two = Regrouping(**GOOD), Regrouping(**GOOD)
    assert one == two
    assert hash(one) == hash(two)
    assert len({one.blocks[0], two.blocks[0]}) == 1
    assert one != Regrouping(**(GOOD | {"residual_columns": [4, 3]}))
    assert one != Regrouping(**(GOOD | {"blocks": (Block([0, 1], [0, 2]),)}))
    assert one != "blocks"
    assert one.blocks[0] != "block"
    with pytest.raises(ValueError, match="read-only"):
        one.blocks[0].rows[0] = 3
    rows = np.array([0, 1])
    block = Block(rows, [0])
    rows[0] = 7
    assert block.rows.tolist() == [0, 1]


def test_residual_indices_are_int64_in_row_major_order():
    result = regroup(np.random.default_rng(0).random((32, 50)) < 0.2)
    assert result.residual_count > 0
    assert result.residual_rows.dtype == result.residual_columns.dtype == np.int64
    assert (np.diff(result.residual_rows * 50 + result.residual_columns) > 0).all()
