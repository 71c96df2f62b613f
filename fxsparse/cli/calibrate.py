"""Measure a saved model again, for other inputs or on another device, and save it with what was found."""

from __future__ import annotations

import argparse
from pathlib import Path

from fxsparse.cli import arguments as options
from fxsparse.cli import models, plans
from fxsparse.cli.convert import finished
from fxsparse.cli.output import Outcome, check_target
from fxsparse.errors import FxsparseError

HELP = "measure a saved model again, for other inputs or on another device"
EPILOG = """\
examples:
  fxsparse calibrate fast.pt2 --input 64x3x32x32 --output fast64.pt2
  fxsparse calibrate fast.pt2 --input 8x3x32x32 --plan plan.json --deterministic --output fast8.pt2
  fxsparse calibrate nets:build --weights fast.safetensors --input 8x3x32x32 --output fast8.safetensors
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    kinds = "a file that fxsparse.save wrote, or package.module:factory with --weights that save_weights wrote"
    options.add_model(parser, kinds=kinds, masks=False)
    parser.set_defaults(regroup=False)
    options.add_inputs(parser, required=True)
    group = parser.add_argument_group("calibration")
    options.add_measuring(group)
    group.add_argument(
        "--deterministic",
        action="store_true",
        help="measure nothing: follow the entry of the model's plan, or of --plan, that is nearest to the inputs",
    )
    files = parser.add_argument_group("files")
    files.add_argument("--output", type=Path, required=True, metavar="FILE", help="where the model is saved")
    files.add_argument("--report", type=Path, metavar="FILE", help="write the report there as an HTML page")
    plans.add_argument(files)


def run(arguments: argparse.Namespace) -> Outcome:
    """Load, measure, save and report."""
    check_target(arguments.output, "--output")
    check_target(arguments.report, "--report")
    plan = plans.read(arguments)
    with models.surroundings(arguments):
        found = models.subject(arguments, takes_saved=True)
        if not found.saved:
            raise FxsparseError(
                f"'{arguments.model}' makes a model that is not converted. Convert it first: see 'fxsparse convert'."
            )
        assert found.inputs is not None  # --input is required
        plans.calibrate(found.model, found.inputs, arguments, plan, deterministic=arguments.deterministic)
        return finished(found.model, arguments, found.notes)
