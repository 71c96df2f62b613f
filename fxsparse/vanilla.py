"""The vanilla path of a conv site: `torch.conv2d`, with one `F.pad` before it where that cannot pad so itself."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def split_padding(
    padding: tuple[int, int, int, int], padding_mode: str
) -> tuple[tuple[tuple[int, ...], str] | None, tuple[int, int]]:
    """Return the padding that `torch.conv2d` cannot do itself, as arguments of `F.pad`, and the one that it can.

    Args:
        padding: (top, bottom, left, right).
        padding_mode: "zeros", "reflect", "replicate" or "circular".
    """
    top, bottom, left, right = padding
    if not any(padding) or (padding_mode == "zeros" and (top, left) == (bottom, right)):
        return None, (top, left)
    mode = "constant" if padding_mode == "zeros" else padding_mode
    return ((left, right, top, bottom), mode), (0, 0)


def conv2d(
    source: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    groups: int,
    padding_mode: str,
) -> Tensor:
    """Convolve [N, C, H, W] or [C, H, W] exactly as the nodes of a vanilla site do."""
    outer, inner = split_padding(padding, padding_mode)
    if outer:
        source = F.pad(source, *outer)
    return torch.conv2d(source, weight, bias, stride, inner, dilation, groups)
