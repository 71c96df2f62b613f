"""Prune a dense model in blocks, without training, to a share of its time, and save its weights and masks.

The weights that stay are fitted to a few hundred unlabelled inputs, layer by layer. 'fxsparse convert' with the saved
weights makes the pruned model fast.
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import fxsparse
from fxsparse.cli import arguments as options
from fxsparse.cli import models, tensor_files
from fxsparse.cli.output import Outcome, check_target, on_terminal, size_of
from fxsparse.errors import FxsparseError
from fxsparse.pruning.costs import SOURCES
from fxsparse.pruning.strips import PARTITIONERS

HELP = "prune a dense model in blocks, without training, to a share of its time"
EPILOG = """\
examples:
  fxsparse prune nets:build --weights dense.safetensors --data photos.safetensors \\
      --budget 0.4 --output pruned.safetensors
  fxsparse prune torchvision.models:resnet50 --weights dense.pt --data photos.pt --budget 30ms \\
      --output pruned.safetensors
  fxsparse convert torchvision.models:resnet50 --weights pruned.safetensors --input 1x3x224x224 \\
      --output fast.pt2
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    default = fxsparse.PruneSettings()
    options.add_model(parser, masks=False)
    options.add_inputs(parser, required=False)
    group = parser.add_argument_group("pruning")
    group.add_argument(
        "--budget", required=True, metavar="B", help="share of the dense time to leave, as 0.4, or milliseconds: 2.5ms"
    )
    group.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="FILE",
        help="unlabelled inputs: tensors [N, ...] in the order of the model's arguments, safetensors or torch.save",
    )
    group.add_argument("--samples", type=int, default=default.samples, metavar="N", help="inputs that are used")
    group.add_argument(
        "--include", action="append", metavar="RULE", help="convolutions to prune: name, glob or re:pattern"
    )
    group.add_argument("--exclude", action="append", metavar="RULE", help="convolutions to leave dense")
    group.add_argument(
        "--cost", choices=SOURCES, default=default.cost, help="how layers are priced (default: measured)"
    )
    group.add_argument("--groups", choices=PARTITIONERS, default=default.partitioner, help="how rows are grouped")
    group.add_argument("--seconds", type=float, metavar="S", help="for each calibration, about")
    group.add_argument("--output", type=Path, required=True, metavar="FILE", help="where weights and masks are saved")
    parser.set_defaults(regroup=False)


def run(arguments: argparse.Namespace) -> Outcome:
    """Prune, save and report."""
    check_target(arguments.output, "--output")
    budget: float | str = arguments.budget
    with contextlib.suppress(ValueError):  # milliseconds, or nothing that `prune` takes
        budget = float(arguments.budget)
    with models.surroundings(arguments):
        found = models.subject(arguments)
        like = next(parameter for parameter in found.model.parameters())
        data = tuple(value.to(like) if value.is_floating_point() else value for value in _data(arguments.data))
        settings = fxsparse.PruneSettings(
            include=tuple(arguments.include or ("*",)),
            exclude=tuple(arguments.exclude or ()),
            samples=arguments.samples,
            cost=arguments.cost,
            partitioner=arguments.groups,
            calibrate_s=arguments.seconds,
            progress=on_terminal(),
        )
        pruned = fxsparse.prune(found.model, budget, [data], example_inputs=found.inputs, settings=settings)
    tensors = {name: value.contiguous().cpu().clone() for name, value in pruned.model.state_dict().items()}
    try:
        save_file(tensors, arguments.output)
    except OSError as error:
        raise FxsparseError(f"--output: '{arguments.output}' cannot be written ({error}).") from error
    size = arguments.output.stat().st_size
    values: dict[str, Any] = {
        "output": str(arguments.output),
        "bytes": size,
        "layers": list(pruned.masks),
        "report": pruned.report.to_dict(),
    }
    text = f"{pruned.report}\nSaved '{arguments.output}' ({size_of(size)}); the masks are its zeros."
    return Outcome(values, text)


def _data(path: Path) -> list[Tensor]:
    """Read the inputs."""
    found = tensor_files.read(path, "--data")
    sizes = {len(value) for value in found.values() if value.dim()}
    if len(sizes) != 1 or any(not value.dim() for value in found.values()):
        raise FxsparseError(
            f"--data: '{path}' holds tensors of {sorted(sizes) or 'no'} inputs. Give one tensor for each argument of "
            "the model, with as many inputs in the first dimension of each."
        )
    return [torch.as_tensor(value) for value in found.values()]
