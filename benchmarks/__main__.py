"""`python -m benchmarks COMMAND`: prints a table; `--json PATH` writes all the numbers."""

from __future__ import annotations

import argparse
import importlib
import json
import platform
from pathlib import Path
from typing import Any

import torch

import fxsparse

COMMANDS = {
    "zoo": "convert the models of torchvision and timm and compare with the masked dense ones",
    "face": "a face detector that was really pruned, converted without loss",
    "lth": "a VGG-16 lottery ticket in the paper's own blocks",
    "layers": "single convolutions, regrouped and unstructured, against the best dense kernel",
}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run one command; return what `--json` writes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    modules = {}
    for name, what in COMMANDS.items():
        sub = commands.add_parser(name, help=what, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        modules[name] = importlib.import_module(f"benchmarks.{name}")
        modules[name].add_arguments(sub)
        sub.add_argument("--json", type=Path, metavar="PATH", help="write all numbers to this file")
    arguments = parser.parse_args(argv)
    print(_render_environment())
    result = {
        "command": arguments.command,
        "environment": environment(),
        **modules[arguments.command].run(arguments),
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    return result


def environment() -> dict[str, Any]:
    """Return what the numbers depend on besides the code."""
    return {
        "torch": torch.__version__,
        "fxsparse": fxsparse.__version__,
        "cpu kernels": fxsparse.capabilities().cpu,
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _render_environment() -> str:
    return ", ".join(f"{key} {value}" for key, value in environment().items())


if __name__ == "__main__":
    main()
