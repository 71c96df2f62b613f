"""`python -m benchmarks COMMAND`: prints a table; `--json PATH` writes all the numbers."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

import torch

import fxsparse
from benchmarks.results import Results
from fxsparse.plan import device_name

COMMANDS = {
    "zoo": "convert the models of torchvision and timm and compare with the masked dense ones",
    "face": "a face detector that was really pruned, converted without loss",
    "lth": "a VGG-16 lottery ticket in the paper's own blocks",
    "layers": "single convolutions, regrouped and unstructured, against the best dense kernel",
    "pruning": "accuracy against measured speed: MNIST, FFDNet, EfficientNet-Lite0",
    "sizes": "bytes on disk: dense, converted and frozen",
    "networks": "whole networks: dense, step by step, and with epilogues and regions",
    "cpu": "pruned networks against the best dense engines of the CPU: eager, compiled, onnxruntime, OpenVINO",
    "correctness": "random convolutions on the CPU's kernels against float64",
    "cuda": "on a GPU: whole networks against torch.compile and CUDA graphs; single convolutions against cuDNN",
    "tuner": "how often calibration changes its mind, and what its choices cost",
    "never-slower": "20 models at every density: the calibrated model must not be slower than the vanilla one",
}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run one command; return what `--json` writes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    modules = {}
    for name, what in COMMANDS.items():
        sub = commands.add_parser(name, help=what, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        modules[name] = importlib.import_module(f"benchmarks.{name.replace('-', '_')}")
        modules[name].add_arguments(sub)
        sub.add_argument("--json", type=Path, metavar="PATH", help="write all numbers to this file")
    arguments = parser.parse_args(argv)
    print(_render_environment())
    header = {"command": arguments.command, "environment": environment()}
    arguments.results = Results(arguments.json, header)
    return arguments.results.save(modules[arguments.command].run(arguments))


def environment() -> dict[str, Any]:
    """Return what the numbers depend on besides the code."""
    return {
        "torch": torch.__version__,
        "fxsparse": fxsparse.__version__,
        "cpu kernels": fxsparse.capabilities().cpu,
        "cpu": device_name(torch.device("cpu")),
        "threads": torch.get_num_threads(),
    }


def _render_environment() -> str:
    return ", ".join(f"{key} {value}" for key, value in environment().items())


if __name__ == "__main__":
    sys.exit(not main().get("ok", True))
