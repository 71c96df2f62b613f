"""Fake, autograd and autocast of `conv2d`, `unpack` and `repack`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxsparse.ops import reference
from fxsparse.ops.autocast import register_autocast

_aten = torch.ops.aten


@torch.library.register_fake("fxsparse::conv2d")
def _conv2d_fake(
    input: Tensor,
    values: Tensor,
    columns: Tensor,
    panels: Tensor,
    rows: Tensor,
    bias: Tensor | None,
    weight_shape: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    padding_mode: str = "zeros",
    activation: str = "none",
    add: Tensor | None = None,
) -> Tensor:
    torch._check(
        input.dim() in (3, 4),
        lambda: f"fxsparse::conv2d: the input has {input.dim()} dimensions (supported: 3 or 4)",
    )
    torch._check(
        input.shape[-3] == weight_shape[1] * groups,
        lambda: (
            f"fxsparse::conv2d: the input has {input.shape[-3]} channels; "
            f"the weight {tuple(weight_shape)} with groups={groups} needs {weight_shape[1] * groups}"
        ),
    )
    torch._check(
        input.dtype == values.dtype,
        lambda: f"fxsparse::conv2d: the input is {input.dtype}, the packed values are {values.dtype}",
    )
    top, bottom, left, right = padding
    sizes = []
    for axis, pads in ((0, top + bottom), (1, left + right)):
        extent = dilation[axis] * (weight_shape[2 + axis] - 1) + 1
        sizes.append((input.shape[-2 + axis] + pads - extent) // stride[axis] + 1)
    return input.new_empty((*input.shape[:-3], weight_shape[0], *sizes))


@torch.library.register_fake("fxsparse::unpack")
def _unpack_fake(values: Tensor, columns: Tensor, panels: Tensor, rows: Tensor, weight_shape: list[int]) -> Tensor:
    return values.new_empty(weight_shape)


@torch.library.register_fake("fxsparse::repack")
def _repack_fake(weight: Tensor, columns: Tensor, panels: Tensor, rows: Tensor, values: int) -> Tensor:
    return weight.new_empty(values)


def _save_conv2d(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, values, columns, panels, rows, bias, *options, add = inputs
    ctx.save_for_backward(input, values, columns, panels, rows, bias, add)
    ctx.options = options


def _conv2d_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, values, columns, panels, rows, bias, add = ctx.saved_tensors
    weight_shape, stride, padding, dilation, groups, mode, activation = ctx.options
    if activation != "none":
        # Saving the value before the activation would cost its memory in every forward; training through a fused
        # activation is rare, so it is computed again here.
        before = torch.ops.fxsparse.conv2d(input, values, columns, panels, rows, bias, *ctx.options[:-1], "none", add)
        grad = _activation_backward(grad, before, activation)
    batched = input.dim() == 4
    padded = reference.pad(input if batched else input.unsqueeze(0), padding, mode)
    weight = torch.ops.fxsparse.unpack(values, columns, panels, rows, weight_shape)
    needs_input, needs_values, needs_bias = (ctx.needs_input_grad[i] for i in (0, 1, 5))
    grad_padded, grad_weight, grad_bias = _aten.convolution_backward(
        grad if batched else grad.unsqueeze(0),
        padded,
        weight,
        [weight_shape[0]],
        stride,
        [0, 0],
        dilation,
        False,
        [0, 0],
        groups,
        [needs_input, needs_values, needs_bias],
    )
    grad_input = None
    if needs_input:
        grad_input = _pad_backward(grad_padded, input, padding, mode)
    grad_values = None
    if needs_values:
        grad_values = torch.ops.fxsparse.repack(grad_weight, columns, panels, rows, values.numel())
    grad_add = grad if add is not None and ctx.needs_input_grad[13] else None
    return (grad_input, grad_values, None, None, None, grad_bias, *[None] * 7, grad_add)


def _activation_backward(grad: Tensor, before: Tensor, activation: str) -> Tensor:
    result: Tensor
    if activation == "relu":
        result = _aten.threshold_backward(grad, before, 0)
    elif activation == "relu6":
        result = _aten.hardtanh_backward(grad, before, 0, 6)
    elif activation == "silu":
        result = _aten.silu_backward(grad, before)
    else:
        result = _aten.hardswish_backward(grad, before)
    return result


def _pad_backward(grad: Tensor, input: Tensor, padding: list[int], mode: str) -> Tensor:
    """Return the gradient of the un-padded input: crop (zeros) or add up what each element was shown as."""
    if any(padding):
        top, _, left, _ = padding
        height, width = input.shape[-2:]
        if mode == "zeros":
            grad = grad.narrow(-2, top, height).narrow(-1, left, width)
        else:
            y = reference.padding_index(height, top, padding[1], mode, grad.device)
            x = reference.padding_index(width, left, padding[3], mode, grad.device)
            shape = (*grad.shape[:-2], height, grad.shape[-1])
            grad = grad.new_zeros(shape).index_add(-2, y, grad)
            grad = grad.new_zeros((*shape[:-1], width)).index_add(-1, x, grad)
    return grad if input.dim() == 4 else grad.squeeze(0)


def _save_unpack(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, columns, panels, rows, _ = inputs
    ctx.save_for_backward(columns, panels, rows)
    ctx.count = values.numel()


def _unpack_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.fxsparse.repack(grad, *ctx.saved_tensors, ctx.count), None, None, None, None


def _save_repack(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, columns, panels, rows, _ = inputs
    ctx.save_for_backward(columns, panels, rows)
    ctx.shape = list(weight.shape)


def _repack_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.fxsparse.unpack(grad, *ctx.saved_tensors, ctx.shape), None, None, None, None


torch.library.register_autograd("fxsparse::conv2d", _conv2d_backward, setup_context=_save_conv2d)
torch.library.register_autograd("fxsparse::unpack", _unpack_backward, setup_context=_save_unpack)
torch.library.register_autograd("fxsparse::repack", _repack_backward, setup_context=_save_repack)
register_autocast("conv2d")
