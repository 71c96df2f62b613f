"""Pruned networks on a GPU (`cuda_networks.py`), and single convolutions: `python -m benchmarks cuda [--layers]`.

The four 3x3 shapes of ResNet-50 and 1x1 ones around them, in bfloat16 (or another dtype), under masks in groups of
rows that share random columns. The dense side is the fastest of cuDNN's (NCHW and channels_last, `cudnn.benchmark` on);
ours is `fxsparse::conv2d_batch_inner` between batch-innermost images, or of fewer than 8 `fxsparse::conv2d_planes`: the
kernel that it chooses, with and without launches that overlap, and every other. All are timed in CUDA graphs of many
launches on the same tensors, round robin. Outputs are checked against float64 first.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor

from benchmarks import cuda_networks, lth
from benchmarks.layers import LAYERS, Layer
from fxsparse.ops import batch_inner, tiles
from fxsparse.ops.packing import pack
from fxsparse.ops.precision import convs_allow_tf32
from fxsparse.regrouping import Block, Regrouping, Target, regroup

Call = Callable[[], object]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "tf32": torch.float32}
HOPPER_KERNELS = ("wgmma64", "wgmma64half", "wgmma128", "wgmma128half")
SHAPES = tuple(layer for layer in LAYERS if layer.name.startswith("r50") and "s2" not in layer.name)
_LAUNCHES = 20
_ROUNDS = 7


@dataclasses.dataclass
class Case:
    """One layer; times in microseconds.

    Attributes:
        rows: that share their columns; 0: as many as the ticket has.
        error: of the chosen kernel's output against float64: norm of the difference over norm.
        dense: of each dense way.
        ours: of each kernel; "auto" is what the operator chooses, "auto, alone" the same without overlap.
        ratio: best dense over "auto".
        best_ratio: best dense over our fastest kernel.
        tflops: 2 · kept weights · positions over the time of "auto", in 10^12 a second.
    """

    layer: str
    batch: int
    dtype: str
    density: float
    rows: int
    error: float
    dense: dict[str, float]
    ours: dict[str, float]
    ratio: float
    best_ratio: float
    tflops: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument(
        "--dtype", choices=list(DTYPES), default="bfloat16", help="tf32: float32 where convolutions may use TF32"
    )
    cuda_networks.add_arguments(parser)
    layers = parser.add_argument_group("single convolutions")
    layers.add_argument("--layers", action="store_true", help="instead: single convolutions")
    layers.add_argument("--only", default="*", metavar="GLOB", help="names of the layers")
    layers.add_argument("--batch", type=int, nargs="+", default=[64, 256], help="batch sizes")
    layers.add_argument("--ticket", action="store_true", help="the layers and blocks of the published ticket")
    layers.add_argument("--density", type=float, nargs="+", default=[0.1], help="shares kept")
    layers.add_argument("--rows", type=int, nargs="+", default=[64], help="rows that share their columns")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, print the table, return the numbers."""
    if not torch.cuda.is_available():
        raise SystemExit("`python -m benchmarks cuda` needs a CUDA device.")
    if not arguments.layers:
        return cuda_networks.run(arguments, DTYPES[arguments.dtype])
    cases = []
    for layer, mask in ticket_layers() if arguments.ticket else [(layer, None) for layer in SHAPES]:
        if fnmatch.fnmatchcase(layer.name, arguments.only):
            for batch in arguments.batch:
                cases += measure_layer(layer, batch, arguments, mask)
                arguments.results.save({"ok": False, "layers": [dataclasses.asdict(case) for case in cases]})
    print(render_layers(cases))
    return {"ok": bool(cases), "layers": [dataclasses.asdict(case) for case in cases]}


def ticket_layers() -> list[tuple[Layer, Tensor]]:
    """Return the layers of the published ticket and their masks."""
    found = []
    sides = iter((32, 32, 16, 16, 8, 8, 8, 4, 4, 4, 2, 2, 2))
    for (name, mask), side in zip(lth.ticket_masks().items(), sides, strict=True):
        out, channels, kernel, _ = mask.shape
        found.append((Layer(f"{name} {channels}-{out}@{side}", channels, side, out, kernel, 1, (1, 64)), mask))
    return found


def measure_layer(layer: Layer, batch: int, arguments: argparse.Namespace, mask: Tensor | None = None) -> list[Case]:
    """Measure one layer and batch size at every density and group size, or under a mask of its own."""
    dtype = DTYPES[arguments.dtype]
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = arguments.dtype == "tf32"
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (layer.out, layer.channels, layer.kernel, layer.kernel)
    x = torch.randn(batch, layer.channels, layer.side, layer.side, device="cuda", generator=generator).to(dtype)
    weight = torch.randn(shape, device="cuda", generator=generator) * (2 / np.prod(shape[1:])) ** 0.5
    dense = graph_times(dense_calls(layer, x, weight.to(dtype)))
    if mask is not None:
        regrouping = regroup(mask, target=Target(group_rows=64))
        return [_sparse_case(layer, x, weight, dense, float(mask.float().mean()), 0, regrouping)]
    cases = []
    for rows in arguments.rows:
        for density in arguments.density:
            if rows <= layer.out:
                regrouping = random_groups(tuple(weight.shape), density, rows, np.random.default_rng(0))
                cases.append(_sparse_case(layer, x, weight, dense, density, rows, regrouping))
                print(".", end="", flush=True)
    return cases


def _sparse_case(
    layer: Layer, x: Tensor, weight: Tensor, dense: dict[str, float], density: float, rows: int, regrouping: Regrouping
) -> Case:
    kept = (weight * regrouping.to_mask().reshape(weight.shape).to(weight.device)).to(x.dtype)
    tiled = tiles.tile(pack(kept, regrouping))
    inner = batch_inner.to_batch_inner(x)
    has_wgmma = torch.cuda.get_device_capability()[0] == 9 and x.dtype != torch.float32
    auto = "planes" if len(x) < batch_inner.LANES else "auto"  # as a region chooses

    def call(kernel: str, overlap: bool = True) -> Call:
        return lambda: sparse_call(layer, x if kernel == "planes" else inner, tiled, kernel, overlap)

    error = relative_error(call(auto)(), F.conv2d(x[:8].double(), kept.double(), None, layer.stride, layer.padding))
    arms = {"auto": call(auto), "auto, alone": call(auto, False)}
    if auto != "auto":
        arms["batch-innermost"] = call("auto")
    arms |= {kernel: call(kernel) for kernel in ("portable", *(HOPPER_KERNELS if has_wgmma else ()))}
    ours = graph_times(arms)
    best = min(dense.values())
    return Case(
        layer=layer.name,
        batch=len(x),
        dtype=str(x.dtype).removeprefix("torch."),
        density=density,
        rows=rows,
        error=error,
        dense=dense,
        ours=ours,
        ratio=best / ours["auto"],
        best_ratio=best / min(ours.values()),
        tflops=2 * int(regrouping.to_mask().sum()) * layer.positions * len(x) / ours["auto"] / 1e6,
    )


def dense_calls(layer: Layer, x: Tensor, weight: Tensor) -> dict[str, Call]:
    """Return the dense ways to run a layer."""

    def call(memory_format: torch.memory_format) -> Call:
        laid, own = x.contiguous(memory_format=memory_format), weight.contiguous(memory_format=memory_format)
        return lambda: F.conv2d(laid, own, None, layer.stride, layer.padding)

    return {"channels_last": call(torch.channels_last), "contiguous": call(torch.contiguous_format)}


def sparse_call(layer: Layer, x: Tensor, tiled: tiles.TiledWeight, kernel: str, overlap: bool) -> Tensor:
    """Run a layer between batch-innermost images, or with kernel "planes" as torch stores them."""
    tables = (tiled.values, tiled.columns, tiled.tiles, tiled.rows, None, tiled.weight_shape)
    geometry = ((layer.stride, layer.stride), (layer.padding,) * 4, (1, 1), 1)
    tf32 = convs_allow_tf32()
    result: Tensor = (
        torch.ops.fxsparse.conv2d_planes(x, *tables, *geometry, overlap=overlap, allow_tf32=tf32)
        if kernel == "planes"
        else torch.ops.fxsparse.conv2d_batch_inner(
            x, *tables, *geometry, kernel=kernel, overlap=overlap, allow_tf32=tf32
        )
    )
    return result


def random_groups(shape: tuple[int, ...], density: float, rows: int, rng: np.random.Generator) -> Regrouping:
    """Draw groups of `rows` random rows, each with a share `density` of the columns."""
    out, columns = shape[0], int(np.prod(shape[1:]))
    count = max(1, round(columns * density))
    blocks = tuple(
        Block(np.sort(group), np.sort(rng.permutation(columns)[:count]))
        for group in np.split(rng.permutation(out), range(rows, out, rows))
    )
    return Regrouping((out, columns), 1, blocks, np.empty(0, np.int64), np.empty(0, np.int64))


def relative_error(got: Any, wanted: Tensor) -> float:
    """Return the norm of the difference over the norm, for the images that `wanted` has."""
    difference = (got[: len(wanted)].double() - wanted).norm() / wanted.norm()
    return float(difference)


def graph_times(calls: dict[str, Call]) -> dict[str, float]:
    """Time calls as replays of CUDA graphs of many launches, round robin; microseconds of one call, medians."""
    graphs = {name: _captured(call) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for graph in graphs.values():
        graph.replay()
    for _ in range(_ROUNDS):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            graph.replay()  # fills the caches with this arm's data
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) / _LAUNCHES * 1000)
    return {name: statistics.median(own) for name, own in times.items()}


def _captured(call: Call) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_LAUNCHES):
            call()
    return graph


def render_layers(cases: list[Case]) -> str:
    """Return the table of single convolutions."""
    ours = list(dict.fromkeys(name for case in cases for name in case.ours))
    rows = [
        [
            *(case.layer, case.batch, case.dtype, case.density, case.rows, f"{case.error:.1e}"),
            *(f"{min(case.dense.values()):.1f}", *(f"{case.ours.get(name, float('nan')):.1f}" for name in ours)),
            *(f"{case.ratio:.2f}x", f"{case.best_ratio:.2f}x", f"{case.tflops:.0f}"),
        ]
        for case in cases
    ]
    headers = ["layer", "batch", "dtype", "density", "rows", "error", "dense us", *ours, "ratio", "best", "TFLOP/s"]
    return tabulate(rows, headers=headers)
