"""The option `--plan`: a file that measurements are read from, if it is there, and that new ones are added to."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torch import nn

import fxsparse
from fxsparse.cli.output import check_target, on_terminal
from fxsparse.inputs import ExampleInputs
from fxsparse.plan import Plan


def add_argument(group: Any) -> None:
    """Declare the option."""
    group.add_argument(
        "--plan",
        type=Path,
        metavar="FILE",
        help="a plan as JSON: what it has for just these inputs is followed without measuring, and what is measured "
        "is added to it; made if it does not exist",
    )


def read(arguments: argparse.Namespace) -> Plan | None:
    """Return the plan in the file; None where none is named, or the file is to be made.

    Raises:
        FxsparseError: the file holds no plan, or could not be written.
    """
    check_target(arguments.plan, "--plan")
    if arguments.plan is None or not arguments.plan.exists():
        return None
    return Plan.load(arguments.plan)


def calibrate(
    model: nn.Module,
    inputs: ExampleInputs,
    arguments: argparse.Namespace,
    plan: Plan | None,
    *,
    deterministic: bool = False,
) -> None:
    """Calibrate a model as the options ask for.

    Raises:
        FxsparseError: as `fxsparse.calibrate`.
    """
    given = {"margin": arguments.margin, "budget_s": arguments.budget, "deploy": arguments.deploy}
    fxsparse.calibrate(
        model,
        inputs,
        plan=plan,
        deterministic=deterministic,
        progress=on_terminal(),
        **{name: value for name, value in given.items() if value is not None},
    )


def write(model: nn.Module, arguments: argparse.Namespace) -> list[str]:
    """Write the model's plan to the file that is named, if any; return what to say about it.

    Raises:
        FxsparseError: the file cannot be written.
    """
    if arguments.plan is None:
        return []
    plan = model.__dict__.get("plan", Plan())
    plan.save(arguments.plan)
    count = len(plan.entries)
    return [f"The plan is in '{arguments.plan}' ({count} {'entry' if count == 1 else 'entries'})."]
