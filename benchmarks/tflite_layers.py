"""The layers that a TFLite network needs besides those of `torch.nn`, and the network itself."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn


class Step(NamedTuple):
    """One layer of the network: which module, on which tensors, and the tensor that it gives."""

    layer: str
    inputs: tuple[int, ...]
    output: int


class TFLiteNet(nn.Module):
    """The layers of a TFLite file in its order: from an NCHW image to the file's outputs, a tuple."""

    def __init__(self, layers: dict[str, nn.Module], steps: list[Step], source: int, outputs: list[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(layers)
        self.steps = steps
        self.source = source
        self.outputs = outputs

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        values = {self.source: x}
        for step in self.steps:
            values[step.output] = self.layers[step.layer](*(values[i] for i in step.inputs))
        return tuple(values[i] for i in self.outputs)


class Add(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


class Pad(nn.Module):
    """Pads [N, C, H, W] by (left, right, top, bottom, front, back): the last two are channels."""

    def __init__(self, pads: tuple[int, ...], value: float = 0.0) -> None:
        super().__init__()
        self.pads, self.value = pads, value

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, self.pads, value=self.value)


class Resize(nn.Module):
    def __init__(self, size: tuple[int, int], align_corners: bool) -> None:
        super().__init__()
        self.size, self.align_corners = size, align_corners

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, size=self.size, mode="bilinear", align_corners=self.align_corners)


class DepthToSpace(nn.Module):
    """TFLite's channel order is (vertical, horizontal, channel); `pixel_shuffle` has the channel first."""

    def __init__(self, block: int) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        split = x.unflatten(1, (self.block * self.block, -1)).transpose(1, 2).flatten(1, 2)
        return F.pixel_shuffle(split, self.block)


class Reshape(nn.Module):
    """Reshapes as the NHWC tensor of the file would be."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1).reshape(self.shape)
