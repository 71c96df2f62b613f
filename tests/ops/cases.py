"""Random convolutions with their packed weights, for the operator tests on every device."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fxsparse
from fxsparse.ops.packing import PackedWeight, pack
from fxsparse.ops.reference import ACTIVATIONS


@dataclasses.dataclass
class Case:
    """A convolution: sizes, options, mask and data."""

    batch: int | None = 2
    in_channels: int = 8
    out_channels: int = 24
    kernel: tuple[int, int] = (3, 3)
    size: tuple[int, int] = (9, 11)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    padding_mode: str = "zeros"
    activation: str = "none"
    bias: bool = True
    add: bool = False
    mask: str = "mixed"
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        """Draw the data."""
        gen = torch.Generator().manual_seed(self.seed)
        shape = (self.out_channels, self.in_channels // self.groups, *self.kernel)

        def draw(*size: int) -> Tensor:
            return torch.randn(*size, generator=gen, dtype=torch.float64).to(self.dtype).to(self.device)

        self.kept = make_mask(self.mask, shape, gen)
        self.weight = draw(*shape) * self.kept.to(self.device)
        lead = () if self.batch is None else (self.batch,)
        self.input = draw(*lead, self.in_channels, *self.size)
        self.bias_tensor = draw(self.out_channels) if self.bias else None
        self.regrouping = fxsparse.regroup(self.kept, groups=self.groups, cache=False)
        self.packed: PackedWeight = pack(self.weight, self.regrouping)
        self.add_tensor = draw(*self.expected_shape()) if self.add else None

    def expected_shape(self) -> tuple[int, ...]:
        """Return the shape of the output."""
        top, bottom, left, right = self.padding
        out = []
        for axis, pads in ((0, top + bottom), (1, left + right)):
            extent = self.dilation[axis] * (self.kernel[axis] - 1) + 1
            out.append((self.size[axis] + pads - extent) // self.stride[axis] + 1)
        lead = () if self.batch is None else (self.batch,)
        return (*lead, self.out_channels, *out)

    def arguments(self) -> tuple[Any, ...]:
        """Return the operator's arguments."""
        p = self.packed
        return (
            self.input,
            p.values,
            p.columns,
            p.panels,
            p.rows,
            self.bias_tensor,
            list(p.weight_shape),
            list(self.stride),
            list(self.padding),
            list(self.dilation),
            self.groups,
            self.padding_mode,
            self.activation,
            self.add_tensor,
        )

    def run(self) -> Tensor:
        """Call the operator."""
        return torch.ops.fxsparse.conv2d(*self.arguments())

    def expected(self) -> Tensor:
        """Compute the output in float64 by torch's own padding and convolution."""
        top, bottom, left, right = self.padding
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        x = self.input.double()
        if any(self.padding):
            x = F.pad(x, (left, right, top, bottom), mode=mode)
        bias = None if self.bias_tensor is None else self.bias_tensor.double()
        out = F.conv2d(x, self.weight.double(), bias, self.stride, 0, self.dilation, self.groups)
        if self.add_tensor is not None:
            out = out + self.add_tensor.double()
        return ACTIVATIONS[self.activation](out)

    def check(self) -> None:
        """Assert that the operator agrees with float64 to its dtype's rounding, and writes every element."""
        expected = self.expected()
        got = self.run()
        assert got.shape == self.expected_shape() == tuple(expected.shape)
        assert got.dtype == self.dtype
        assert got.is_contiguous()
        if not got.numel():
            return
        scale = max(expected.abs().max().item(), 1e-30)
        error = (got.double() - expected).abs().max().item() / scale
        assert error < tolerance(self.dtype, self.weight[0].numel()), error


def tolerance(dtype: torch.dtype, terms: int) -> float:
    """Return the largest error relative to the largest output that the dtype's rounding explains.

    A sum of `terms` products in float32 is off by about eps * sqrt(terms) of its size; 16-bit dtypes accumulate in
    float32 and round once at the end.
    """
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    once = torch.finfo(dtype).eps if dtype in (torch.bfloat16, torch.float16) else 0.0
    return 4 * torch.finfo(accumulate).eps * max(terms, 1) ** 0.5 + once


def make_mask(kind: str, shape: tuple[int, ...], gen: torch.Generator) -> Tensor:
    """Draw a mask of a kind: empty, full, unstructured, blocks, or mixed (blocks and residual)."""
    if kind == "empty":
        return torch.zeros(shape, dtype=torch.bool)
    if kind == "full":
        return torch.ones(shape, dtype=torch.bool)
    if kind == "unstructured":
        return torch.rand(shape, generator=gen) < 0.1
    flat = torch.zeros(shape[0], shape[1] * shape[2] * shape[3], dtype=torch.bool)
    for start in range(0, shape[0], 12):
        flat[start : start + 12] = torch.rand(flat.shape[1], generator=gen) < 0.3
    if kind == "mixed":
        flat |= torch.rand(flat.shape, generator=gen) < 0.03
    return flat.view(shape)
