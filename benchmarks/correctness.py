"""`fxsparse::conv2d` on random convolutions against torch's in float64: the largest errors, by dtype.

The kernels are those of this process: FXSPARSE_CPU_ISA=avx2 or =baseline forces others than the CPU's best.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import statistics
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor

import fxsparse
from fxsparse.ops.packing import pack

DTYPES = {"float32": 1e-5, "float64": 1e-13, "bfloat16": 1e-2, "float16": 1e-3}  # the error that is allowed
_ACTIVATIONS = {"none": lambda x: x, "relu": F.relu, "relu6": F.relu6, "silu": F.silu, "hardswish": F.hardswish}
_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}
_ROW_GROUPS = (1, 8, 32)  # output channels that share their columns


@dataclasses.dataclass(frozen=True)
class Shape:
    """A convolution, as it is drawn: arguments as of `torch.conv2d`, padding as (top, bottom, left, right)."""

    batch: int
    channels: int
    out_channels: int
    groups: int
    size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    mode: str
    activation: str
    add: bool
    row_group: int
    density: float
    residual: float
    threads: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cases", type=int, default=500, help="random convolutions for each dtype")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    rows = [_row(name, allowed, arguments) for name, allowed in DTYPES.items()]
    cells = [[r["dtype"], r["cases"], *(f"{r[k]:.2g}" for k in ("median", "largest", "allowed"))] for r in rows]
    headers = ["dtype", "convolutions", "median error", "largest error", "allowed"]
    print(tabulate(cells, headers=headers, tablefmt="github"))
    print("Errors are relative to the largest output of a convolution, computed by torch.conv2d in float64.")
    for row in rows:
        print(f"{row['dtype']}, the largest: {row['worst']}")
    return {"rows": rows, "ok": all(row["largest"] <= row["allowed"] for row in rows)}


def draw(rng: random.Random) -> Shape:
    """Draw a convolution that has an output."""
    while True:
        groups = rng.choice((1, 1, 1, 2, 4))
        depthwise = rng.random() < 0.1
        channels = groups * rng.choice((1, 3, 8, 17, 32))
        mode = rng.choice(("zeros", "zeros", "zeros", "reflect", "replicate", "circular"))
        shape = Shape(
            batch=rng.choice((1, 1, 2, 3, 5, 16)),
            channels=channels,
            out_channels=channels * rng.choice((1, 2)) if depthwise else groups * rng.choice((1, 7, 16, 32, 48, 75)),
            groups=channels if depthwise else groups,
            size=(rng.choice((1, 2, 4, 7, 9, 14, 16, 28, 33, 56)), rng.choice((1, 2, 4, 7, 11, 14, 16, 28, 57))),
            kernel=rng.choice(((1, 1), (1, 1), (3, 3), (3, 3), (3, 3), (5, 5), (1, 7), (2, 4), (7, 7))),
            stride=rng.choice(((1, 1), (1, 1), (2, 2), (3, 2), (1, 4))),
            padding=rng.choice(((0, 0, 0, 0), (1, 1, 1, 1), (1, 1, 1, 1), (3, 3, 3, 3), (0, 1, 2, 0), (0, 0, 3, 3))),
            dilation=rng.choice(((1, 1), (1, 1), (2, 2), (2, 3))),
            mode=mode,
            activation=rng.choice(tuple(_ACTIVATIONS)),
            add=rng.random() < 0.3,
            row_group=rng.choice(_ROW_GROUPS),
            density=rng.choice((0.0, 0.05, 0.2, 0.5, 1.0)),
            residual=rng.choice((0.0, 0.0, 0.02, 0.1)),
            threads=rng.choice((1, 2, 3, torch.get_num_threads())),
        )
        top, bottom, left, right = shape.padding
        extents = [d * (k - 1) + 1 for d, k in zip(shape.dilation, shape.kernel, strict=True)]
        fits = shape.size[0] + top + bottom >= extents[0] and shape.size[1] + left + right >= extents[1]
        inside = max(top, bottom) < shape.size[0] and max(left, right) < shape.size[1]
        if fits and (mode == "zeros" or inside):
            return shape


def error(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> float:
    """Return the operator's largest error on random data, relative to the largest output."""

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    weight_shape = (shape.out_channels, shape.channels // shape.groups, *shape.kernel)
    flat = (shape.out_channels, weight_shape[1] * shape.kernel[0] * shape.kernel[1])
    strips = torch.rand(-(-flat[0] // shape.row_group), flat[1], generator=generator) < shape.density
    kept = strips.repeat_interleave(shape.row_group, 0)[: flat[0]]
    kept = (kept | (torch.rand(flat, generator=generator) < shape.residual)).view(weight_shape)
    weight = randn(*weight_shape) * kept
    x, bias = randn(shape.batch, shape.channels, *shape.size), randn(shape.out_channels)
    top, bottom, left, right = shape.padding
    padded = (
        F.pad(x.double(), (left, right, top, bottom), mode=_MODES[shape.mode]) if any(shape.padding) else x.double()
    )
    wanted = F.conv2d(padded, weight.double(), bias.double(), shape.stride, 0, shape.dilation, shape.groups)
    add = randn(*wanted.shape) if shape.add else None
    wanted = _ACTIVATIONS[shape.activation](wanted if add is None else wanted + add.double())
    packed = pack(weight, fxsparse.regroup(kept, groups=shape.groups, cache=False))
    geometry = (shape.stride, shape.padding, shape.dilation, shape.groups, shape.mode, shape.activation, add)
    got = torch.ops.fxsparse.conv2d(
        x, packed.values, packed.columns, packed.panels, packed.rows, bias, packed.weight_shape, *geometry
    )
    scale = max(wanted.abs().max().item(), torch.finfo(torch.float32).tiny)
    return (got.double() - wanted).abs().max().item() / scale


def _row(name: str, allowed: float, arguments: argparse.Namespace) -> dict[str, Any]:
    rng, generator = random.Random(arguments.seed), torch.Generator().manual_seed(arguments.seed)
    dtype, threads = getattr(torch, name), torch.get_num_threads()
    found = []
    try:
        for _ in range(arguments.cases):
            shape = draw(rng)
            torch.set_num_threads(shape.threads)
            found.append((error(shape, dtype, generator), shape))
    finally:
        torch.set_num_threads(threads)
    largest, worst = max(found, key=lambda each: each[0])
    median = statistics.median(each for each, _ in found)
    return {
        "dtype": name,
        "cases": len(found),
        "median": median,
        "largest": largest,
        "allowed": allowed,
        "worst": str(worst),
    }
