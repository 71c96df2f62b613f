"""Random convolutions with blocks drawn directly, a float64 oracle and an error bound for every output."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fxsparse.ops.packing import pack
from fxsparse.ops.reference import ACTIVATIONS
from fxsparse.regrouping import Block, Regrouping

# Unit roundoff of the result and of the sums.
ROUNDOFF = {
    torch.float32: (2.0**-24, 2.0**-24),
    torch.float64: (2.0**-53, 2.0**-53),
    torch.float16: (2.0**-11, 2.0**-24),
    torch.bfloat16: (2.0**-8, 2.0**-24),
}
# In the place of a dtype: float32 whose products may be of factors rounded to TF32, two roundings of 2**-11.
TF32 = "tf32"
TF32_PRODUCT = 1.01 * 2.0**-10
# No activation is steeper than hardswish.
STEEPEST = 1.5


@dataclasses.dataclass
class Drawn:
    """A convolution: sizes, options and data. `blocks` is the density of columns inside the blocks."""

    dtype: torch.dtype | str = torch.float32
    batch: int | None = 3
    in_channels: int = 24
    out_channels: int = 40
    size: tuple[int, int] = (13, 17)
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    mode: str = "zeros"
    activation: str = "none"
    bias: bool = True
    add: bool = False
    blocks: float = 0.5
    residual: float = 0.05
    device: str = "cuda"
    seed: int = 0

    def __post_init__(self) -> None:
        """Draw the blocks, the residual and the data."""
        self.tf32 = self.dtype == TF32
        self.dtype = torch.float32 if self.tf32 else self.dtype
        rng = np.random.default_rng(self.seed)
        self.weight_shape = (self.out_channels, self.in_channels // self.groups, *self.kernel)
        regrouping = self._regrouping(rng)
        kept = regrouping.to_mask().reshape(self.weight_shape).to(self.device)
        self.weight = self.draw(*self.weight_shape, seed=1) * kept
        self.packed = pack(self.weight, regrouping)
        self.input = self.draw(*self._lead(), self.in_channels, *self.size, seed=2)
        self.bias_values = self.draw(self.out_channels, seed=3) if self.bias else None
        self.added = self.draw(*self.output_shape(), seed=4) if self.add else None

    def draw(self, *shape: int, seed: int) -> Tensor:
        """Draw normal data of the case's dtype on its device."""
        generator = torch.Generator().manual_seed(1000 * self.seed + seed)
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(self.device, self.dtype)

    def _lead(self) -> tuple[int, ...]:
        return () if self.batch is None else (self.batch,)

    def _regrouping(self, rng: np.random.Generator) -> Regrouping:
        rows, columns = self.weight_shape[0], int(np.prod(self.weight_shape[1:]))
        outside = np.ones((rows, columns), bool)
        blocks = []
        for group in np.arange(rows).reshape(self.groups, -1):
            left = rng.permutation(group)
            while len(left):
                taken, left = np.split(left, [min(rng.integers(1, 50), len(left))])
                chosen = np.flatnonzero(rng.random(columns) < self.blocks)
                if len(chosen):
                    blocks.append(Block(np.sort(taken), chosen))
                    outside[np.ix_(taken, chosen)] = False
        residual = np.nonzero(outside & (rng.random((rows, columns)) < self.residual))
        return Regrouping((rows, columns), self.groups, tuple(blocks), *residual)

    def output_shape(self) -> tuple[int, ...]:
        """Return the shape of the output."""
        pads = (sum(self.padding[:2]), sum(self.padding[2:]))
        spatial = (
            (self.size[i] + pads[i] - self.dilation[i] * (self.kernel[i] - 1) - 1) // self.stride[i] + 1 for i in (0, 1)
        )
        return (*self._lead(), self.out_channels, *spatial)

    def tables(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the packed form's tables."""
        return self.packed.columns, self.packed.panels, self.packed.rows

    def arguments(self, **changes: Any) -> dict[str, Any]:
        """Return the operator's arguments, some of them replaced."""
        columns, panels, rows = self.tables()
        arguments = {
            "input": self.input,
            "values": self.packed.values,
            "columns": columns,
            "panels": panels,
            "rows": rows,
            "bias": self.bias_values,
            "weight_shape": self.weight_shape,
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
            "padding_mode": self.mode,
            "activation": self.activation,
            "add": self.added,
        }
        return arguments | changes

    def run(self, **changes: Any) -> Tensor:
        """Call the operator, into memory that held NaN before if the allocator reuses it."""
        poison = self.input.new_full(self.output_shape(), float("nan"))
        del poison
        return torch.ops.fxsparse.conv2d(**self.arguments(**changes))

    def _convolve(self, input: Tensor, weight: Tensor, bias: Tensor | None, added: Tensor | None) -> Tensor:
        top, bottom, left, right = self.padding
        mode = "constant" if self.mode == "zeros" else self.mode
        batched = input if input.dim() == 4 else input.unsqueeze(0)
        padded = F.pad(batched, (left, right, top, bottom), mode=mode) if any(self.padding) else batched
        out = F.conv2d(padded, weight, bias, self.stride, 0, self.dilation, self.groups)
        out = out if input.dim() == 4 else out.squeeze(0)
        return out if added is None else out + added

    def check(self, got: Tensor, input: Tensor | None = None) -> None:
        """Assert that every output is within what rounding the sums, then the result once, explains."""
        tensors = [self.input if input is None else input, self.weight, self.bias_values, self.added]
        wide = [None if t is None else t.double() for t in tensors]
        assert got.shape == self.output_shape()
        assert got.dtype == self.dtype
        assert got.is_contiguous()
        if not got.numel():
            return
        # On the CPU: torch's CUDA hardswish multiplies by 1 / 6 in float32 whatever the dtype.
        expected = ACTIVATIONS[self.activation](self._convolve(*wide).cpu()).to(got.device)
        magnitude = self._convolve(*(None if t is None else t.abs() for t in wide))
        result, sums = ROUNDOFF[self.dtype]
        terms = self.weight[0].numel() + 8
        bound = STEEPEST * terms * sums * magnitude + 1.01 * result * expected.abs() + 2.0**-24
        if self.dtype == torch.float64:
            bound = 4 * STEEPEST * terms * sums * magnitude + 1e-300  # the oracle rounds as much
        error = (got.double() - expected).abs()
        worst = (error / bound).max().item()
        assert not got.isnan().any(), "an output was not written"
        assert worst <= 1, f"error is {worst} times the bound"


def random_case(seed: int, dtype: torch.dtype | str, batches: tuple[int, ...]) -> tuple[Drawn, np.random.Generator]:
    """Draw a convolution with zero padding, its batch one of those; also what drew it."""
    rng = np.random.default_rng(seed)

    def pick(*choices: Any) -> Any:
        return choices[rng.integers(len(choices))]

    groups = pick(1, 1, 2, 3)
    case = Drawn(
        dtype=dtype,
        batch=pick(*batches),
        in_channels=groups * pick(1, 5, 40, 200),
        out_channels=groups * pick(1, 7, 45, 130),
        size=(pick(11, 14), pick(9, 20)),
        kernel=(pick(1, 3, 5), pick(1, 2, 3)),
        stride=(pick(1, 2, 3), pick(1, 2)),
        padding=(pick(0, 1, 4), pick(0, 2), pick(0, 3), pick(1, 5)),
        dilation=(pick(1, 2), pick(1, 3)),
        groups=groups,
        activation=pick("none", "relu", "relu6", "silu", "hardswish"),
        bias=pick(True, False),
        add=pick(True, False),
        blocks=pick(0.0, 0.2, 1.0),
        residual=pick(0.0, 0.03, 0.3),
        seed=seed,
    )
    return case, rng
