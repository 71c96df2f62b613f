"""The operators `region` and `region_batch_inner`: their programs, and what they compute step by step.

A region is a list of steps over values. The inputs are the first values, and each step makes the next one. Its program
is plain integers, so that it exports and compiles like any operator's arguments (see `docs/architecture.md`).

The steps of `region_batch_inner` run on images stored batch-innermost (`ops/batch_inner.py`): it changes the layout of
what comes in and of what goes out, and its convolutions' weights are in tiled form (`ops/tiles.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fxsparse.ops import batch_inner

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
ACTIVATIONS = ("none", "relu", "relu6", "silu", "hardswish")
_FUNCTIONS = {"relu": torch.relu, "relu6": F.relu6, "silu": F.silu, "hardswish": F.hardswish}
NONE = -1  # in the place of a number
_LENGTHS = (23, 11, 4, 2, 4)  # of a step's numbers, by kind


class Conv(NamedTuple):
    """A sparse convolution: values by number in the region, tensors by number in `tensors`.

    `packed` is values, columns, panels and rows in `region`; tile_values, tile_columns, tiles and tile_rows in
    `region_batch_inner`, whose only padding mode is "zeros".
    """

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

    def run_tiled(self, values: list[Tensor], tensors: list[Tensor], conv2d: Callable[..., Tensor]) -> Tensor:
        """Compute it from a tiled weight, by `conv2d_batch_inner` or what stands in for it."""
        tiled = (tensors[i] for i in self.packed)
        bias = None if self.bias == NONE else tensors[self.bias]
        add = None if self.add == NONE else values[self.add]
        geometry = tuple(list(part) for part in (self.weight_shape, self.stride, self.padding, self.dilation))
        return conv2d(values[self.input], *tiled, bias, *geometry, self.groups, self.activation, add)


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


class Average(NamedTuple):
    """The mean of each plane, as a plane of one pixel."""

    input: int

    def numbers(self) -> list[int]:
        """Return the step as the program has it."""
        return [3, self.input]

    def run(self, values: list[Tensor], tensors: list[Tensor]) -> Tensor:
        """Compute it."""
        return F.adaptive_avg_pool2d(values[self.input], 1)


class Linear(NamedTuple):
    """A linear layer on planes of one pixel, whose outputs are such planes; in `region_batch_inner` only."""

    input: int
    weight: int
    bias: int

    def numbers(self) -> list[int]:
        """Return the step as the program has it."""
        return [4, *self]

    def run(self, values: list[Tensor], tensors: list[Tensor]) -> Tensor:
        """Compute it."""
        bias = None if self.bias == NONE else tensors[self.bias]
        return F.linear(values[self.input].flatten(-3), tensors[self.weight], bias)[..., None, None]


Step = Conv | MaxPool | Add | Average | Linear


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
        elif n[0] == 2:
            yield Add(n[1], n[2], ACTIVATIONS[n[3]])
        elif n[0] == 3:
            yield Average(n[1])
        else:
            yield Linear(*n[1:])


def reference(inputs: list[Tensor], tensors: list[Tensor], program: list[int], outputs: list[int]) -> list[Tensor]:
    """Compute a region step by step: where there is no kernel for it, in fake tensors, and for its gradients."""
    values = list(inputs)
    for step in steps_of(program):
        values.append(step.run(values, tensors))
    return [values[i] for i in outputs]


def reference_batch_inner(
    inputs: list[Tensor],
    tensors: list[Tensor],
    program: list[int],
    outputs: list[int],
    channels_last: list[int],
    allow_tf32: bool,
) -> list[Tensor]:
    """Compute a region of tiled convolutions step by step, in torch's own operators and layouts alone.

    Args:
        inputs: images of one batch, [N, C, H, W] or [C, H, W], of any strides.
        tensors: tiled weights and biases.
        program: as `steps_of` reads it.
        outputs: the values to return.
        channels_last: those of them that get the strides of torch.channels_last; the others are contiguous.
        allow_tf32: that convolutions of float32 may round their factors to TF32, which nothing here does.
    """
    batched = inputs[0].dim() == 4
    values = [(x if batched else x[None]).contiguous() for x in inputs]  # one order of sums, whatever the strides
    for step in steps_of(program):
        if isinstance(step, Conv):
            values.append(step.run_tiled(values, tensors, batch_inner.conv2d_planes))
        else:
            values.append(step.run(values, tensors))
    results = {i: _stored(values[i], i in channels_last) for i in outputs}
    return [results[i] if batched else results[i][0] for i in outputs]


def fake_batch_inner(
    inputs: list[Tensor],
    tensors: list[Tensor],
    program: list[int],
    outputs: list[int],
    channels_last: list[int],
    allow_tf32: bool,
) -> list[Tensor]:
    """Return what `region_batch_inner` does, in shapes and strides alone."""
    batched = inputs[0].dim() == 4
    values = [x if batched else x[None] for x in inputs]
    for step in steps_of(program):
        if isinstance(step, Conv):
            values.append(step.run_tiled(values, tensors, torch.ops.fxsparse.conv2d_batch_inner))
        else:
            values.append(step.run(values, tensors))
    results = {i: torch.empty_like(_stored(values[i], i in channels_last)) for i in outputs}
    return [results[i] if batched else results[i][0] for i in outputs]


def _stored(value: Tensor, channels_last: bool) -> Tensor:
    """Return a new tensor as torch stores images."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty_like(value, memory_format=memory_format).copy_(value)
