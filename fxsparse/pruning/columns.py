"""The inputs of a convolution as columns of its weight matrix, at some output positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxsparse import sites

_CHUNK = 2**24  # values that are unfolded at a time


def sample(conv: nn.Conv2d, batch: int, height: int, width: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw output positions: int64 [P, 3] of (image, row, column), in no order, each once where there are few.

    Args:
        conv: the convolution.
        batch: number of images.
        height, width: of its output.
        count: positions wanted; P is this or all that there are.
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


def padded(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Pad an input [N, C, H, W] as the convolution does."""
    kernel = (conv.kernel_size[0], conv.kernel_size[1])
    dilation = (conv.dilation[0], conv.dilation[1])
    top, bottom, left, right = sites.explicit_padding(conv.padding, kernel, dilation)
    if not top + bottom + left + right:
        return x
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return F.pad(x, (left, right, top, bottom), mode=mode)


def unfolded(conv: nn.Conv2d, x: Tensor, positions: Tensor) -> Tensor:
    """Return the columns that the convolution multiplies at some positions.

    Args:
        conv: the convolution.
        x: its input after `padded`.
        positions: int64 [P, 3].

    Returns:
        [groups, P, K]: per convolution group, the inputs in the order of the weight matrix's columns.
    """
    (kh, kw), (sh, sw), (dh, dw) = conv.kernel_size, conv.stride, conv.dilation
    image, row, column = positions.to(x.device).unbind(1)
    taps_y = row[:, None, None] * sh + torch.arange(kh, device=x.device)[:, None] * dh
    taps_x = column[:, None, None] * sw + torch.arange(kw, device=x.device)[None] * dw
    values = x.permute(0, 2, 3, 1)[image[:, None, None], taps_y, taps_x]  # [P, kh, kw, C]
    count, groups = len(positions), conv.groups
    split = values.permute(0, 3, 1, 2).reshape(count, groups, -1)
    return split.transpose(0, 1)


def chunks(positions: Tensor, columns: int) -> tuple[Tensor, ...]:
    """Split positions so that one part unfolds to some megabytes."""
    return torch.split(positions, max(64, _CHUNK // max(columns, 1)))
