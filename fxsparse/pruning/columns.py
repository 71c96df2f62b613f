"""Calls of convolutions, wherever a model makes them, and their inputs as columns of the weight matrix."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fxsparse import sites

_CHUNK = 2**24  # values that are unfolded at a time
_RESULTS = 2**20  # of a convolution at a time


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of `torch.conv2d`; the fields are its arguments."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None = None
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: int = 1

    def on(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Convolve another input with other weights in the same way."""
        return torch.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def room(self, x: Tensor) -> Tensor:
        """Return a tensor for the output on images [N, C, H, W], its values not set."""
        nothing = self.on(x[:0], self.weight, self.bias)
        return nothing.new_empty(len(x), *nothing.shape[1:])

    def into(self, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        """Write the output on images: on a CPU a few at a time: memory for all at once would cost more.

        Measured: of 128 results of 64 channels and 56x56 pixels half of the time goes to page faults.
        """
        few = len(x) if x.device.type != "cpu" else _RESULTS * len(out) // max(out.numel(), 1)
        for images, results in zip(x.split(max(few, 1)), out.split(max(few, 1)), strict=True):
            results.copy_(self.on(images, weight, bias))


class Convolutions(TorchFunctionMode):
    """While it is entered, calls of `torch.conv2d` on some weights go to a function instead.

    So layers are met whatever module, or function, makes the call, and however that pads its input before.
    """

    def __init__(self, weights: Mapping[str, Tensor], handle: Callable[[str, Call], Tensor]) -> None:
        """Take the weights by name, and the function: it gets the name and the call."""
        super().__init__()
        self._names = {id(weight): name for name, weight in weights.items()}
        self._handle = handle

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let everything through but convolutions of these weights."""
        if func is torch.conv2d:
            call = Call(*args, **(kwargs or {}))
            name = self._names.get(id(call.weight))
            if name is not None:
                return self._handle(name, call)
        return func(*args, **(kwargs or {}))


def sample(batch: int, height: int, width: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw output positions: int64 [P, 3] of (image, row, column), in no order, each once.

    Args:
        batch: number of images.
        height, width: of the output.
        count: positions wanted; P is this or all that there are, or a few less where there are millions.
        generator: of the draw.
    """
    total = batch * height * width
    if total <= count:
        chosen = torch.arange(total)
    elif total <= 2**22:
        chosen = torch.randperm(total, generator=generator)[:count]
    else:
        chosen = torch.randint(total, (count,), generator=generator).unique()
    plane = height * width
    return torch.stack([chosen // plane, chosen % plane // width, chosen % width], 1)


def padded(call: Call, x: Tensor) -> Tensor:
    """Pad an input [N, C, H, W] with the zeros that the call pads it with."""
    kernel = (call.weight.shape[2], call.weight.shape[3])
    padding = call.padding if isinstance(call.padding, str) else sites.pair(call.padding)
    top, bottom, left, right = sites.explicit_padding(padding, kernel, sites.pair(call.dilation))
    return F.pad(x, (left, right, top, bottom)) if top + bottom + left + right else x


def unfolded(call: Call, x: Tensor, positions: Tensor) -> Tensor:
    """Return the columns that a convolution multiplies at some positions.

    Args:
        call: of the convolution.
        x: its input after `padded`.
        positions: int64 [P, 3].

    Returns:
        [groups, P, K]: per convolution group, the inputs in the order of the weight matrix's columns.
    """
    kh, kw = call.weight.shape[2:]
    (sh, sw), (dh, dw) = sites.pair(call.stride), sites.pair(call.dilation)
    image, row, column = positions.to(x.device).unbind(1)
    taps_y = row[:, None, None] * sh + torch.arange(kh, device=x.device)[:, None] * dh
    taps_x = column[:, None, None] * sw + torch.arange(kw, device=x.device)[None] * dw
    values = x.permute(0, 2, 3, 1)[image[:, None, None], taps_y, taps_x]  # [P, kh, kw, C]
    split = values.permute(0, 3, 1, 2).reshape(len(positions), call.groups, -1)
    return split.transpose(0, 1)


def chunks(positions: Tensor, columns: int) -> tuple[Tensor, ...]:
    """Split positions so that one part unfolds to some megabytes."""
    return torch.split(positions, max(64, _CHUNK // max(columns, 1)))
