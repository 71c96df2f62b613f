"""Print what a file holds, without loading its weights: a saved model, its weights, a plan, or plain tensors."""

from __future__ import annotations

import argparse
from pathlib import Path

from safetensors import SafetensorError, safe_open
from tabulate import tabulate

from fxsparse import saving
from fxsparse.cli.output import Outcome, size_of
from fxsparse.cli.tensor_files import is_converted
from fxsparse.errors import FxsparseError
from fxsparse.plan import Plan

HELP = "print what a file holds, without loading its weights"
EPILOG = """\
examples:
  fxsparse info fast.pt2
  fxsparse info plan.json --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("file", type=Path, metavar="FILE", help="a saved model or its weights, a plan, or safetensors")


def run(arguments: argparse.Namespace) -> Outcome:
    """Look at the file's beginning, read what it is, and print it."""
    path: Path = arguments.file
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise FxsparseError(f"'{path}' cannot be read ({error.strerror}). Name a file.") from error
    if start[:1] == b"{":
        return _plan(path)
    if start[8:] == b"{":  # the length of a JSON header, and the header: safetensors
        return _tensors(path)
    return _saved(path)


def _saved(path: Path) -> Outcome:
    saved = saving.info(path)
    versions = ", ".join(f"{name} {version}" for name, version in saved.versions.items())
    parts = ", ".join(f"{name} {size_of(count)}" for name, count in saved.parts.items())
    lines = [
        f"{path}: fxsparse {saved.kind}, {saved.dtype} on {saved.device}, {size_of(saved.bytes)} ({parts}).",
        f"Versions: {versions}.",
        "",
        str(saved.report),
    ]
    if saved.plan.entries:
        lines += ["", _plan_table(saved.plan)]
    return Outcome(saved.to_dict(), "\n".join(lines))


def _plan(path: Path) -> Outcome:
    plan = Plan.load(path)
    size = path.stat().st_size
    text = f"{path}: fxsparse plan, {size_of(size)}.\n\n{_plan_table(plan)}"
    return Outcome({"kind": "plan", "bytes": size, "plan": plan.to_dict()}, text)


def _plan_table(plan: Plan) -> str:
    rows = []
    for entry in plan.entries:
        sparse = sum(site.path == "sparse" for site in entry.sites.values())
        gain = entry.model_vanilla_ms / entry.model_ms if entry.model_vanilla_ms and entry.model_ms else None
        rows.append(
            (
                entry.key.device,
                entry.key.dtype,
                ", ".join("x".join(map(str, shape)) for shape in entry.key.shapes),
                entry.key.deploy,
                f"{sparse} of {len(entry.sites)}",
                len(entry.moves),
                "-" if gain is None else f"{gain:.2f}x",
            )
        )
    headers = ("measured on", "dtype", "inputs", "deployment", "sparse", "moves", "gain")
    return tabulate(rows, headers=headers, disable_numparse=True)


def _tensors(path: Path) -> Outcome:
    """Describe a safetensors file by its header."""
    if is_converted(path):
        return _saved(path)
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            parts = {name: file.get_slice(name) for name in names}
            tensors = {name: {"dtype": part.get_dtype(), "shape": part.get_shape()} for name, part in parts.items()}
    except SafetensorError as error:
        raise FxsparseError(f"'{path}' is no usable safetensors file ({error}). Save it again.") from error
    size = path.stat().st_size
    rows = [(name, t["dtype"], "x".join(map(str, t["shape"])) or "scalar") for name, t in tensors.items()]
    table = tabulate(rows, headers=("tensor", "dtype", "shape"), disable_numparse=True)
    text = f"{path}: {len(tensors)} tensors in safetensors, {size_of(size)}.\n\n{table}"
    return Outcome({"kind": "safetensors", "bytes": size, "tensors": tensors}, text)
