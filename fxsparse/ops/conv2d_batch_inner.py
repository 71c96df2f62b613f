"""Fake and autograd of `conv2d_batch_inner`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxsparse.errors import FxsparseError
from fxsparse.ops.batch_inner import output_shape, strides


def _fake(
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
) -> Tensor:
    torch._check(
        input.dim() == 4,
        lambda: f"fxsparse::conv2d_batch_inner: the input has {input.dim()} dimensions (supported: 4)",
    )
    torch._check(
        input.shape[1] == weight_shape[1] * groups,
        lambda: (
            f"fxsparse::conv2d_batch_inner: the input has {input.shape[1]} channels; "
            f"the weight {tuple(weight_shape)} with groups={groups} needs {weight_shape[1] * groups}"
        ),
    )
    torch._check(
        input.dtype == tile_values.dtype,
        lambda: f"fxsparse::conv2d_batch_inner: the input is {input.dtype}, the tiled values are {tile_values.dtype}",
    )
    shape = output_shape(input, weight_shape, stride, padding, dilation)
    return input.new_empty_strided(shape, strides(shape))


torch.library.register_fake("fxsparse::conv2d_batch_inner", _fake)


def _no_backward(ctx: Any, grad: Tensor) -> None:
    raise FxsparseError(
        "`fxsparse::conv2d_batch_inner` has no backward. Train on `fxsparse::conv2d`, or in mode 'training'."
    )


torch.library.register_autograd("fxsparse::conv2d_batch_inner", _no_backward)
