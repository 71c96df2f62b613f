"""Small pictures of a weight matrix, before and after regrouping, for the report's page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fxsparse.errors import FxsparseError
from fxsparse.regrouping import Block, Regrouping
from fxsparse.regrouping.weight_matrix import BoolArray, IntArray

Cells = npt.NDArray[np.uint8]
Outline = tuple[float, float, float, float]

MAX_ROWS = 160
MAX_COLUMNS = 240


@dataclass(frozen=True, eq=False)
class WeightPicture:
    """A weight matrix as two grids of cells; a cell is a rectangle of weights, all the same size but the last.

    Attributes:
        before: uint8 [h, w], h <= 160 and w <= 240: share of the cell's weights that are kept, 0 (none) to
            255 (all), with rows and columns in the weight's order. Any kept weight makes at least 1.
        after: uint8 [h, w], the same weights rearranged: each block's rows together, widest block first, its
            columns moved to the left and the other columns after them in order, so every block has a column
            order of its own. Then rows without a block, pruned rows last. Fill-in counts as pruned.
        outlines: where the blocks are in ``after``: (left, top, width, height) as fractions of the picture.
            Neighbouring blocks that are lower than a cell share one outline.
        rows: O, rows of the weight matrix.
        columns: K, its columns.
    """

    before: Cells
    after: Cells
    outlines: tuple[Outline, ...]
    rows: int
    columns: int

    def __repr__(self) -> str:
        """Show the sizes."""
        height, width = self.before.shape
        return f"WeightPicture({self.rows} x {self.columns} in {height} x {width} cells)"


def picture(mask: BoolArray, regrouping: Regrouping) -> WeightPicture:
    """Draw a weight matrix before and after regrouping.

    Args:
        mask: bool [O, K], True = kept.
        regrouping: of this weight matrix.

    Raises:
        FxsparseError: the mask has not the regrouping's shape.
    """
    matrix = np.ascontiguousarray(mask, dtype=bool)
    if matrix.shape != regrouping.shape:
        raise FxsparseError(
            f"Mask is {list(matrix.shape)}; the regrouping is {list(regrouping.shape)}. "
            "Give the mask of the same weight as [O, K]."
        )
    rows, columns = matrix.shape
    # Widest first makes a staircase, which is easier to read than the order of the packed panels.
    blocks = sorted(regrouping.blocks, key=lambda block: block.columns.size, reverse=True)
    return WeightPicture(
        before=_cells(matrix),
        after=_cells(_arranged(matrix, blocks)),
        outlines=_outlines(blocks, rows, columns),
        rows=rows,
        columns=columns,
    )


def _arranged(matrix: BoolArray, blocks: Sequence[Block]) -> BoolArray:
    rows, columns = matrix.shape
    arranged = np.empty_like(matrix)
    loose = np.ones(rows, dtype=bool)
    top = 0
    for block in blocks:
        others = np.ones(columns, dtype=bool)
        others[block.columns] = False
        order = np.concatenate([block.columns, np.flatnonzero(others)])
        np.take(matrix[block.rows], order, axis=1, out=arranged[top : top + block.rows.size], mode="clip")
        loose[block.rows] = False
        top += block.rows.size
    alive = matrix.any(axis=1)
    rest = np.concatenate([np.flatnonzero(loose & alive), np.flatnonzero(loose & ~alive)])
    arranged[top:] = matrix[rest]
    return arranged


def _outlines(blocks: Sequence[Block], rows: int, columns: int) -> tuple[Outline, ...]:
    cell_rows = _cell_size(rows, MAX_ROWS)
    merged: list[tuple[int, int, int]] = []  # top row, rows, columns
    for block in blocks:
        if merged and merged[-1][1] < cell_rows:
            top, height, width = merged[-1]  # the wider one, as the blocks come sorted
            merged[-1] = (top, height + block.rows.size, width)
        else:
            top = merged[-1][0] + merged[-1][1] if merged else 0
            merged.append((top, block.rows.size, block.columns.size))
    return tuple((0.0, top / rows, width / columns, height / rows) for top, height, width in merged)


def _cell_size(weights: int, cells: int) -> int:
    return -(-weights // cells)


def _cells(matrix: BoolArray) -> Cells:
    step = _cell_size(matrix.shape[0], MAX_ROWS)
    tops = np.arange(0, matrix.shape[0], step)
    lefts = np.arange(0, matrix.shape[1], _cell_size(matrix.shape[1], MAX_COLUMNS))
    bits = matrix.view(np.uint8)
    # `reduceat` along the rows would do the same at a tenth of the speed.
    kept = np.stack([bits[top : top + step].sum(axis=0, dtype=np.uint32) for top in tops])
    kept = np.add.reduceat(kept, lefts, axis=1, dtype=np.int64)
    area = np.outer(_lengths(tops, matrix.shape[0]), _lengths(lefts, matrix.shape[1]))
    return (-(-kept * 255 // area)).astype(np.uint8)  # rounded up: no kept weight disappears


def _lengths(starts: IntArray, end: int) -> IntArray:
    return np.diff(starts, append=end)
