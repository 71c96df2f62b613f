"""The operators in plain torch: exact on every device, fast on none.

They are the specification that the compiled kernels are tested against, and the fallback where there is no kernel.
`docs/architecture.md` describes the packed form.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

LANES = 16

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
}


def conv2d(
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
    """Compute `activation(conv2d(input, unpack(values, ...), bias) + add)`; see `docs/architecture.md`."""
    weight = unpack(values, columns, panels, rows, weight_shape)
    accumulate = torch.float32 if input.dtype in (torch.bfloat16, torch.float16) else input.dtype
    padded = pad(input, padding, padding_mode).to(accumulate)
    wide_bias = None if bias is None else bias.to(accumulate)
    out = F.conv2d(padded, weight.to(accumulate), wide_bias, stride, 0, dilation, groups)
    if add is not None:
        out = out + add
    return ACTIVATIONS[activation](out).to(input.dtype).contiguous()


def pad(input: Tensor, padding: list[int], mode: str) -> Tensor:
    """Pad the last two dimensions by (top, bottom, left, right), as `nn.Conv2d` does in `mode`."""
    if not any(padding):
        return input
    top, bottom, left, right = padding
    if mode == "zeros":
        return F.pad(input, (left, right, top, bottom))
    y = padding_index(input.shape[-2], top, bottom, mode, input.device)
    x = padding_index(input.shape[-1], left, right, mode, input.device)
    return input.index_select(-2, y).index_select(-1, x)


def padding_index(size: int, before: int, after: int, mode: str, device: torch.device) -> Tensor:
    """Return which element of a row of `size` each element of the padded row shows (not for mode zeros)."""
    index = torch.arange(-before, size + after, device=device)
    if mode == "reflect":
        return size - 1 - (size - 1 - index.abs()).abs()
    if mode == "replicate":
        return index.clamp(0, size - 1)
    return index % size


def unpack(values: Tensor, columns: Tensor, panels: Tensor, rows: Tensor, weight_shape: list[int]) -> Tensor:
    """Return the dense weight, of shape `weight_shape`."""
    target, source = packed_positions(columns, panels, rows, weight_shape)
    flat = values.new_zeros(_numel(weight_shape))
    return flat.index_put((target,), values[source]).reshape(weight_shape)


def repack(weight: Tensor, columns: Tensor, panels: Tensor, rows: Tensor, values: int) -> Tensor:
    """Return the packed values ([values]) of a dense weight; padding gets 0."""
    target, source = packed_positions(columns, panels, rows, list(weight.shape))
    return weight.new_zeros(values).index_put((source,), weight.reshape(-1)[target])


def packed_positions(columns: Tensor, panels: Tensor, rows: Tensor, weight_shape: list[int]) -> tuple[Tensor, Tensor]:
    """Return (index into the flat weight, index into the values) of every packed weight, padding left out."""
    width = _numel(weight_shape[1:])
    device = columns.device
    panel, step = _expand(panels[:, 1])
    lane = torch.arange(LANES, device=device)
    channel = rows[:, 0].reshape(-1, LANES)[panel]
    block_target = channel * width + columns[panels[panel, 0] + step].long()[:, None]
    block_source = (panels[panel, 2] + step * LANES)[:, None] + lane
    real = channel >= 0
    row, step = _expand(rows[:, 2])
    residual_target = rows[row, 0] * width + columns[rows[row, 1] + step].long()
    residual_source = rows[row, 3] + step
    return (
        torch.cat([block_target[real], residual_target]),
        torch.cat([block_source[real], residual_source]),
    )


def _expand(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Number the elements of consecutive runs: ([0, 0, 1, ...], [0, 1, 0, ...]) for counts [2, 1, ...]."""
    run = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    start = torch.cumsum(counts, 0) - counts
    return run, torch.arange(len(run), device=counts.device) - start[run]


def _numel(shape: list[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
