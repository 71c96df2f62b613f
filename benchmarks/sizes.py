"""Bytes on disk: the dense weights, the converted model, and the frozen one, as files that load again."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tabulate import tabulate
from torch import nn

import fxsparse
from benchmarks import models, pruned


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--source", choices=("torchvision", "timm"), default="torchvision", help="where the model is")
    parser.add_argument("--model", default="resnet50", help="its name there")
    parser.add_argument("--density", type=float, default=0.1, help="share of the weights kept")
    parser.add_argument("--size", type=int, default=224, help="pixels of the images' sides")
    parser.add_argument("--budget", type=float, default=20.0, help="seconds for the calibration")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    rows = [_measure(arguments, structure) for structure in pruned.STRUCTURES]
    print(
        tabulate(
            [
                (
                    row["structure"],
                    f"{row['sparse']} of {row['sites']}",
                    *(f"{row[kind] / 1e6:.1f}" for kind in ("dense", "converted", "frozen")),
                    f"{row['dense'] / row['frozen']:.2f}x",
                )
                for row in rows
            ],
            headers=("masks", "sparse sites", "dense MB", "converted MB", "frozen MB", "dense / frozen"),
            tablefmt="github",
        )
    )
    return {"model": arguments.model, "density": arguments.density, "rows": rows}


def _measure(arguments: argparse.Namespace, structure: str) -> dict[str, Any]:
    model = models.build(arguments.source, arguments.model).eval()
    masks = pruned.make_masks(model, arguments.density, structure)
    models.fill_pruned(model, masks)
    x = torch.randn(1, 3, arguments.size, arguments.size)
    settings = fxsparse.Settings(budget_s=arguments.budget)
    converted = fxsparse.convert(model, masks, example_inputs=(x,), settings=settings)
    with tempfile.TemporaryDirectory() as folder:
        dense, fast, frozen = (Path(folder) / name for name in ("dense.safetensors", "fast.pt2", "frozen.pt2"))
        save_file(model.state_dict(), dense)
        fxsparse.save(converted, fast)
        _check(converted, fast, x)
        fxsparse.freeze(converted)
        fxsparse.save(converted, frozen)
        _check(converted, frozen, x)
        return {
            "structure": structure,
            "sites": len(converted.report.rows),
            "sparse": converted.report.sparse,
            "dense": dense.stat().st_size,
            "converted": fast.stat().st_size,
            "frozen": frozen.stat().st_size,
        }


@torch.inference_mode()
def _check(model: nn.Module, path: Path, x: torch.Tensor) -> None:
    if not torch.equal(fxsparse.load(path)(x), model(x)):
        raise RuntimeError(f"{path.name} does not compute what was saved.")
