"""Packs a weight and its regrouping into the tensors that the operators read (see `docs/architecture.md`)."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from fxsparse.ops.reference import LANES
from fxsparse.regrouping import Regrouping


@dataclasses.dataclass(frozen=True)
class PackedWeight:
    """A weight in packed form.

    Attributes:
        values: float [V], on the weight's device, in its dtype.
        columns: int32 [.], panels: int64 [P, 4], rows: int64 [16 P, 4]: the tables, on the same device.
        weight_shape: (O, C / groups, kh, kw).
    """

    values: Tensor
    columns: Tensor
    panels: Tensor
    rows: Tensor
    weight_shape: tuple[int, int, int, int]

    @property
    def nbytes(self) -> int:
        """Bytes of all four tensors."""
        return sum(t.numel() * t.element_size() for t in (self.values, self.columns, self.panels, self.rows))


def pack(weight: Tensor, regrouping: Regrouping) -> PackedWeight:
    """Pack a weight.

    Args:
        weight: [O, C / groups, kh, kw], any floating dtype and device.
        regrouping: of that weight's mask; weights outside it are not packed.

    Returns:
        The packed weight; `unpack` of it equals `weight` where the regrouping keeps it and 0 elsewhere.
    """
    out_channels, in_channels = weight.shape[0], weight.shape[1]
    group_rows = out_channels // regrouping.groups
    parts = [(block.rows, block.columns, int(block.rows[0]) // group_rows) for block in regrouping.blocks]
    in_block = np.zeros(out_channels, bool)
    for block in regrouping.blocks:
        in_block[block.rows] = True
    no_columns = np.empty(0, np.int64)
    for group in range(regrouping.groups):
        loose = np.flatnonzero(~in_block[group * group_rows : (group + 1) * group_rows]) + group * group_rows
        if len(loose):
            parts.append((loose, no_columns, group))

    panels, lanes = [], []
    first_column = first_value = 0
    for part_rows, part_columns, group in parts:
        for start in range(0, len(part_rows), LANES):
            panels.append((first_column, len(part_columns), first_value, group * in_channels))
            lane = np.full(LANES, -1, np.int64)
            chunk = part_rows[start : start + LANES]
            lane[: len(chunk)] = chunk
            lanes.append(lane)
            first_value += len(part_columns) * LANES
        first_column += len(part_columns)

    rows = np.zeros((len(lanes) * LANES, 4), np.int64)
    rows[:, 0] = np.concatenate(lanes) if lanes else -1
    real = rows[:, 0] >= 0
    count = np.bincount(regrouping.residual_rows, minlength=out_channels)
    before = np.cumsum(count) - count
    channel = rows[real, 0]
    some = count[channel] > 0
    rows[real, 2] = count[channel]
    rows[real, 1] = np.where(some, first_column + before[channel], 0)
    rows[real, 3] = np.where(some, first_value + before[channel], 0)

    columns = np.concatenate([*(part[1] for part in parts), regrouping.residual_columns]).astype(np.int32)
    device = weight.device
    tables = (
        torch.from_numpy(columns).to(device),
        torch.from_numpy(np.array(panels, np.int64).reshape(-1, 4)).to(device),
        torch.from_numpy(rows).to(device),
    )
    total = first_value + regrouping.residual_count
    values = torch.ops.fxsparse.repack(weight.detach().contiguous(), *tables, total)
    o, c, kh, kw = weight.shape
    return PackedWeight(values, *tables, (o, c, kh, kw))
