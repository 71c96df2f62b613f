"""Whole networks with all but the first convolution sparse: dense, step by step, and with epilogues and regions.

Nothing is calibrated: every arm runs what its name says. The dense arms have their batch norms folded, as the others.
"""

from __future__ import annotations

import argparse
import copy
from functools import partial
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

import fxsparse
from benchmarks import models, pruned
from benchmarks.lth import Features
from fxsparse.arms import Arm, compiled_or_reason, dense_arms
from fxsparse.graph_module import ConvertedModule, single_steps
from fxsparse.inputs import ExampleInputs
from fxsparse.masks import bake
from fxsparse.output_agreement import allowed_error, largest_error, own_error
from fxsparse.timing import interleaved

_COMPILE_LIMIT_S = 300


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--networks", nargs="+", default=["vgg16_bn:32", "resnet18:32", "resnet50:224"], metavar="N:PX")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--density", type=float, nargs="+", default=[0.1], help="shares of the weights kept")
    parser.add_argument("--structure", nargs="+", choices=pruned.STRUCTURES, default=list(pruned.STRUCTURES))
    parser.add_argument("--compile", action="store_true", help="time torch.compile with freezing too")
    parser.add_argument("--budget", type=float, default=6.0, help="seconds of timing for a row")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    rows = []
    for network in arguments.networks:
        name, _, size = network.partition(":")
        for structure in arguments.structure:
            for density in arguments.density:
                model, converted = _build(name, int(size), density, structure)
                for batch in arguments.batch:
                    row = {"network": network, "structure": structure, "density": density, "batch": batch}
                    x = torch.randn(batch, 3, int(size), int(size), generator=torch.Generator().manual_seed(batch))
                    rows.append({**row, **_measure(model, converted, x, arguments)})
    columns = list(dict.fromkeys(key for row in rows for key in row))
    print(tabulate([[_text(row.get(key, "")) for key in columns] for row in rows], headers=columns, tablefmt="github"))
    return {"rows": rows}


def _build(name: str, size: int, density: float, structure: str) -> tuple[nn.Module, ConvertedModule]:
    """Return the pruned model and the converted one, on the sparse paths but for the first convolution."""
    model = models.build("torchvision", name)
    model = (Features(model) if name.startswith("vgg") else model).eval()
    masks = pruned.make_masks(model, density, structure)
    x = torch.randn(2, 3, size, size)
    models.prepare(model, masks, x)
    model = bake(model, masks).model
    settings = fxsparse.Settings(calibrate=False)
    converted = fxsparse.convert(model, example_inputs=(x,), settings=settings)
    assert isinstance(converted, ConvertedModule)
    fxsparse.set_mode(converted, "sparse")
    fxsparse.set_mode(converted, "vanilla", sites=next(iter(masks)))
    return model, converted


def _measure(model: nn.Module, converted: ConvertedModule, x: Tensor, arguments: argparse.Namespace) -> dict[str, Any]:
    inputs = ExampleInputs((x,), {})
    dense = fxsparse.to_dense(converted)
    arms: dict[str, Arm] = dict(dense_arms(dense, inputs))
    if arguments.compile:
        compiled, why = compiled_or_reason(dense, inputs, _COMPILE_LIMIT_S)
        if compiled is None:
            print(why)
        else:
            arms["dense compiled"] = compiled
    steps = copy.deepcopy(converted)
    with single_steps(steps):
        arms |= {"single steps": partial(steps, x), "fxsparse": partial(converted, x)}
        wanted, own = own_error(model, x)
        allowed = allowed_error(own, x.dtype)
        for name, arm in arms.items():
            with torch.inference_mode():
                error = largest_error(arm(), wanted)
            if not error <= allowed:
                raise RuntimeError(f"'{name}' differs from the dense model by {error:.3g} (allowed {allowed:.3g}).")
        times = interleaved(arms, torch.device("cpu"), budget_s=arguments.budget)
    best = min((name for name in times if name.startswith("dense")), key=lambda name: times[name].median_ms)
    return {
        **{name: times[name].median_ms for name in times},
        "best dense / fxsparse": times.ratio(best, "fxsparse").median,
        "steps / fxsparse": times.ratio("single steps", "fxsparse").median,
    }


def _text(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)
