"""`fxsparse::validate` in Python: the check of packed tables that come from outside, where it is not compiled.

`cpu/packed.cpp` has the compiled one; both refuse the same tables.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fxsparse.ops.reference import LANES

_LARGEST_INDEX = 2**31 - 1
_Columns = npt.NDArray[np.int32]


def validate(columns: Tensor, panels: Tensor, rows: Tensor, values: int, weight_shape: list[int], groups: int) -> None:
    """Refuse tables that would make a kernel read or write out of bounds; see `docs/architecture.md`.

    Raises:
        RuntimeError: the first thing that is wrong.
    """
    shape = tuple(weight_shape)
    if len(shape) != 4 or min(shape) < 1 or math.prod(shape[1:]) > _LARGEST_INDEX:
        raise RuntimeError(f"'weight_shape' is {shape}, expected 4 sizes of at least 1, and rows that int32 can index")
    for name, table, dtype, fields in (
        ("columns", columns, torch.int32, ()),
        ("panels", panels, torch.int64, (4,)),
        ("rows", rows, torch.int64, (4,)),
    ):
        if table.dtype != dtype or table.dim() != 1 + len(fields) or tuple(table.shape[1:]) != fields:
            raise RuntimeError(f"'{name}' is {table.dtype} {tuple(table.shape)}, expected {dtype} [., {fields}]")
    if len(rows) != LANES * len(panels):
        raise RuntimeError(f"'rows' has {len(rows)} lanes, expected {LANES} for each of the {len(panels)} panels")
    if groups < 1 or shape[0] % groups:
        raise RuntimeError(f"'groups' is {groups}, expected a divisor of the {shape[0]} output channels")
    if values < 0:
        raise RuntimeError(f"'values' is {values}, expected the number of packed values")
    wrong = _TableCheck(columns, values, shape, groups).run(panels.tolist(), rows.tolist())
    if wrong:
        raise RuntimeError(f"The packed weight is damaged: {wrong}")


class _TableCheck:
    """Checks tables line by line, in Python's integers, which do not overflow."""

    def __init__(self, columns: Tensor, values: int, weight_shape: tuple[int, ...], groups: int) -> None:
        self._columns = columns.cpu().numpy()
        self._values = values
        self._channels = weight_shape[1]
        self._width = math.prod(weight_shape[1:])
        self._groups = groups
        self._group_rows = weight_shape[0] // groups
        self._seen: set[int] = set()

    def run(self, panels: list[list[int]], rows: list[list[int]]) -> str:
        """Return what is wrong, or ""."""
        for p, panel in enumerate(panels):
            wrong = self._panel(p, rows[p * LANES : (p + 1) * LANES], *panel)
            if wrong:
                return wrong
        missing = self._group_rows * self._groups - len(self._seen)
        return f"{missing} output channels are missing from 'rows'" if missing else ""

    def _panel(self, p: int, rows: list[list[int]], first: int, count: int, value: int, channel: int) -> str:
        if not _in_range(first, count, len(self._columns)):
            return f"Panel {p} has columns [{first}, +{count}), but 'columns' has {len(self._columns)} entries"
        if not _in_range(value, count * LANES, self._values):
            return f"Panel {p} has {count} columns of values from {value} on, but 'values' has {self._values} entries"
        block = self._columns[first : first + count]
        if not self._ascending(block):
            return f"The columns of panel {p} are not ascending indices in [0, {self._width})"
        if channel < 0 or channel % self._channels or channel // self._channels >= self._groups:
            limit = self._channels * self._groups
            return f"Panel {p} has first input channel {channel}, expected a multiple of {self._channels} below {limit}"
        wrong = (self._row(p * LANES + i, channel // self._channels, block, *row) for i, row in enumerate(rows))
        return next((text for text in wrong if text), "")

    def _row(self, at: int, group: int, block: _Columns, channel: int, first: int, count: int, value: int) -> str:
        if channel < 0:
            padding = (channel, first, count, value) == (-1, 0, 0, 0)
            return "" if padding else f"Lane {at} has output channel {channel}, expected a padding lane (-1, 0, 0, 0)"
        if channel // self._group_rows != group:
            return f"Lane {at} has output channel {channel}, expected one of group {group}"
        if channel in self._seen:
            return f"Output channel {channel} is in 'rows' twice"
        self._seen.add(channel)
        if not _in_range(first, count, len(self._columns)):
            return f"Lane {at} has residual columns [{first}, +{count}), but 'columns' has {len(self._columns)} entries"
        if not _in_range(value, count, self._values):
            return f"Lane {at} has residual values [{value}, +{count}), but 'values' has {self._values} entries"
        own = self._columns[first : first + count]
        if not self._ascending(own):
            return f"The residual columns of lane {at} are not ascending indices in [0, {self._width})"
        if count and np.isin(own, block).any():
            return f"Lane {at} has a residual weight in a column of its block"
        return ""

    def _ascending(self, columns: _Columns) -> bool:
        if not len(columns):
            return True
        return bool(columns[0] >= 0 and columns[-1] < self._width and (columns[1:] > columns[:-1]).all())


def _in_range(first: int, count: int, size: int) -> bool:
    return first >= 0 and count >= 0 and first + count <= size
