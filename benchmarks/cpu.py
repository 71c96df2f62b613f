"""Pruned networks against the best dense engines of the CPU: `python -m benchmarks cpu`.

A dense engine gains nothing from zeros, so each is built once for a network and batch size, on the weights of the first
structure and level of zeros, and timed in one interleaved run with the converted models of all of them. Every converted
model is calibrated at the batch size at which it is timed. Every output is checked against its own masked dense model
before anything is timed.

`--layers` takes one converted model apart instead, and `--scaling` compares one thread with all.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.fx import Interpreter, Node

from benchmarks.cpu_models import STRUCTURES, Level, Workload, build
from benchmarks.engines import engine_arms
from fxsparse import roofline
from fxsparse.arms import Arm, fold_batch_norm
from fxsparse.graph_module import ConvertedModule
from fxsparse.output_agreement import allowed_error, largest_error, own_error
from fxsparse.roofline import Roofline
from fxsparse.sites import ConvSite, conv_sites, site_of
from fxsparse.timing import Timings, interleaved

NETWORKS = ("vgg16:32:1", "resnet18:32:1", "resnet50:224:1", "mobilenetv1:224:1", "vgg16:32:64", "resnet50:224:16")
ZEROS = (0.8, 0.9, 0.95)
# How many times faster than the best dense engine, by structure, network and share of zeros.
TARGETS: dict[str, dict[str, dict[float, float]]] = {
    "regrouped": {
        "vgg16:32:1": {0.8: 6, 0.9: 10, 0.95: 13},
        "resnet18:32:1": {0.8: 4.5, 0.9: 7, 0.95: 9},
        "resnet50:224:1": {0.8: 3.2, 0.9: 4.5, 0.95: 5.5},
        "mobilenetv1:224:1": {0.8: 1.3, 0.9: 1.6, 0.95: 1.8},
        "vgg16:32:64": {0.8: 3.5, 0.9: 5.5, 0.95: 7.5},
        "resnet50:224:16": {0.8: 2.4, 0.9: 3.6, 0.95: 4.5},
    },
    "unstructured": {"resnet50:224:1": {0.9: 2, 0.95: 3}, "resnet50:224:16": {0.9: 3, 0.95: 4}},
}
# A sample calls an arm until it lasts this long. The calls before it are not timed: they find another engine's data in
# the caches, and its threads spinning on the cores, which no program sees that runs one network.
_SAMPLE_MS = 10.0
_SETTLE_MS = 30.0
_MAX_ROUNDS = 300
_LEAST_LAYER_S = 0.05


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument(
        "--networks", nargs="+", type=Workload.read, metavar="NAME:PX:BATCH", help=f"None: {' '.join(NETWORKS)}"
    )
    parser.add_argument("--zeros", type=float, nargs="+", metavar="SHARE", help=f"None: {' '.join(map(str, ZEROS))}")
    parser.add_argument("--structure", nargs="+", choices=STRUCTURES, default=["regrouped"], help="of the masks")
    parser.add_argument("--budget", type=float, default=8.0, metavar="SECONDS", help="time for a row of the table")
    parser.add_argument("--repeats", type=int, default=1, metavar="N", help="how often every row is measured")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--layers", action="store_true", help="instead: every sparse convolution alone; None: resnet50:224:1, 0.9"
    )
    instead.add_argument(
        "--scaling", action="store_true", help="instead: one thread against all; None: resnet50:224:1, 0.9"
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the command: print the tables and return all numbers."""
    single = arguments.layers or arguments.scaling
    networks = arguments.networks or [Workload.read(text) for text in (["resnet50:224:1"] if single else NETWORKS)]
    levels = Level.every(arguments.structure, arguments.zeros or _zeros(single))
    if arguments.layers:
        return {"layers": [_layers(*pair, arguments) for pair in itertools.product(networks, levels)]}
    if arguments.scaling:
        return {"scaling": [_scaling(*pair, arguments) for pair in itertools.product(networks, levels)]}
    results: list[dict[str, Any]] = []
    for workload in networks:
        results.append(measure(workload, levels, arguments))
        arguments.results.save({"results": results})  # a run of all networks is long
    rows = [row for result in results for row in result["rows"]]
    print(f"\n{render(rows)}\n\nMilliseconds of every engine:\n{render_engines(results)}")
    return {"results": results}


def measure(workload: Workload, levels: list[Level], arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one network at one batch size: all engines and all levels in one interleaved run, and that repeated.

    Raises:
        RuntimeError: an output is further from its masked dense model's than rounding explains.
    """
    x = workload.images()
    sparse = {level: build(workload, level) for level in levels}
    reference = sparse[levels[0]].dense
    start = time.perf_counter()
    engines, skipped = engine_arms(fold_batch_norm(reference), x, compiled=arguments.compile)
    print(f"{workload}: the dense engines took {time.perf_counter() - start:.0f} s to build", flush=True)
    for reason in skipped.values():
        print(reason, flush=True)
    arms = {str(level): _arm(workload, each.model) for level, each in sparse.items()}
    errors = check(workload, reference, {**engines, str(levels[0]): arms[str(levels[0])]})
    for level in levels[1:]:
        errors |= check(workload, sparse[level].dense, {str(level): arms[str(level)]})
    budget_s = arguments.budget * len(levels)
    every = [_time({**engines, **arms}, budget_s) for _ in range(arguments.repeats)]
    ms = {name: statistics.median(times[name].median_ms for times in every) for name in (*engines, *arms)}
    best = min(engines, key=lambda name: ms[name])
    rows = []
    for level, each in sparse.items():
        ratios = [times.ratio(best, str(level)).median for times in every]
        target = TARGETS.get(level.structure, {}).get(str(workload), {}).get(level.zeros)
        rows.append(
            {
                **dataclasses.asdict(workload),
                **dataclasses.asdict(level),
                "best dense": best,
                "dense ms": ms[best],
                "fxsparse ms": ms[str(level)],
                "ratio": statistics.median(ratios),
                "ratios": ratios,
                "target": target,
                "sparse sites": each.sparse_sites,
                "sites": each.sites,
                "convert s": each.convert_s,
            }
        )
        print(f"{workload}, {level}: {rows[-1]['ratio']:.2f}x", flush=True)
    repeats = [{name: dataclasses.asdict(timing) for name, timing in times.items()} for times in every]
    return {
        "network": str(workload),
        "rows": rows,
        "ms": ms,
        "errors": errors,
        "skipped": skipped,
        "repeats": repeats,
    }


def check(workload: Workload, dense: nn.Module, arms: Mapping[str, Arm]) -> dict[str, float]:
    """Compare the arms' outputs with a masked dense model's; return their errors.

    Raises:
        RuntimeError: one is larger than rounding explains.
    """
    wanted, own = own_error(dense, workload.images())
    allowed = allowed_error(own, torch.float32)
    errors = {}
    for name, arm in arms.items():
        with torch.inference_mode():  # as in the timing
            errors[name] = largest_error(arm(), wanted)
        if not errors[name] <= allowed:
            raise RuntimeError(
                f"{workload}: '{name}' differs from the masked dense model by {errors[name]:.3g} "
                f"(allowed {allowed:.3g})."
            )
    return errors


def render(rows: list[dict[str, Any]]) -> str:
    """Return the table of the ratios: the median of the repeats, and their range."""
    columns = ("name", "px", "batch", "structure", "zeros", "best dense", "dense ms", "fxsparse ms")
    cells = [
        [
            *(f"{row[key]:.3f}" if key.endswith("ms") else row[key] for key in columns),
            f"{row['ratio']:.2f}x [{min(row['ratios']):.2f}, {max(row['ratios']):.2f}]",
            "" if row["target"] is None else f"{row['target']:g}x",
        ]
        for row in rows
    ]
    headers = ["network", *columns[1:], "ratio [of repeats]", "target"]
    return tabulate(cells, headers=headers, tablefmt="github", disable_numparse=True)


def render_engines(results: list[dict[str, Any]]) -> str:
    """Return the table of what every engine took."""
    names = list(dict.fromkeys(name for result in results for name in result["ms"]))
    cells = [
        [result["network"], *(f"{result['ms'][name]:.3f}" if name in result["ms"] else "-" for name in names)]
        for result in results
    ]
    return tabulate(cells, headers=["network", *names], tablefmt="github", disable_numparse=True)


def _layers(workload: Workload, level: Level, arguments: argparse.Namespace) -> dict[str, Any]:
    """Time every sparse convolution of a converted model alone, and print the table."""
    model = build(workload, level).model
    found = layer_rows(model, workload.images(), budget_s=arguments.budget)
    print(f"\n{workload}, {level}\n{found}\n")
    return {"network": str(workload), **dataclasses.asdict(level), **found.to_dict()}


def _scaling(workload: Workload, level: Level, arguments: argparse.Namespace) -> dict[str, Any]:
    """Time a converted model, calibrated with all threads, with one and with all."""
    arm = _arm(workload, build(workload, level).model)
    threads = torch.get_num_threads()

    def on(count: int) -> Any:
        torch.set_num_threads(count)
        return arm()

    try:
        times = _time({"one": partial(on, 1), "all": partial(on, threads)}, arguments.budget)
    finally:
        torch.set_num_threads(threads)
    one, every = (times[name].median_ms for name in ("one", "all"))
    ratio = times.ratio("one", "all").median
    print(f"{workload}, {level}: 1 thread {one:.3f} ms, {threads} threads {every:.3f} ms: {ratio:.2f}x")
    numbers = {"one_ms": one, "all_ms": every, "threads": threads, "ratio": ratio}
    return {"network": str(workload), **dataclasses.asdict(level), **numbers}


def _arm(workload: Workload, model: nn.Module) -> Arm:
    return partial(model, workload.images())


def _time(arms: Mapping[str, Arm], budget_s: float) -> Timings:
    cpu = torch.device("cpu")
    return interleaved(arms, cpu, budget_s=budget_s, max_rounds=_MAX_ROUNDS, sample_ms=_SAMPLE_MS, settle_ms=_SETTLE_MS)


def _zeros(single: bool) -> tuple[float, ...]:
    return (0.9,) if single else ZEROS


@dataclasses.dataclass(frozen=True)
class LayerRow:
    """One sparse convolution.

    Attributes:
        name: in the model.
        weight, input, output: shapes.
        density: share of the weights kept.
        ms: of one call of the operator, with its data in the caches as far as they hold it, and nothing fused to it.
        gflops: 2 · weights kept · output positions over that time, in 10^9 a second.
        flop_ms: the same work at the measured peak.
        byte_ms: input, output and packed weight moved once, at the bandwidth measured for that many bytes.
    """

    name: str
    weight: tuple[int, ...]
    input: tuple[int, ...]
    output: tuple[int, ...]
    density: float
    ms: float
    gflops: float
    flop_ms: float
    byte_ms: float

    @property
    def of_peak(self) -> float:
        """Share of the measured peak of arithmetic."""
        return self.flop_ms / self.ms

    @property
    def of_roofline(self) -> float:
        """Share of the roofline: the longer of the two bounds over the time."""
        return max(self.flop_ms, self.byte_ms) / self.ms


@dataclasses.dataclass(frozen=True)
class LayerTable:
    """All sparse convolutions; its `str` is a table.

    Attributes:
        rows: in the order in which they run.
        line: what the machine can do with all threads.
        dense: names of the convolutions that do not run sparse.
    """

    rows: tuple[LayerRow, ...]
    line: Roofline
    dense: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        shares = [{"of_peak": row.of_peak, "of_roofline": row.of_roofline} for row in self.rows]
        rows = [dataclasses.asdict(row) | share for row, share in zip(self.rows, shares, strict=True)]
        return {"rows": rows, "roofline": self.line.to_dict(), "dense": list(self.dense)}

    def __str__(self) -> str:
        """Return the table, with the machine's ceilings above it and what runs dense below."""
        rates = ", ".join(f"{size / 2**20:g} MiB {rate / 1e9:.0f} GB/s" for size, rate in self.line.bandwidth)
        peak = f"Best matrix product (the FMA peak): {self.line.flops_per_s / 1e9:.0f} GFLOP/s; copies: {rates}."
        cells = [
            [
                row.name,
                "x".join(map(str, row.weight)),
                "x".join(map(str, row.input)),
                f"{row.density:.3f}",
                f"{row.ms:.4f}",
                f"{row.gflops:.0f}",
                f"{row.of_peak:.0%}",
                f"{row.byte_ms:.4f}",
                f"{row.of_roofline:.0%}",
            ]
            for row in self.rows
        ]
        ms, flop_ms, byte_ms, bound_ms = (
            math.fsum(values)
            for values in zip(
                *((row.ms, row.flop_ms, row.byte_ms, row.of_roofline * row.ms) for row in self.rows), strict=True
            )
        )
        gflops = flop_ms * self.line.flops_per_s / 1e9 / ms
        shares = f"{flop_ms / ms:.0%}", f"{byte_ms:.4f}", f"{bound_ms / ms:.0%}"
        cells.append(["all", "", "", "", f"{ms:.4f}", f"{gflops:.0f}", *shares])
        headers = "convolution", "weight", "input", "density", "ms", "GFLOP/s", "of peak", "memory ms", "of roofline"
        table = tabulate(cells, headers=headers, tablefmt="github", disable_numparse=True)
        return f"{peak}\n{table}\nRun dense: {', '.join(self.dense) or 'none'}."


def layer_rows(model: ConvertedModule, x: Tensor, *, budget_s: float) -> LayerTable:
    """Time every sparse convolution of a converted model alone, on the inputs that it gets in the model.

    Args:
        model: in eval mode.
        x: its input.
        budget_s: seconds of timing for all convolutions together, about.
    """
    line = roofline.measure(torch.device("cpu"), torch.float32)
    with torch.inference_mode():
        calls = _Calls(model)
        calls.run(x)
    share_s = max(budget_s / max(len(calls.found), 1), _LEAST_LAYER_S)
    rows = tuple(_row(site, arguments, line, share_s) for site, arguments in calls.found)
    names = {site.name for site, _ in calls.found}
    dense = tuple(site.name for _, site in conv_sites(model) if site.name not in names)
    return LayerTable(rows, line, dense)


class _Calls(Interpreter):
    """Runs a graph step by step and keeps what its sparse convolutions are called with."""

    def __init__(self, model: ConvertedModule) -> None:
        super().__init__(model)
        self.found: list[tuple[ConvSite, tuple[Any, ...]]] = []

    def run_node(self, n: Node) -> Any:
        site = site_of(n)
        if site is not None and n.target is torch.ops.fxsparse.conv2d.default:
            self.found.append((site, self.fetch_args_kwargs_from_env(n)[0]))
        return super().run_node(n)


def _row(site: ConvSite, arguments: tuple[Any, ...], line: Roofline, budget_s: float) -> LayerRow:
    operator = torch.ops.fxsparse.conv2d.default
    with torch.inference_mode():
        output = operator(*arguments)
    times = interleaved({"op": partial(operator, *arguments)}, output.device, budget_s=budget_s, max_rounds=200)
    ms = times["op"].median_ms
    assert site.regrouping is not None  # as it has been packed
    macs = site.regrouping.kept * (output.numel() // output.shape[1])
    source, *packed = arguments[:5]  # the four packed tensors follow the input
    nbytes = sum(tensor.nbytes for tensor in (source, output, *packed))
    return LayerRow(
        name=site.name,
        weight=site.weight_shape,
        input=tuple(source.shape),
        output=tuple(output.shape),
        density=site.regrouping.density,
        ms=ms,
        gflops=2e-6 * macs / ms,
        flop_ms=line.bound_ms(macs, 0),
        byte_ms=line.bound_ms(0, nbytes),
    )
