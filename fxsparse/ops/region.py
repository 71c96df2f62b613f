"""The operator `region`: its program, and what it computes step by step.

A region is a list of steps over values. The inputs are the first values, and each step makes the next one. Its program
is plain integers, so that it exports and compiles like any operator's arguments (see `docs/architecture.md`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
ACTIVATIONS = ("none", "relu", "relu6", "silu", "hardswish")
_FUNCTIONS = {"relu": torch.relu, "relu6": F.relu6, "silu": F.silu, "hardswish": F.hardswish}
NONE = -1  # in the place of a number
_LENGTHS = (23, 11, 4)  # of a step's numbers, by kind


class Conv(NamedTuple):
    """A sparse convolution: values by number in the region, tensors by number in `tensors`."""

    input: int
    add: int
    packed: tuple[int, int, int, int]
    bias: int
    weight_shape: tuple[int, int, int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int
    padding_mode: str
    activation: str

    def numbers(self) -> list[int]:
        """Return the step as the program has it."""
        return [
            *(0, self.input, self.add, *self.packed, self.bias, *self.weight_shape, *self.stride, *self.padding),
            *(*self.dilation, self.groups, PADDING_MODES.index(self.padding_mode), ACTIVATIONS.index(self.activation)),
        ]

    def run(self, values: list[Tensor], tensors: list[Tensor]) -> Tensor:
        """Compute it."""
        packed = (tensors[i] for i in self.packed)
        bias = None if self.bias == NONE else tensors[self.bias]
        add = None if self.add == NONE else values[self.add]
        geometry = (self.weight_shape, self.stride, self.padding, self.dilation, self.groups, self.padding_mode)
        result: Tensor = torch.ops.fxsparse.conv2d(values[self.input], *packed, bias, *geometry, self.activation, add)
        return result


class MaxPool(NamedTuple):
    """`torch.max_pool2d`."""

    input: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    ceil_mode: bool

    def numbers(self) -> list[int]:
        """Return the step as the program has it."""
        return [1, self.input, *self.kernel_size, *self.stride, *self.padding, *self.dilation, int(self.ceil_mode)]

    def run(self, values: list[Tensor], tensors: list[Tensor]) -> Tensor:
        """Compute it."""
        return torch.max_pool2d(values[self.input], *self[1:])


class Add(NamedTuple):
    """An activation, of the sum of two values of one shape or of one value."""

    input: int
    add: int
    activation: str

    def numbers(self) -> list[int]:
        """Return the step as the program has it."""
        return [2, self.input, self.add, ACTIVATIONS.index(self.activation)]

    def run(self, values: list[Tensor], tensors: list[Tensor]) -> Tensor:
        """Compute it."""
        value = values[self.input]
        if self.add != NONE:
            value = value + values[self.add]
        elif self.activation == "none":
            return value.clone()
        return value if self.activation == "none" else _FUNCTIONS[self.activation](value)


Step = Conv | MaxPool | Add


def steps_of(program: list[int]) -> Iterator[Step]:
    """Read a program."""
    at = 0
    while at < len(program):
        n: list[Any] = program[at : at + _LENGTHS[program[at]]]
        at += len(n)
        if n[0] == 0:
            shapes = (tuple(n[8:12]), tuple(n[12:14]), tuple(n[14:18]), tuple(n[18:20]))
            yield Conv(n[1], n[2], tuple(n[3:7]), n[7], *shapes, n[20], PADDING_MODES[n[21]], ACTIVATIONS[n[22]])
        elif n[0] == 1:
            yield MaxPool(n[1], tuple(n[2:4]), tuple(n[4:6]), tuple(n[6:8]), tuple(n[8:10]), bool(n[10]))
        else:
            yield Add(n[1], n[2], ACTIVATIONS[n[3]])


def reference(inputs: list[Tensor], tensors: list[Tensor], program: list[int], outputs: list[int]) -> list[Tensor]:
    """Compute a region step by step: where there is no kernel for it, in fake tensors, and for its gradients."""
    values = list(inputs)
    for step in steps_of(program):
        values.append(step.run(values, tensors))
    return [values[i] for i in outputs]
