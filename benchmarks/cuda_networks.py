"""Pruned networks on a GPU against the best dense ways to run them: `python -m benchmarks cuda`.

The dense sides gain nothing from zeros: torch.compile with mode="reduce-overhead", and eager kernels in a CUDA graph in
both memory formats, batch norms folded and cuDNN's own benchmark on. The converted model is calibrated with
deploy="graph" at the batch size at which it is timed, and runs as a CUDA graph too. All are timed in one interleaved
run, on random images; every output is first checked against the masked dense model's. Nothing computes in TF32,
but for convolutions with `--dtype tf32`.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import statistics
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

import fxsparse
from benchmarks.cpu_models import STRUCTURES, Level, Workload, pruned
from fxsparse import timing
from fxsparse.arms import Arm, channels_last, fold_batch_norm
from fxsparse.graph_module import ConvertedModule
from fxsparse.output_agreement import allowed_error, largest_error, own_error

NETWORKS = (
    *("vgg16:32:1", "vgg16:32:64", "vgg16:32:256", "resnet18:32:1", "resnet18:32:64", "resnet18:32:256"),
    *("resnet50:224:1", "resnet50:224:64", "resnet50:224:256"),
)
ZEROS = (0.8, 0.9, 0.95)
# How many times faster than the best dense way, at 90 % zeros, by dtype and network.
TARGETS: dict[str, dict[str, float]] = {
    "bfloat16": {
        **{"vgg16:32:1": 2.5, "vgg16:32:64": 4, "vgg16:32:256": 4},
        **{"resnet18:32:1": 2, "resnet18:32:64": 3, "resnet18:32:256": 2.4},
        **{"resnet50:224:1": 2, "resnet50:224:64": 2, "resnet50:224:256": 2},
    },
    "float32": {"vgg16:32:64": 5, "resnet50:224:64": 4},
}
_TARGET_ZEROS = 0.9
GROUP_ROWS = 64
_MAX_ROUNDS = 300
_SAMPLE_MS = 5.0
_CUDA = torch.device("cuda")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument(
        "--networks", nargs="+", type=Workload.read, metavar="NAME:PX:BATCH", help=f"None: {' '.join(NETWORKS)}"
    )
    parser.add_argument("--zeros", type=float, nargs="+", metavar="SHARE", default=list(ZEROS), help="shares pruned")
    parser.add_argument("--structure", nargs="+", choices=STRUCTURES, default=["regrouped"], help="of the masks")
    parser.add_argument("--budget", type=float, default=1.0, metavar="SECONDS", help="timing of one network")
    parser.add_argument("--calibration", type=float, metavar="SECONDS", help="budget of each conversion's calibration")
    parser.add_argument("--repeats", type=int, default=1, metavar="N", help="how often every network is timed")
    parser.add_argument("--cold", action="store_true", help="flush the L2 cache before every call")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")


def run(arguments: argparse.Namespace, dtype: torch.dtype) -> dict[str, Any]:
    """Measure, print the tables, return the numbers."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = arguments.dtype == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = False  # as is the default
    levels = Level.every(arguments.structure, arguments.zeros)
    results: list[dict[str, Any]] = []
    for workload in arguments.networks or [Workload.read(text) for text in NETWORKS]:
        results.append(measure(workload, levels, dtype, arguments))
        arguments.results.save({"device": torch.cuda.get_device_name(), "networks": results})  # a whole run is long
    rows = [row for result in results for row in result["rows"]]
    print(f"\n{render(rows)}\n\nMilliseconds of every way to run a network:\n{render_ways(results)}")
    return {"device": torch.cuda.get_device_name(), "networks": results}


def measure(
    workload: Workload, levels: list[Level], dtype: torch.dtype, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Measure one network at one batch size: all dense ways and all levels in one interleaved run.

    Raises:
        RuntimeError: an output is further from its masked dense model's than rounding explains.
    """
    x = workload.images().to(_CUDA, dtype).contiguous(memory_format=torch.channels_last)
    made = {level: _build(workload, level, x, arguments.calibration) for level in levels}
    reference = made[levels[0]][0]
    dense, skipped = dense_arms(reference, x, compiled=arguments.compile)
    for reason in skipped.values():
        print(reason, flush=True)
    arms = {str(level): timing.graphed(partial(model, x), _CUDA) for level, (_, model) in made.items()}
    errors = _check(workload, reference, x, {**dense, str(levels[0]): arms[str(levels[0])]})
    for level in levels[1:]:
        errors |= _check(workload, made[level][0], x, {str(level): arms[str(level)]})
    every = [_time({**dense, **arms}, arguments) for _ in range(arguments.repeats)]
    ms = {name: statistics.median(times[name].median_ms for times in every) for name in (*dense, *arms)}
    best = min(dense, key=lambda name: ms[name])
    name = arguments.dtype
    rows = []
    for level, (_, model) in made.items():
        ratios = [times.ratio(best, str(level)).median for times in every]
        regions = model.code.count("torch.ops.fxsparse.region_batch_inner")
        rows.append(
            {
                **dataclasses.asdict(workload),
                **dataclasses.asdict(level),
                "dtype": name,
                "best dense": best,
                "dense ms": ms[best],
                "fxsparse ms": ms[str(level)],
                "ratio": statistics.median(ratios),
                "ratios": ratios,
                "target": TARGETS.get(name, {}).get(str(workload)) if level.zeros == _TARGET_ZEROS else None,
                "sparse sites": model.report.sparse,
                "sites": len(model.report.rows),
                "regions": regions,
            }
        )
        print(f"{workload}, {level}: {ms[best]:.3f} / {ms[str(level)]:.3f} ms = {rows[-1]['ratio']:.2f}x", flush=True)
    return {"network": str(workload), "rows": rows, "ms": ms, "errors": errors, "skipped": skipped}


def dense_arms(model: nn.Module, x: Tensor, *, compiled: bool) -> tuple[dict[str, Arm], dict[str, str]]:
    """Return the dense ways to run a model, and why others are left out.

    Args:
        model: in evaluation mode, its batch norms not folded.
        x: its input, channels_last.
        compiled: try torch.compile.
    """
    folded = fold_batch_norm(model)
    last, first = channels_last(folded), x.contiguous()
    arms: dict[str, Arm] = {}
    skipped: dict[str, str] = {}
    if compiled:  # before the captures: when it records, it frees the workspaces of cuBLAS, which their replays use
        start = time.perf_counter()
        try:
            module: Any = torch.compile(copy.deepcopy(last), mode="reduce-overhead", dynamic=False)
            with torch.inference_mode():
                for _ in range(3):
                    module(x)
            torch.cuda.synchronize()
            arms["reduce-overhead"] = partial(module, x)
            print(f"torch.compile took {time.perf_counter() - start:.0f} s", flush=True)
        except Exception as error:  # whatever the compiler stack raises, the others can be timed without it
            lines = str(error).splitlines() or [""]
            skipped["compile"] = f"torch.compile is left out: {type(error).__name__}: {lines[0]}"
    arms["channels_last graph"] = timing.graphed(partial(last, x), _CUDA)
    arms["contiguous graph"] = timing.graphed(partial(folded, first), _CUDA)
    return arms, skipped


def render(rows: list[dict[str, Any]]) -> str:
    """Return the table of the ratios: the median of the repeats, and their range."""
    columns = ("name", "px", "batch", "dtype", "structure", "zeros", "best dense", "dense ms", "fxsparse ms")
    cells = [
        [
            *(f"{row[key]:.3f}" if key.endswith("ms") else row[key] for key in columns),
            f"{row['ratio']:.2f}x [{min(row['ratios']):.2f}, {max(row['ratios']):.2f}]",
            "" if row["target"] is None else f"{row['target']:g}x",
            f"{row['sparse sites']}/{row['sites']}",
            row["regions"],
        ]
        for row in rows
    ]
    headers = ["network", *columns[1:], "ratio [of repeats]", "target", "sparse", "regions"]
    return tabulate(cells, headers=headers, tablefmt="github", disable_numparse=True)


def render_ways(results: list[dict[str, Any]]) -> str:
    """Return the table of what every way took."""
    names = list(dict.fromkeys(name for result in results for name in result["ms"]))
    cells = [
        [result["network"], *(f"{result['ms'][name]:.3f}" if name in result["ms"] else "-" for name in names)]
        for result in results
    ]
    return tabulate(cells, headers=["network", *names], tablefmt="github", disable_numparse=True)


def _build(workload: Workload, level: Level, x: Tensor, budget_s: float | None) -> tuple[nn.Module, ConvertedModule]:
    """Prune a network and convert it; return the masked dense model and the calibrated one."""
    dense = channels_last(pruned(workload, level, GROUP_ROWS)).to(_CUDA, x.dtype)
    settings = fxsparse.Settings(deploy="graph", budget_s=budget_s, target=fxsparse.Target(group_rows=GROUP_ROWS))
    start = time.perf_counter()
    converted = fxsparse.convert(dense, example_inputs=(x,), settings=settings)
    assert isinstance(converted, ConvertedModule)  # every network here is captured as one graph
    report: Any = converted.report
    took = time.perf_counter() - start
    counts = f"{report.sparse} of {len(report.rows)} convolutions run sparse"
    print(f"{workload}, {level}: converted in {took:.1f} s; {counts}", flush=True)
    return dense, converted


def _check(workload: Workload, dense: nn.Module, x: Tensor, arms: Mapping[str, Arm]) -> dict[str, float]:
    """Compare the arms' outputs with a masked dense model's; return their errors.

    Raises:
        RuntimeError: one is larger than rounding explains.
    """
    wanted, own = own_error(dense, x)
    allowed = allowed_error(own, x.dtype, x.dtype)
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


def _time(arms: Mapping[str, Arm], arguments: argparse.Namespace) -> timing.Timings:
    return timing.interleaved(
        arms,
        _CUDA,
        budget_s=arguments.budget,
        max_rounds=_MAX_ROUNDS,
        sample_ms=_SAMPLE_MS,
        cold=arguments.cold,
    )
