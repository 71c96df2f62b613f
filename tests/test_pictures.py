"""Pictures of weight matrices: what a cell, a row order and an outline mean."""

import numpy as np
import pytest
import torch

import fxsparse
from fxsparse.pictures import MAX_COLUMNS, MAX_ROWS, WeightPicture, picture
from fxsparse.regrouping import Block, Regrouping


def _regrouping(mask: np.ndarray, *blocks: tuple[list[int], list[int]], groups: int = 1) -> Regrouping:
    """Make a regrouping of a mask from blocks that may hold pruned weights."""
    covered = np.zeros_like(mask)
    for rows, columns in blocks:
        covered[np.ix_(rows, columns)] = True
    residual_rows, residual_columns = np.nonzero(mask & ~covered)
    regrouping = Regrouping(
        mask.shape,
        groups,
        tuple(Block(np.array(rows), np.array(columns)) for rows, columns in blocks),
        residual_rows,
        residual_columns,
        int((covered & ~mask).sum()),
    )
    regrouping.validate()
    return regrouping


def test_before_shows_the_weights_where_they_are() -> None:
    mask = np.array([[1, 0, 0], [0, 1, 1]], dtype=bool)
    assert np.array_equal(picture(mask, _regrouping(mask)).before, mask * np.uint8(255))


def test_a_block_moves_to_the_top_left_and_the_residual_stays_outside_it() -> None:
    mask = np.zeros((4, 5), dtype=bool)
    mask[np.ix_([1, 3], [2, 4])] = True
    mask[3, 0] = mask[2, 3] = True
    drawn = picture(mask, _regrouping(mask, ([1, 3], [2, 4])))
    expected = [
        [1, 1, 0, 0, 0],  # row 1
        [1, 1, 1, 0, 0],  # row 3, with its residual
        [0, 0, 0, 1, 0],  # row 2: no block, columns as they were
        [0, 0, 0, 0, 0],  # row 0: pruned
    ]
    assert np.array_equal(drawn.after, np.array(expected) * 255)
    assert drawn.outlines == ((0.0, 0.0, 0.4, 0.5),)
    assert (drawn.rows, drawn.columns) == (4, 5)


def test_fill_in_is_drawn_as_pruned() -> None:
    mask = np.array([[1, 1, 1, 0], [1, 0, 1, 0]], dtype=bool)
    drawn = picture(mask, _regrouping(mask, ([0, 1], [0, 1, 2])))
    assert drawn.after[1, 1] == 0
    assert drawn.outlines == ((0.0, 0.0, 0.75, 1.0),)


def test_the_widest_block_comes_first_and_each_has_its_own_column_order() -> None:
    mask = np.array([[0, 0, 0, 1], [1, 0, 1, 0]], dtype=bool)
    drawn = picture(mask, _regrouping(mask, ([0], [3]), ([1], [0, 2])))
    assert np.array_equal(drawn.after, np.array([[1, 1, 0, 0], [1, 0, 0, 0]]) * 255)
    assert drawn.outlines == ((0.0, 0.0, 0.5, 0.5), (0.0, 0.5, 0.25, 0.5))


def test_a_cell_of_a_large_matrix_is_the_density_of_its_weights() -> None:
    mask = np.zeros((MAX_ROWS * 3, MAX_COLUMNS * 2), dtype=bool)
    mask[:3, :2] = True  # one cell, full
    mask[3, 2] = True  # one weight of six
    drawn = picture(mask, _regrouping(mask))
    assert drawn.before.shape == (MAX_ROWS, MAX_COLUMNS)
    assert drawn.before[0, 0] == 255
    assert drawn.before[1, 1] == 43  # 255 / 6, rounded up
    assert np.count_nonzero(drawn.before) == 2


def test_one_kept_weight_in_a_huge_matrix_stays_visible() -> None:
    mask = np.zeros((2048, 4608), dtype=bool)
    mask[2047, 4607] = True
    assert picture(mask, _regrouping(mask)).before[-1, -1] >= 1


def test_blocks_lower_than_a_cell_share_an_outline() -> None:
    mask = np.zeros((512, 9), dtype=bool)
    mask[:, :4] = True
    drawn = picture(mask, _regrouping(mask, *(([row], [0, 1, 2, 3]) for row in range(512)), groups=512))
    assert len(drawn.outlines) <= MAX_ROWS
    assert sum(height for _, _, _, height in drawn.outlines) == pytest.approx(1)


@pytest.mark.parametrize(
    ("shape", "density", "groups"),
    [
        ((1, 64, 3, 3), 0.2, 1),
        ((64, 1, 1, 1), 0.5, 1),
        ((1, 1, 1, 1), 1.0, 1),
        ((32, 1, 3, 3), 0.4, 32),
        ((64, 16, 3, 3), 0.1, 4),
        ((48, 24, 3, 3), 0.0, 1),
        ((48, 24, 3, 3), 1.0, 1),
        ((320, 511, 1, 1), 0.1, 1),
    ],
)
def test_every_shape_draws_and_keeps_its_weights(shape: tuple[int, ...], density: float, groups: int) -> None:
    mask = torch.rand(shape) < density
    matrix = mask.reshape(shape[0], -1).numpy()
    drawn = picture(matrix, fxsparse.regroup(mask, groups=groups))
    assert drawn.before.shape == drawn.after.shape
    assert drawn.before.dtype == drawn.after.dtype == np.uint8
    assert drawn.before.shape[0] <= MAX_ROWS and drawn.before.shape[1] <= MAX_COLUMNS
    for left, top, width, height in drawn.outlines:
        assert left >= 0 and top >= 0 and width > 0 and height > 0
        assert left + width <= 1 + 1e-9 and top + height <= 1 + 1e-9
    if matrix.shape == drawn.before.shape:  # a cell a weight
        assert np.count_nonzero(drawn.before) == np.count_nonzero(drawn.after) == matrix.sum()


def test_a_mask_of_another_shape_is_refused() -> None:
    mask = np.ones((2, 3), dtype=bool)
    with pytest.raises(fxsparse.FxsparseError, match=r"Mask is \[3, 2\]; the regrouping is \[2, 3\]"):
        picture(mask.T, _regrouping(mask))


def test_a_picture_says_its_sizes() -> None:
    mask = np.ones((2, 3), dtype=bool)
    assert repr(picture(mask, _regrouping(mask))) == "WeightPicture(2 x 3 in 2 x 3 cells)"
    assert isinstance(picture(mask, _regrouping(mask)), WeightPicture)
