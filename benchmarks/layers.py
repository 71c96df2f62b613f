"""Single convolutions: `python -m benchmarks layers`.

The layers of ResNet-50 (ImageNet) and VGG-16 (CIFAR) at batch 1 and at a large batch; masks in groups of 32
rows that share their columns ("regrouped") and unstructured ones, at 80, 90 and 95 % zeros. The dense side
is the best of torch's NCHW, channels_last and oneDNN with a prepacked weight (what torch.compile's freezing
uses). Outputs are checked against float64 before anything is timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor

from fxsparse.arms import Arm
from fxsparse.ops.packing import PackedWeight, pack
from fxsparse.output_agreement import allowed_error, largest_error
from fxsparse.regrouping import Target, regroup
from fxsparse.timing import interleaved

GROUP_ROWS = 32
DENSITIES = (0.2, 0.1, 0.05)
STRUCTURES = ("regrouped", "unstructured")


@dataclasses.dataclass(frozen=True)
class Layer:
    """A convolution of square images, padded by kernel // 2; `side` is the input's."""

    name: str
    channels: int
    side: int
    out: int
    kernel: int
    stride: int
    batches: tuple[int, int]

    @property
    def padding(self) -> int:
        return self.kernel // 2

    @property
    def positions(self) -> int:
        """Output positions of one image."""
        return ((self.side + 2 * self.padding - self.kernel) // self.stride + 1) ** 2


def _resnet50(name: str, channels: int, side: int, out: int, kernel: int = 1, stride: int = 1) -> Layer:
    return Layer(f"r50 {name}", channels, side, out, kernel, stride, (1, 16))


def _vgg(channels: int, side: int) -> Layer:
    return Layer(f"vgg {channels}-{channels}@{side}", channels, side, channels, 3, 1, (1, 64))


LAYERS = (
    _resnet50("3x3 64@56", 64, 56, 64, 3),
    _resnet50("3x3 128@28", 128, 28, 128, 3),
    _resnet50("3x3 256@14", 256, 14, 256, 3),
    _resnet50("3x3 512@7", 512, 7, 512, 3),
    _resnet50("3x3s2 128@56", 128, 56, 128, 3, 2),
    _resnet50("1x1 64-256@56", 64, 56, 256),
    _resnet50("1x1 256-64@56", 256, 56, 64),
    _resnet50("1x1 512-128@28", 512, 28, 128),
    _resnet50("1x1 128-512@28", 128, 28, 512),
    _resnet50("1x1 256-1024@14", 256, 14, 1024),
    _resnet50("1x1 1024-256@14", 1024, 14, 256),
    _resnet50("1x1 512-2048@7", 512, 7, 2048),
    _resnet50("1x1 2048-512@7", 2048, 7, 512),
    _vgg(64, 32),
    _vgg(128, 16),
    _vgg(256, 8),
    _vgg(512, 4),
    _vgg(512, 2),
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One layer, batch size, structure and density.

    Attributes:
        kept: weights kept.
        stored: weights in blocks (fill-in included) and residual, as a share of the kept ones.
        residual: weights outside the blocks, as a share of the kept ones.
        error: of the sparse output against float64, as a share of its largest value.
        dense: milliseconds of each dense way, once measured.
        sparse_ms: of `fxsparse::conv2d`.
        ratio: best dense over sparse.
        gflops: 2 · kept · output positions over the sparse time, in 10^9 a second.
    """

    layer: str
    batch: int
    structure: str
    density: float
    kept: int
    stored: float
    residual: float
    error: float
    dense: dict[str, float] = dataclasses.field(default_factory=dict)
    sparse_ms: float = math.nan
    ratio: float = math.nan
    gflops: float = math.nan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--only", default="*", metavar="GLOB", help="names of the layers")
    parser.add_argument("--batch", type=int, nargs="+", help="batch sizes, for all layers")
    parser.add_argument("--density", type=float, nargs="+", default=list(DENSITIES), help="shares kept")
    parser.add_argument("--structure", choices=STRUCTURES, nargs="+", default=list(STRUCTURES))
    parser.add_argument("--partitioner", choices=("consecutive", "clustering"), default="clustering")
    parser.add_argument("--budget", type=float, default=0.5, metavar="SECONDS", help="time for one of a layer's arms")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the command: print the table and return all numbers."""
    chosen = [layer for layer in LAYERS if fnmatch.fnmatchcase(layer.name, arguments.only)]
    cases: list[Case] = []
    for layer in chosen:
        for batch in arguments.batch or layer.batches:
            cases += measure(layer, batch, arguments)
            print(f"{layer.name}, batch {batch}: done", flush=True)
    print(f"\n{render(cases)}")
    return {"cases": [dataclasses.asdict(case) for case in cases], "geometric_means": means(cases)}


def measure(layer: Layer, batch: int, arguments: argparse.Namespace) -> list[Case]:
    """Measure one layer at one batch size: all its structures and densities in one interleaved run.

    Raises:
        RuntimeError: a sparse output is further from float64 than rounding explains.
    """
    rng = np.random.default_rng(3)
    shape = (layer.out, layer.channels, layer.kernel, layer.kernel)
    weight = torch.from_numpy(rng.standard_normal(shape, np.float32))
    x = torch.from_numpy(rng.standard_normal((batch, layer.channels, layer.side, layer.side), np.float32))
    target = Target(group_rows=GROUP_ROWS, partitioner=arguments.partitioner)
    arms = dense_arms(layer, x, weight)
    dense = list(arms)
    cases: dict[str, Case] = {}
    for structure in arguments.structure:
        for density in arguments.density:
            mask = make_mask(shape, structure, density, rng)
            regrouping = regroup(mask, target, cache=False)
            name = f"{structure} {density}"
            arms[name] = sparse_arm(layer, x, pack(weight * mask, regrouping))
            kept, residual = regrouping.kept, regrouping.residual_count
            error = _error(layer, x, weight * mask, arms[name], name)
            stored = (regrouping.block_area + residual) / kept
            cases[name] = Case(layer.name, batch, structure, density, kept, stored, residual / kept, error)
    times = interleaved(arms, x.device, budget_s=arguments.budget * len(arms), max_rounds=101)
    dense_ms = {name: times[name].median_ms for name in dense}
    return [
        dataclasses.replace(
            case,
            dense=dense_ms,
            sparse_ms=times[name].median_ms,
            ratio=min(dense_ms.values()) / times[name].median_ms,
            gflops=2e-6 * case.kept * layer.positions * batch / times[name].median_ms,
        )
        for name, case in cases.items()
    ]


def dense_arms(layer: Layer, x: Tensor, weight: Tensor) -> dict[str, Arm]:
    """Return the dense ways to run a layer."""
    x_last, weight_last = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    stride, padding = layer.stride, layer.padding
    arms: dict[str, Arm] = {
        "NCHW": lambda: F.conv2d(x, weight, None, stride, padding),
        "channels_last": lambda: F.conv2d(x_last, weight_last, None, stride, padding),
    }
    if torch.backends.mkldnn.is_available():
        geometry = ((padding, padding), (stride, stride), (1, 1), 1)
        prepacked = torch.ops.mkldnn._reorder_convolution_weight(weight_last, *geometry, list(x.shape))
        convolution = torch.ops.mkldnn._convolution_pointwise
        arms["prepacked"] = lambda: convolution(x_last, prepacked, None, *geometry, "none", [], "")
    return arms


def sparse_arm(layer: Layer, x: Tensor, packed: PackedWeight) -> Arm:
    """Return the sparse operator on packed weights."""
    tensors = (packed.values, packed.columns, packed.panels, packed.rows)
    shape, stride, padding = packed.weight_shape, [layer.stride] * 2, [layer.padding] * 4
    return lambda: torch.ops.fxsparse.conv2d(x, *tensors, None, shape, stride, padding, [1, 1], 1)


def _error(layer: Layer, x: Tensor, weight: Tensor, arm: Arm, name: str) -> float:
    some = slice(0, 2)  # float64 is slow, and all images go the same way; the last one guards the others
    images = torch.cat([x[some], x[-1:]])
    exact = F.conv2d(images.double(), weight.double(), None, layer.stride, layer.padding)
    plain = F.conv2d(images, weight, None, layer.stride, layer.padding)
    output = arm()
    error = largest_error(torch.cat([output[some], output[-1:]]), exact)
    allowed = allowed_error(largest_error(plain, exact), x.dtype)
    if not error <= allowed:
        raise RuntimeError(
            f"{layer.name}, batch {len(x)}, {name}: the sparse output differs from float64 by {error:.3g} "
            f"(allowed {allowed:.3g})."
        )
    return error


def means(cases: list[Case]) -> dict[str, float]:
    """Return the geometric mean of the ratios by network, batch size class, structure and density."""
    ratios: dict[str, list[float]] = {}
    for case in cases:
        network = case.layer.split()[0]
        key = f"{network}, batch {case.batch}, {case.structure}, {1 - case.density:.0%} zeros"
        ratios.setdefault(key, []).append(case.ratio)
    return {key: math.exp(sum(map(math.log, values)) / len(values)) for key, values in ratios.items()}


def render(cases: list[Case]) -> str:
    """Return the table and the geometric means."""
    ways = list(cases[0].dense) if cases else []
    rows = [
        [
            case.layer,
            case.batch,
            case.structure,
            f"{1 - case.density:.0%}",
            f"{case.residual:.0%}",
            f"{case.stored:.2f}",
            *(f"{case.dense[way]:.3f}" for way in ways),
            f"{case.sparse_ms:.3f}",
            f"{case.ratio:.2f}x",
            f"{case.gflops:.0f}",
            f"{case.error:.0e}",
        ]
        for case in cases
    ]
    headers = (
        "layer", "batch", "mask", "zeros", "residual", "stored", *(f"{way} ms" for way in ways),
        "sparse ms", "best dense / sparse", "GFLOP/s", "rel err",
    )  # fmt: skip
    lines = [tabulate(rows, headers=headers, disable_numparse=True), ""]
    lines += [f"{key}: {value:.2f}x" for key, value in means(cases).items()]
    return "\n".join(lines)


def make_mask(shape: tuple[int, ...], structure: str, density: float, rng: np.random.Generator) -> Tensor:
    """Return a random mask with the same number of weights kept in every row."""
    rows, columns = shape[0], math.prod(shape[1:])
    kept = max(1, round(density * columns))
    same = GROUP_ROWS if structure == "regrouped" else 1
    mask = np.zeros((rows, columns), bool)
    for first in range(0, rows, same):
        mask[first : first + same, rng.choice(columns, kept, replace=False)] = True
    return torch.from_numpy(mask).reshape(shape)
