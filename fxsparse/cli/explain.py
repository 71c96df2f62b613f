"""Say what would become of every convolution, without measuring and without saving anything.

With --input the report has the shapes and multiply-adds of every convolution.
"""

from __future__ import annotations

import argparse

import fxsparse
from fxsparse.cli import arguments as options
from fxsparse.cli import models
from fxsparse.cli.output import Outcome, on_terminal

HELP = "say what would become of every convolution, without measuring"
EPILOG = """\
examples:
  fxsparse explain nets:build --masks masks.safetensors
  fxsparse explain torchvision.models:resnet50 --prune 0.9 --input 1x3x224x224 --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    options.add_model(parser)
    options.add_inputs(parser, required=False)
    options.add_settings(parser, measures=False)


def run(arguments: argparse.Namespace) -> Outcome:
    """Convert without measuring, and report."""
    with models.surroundings(arguments):
        found = models.subject(arguments)
        settings = options.settings_of(arguments, progress=on_terminal())
        report = fxsparse.explain(found.model, found.masks, example_inputs=found.inputs, settings=settings)
    text = "\n".join([str(report), *(f"Note: {note}" for note in found.notes)])
    return Outcome({"notes": list(found.notes), "report": report.to_dict()}, text)
