"""A weight matrix as dense blocks plus residual weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fxsparse.errors import FxsparseError
from fxsparse.regrouping.target import Target
from fxsparse.regrouping.weight_matrix import BoolArray, IntArray, as_groups, as_mask_matrix, as_matrix_shape


def _frozen(values: Any) -> IntArray:
    array = np.array(values, dtype=np.int64)
    array.setflags(write=False)
    return array


@dataclass(frozen=True, eq=False)
class Block:
    """A dense sub-matrix of the weight matrix.

    Attributes:
        rows: int64 [R], output channels, ascending.
        columns: int64 [C], ascending; column k is one (channel inside the convolution group, tap).
    """

    rows: IntArray
    columns: IntArray

    def __post_init__(self) -> None:
        """Keep read-only int64 copies."""
        object.__setattr__(self, "rows", _frozen(self.rows))
        object.__setattr__(self, "columns", _frozen(self.columns))

    @property
    def area(self) -> int:
        """The number of weights that the block stores, without lane padding."""
        return self.rows.size * self.columns.size

    def __repr__(self) -> str:
        """Show the size."""
        return f"Block({self.rows.size} rows, {self.columns.size} columns)"

    def __eq__(self, other: object) -> bool:
        """Compare rows and columns."""
        if not isinstance(other, Block):
            return NotImplemented
        return np.array_equal(self.rows, other.rows) and np.array_equal(self.columns, other.columns)

    def __hash__(self) -> int:
        """Hash rows and columns."""
        return hash((self.rows.tobytes(), self.columns.tobytes()))


@dataclass(frozen=True, eq=False)
class Regrouping:
    """Blocks and residual weights of one weight matrix.

    Attributes:
        shape: (O, K) of the weight matrix, K = (C / groups)·kh·kw.
        groups: convolution groups; group i holds the rows ``i * O / groups`` to ``(i + 1) * O / groups``.
        blocks: a row is in at most one block, and the rows of a block are in one convolution group.
        residual_rows: int64 [n], row of every kept weight outside the blocks, in row-major order.
        residual_columns: int64 [n], its column.
        fill_in: zeros stored inside the blocks.
    """

    shape: tuple[int, int]
    groups: int
    blocks: tuple[Block, ...]
    residual_rows: IntArray
    residual_columns: IntArray
    fill_in: int = 0

    def __post_init__(self) -> None:
        """Keep read-only int64 copies."""
        object.__setattr__(self, "shape", tuple(int(size) for size in self.shape))
        object.__setattr__(self, "blocks", tuple(self.blocks))
        object.__setattr__(self, "residual_rows", _frozen(self.residual_rows))
        object.__setattr__(self, "residual_columns", _frozen(self.residual_columns))

    @classmethod
    def from_blocks(cls, blocks: Iterable[tuple[Any, Any]], shape: Sequence[int], groups: int = 1) -> Regrouping:
        """Make a regrouping from any list of blocks, which may overlap and span convolution groups.

        The kept weights are the union of the blocks. Rows whose unions of columns are equal, inside one
        convolution group, become one block, so nothing is filled in and nothing is residual.

        Args:
            blocks: pairs (rows, columns) of integer lists, arrays or tensors in any order. A pair with no row
                or no column is ignored.
            shape: the weight's shape, (O, C / groups, kh, kw) or (O, K).
            groups: convolution groups; the columns are counted inside one group.

        Raises:
            FxsparseError: an index is not an integer, or an entry is not a pair; an index is out of range or
                appears twice in one list, or ``groups`` does not divide O.
        """
        size = as_matrix_shape(shape)
        groups = as_groups(groups, size[0])
        kept = np.zeros(size, dtype=bool)
        for number, entry in enumerate(blocks):
            try:
                rows, columns = entry
            except (TypeError, ValueError):
                raise FxsparseError(f"Block {number} is {entry!r:.60}. Give a pair (rows, columns).") from None
            row_indices = _indices(rows, "row", number, size[0], "rows")
            column_indices = _indices(columns, "column", number, size[1], "columns")
            kept[np.ix_(row_indices, column_indices)] = True
        return cls.from_identical_rows(kept, groups)

    @classmethod
    def from_identical_rows(cls, mask: Any, groups: int = 1) -> Regrouping:
        """Make one block of every set of rows with the same columns: no residual, no fill-in, no cost rule.

        Args:
            mask: as in ``fxsparse.regroup``.
            groups: convolution groups.

        Raises:
            FxsparseError: the mask or ``groups`` cannot be read.
        """
        from fxsparse.regrouping.blocks import build
        from fxsparse.regrouping.partition import identical_rows

        matrix = as_mask_matrix(mask)
        groups = as_groups(groups, matrix.shape[0])
        labels = identical_rows(matrix, groups)
        _, first = np.unique(labels[labels >= 0], return_index=True)
        return build(matrix, groups, labels, matrix[np.flatnonzero(labels >= 0)[first]])

    @classmethod
    def all_residual(cls, mask: Any, groups: int = 1) -> Regrouping:
        """Make a regrouping without blocks: every kept weight is residual.

        Args:
            mask: as in ``fxsparse.regroup``.
            groups: convolution groups.

        Raises:
            FxsparseError: the mask or ``groups`` cannot be read.
        """
        matrix = as_mask_matrix(mask)
        rows, columns = np.nonzero(matrix)
        return cls(matrix.shape, as_groups(groups, matrix.shape[0]), (), rows, columns)

    @property
    def block_area(self) -> int:
        """Weights stored in blocks, fill-in included, lane padding not."""
        return sum(block.area for block in self.blocks)

    @property
    def residual_count(self) -> int:
        """Kept weights outside the blocks."""
        return self.residual_rows.size

    @property
    def kept(self) -> int:
        """Kept weights, in blocks and residual."""
        return self.block_area - self.fill_in + self.residual_count

    @property
    def density(self) -> float:
        """Kept weights as a share of all weights."""
        return self.kept / self.dense_cost

    @property
    def dense_cost(self) -> int:
        """The cost of the dense weight in MAC units: O * K."""
        return self.shape[0] * self.shape[1]

    def cost(self, target: Target | None = None) -> float:
        """Return the cost in MAC units: padded block area and residual weights at the target's prices."""
        target = target or Target()
        area = sum(target.padded(block.rows.size) * block.columns.size for block in self.blocks)
        return area * target.block_cost + self.residual_count * target.residual_cost

    def to_mask(self) -> torch.Tensor:
        """Return the stored weights, blocks (with their fill-in) and residual, as a bool tensor [O, K]."""
        return torch.from_numpy(self._stored())

    def covers(self, mask: Any) -> bool:
        """Say whether every kept weight of ``mask`` is in a block or in the residual.

        Raises:
            FxsparseError: the mask cannot be read, or it has another shape.
        """
        matrix = as_mask_matrix(mask)
        if matrix.shape != self.shape:
            raise FxsparseError(
                f"Mask is {list(matrix.shape)} as a weight matrix; the regrouping is {list(self.shape)}. "
                "Give the mask of the same weight."
            )
        return not (matrix & ~self._stored()).any()

    def validate(self) -> None:
        """Check every promise of the class.

        Raises:
            FxsparseError: the first promise that does not hold, with the block's number.
        """
        rows, columns = as_matrix_shape(self.shape)
        as_groups(self.groups, rows)
        owner = np.full(rows, -1)
        for number, block in enumerate(self.blocks):
            _check_ascending(block.rows, rows, f"rows of block {number}")
            _check_ascending(block.columns, columns, f"columns of block {number}")
            conv_groups = block.rows // (rows // self.groups)
            if conv_groups[0] != conv_groups[-1]:
                raise FxsparseError(f"The rows of block {number} are in more than one convolution group.")
            taken = block.rows[owner[block.rows] >= 0]
            if taken.size:
                raise FxsparseError(f"Row {taken[0]} is in block {owner[taken[0]]} and in block {number}.")
            owner[block.rows] = number
        if self.residual_rows.shape != self.residual_columns.shape or self.residual_rows.ndim != 1:
            raise FxsparseError("The residual has not one column a row index.")
        if self.residual_count:
            for values, limit, what in (
                (self.residual_rows, rows, "rows"),
                (self.residual_columns, columns, "columns"),
            ):
                if values.min() < 0 or values.max() >= limit:
                    raise FxsparseError(f"The residual {what} leave the range 0 to {limit - 1}.")
            if (np.diff(self.residual_rows * columns + self.residual_columns) <= 0).any():
                raise FxsparseError("The residual weights are not in row-major order, each once.")
            in_blocks = np.zeros(self.shape, dtype=bool)
            for block in self.blocks:
                in_blocks[np.ix_(block.rows, block.columns)] = True
            if in_blocks[self.residual_rows, self.residual_columns].any():
                raise FxsparseError("A residual weight lies in a block.")
        if not 0 <= self.fill_in <= self.block_area:
            raise FxsparseError(f"The fill-in is {self.fill_in}, the block area {self.block_area}.")

    def _stored(self) -> BoolArray:
        stored = np.zeros(self.shape, dtype=bool)
        for block in self.blocks:
            stored[np.ix_(block.rows, block.columns)] = True
        stored[self.residual_rows, self.residual_columns] = True
        return stored

    def __repr__(self) -> str:
        """Show the sizes."""
        return (
            f"Regrouping({self.shape[0]} x {self.shape[1]}, groups={self.groups}, {self.kept} kept: "
            f"{len(self.blocks)} blocks of area {self.block_area} with {self.fill_in} filled in, "
            f"{self.residual_count} residual)"
        )

    def __eq__(self, other: object) -> bool:
        """Compare all fields."""
        if not isinstance(other, Regrouping):
            return NotImplemented
        return (
            (self.shape, self.groups, self.fill_in) == (other.shape, other.groups, other.fill_in)
            and self.blocks == other.blocks
            and np.array_equal(self.residual_rows, other.residual_rows)
            and np.array_equal(self.residual_columns, other.residual_columns)
        )

    def __hash__(self) -> int:
        """Hash all fields."""
        residual = (self.residual_rows.tobytes(), self.residual_columns.tobytes())
        return hash((self.shape, self.groups, self.fill_in, self.blocks, residual))


def _indices(values: Any, what: str, number: int, limit: int, plural: str) -> IntArray:
    array = np.asarray(values.detach().cpu() if isinstance(values, torch.Tensor) else values)
    if array.size == 0:
        return np.zeros(0, dtype=np.int64)
    if array.ndim != 1:
        raise FxsparseError(f"Block {number} has {plural} of shape {array.shape}. Give a flat list of {what} indices.")
    if array.dtype.kind not in "iu":
        raise FxsparseError(f"Block {number} has {plural} of dtype {array.dtype}. Give integer {what} indices.")
    outside = array[(array < 0) | (array >= limit)]
    if outside.size:
        raise FxsparseError(f"Block {number} has {what} {outside[0]}; the weight matrix has {plural} 0 to {limit - 1}.")
    indices = np.sort(array.astype(np.int64))
    twice = indices[1:][np.diff(indices) == 0]
    if twice.size:
        raise FxsparseError(f"Block {number} has {what} {twice[0]} twice. Give each {what} once.")
    return indices


def _check_ascending(indices: IntArray, limit: int, what: str) -> None:
    if indices.ndim != 1 or indices.size == 0:
        raise FxsparseError(f"The {what} are not a list of at least one index.")
    if (np.diff(indices) <= 0).any():
        raise FxsparseError(f"The {what} are not ascending, each once.")
    if indices[0] < 0 or indices[-1] >= limit:
        raise FxsparseError(f"The {what} leave the range 0 to {limit - 1}.")
