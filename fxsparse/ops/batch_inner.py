"""`conv2d_batch_inner`: a sparse convolution between images that are stored batch-innermost.

A tensor [N, C, H, W] is *batch_inner* if it lies in memory as [H][W][C][Np], Np = N rounded up to a multiple of 8,
from a 16-byte boundary on: strides (1, Np, W·C·Np, C·Np). Then every weight column of a convolution meets runs of at
least 16 bytes, whatever the columns are. What lanes N to Np - 1 hold is of no consequence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fxsparse.ops import reference

LANES = 8
# Of the tiled form (`ops/tiles.py`): what columns are padded to, and where a column's word has its row and column.
COLUMN_STEP = 64
ROW_SHIFT, TAP_SHIFT = 27, 23
_ALIGNMENT = 16


def padded_batch(batch: int) -> int:
    """Return Np."""
    return -(-batch // LANES) * LANES


def strides(shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Return the strides of a batch_inner tensor [N, C, H, W]."""
    batch, channels, _, width = shape
    lanes = padded_batch(batch)
    return 1, lanes, width * channels * lanes, channels * lanes


def empty(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a new batch_inner tensor [N, C, H, W] of the dtype and device of another."""
    batch, channels, height, width = shape
    storage = like.new_empty((height, width, channels, padded_batch(batch)))
    return storage.narrow(3, 0, batch).permute(3, 2, 0, 1)


def is_batch_inner(tensor: Tensor) -> bool:
    """Tell whether a tensor [N, C, H, W] is batch_inner, the lanes behind the batch included."""
    expected = strides(tuple(tensor.shape))
    if any(n > 1 and s != e for n, s, e in zip(tensor.shape, tensor.stride(), expected, strict=True)):
        return False
    batch, *rest = tensor.shape
    first = tensor.storage_offset()
    there = tensor.untyped_storage().nbytes() // tensor.element_size()
    aligned = tensor.data_ptr() % _ALIGNMENT == 0
    return aligned and first + math.prod(rest) * padded_batch(batch) <= there


def to_batch_inner(tensor: Tensor) -> Tensor:
    """Return the tensor [N, C, H, W] itself if it is batch_inner, else a copy that is."""
    return tensor if is_batch_inner(tensor) else empty(tensor, tuple(tensor.shape)).copy_(tensor)


def conv2d_batch_inner(
    input: Tensor,
    tile_values: Tensor,
    tile_columns: Tensor,
    tiles: Tensor,
    tile_rows: Tensor,
    bias: Tensor | None,
    weight_shape: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str = "none",
    add: Tensor | None = None,
    kernel: str = "auto",
    overlap: bool = True,
    allow_tf32: bool = False,
) -> Tensor:
    """Compute `activation(conv2d(input, weight, bias) + add)` in plain torch; the result is batch_inner.

    `kernel`, `overlap` and `allow_tf32` choose among CUDA kernels: nothing here.
    """
    tiled = (tile_values, tile_columns, tiles, tile_rows)
    geometry = (weight_shape, stride, padding, dilation, groups)
    return to_batch_inner(_computed(input, tiled, bias, geometry, activation, add))


def conv2d_planes(
    input: Tensor,
    tile_values: Tensor,
    tile_columns: Tensor,
    tiles: Tensor,
    tile_rows: Tensor,
    bias: Tensor | None,
    weight_shape: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str = "none",
    add: Tensor | None = None,
    tile: list[int] | None = None,
    overlap: bool = False,
    allow_tf32: bool = False,
) -> Tensor:
    """Compute the same between images as torch stores them: the result is channels_last if the input's channels are.

    `tile`, `overlap` and `allow_tf32` choose among CUDA kernels: nothing here.
    """
    tiled = (tile_values, tile_columns, tiles, tile_rows)
    geometry = (weight_shape, stride, padding, dilation, groups)
    result = _computed(input, tiled, bias, geometry, activation, add)
    return result.contiguous(memory_format=plane_format(input))


def plane_format(input: Tensor) -> torch.memory_format:
    """Return the memory format of what `conv2d_planes` makes of an input [N, C, H, W]."""
    return torch.contiguous_format if input.is_contiguous() or input.stride(1) != 1 else torch.channels_last


def _computed(
    input: Tensor,
    tiled: tuple[Tensor, Tensor, Tensor, Tensor],
    bias: Tensor | None,
    geometry: tuple[list[int], list[int], list[int], list[int], int],
    activation: str,
    add: Tensor | None,
) -> Tensor:
    weight_shape, stride, padding, dilation, groups = geometry
    weight = untile(*tiled, weight_shape, groups)
    accumulate = torch.float32 if input.dtype in (torch.bfloat16, torch.float16) else input.dtype
    padded = reference.pad(input, padding, "zeros").to(accumulate)
    wide_bias = None if bias is None else bias.to(accumulate)
    out = F.conv2d(padded, weight.to(accumulate), wide_bias, stride, 0, dilation, groups)
    if add is not None:
        out = out + add
    return reference.ACTIVATIONS[activation](out).to(input.dtype)


def untile(
    tile_values: Tensor, tile_columns: Tensor, tiles: Tensor, tile_rows: Tensor, weight_shape: list[int], groups: int
) -> Tensor:
    """Return the dense weight (O, C / groups, kh, kw) of a tiled one.

    No shape in here depends on what the tables hold, so that it can be traced.
    """
    out_channels, group_channels, height, width = weight_shape
    channels, device = groups * group_channels, tile_values.device
    lanes = len(tile_rows) // max(len(tiles), 1)
    first_column, count, first_value = (tiles[:, i].contiguous() for i in range(3))
    places = torch.arange(len(tile_columns), device=device)
    tile = torch.searchsorted(first_column, places, right=True) - 1  # columns lie tile after tile
    column = (places - first_column[tile])[:, None]
    lane = torch.arange(lanes, device=device)
    eights = tile_values.dtype in (torch.bfloat16, torch.float16)
    inside = (column // 8 * lanes + lane) * 8 + column % 8 if eights else column * lanes + lane
    words = tile_columns.long()[:, None]
    r, s, c = words >> ROW_SHIFT, words >> TAP_SHIFT & 15, words & (1 << TAP_SHIFT) - 1
    rows = tile_rows.long().reshape(-1, lanes)[tile]
    size = out_channels * channels * height * width
    # What is padding goes behind the weight.
    to = torch.where((column < count[tile, None]) & (rows >= 0), ((rows * channels + c) * height + r) * width + s, size)
    values = tile_values[first_value[tile, None] + inside]
    dense = tile_values.new_zeros(size + 1).scatter(0, to.flatten(), values.flatten())[:size]
    dense = dense.reshape(out_channels, channels, height, width)
    if groups == 1:
        return dense
    # A tile may have rows of several groups: it holds zeros where a row does not see a channel.
    grouped = dense.reshape(groups, out_channels // groups, groups, group_channels, height, width)
    return torch.stack([grouped[g, :, g] for g in range(groups)]).reshape(weight_shape)


def cast_tiles(tile_values: Tensor, lanes: int, dtype: torch.dtype) -> Tensor:
    """Return tiled values in another dtype: 16-bit ones lie [K / 8][lanes][8 columns], others [K][lanes]."""
    eights = (torch.bfloat16, torch.float16)
    if (tile_values.dtype in eights) == (dtype in eights):
        return tile_values.to(dtype)
    order = (-1, lanes, 8) if tile_values.dtype in eights else (-1, 8, lanes)
    return tile_values.to(dtype).reshape(order).swapaxes(1, 2).reshape(-1)


def output_shape(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int, int, int]:
    """Return (N, O, Ho, Wo)."""
    sizes = []
    for axis in (0, 1):
        reach = dilation[axis] * (weight_shape[2 + axis] - 1) + 1
        padded = input_shape[2 + axis] + padding[2 * axis] + padding[2 * axis + 1]
        sizes.append((padded - reach) // stride[axis] + 1)
    return input_shape[0], weight_shape[0], sizes[0], sizes[1]
