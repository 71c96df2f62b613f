"""What the CUDA kernels do with tiles, read by read: flat memory in, flat memory out, in float64."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from torch import Tensor

from fxsparse.ops import batch_inner
from fxsparse.ops.tiles import COLUMN_STEP, PADDING_COLUMN, TiledWeight

UNIT = 8  # lanes of the batch that a kernel reads at once
LANES, WARPS, CHUNK = torch.arange(32), 8, 16  # of plane_conv_kernel.h


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
    shape = batch_inner.output_shape(input.shape, list(tiled.weight_shape), list(stride), list(padding), list(dilation))
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


def run_planes(
    tiled: TiledWeight,
    input: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    tile: tuple[int, int, int],
    pairs: bool,
) -> Tensor:
    """Compute the convolution without bias as `plane_conv_kernel` does, warp by warp, from contiguous images.

    Args:
        tile: rows, positions of a warp, and warps that share columns.
        pairs: rows of odd width are computed one position further.

    Returns:
        float64 [N, O, Ho, Wo]. An output that no warp wrote is NaN.
    """
    rows, warp_positions, split = tile
    shape = batch_inner.output_shape(input.shape, list(tiled.weight_shape), list(stride), list(padding), list(dilation))
    batch, out_channels, out_height, out_width = shape
    pitch = -(-out_width // 2) * 2 if pairs else out_width
    out = torch.full((batch, out_channels, out_height, pitch), math.nan, dtype=torch.float64)
    count = WARPS // split * warp_positions  # positions of a CTA
    for t, (first_column, columns, first_value, _) in enumerate(tiled.tiles.tolist()):
        words, values = tiled.columns[first_column:].long(), tiled.values[first_value:].double()
        for first_row in range(0, tiled.tile_rows, rows):
            channels = tiled.rows[t * tiled.tile_rows + first_row :][:rows]
            for start in range(0, batch * out_height * pitch, count):
                sums = torch.zeros(split, rows, count, dtype=torch.float64)
                for unit, member in itertools.product(range(count // 8), range(split)):
                    position = start + unit * 8 + LANES // 4
                    part = sums[member, :, unit * 8 : unit * 8 + 8]
                    for chunk in range(member, -(-columns // CHUNK), split):
                        own = words[chunk * CHUNK + LANES[:, None] % 4 * 4 + torch.arange(4)]
                        gathered = _gather(input, own, position, (out_height, pitch), stride, padding, dilation)
                        if tiled.values.dtype == torch.float32:
                            _multiply_floats(part, values, chunk, gathered, tiled.tile_rows, first_row)
                        else:
                            _multiply_fragments(part, values, chunk, gathered, tiled.tile_rows, first_row)
                for row in np.flatnonzero(channels >= 0):
                    position = torch.arange(start, min(start + count, batch * out_height * pitch))
                    image, y, x = _of_position(position, out_height, pitch)
                    assert bool(out[image, channels[row], y, x].isnan().all()), "an output is written twice"
                    out[image, channels[row], y, x] = sums.sum(0)[row, : len(position)]
    return out[..., :out_width]


def _of_position(position: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    return position // (height * width), position // width % height, position % width


def _gather(
    input: Tensor,
    words: Tensor,
    position: Tensor,
    out_sizes: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
) -> Tensor:
    """Return what each lane loads for its four columns: [32, 4]."""
    _, in_channels, height, width = input.shape
    image, out_y, out_x = _of_position(position, *out_sizes)
    r, s, c = words >> 27, words >> 23 & 15, words & (1 << 23) - 1
    y = (out_y * stride[0] - padding[0])[:, None] + r * dilation[0]
    x = (out_x * stride[1] - padding[2])[:, None] + s * dilation[1]
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width) & (words != PADDING_COLUMN)
    inside &= (image < len(input))[:, None]
    address = ((image[:, None] * in_channels + c) * height + y) * width + x
    return torch.where(inside, input.flatten()[torch.where(inside, address, 0)].double(), 0.0)


def _multiply_fragments(
    part: Tensor, values: Tensor, chunk: int, gathered: Tensor, tile_rows: int, first_row: int
) -> None:
    """Do what mma.sync.m16n8k16 does with the registers of a warp (PTX ISA, 9.7.14.5.8)."""
    g, t = LANES // 4, LANES % 4
    b = torch.zeros(16, 8, dtype=torch.float64)
    for j in range(4):
        b[t * 2 + j // 2 * 8 + j % 2, g] = gathered[:, j]
    for first in range(0, len(part), 16):
        a = torch.zeros(16, 16, dtype=torch.float64)
        for half, j in itertools.product((0, 8), range(4)):
            vector = ((chunk * 2 + t // 2) * tile_rows + g) * 2 + t % 2 + (first_row + first + half) * 2  # of 4
            a[g + half, t * 2 + j // 2 * 8 + j % 2] = values[vector * 4 + j]
        part[first : first + 16] += a @ b


def _multiply_floats(
    part: Tensor, values: Tensor, chunk: int, gathered: Tensor, tile_rows: int, first_row: int
) -> None:
    own = len(part) // 4
    for lane, owner, k in itertools.product(range(32), range(4), range(4)):
        value = gathered[lane // 4 * 4 + owner, k]  # from that lane's register
        first = (chunk * CHUNK + owner * 4 + k) * tile_rows + first_row + lane % 4 * own
        part[lane % 4 * own : lane % 4 * own + own, lane // 4] += values[first : first + own] * value
