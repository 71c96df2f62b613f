"""Regions on random weights, and what they compute in float64 by torch alone."""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor

import fxsparse
from fxsparse.ops.packing import PackedWeight, pack
from fxsparse.ops.region import NONE, Add, Average, Conv, Linear, MaxPool, Step
from fxsparse.ops.tiles import ROWS, tile

# Errors allowed of a region in each dtype: norm of the difference over norm.
RELATIVE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@dataclasses.dataclass
class Drawn:
    """A region on random weights, and its dense weights for the oracle."""

    steps: list[Step] = dataclasses.field(default_factory=list)
    tensors: list[Tensor] = dataclasses.field(default_factory=list)
    dense: dict[int, tuple[Tensor, Tensor | None]] = dataclasses.field(default_factory=dict)
    packed: dict[int, PackedWeight] = dataclasses.field(default_factory=dict)  # by the first of a weight's tensors

    def conv(self, source: int, shape: tuple[int, int, int, int], density: float = 0.3, **options: object) -> None:
        groups = int(options.get("groups", 1))  # type: ignore[call-overload]
        weight = torch.randn(shape) * (torch.rand(shape) < density)
        if self.normed:  # results of about the size of the inputs, so that nothing saturates
            weight /= (density * math.prod(shape[1:])) ** 0.5
        bias = torch.randn(shape[0]) if options.pop("biased", True) else None
        packed = pack(weight, fxsparse.regroup(weight != 0, groups=groups))
        first = len(self.tensors)
        self.packed[first] = packed
        self.tensors += [packed.values, packed.columns, packed.panels, packed.rows]
        if bias is not None:
            self.tensors.append(bias)
        self.dense[len(self.steps)] = (weight, bias)
        values = {
            **{"add": NONE, "stride": (1, 1), "padding": (0, 0, 0, 0), "dilation": (1, 1), "groups": 1},
            **{"padding_mode": "zeros", "activation": "none"},
            **options,
        }
        places: tuple[int, int, int, int] = (first, first + 1, first + 2, first + 3)
        self.steps.append(
            Conv(input=source, packed=places, bias=NONE if bias is None else first + 4, weight_shape=shape, **values)  # type: ignore[arg-type]
        )

    def linear(self, source: int, outputs: int, channels: int, *, biased: bool = True) -> None:
        weight = torch.randn(outputs, channels) / channels**0.5
        bias = torch.randn(outputs) if biased else None
        first = len(self.tensors)
        self.tensors += [weight] if bias is None else [weight, bias]
        self.dense[len(self.steps)] = (weight, bias)
        self.steps.append(Linear(source, first, NONE if bias is None else first + 1))

    @property
    def program(self) -> list[int]:
        return [number for step in self.steps for number in step.numbers()]

    def run(self, inputs: list[Tensor], outputs: list[int]) -> list[Tensor]:
        tensors = [t.to(inputs[0].dtype) if t.is_floating_point() else t for t in self.tensors]
        return torch.ops.fxsparse.region(inputs, tensors, self.program, outputs)

    def run_batch_inner(
        self, inputs: list[Tensor], outputs: list[int], channels_last: tuple[int, ...] = ()
    ) -> list[Tensor]:
        """Run the region on tiled weights, on the inputs' device."""
        tensors = self.tiled(inputs[0])
        return torch.ops.fxsparse.region_batch_inner(inputs, tensors, self.program, outputs, list(channels_last), False)

    def tiled(self, like: Tensor, tile_rows: int = ROWS) -> list[Tensor]:
        """Return the tensors with tiled weights, in the dtype and on the device of another."""
        tensors = [t.to(like) if t.is_floating_point() else t for t in self.tensors]
        for first, packed in self.packed.items():
            made = tile(dataclasses.replace(packed, values=packed.values.to(like.dtype)), tile_rows)
            tensors[first : first + 4] = [t.to(like.device) for t in (made.values, made.columns, made.tiles, made.rows)]
        return tensors

    def oracle(self, inputs: list[Tensor], outputs: list[int]) -> list[Tensor]:
        """Compute with dense weights in float64, by torch alone."""
        values = [x.double() for x in inputs]
        for i, step in enumerate(self.steps):
            values.append(self._step(i, step, values))
        return [values[i] for i in outputs]

    def _step(self, i: int, step: Step, values: list[Tensor]) -> Tensor:
        source = values[step.input]
        if isinstance(step, Linear):
            rounded = [None if t is None else t.to(self.dtype).to(source) for t in self.dense[i]]
            return F.linear(source[..., 0, 0], *rounded)[..., None, None]
        if isinstance(step, Average):
            return source.mean((-2, -1), keepdim=True)
        if isinstance(step, MaxPool):
            return F.max_pool2d(source, *step[1:])
        if isinstance(step, Conv):
            weight, bias = self.dense[i]
            # The operator sees the weights in the inputs' dtype.
            rounded = [None if t is None else t.to(self.dtype).to(source) for t in (weight, bias)]
            top, bottom, left, right = step.padding
            mode = "constant" if step.padding_mode == "zeros" else step.padding_mode
            padded = F.pad(source, (left, right, top, bottom), mode) if any(step.padding) else source
            source = F.conv2d(padded, rounded[0], rounded[1], step.stride, 0, step.dilation, step.groups)
        if step.add != NONE:
            source = source + values[step.add]
        kind = {"none": torch.clone, "relu": torch.relu, "relu6": F.relu6, "silu": F.silu, "hardswish": F.hardswish}
        return kind[step.activation](source)

    dtype: torch.dtype = torch.float32
    normed: bool = False


def residual_net(size: int = 3, channels: int = 16) -> Drawn:
    """Return two convolutions, pooling, a bottleneck with a residual addition, and a strided convolution."""
    drawn = Drawn()
    drawn.conv(0, (channels, 8, 3, 3), padding=(1, 1, 1, 1), activation="relu")  # 1
    drawn.steps.append(MaxPool(1, (3, 3), (2, 2), (1, 1), (1, 1), False))  # 2
    drawn.conv(2, (24, channels, 1, 1), activation="relu6", biased=False)  # 3
    drawn.conv(3, (channels, 24, size, 3), padding=(size // 2, size // 2, 1, 1), add=2, activation="relu")  # 4
    drawn.conv(4, (32, channels, 3, 3), padding=(1, 1, 1, 1), stride=(2, 2), activation="silu")  # 5
    drawn.steps.append(Add(5, NONE, "hardswish"))  # 6
    drawn.steps.append(Add(5, 6, "none"))  # 7
    return drawn


def close(got: list[Tensor], wanted: list[Tensor], relative: float) -> bool:
    return all(
        g.shape == w.shape and float((g.double() - w).abs().max()) <= relative * max(1.0, float(w.abs().max()))
        for g, w in zip(got, wanted, strict=True)
    )


def agrees(drawn: Drawn, x: Tensor, outputs: list[int], channels_last: tuple[int, ...] = ()) -> None:
    """Hold the operator's results against float64, step by step."""
    drawn.dtype = x.dtype
    got = drawn.run_batch_inner([x], outputs, channels_last)
    for value, result, wanted in zip(outputs, got, drawn.oracle([x.cpu()], outputs), strict=True):
        layout = torch.channels_last if value in channels_last else torch.contiguous_format
        assert result.shape == wanted.shape and result.is_contiguous(memory_format=layout)
        error = (result.cpu().double() - wanted).norm() / wanted.norm()
        assert error < RELATIVE[x.dtype], f"value {value}"


def batch_inner_net(channels: int = 24) -> Drawn:
    """Return a net with all that a region on CUDA does: a pooled input, residuals, groups, a mean of planes, and a
    linear layer."""
    drawn = Drawn(normed=True)
    drawn.steps.append(Add(0, NONE, "relu"))  # 1
    drawn.steps.append(MaxPool(1, (3, 3), (2, 2), (1, 1), (1, 1), False))  # 2
    drawn.conv(2, (channels, 8, 3, 3), padding=(1, 1, 1, 1), activation="relu")  # 3
    drawn.conv(3, (channels, channels, 3, 3), padding=(1, 1, 1, 1), activation="silu", biased=False)  # 4
    drawn.conv(4, (channels, channels, 3, 3), padding=(1, 1, 1, 1), add=3, activation="relu")  # 5
    drawn.conv(5, (2 * channels, channels, 1, 1), stride=(2, 2))  # 6
    drawn.conv(5, (2 * channels, channels // 2, 3, 3), padding=(1, 1, 1, 1), stride=(2, 2), groups=2)  # 7
    drawn.steps.append(Add(7, 6, "hardswish"))  # 8
    drawn.steps.append(MaxPool(8, (2, 2), (2, 2), (0, 0), (1, 1), True))  # 9
    drawn.conv(9, (72, 2 * channels, 1, 1), density=0.8, activation="relu6")  # 10
    drawn.steps.append(Average(10))  # 11
    drawn.linear(11, 21, 72)  # 12
    return drawn
