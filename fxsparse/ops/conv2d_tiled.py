"""Fake and autograd of `conv2d_batch_inner` and `conv2d_planes`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxsparse.errors import FxsparseError
from fxsparse.ops.batch_inner import output_shape, plane_format, strides


def _checked_shape(
    name: str,
    input: Tensor,
    tile_values: Tensor,
    weight_shape: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> tuple[int, int, int, int]:
    torch._check(
        input.dim() == 4,
        lambda: f"fxsparse::{name}: the input has {input.dim()} dimensions (supported: 4)",
    )
    torch._check(
        input.shape[1] == weight_shape[1] * groups,
        lambda: (
            f"fxsparse::{name}: the input has {input.shape[1]} channels; "
            f"the weight {tuple(weight_shape)} with groups={groups} needs {weight_shape[1] * groups}"
        ),
    )
    torch._check(
        input.dtype == tile_values.dtype,
        lambda: f"fxsparse::{name}: the input is {input.dtype}, the tiled values are {tile_values.dtype}",
    )
    return output_shape(input.shape, weight_shape, stride, padding, dilation)


def _batch_inner(
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
    geometry = (weight_shape, stride, padding, dilation, groups)
    shape = _checked_shape("conv2d_batch_inner", input, tile_values, *geometry)
    return input.new_empty_strided(shape, strides(shape))


def _planes(
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
    geometry = (weight_shape, stride, padding, dilation, groups)
    shape = _checked_shape("conv2d_planes", input, tile_values, *geometry)
    return input.new_empty(shape).contiguous(memory_format=plane_format(input))


torch.library.register_fake("fxsparse::conv2d_batch_inner", _batch_inner)
torch.library.register_fake("fxsparse::conv2d_planes", _planes)


def _no_backward(ctx: Any, grad: Tensor) -> None:
    raise FxsparseError(f"`fxsparse::{ctx.name}` has no backward. Train on `fxsparse::conv2d`, or in mode 'training'.")


def _keep_name(name: str) -> Any:
    def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.name = name

    return setup


for _name in ("conv2d_batch_inner", "conv2d_planes"):
    torch.library.register_autograd(f"fxsparse::{_name}", _no_backward, setup_context=_keep_name(_name))
