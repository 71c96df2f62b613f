"""Convert a pruned model, measure it on its inputs, and save it.

With --no-calibrate nothing is measured: each convolution follows the cost model's estimate until 'fxsparse calibrate'.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torch import nn

import fxsparse
from fxsparse import report as reports
from fxsparse.cli import arguments as options
from fxsparse.cli import models, plans
from fxsparse.cli.output import Outcome, check_target, on_terminal, size_of

HELP = "convert a pruned model, measure it on its inputs, and save it"
EPILOG = """\
examples:
  fxsparse convert nets:build --weights pruned.safetensors --input 8x3x32x32 --output fast.pt2
  fxsparse convert torchvision.models:resnet50 --prune 0.9 --input 1x3x224x224 \\
      --output fast.pt2 --report report.html --plan plan.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    options.add_model(parser)
    options.add_inputs(parser, required=True)
    options.add_settings(parser, measures=True)
    parser.add_argument("--no-calibrate", action="store_true", help="measure nothing: follow the cost model's estimate")
    group = parser.add_argument_group("files")
    group.add_argument("--output", type=Path, required=True, metavar="FILE", help="where the model is saved")
    group.add_argument("--freeze", action="store_true", help="drop what the plan does not use: smaller, and final")
    group.add_argument("--report", type=Path, metavar="FILE", help="write the report there as an HTML page")
    plans.add_argument(group)


def run(arguments: argparse.Namespace) -> Outcome:
    """Convert, save and report."""
    check_target(arguments.output, "--output")
    check_target(arguments.report, "--report")
    plan = plans.read(arguments)
    with models.surroundings(arguments):
        found = models.subject(arguments)
        settings = options.settings_of(arguments, progress=on_terminal(), calibrate=False)
        model = fxsparse.convert(found.model, found.masks, example_inputs=found.inputs, settings=settings)
        assert found.inputs is not None  # --input is required
        if not arguments.no_calibrate:
            plans.calibrate(model, found.inputs, arguments, plan)
        if arguments.freeze:
            fxsparse.freeze(model)
        return finished(model, arguments, found.notes)


def finished(model: nn.Module, arguments: argparse.Namespace, notes: tuple[str, ...]) -> Outcome:
    """Write the files that the options ask for, and say so."""
    report = reports.report_of(model)
    by_modules = report.rung == "modules"
    if by_modules:
        fxsparse.save_weights(model, arguments.output)
        notes += (
            "The model was captured module by module, so its own code runs and only its weights are saved: "
            "fxsparse.load_weights(path, model) reads them.",
        )
    else:
        fxsparse.save(model, arguments.output)
    size = arguments.output.stat().st_size
    values: dict[str, Any] = {
        "output": str(arguments.output),
        "kind": "weights" if by_modules else "model",
        "bytes": size,
        "notes": list(notes),
        "report": report.to_dict(),
    }
    lines = [str(report), *(f"Note: {note}" for note in notes)]
    if arguments.report is not None:
        report.to_html(arguments.report)
        values["html"] = str(arguments.report)
        lines.append(f"The report is in '{arguments.report}'.")
    lines += plans.write(model, arguments)
    lines.append(f"Saved '{arguments.output}' ({size_of(size)}).")
    return Outcome(values, "\n".join(lines))
