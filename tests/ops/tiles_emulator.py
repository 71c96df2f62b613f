"""What the CUDA kernels do with tiles, read by read: flat memory in, flat memory out, in float64."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from fxsparse.ops import batch_inner
from fxsparse.ops.tiles import COLUMN_STEP, PADDING_COLUMN, TiledWeight

UNIT = 8  # lanes of the batch that a kernel reads at once


def memory_of(tensor: Tensor) -> Tensor:
    """Return the memory of a batch_inner tensor as [H · W · C · Np / 8 units, 8 lanes]; NaN behind the batch."""
    batch, channels, height, width = tensor.shape
    whole = torch.full((height, width, channels, batch_inner.padded_batch(batch)), math.nan, dtype=torch.float64)
    whole[..., :batch] = tensor.permute(2, 3, 1, 0)
    return whole.reshape(-1, UNIT)


def run(
    tiled: TiledWeight,
    input: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    positions: int = 64,
) -> Tensor:
    """Compute the convolution without bias as a kernel with tiles of so many positions does.

    Returns:
        float64 [N, O, Ho, Wo]. An output that no tile wrote is NaN.
    """
    batch, channels, height, width = input.shape
    units = batch_inner.padded_batch(batch) // UNIT
    shape = batch_inner.output_shape(input, list(tiled.weight_shape), list(stride), list(padding), list(dilation))
    out_channels, out_height, out_width = shape[1:]
    memory = memory_of(input)
    out = torch.full((out_height * out_width * out_channels * units, UNIT), math.nan, dtype=torch.float64)
    unit = torch.arange(out_height * out_width * units)  # eight positions: one pixel, eight lanes
    pixel, lane_unit = unit // units, unit % units
    y = pixel // out_width * stride[0] - padding[0]
    x = pixel % out_width * stride[1] - padding[2]
    base = (y * width + x) * channels * units + lane_unit
    stored = (pixel * out_channels) * units + lane_unit
    for t, (first_column, count, first_value, _) in enumerate(tiled.tiles.tolist()):
        columns = tiled.columns[first_column : first_column + max(-(-count // COLUMN_STEP), 1) * COLUMN_STEP].long()
        values = tiled.values[first_value : first_value + len(columns) * tiled.tile_rows].double()
        if tiled.values.dtype in (torch.bfloat16, torch.float16):
            values = values.reshape(-1, tiled.tile_rows, 8).permute(0, 2, 1)
        matrix = values.reshape(len(columns), tiled.tile_rows)
        assert bool((columns[count:] == PADDING_COLUMN).all()) and not matrix[count:].any()
        assert bool((columns[:count].diff() > 0).all())
        r, s, c = columns >> 27, columns >> 23 & 15, columns & (1 << 23) - 1
        rows = tiled.rows[t * tiled.tile_rows : (t + 1) * tiled.tile_rows].long()
        for start in range(0, len(unit), positions // UNIT):
            part = slice(start, start + positions // UNIT)
            at_y, at_x = y[part] + r[:, None] * dilation[0], x[part] + s[:, None] * dilation[1]
            inside = (at_y >= 0) & (at_y < height) & (at_x >= 0) & (at_x < width) & (columns != PADDING_COLUMN)[:, None]
            offset = ((r * dilation[0] * width + s * dilation[1]) * channels + c) * units
            address = torch.where(inside, base[part] + offset[:, None], 0)
            gathered = torch.where(inside[..., None], memory[address], 0.0)  # [columns, units, lanes]
            # Lanes never mix, so NaN behind the batch stays there.
            sums = torch.einsum("km,kul->mul", matrix, gathered)
            for row in np.flatnonzero(rows >= 0):
                target = stored[part] + rows[row] * units
                assert bool(out[target].isnan().all()), "an output is written twice"
                out[target] = sums[row]
    return out.reshape(out_height, out_width, out_channels, -1)[..., :batch].permute(3, 2, 0, 1)
