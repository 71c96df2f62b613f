"""What pruning costs in accuracy and brings in time: `python -m benchmarks pruning {mnist,ffdnet,efficientnet}`.

Every method's masks go through `fxsparse.convert` and calibration, and speed-ups are measured against the best dense
way to run the network (`fxsparse/arms.py`). Trainings take long: finished cells are kept in the folder `--state`, and
the same command goes on from there; `--measure` measures the speeds of what is there. `plot` draws the pictures of the
documentation from the numbers in `docs/data`, and `resnet50` says how long pruning one takes.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

EXPERIMENTS = ("mnist", "ffdnet", "efficientnet", "resnet50", "plot")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("experiment", choices=EXPERIMENTS, help="which")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of splits, weights and batches")
    parser.add_argument("--nets", nargs="+", default=["vgg", "resnet"], help="of mnist: vgg, resnet")
    parser.add_argument("--methods", nargs="+", default=None, help="only these")
    parser.add_argument("--state", type=Path, default=Path("pruning-state"), help="folder for what is finished")
    parser.add_argument("--data", type=Path, default=None, help="folder of the packages with photos and weights")
    parser.add_argument("--measure", action="store_true", help="measure speeds only, of what is trained")
    parser.add_argument("--seconds", type=float, default=None, help="stop after so many, between two cells")
    parser.add_argument("--steps", type=int, default=3000, help="of ffdnet: steps of the long training")
    parser.add_argument("--device", default="cpu", help="of trainings: cpu or cuda")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one experiment."""
    arguments.state.mkdir(parents=True, exist_ok=True)
    module = importlib.import_module(f"benchmarks.pruning_{arguments.experiment}")
    result: dict[str, Any] = module.run(arguments)
    return result
