"""Convert every model of the zoos and compare with the masked dense model: `python -m benchmarks zoo`.

Every classification model of torchvision and a fixed list of timm's CNNs, pruned by magnitude to 10 % layer
by layer, with random weights. Nothing is timed: the sites follow the cost model's estimate. The converted
model sees new images, in two batch sizes, of which only one was there at conversion. What is allowed to
differ: `fxsparse/output_agreement.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import math
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn
from torch.fx import GraphModule, Node

import fxsparse
from benchmarks import models
from fxsparse import sites
from fxsparse.magnitude import magnitude_masks
from fxsparse.output_agreement import allowed_error, largest_error, own_error

# A conversion's peak in bytes per parameter: two copies, the float64 reference and the regrouping's tables.
_BYTES_PER_PARAMETER = 22


@dataclasses.dataclass
class Entry:
    """What became of one model.

    Attributes:
        family, name: which model.
        status: "ok", "FAILED" or "skipped".
        error: what failed or why it was skipped, else "".
        details: the traceback, else "".
        size: pixels of the input's side.
        rung: the capture rung.
        refused: why each earlier rung refused.
        notes: of the report.
        convolutions, sparse: rows of the report, and those that run sparse.
        dense_reasons: how often each reason keeps a convolution dense.
        norms_left: batch norms that still stand directly behind a convolution, unfolded; None without a graph.
        rel_err, allowed: see `fxsparse/output_agreement.py`.
        seconds: wall-clock time of the conversion; total: of everything.
    """

    family: str
    name: str
    status: str = "FAILED"
    error: str = ""
    details: str = ""
    size: int | None = None
    rung: str = "-"
    refused: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    convolutions: int | None = None
    sparse: int | None = None
    dense_reasons: dict[str, int] = dataclasses.field(default_factory=dict)
    norms_left: int | None = None
    rel_err: float | None = None
    allowed: float | None = None
    seconds: float | None = None
    total: float = 0.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--only", default="*", metavar="GLOB", help="names of the models to run")
    parser.add_argument("--family", choices=models.FAMILIES, help="one zoo only")
    parser.add_argument("--limit", type=int, metavar="N", help="at most N models")
    parser.add_argument("--density", type=float, default=models.DENSITY, help="share of the weights kept")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--partitioner", choices=("consecutive", "clustering"), default="consecutive")
    parser.add_argument("--capture", default="auto", help="the rung of the capture ladder")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the command: print the table and return all numbers."""
    chosen = models.names(arguments.family, arguments.only)[: arguments.limit]
    entries = []
    for number, (family, name) in enumerate(chosen, 1):
        entry = convert_one(family, name, arguments)
        print(f"[{number}/{len(chosen)}] {_line(entry)}", flush=True)
        entries.append(entry)
    print()
    print(render(entries))
    missing = [family for family in models.FAMILIES if not models.installed(family)]
    if missing:
        print(f"Not installed, so not run: {', '.join(missing)}.")
    return {
        "entries": [dataclasses.asdict(e) for e in entries],
        "counts": counts(entries),
        "missing": missing,
    }


def convert_one(family: str, name: str, arguments: argparse.Namespace) -> Entry:
    """Convert one model and compare; never raises, the entry has the error."""
    entry = Entry(family, name)
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the zoos themselves: meshgrid, deprecated arguments
            _convert_one(entry, arguments)
    except Exception as error:  # the point of the command is to find what raises
        entry.error = f"{type(error).__name__}: {error}"
        entry.details = traceback.format_exc()
    entry.total = time.perf_counter() - start
    gc.collect()
    return entry


def _convert_one(entry: Entry, arguments: argparse.Namespace) -> None:
    model = models.build(entry.family, entry.name)
    needed = _BYTES_PER_PARAMETER * sum(p.numel() for p in model.parameters())
    if needed > _available_memory():
        entry.status = "skipped"
        entry.error = f"needs about {needed / 2**30:.0f} GiB of memory, {_available_memory() / 2**30:.0f} are free"
        return
    example = models.smallest_input(model, batch=2)
    entry.size = example.shape[-1]
    masks = magnitude_masks(model, arguments.density)
    models.prepare(model, masks, example)
    fresh = torch.randn(5, *example.shape[1:], generator=torch.Generator().manual_seed(1))
    wanted, own = own_error(model, fresh)
    dtype = getattr(torch, arguments.dtype)
    if dtype == torch.float64:
        model, fresh, example = model.double(), fresh.double(), example.double()
        wanted = model(fresh)
    entry.allowed = allowed_error(own, dtype)
    models.fill_pruned(model, masks)

    start = time.perf_counter()
    converted = _convert(model, masks, example, arguments)
    entry.seconds = time.perf_counter() - start
    report = converted.report
    assert isinstance(report, fxsparse.Report)
    entry.rung, entry.refused, entry.notes = report.rung, report.refused, list(report.notes)
    entry.convolutions, entry.sparse = len(report.rows), report.sparse
    entry.dense_reasons = dict(Counter(row.reason for row in report.rows if row.path != "sparse"))
    entry.norms_left = _norms_left(converted)
    entry.rel_err = _error(converted, fresh, wanted)
    if entry.rel_err <= entry.allowed:
        entry.status = "ok"
    else:
        entry.error = f"differs from the masked dense model by {entry.rel_err:.3g} (allowed {entry.allowed:.3g})"


def _convert(model: nn.Module, masks: dict[str, Tensor], example: Tensor, arguments: argparse.Namespace) -> nn.Module:
    settings = fxsparse.Settings(
        calibrate=False,
        cache=False,
        capture=arguments.capture,
        target=fxsparse.Target(partitioner=arguments.partitioner),
    )
    return fxsparse.convert(model, masks, example_inputs=(example,), settings=settings)


def _error(converted: nn.Module, fresh: Tensor, wanted: Any) -> float:
    """Return the worse error of a batch of 2, as at conversion, and of a batch of 3 where the graph serves
    it."""
    errors = []
    static = any("batch size of the example" in note for note in converted.report.notes)  # type: ignore[union-attr]
    with torch.no_grad():
        for part in (slice(0, 2),) if static else (slice(0, 2), slice(2, 5)):
            errors.append(largest_error(converted(fresh[part]), _rows(wanted, part)))
    return max(errors, key=lambda error: math.inf if math.isnan(error) else error)


def _norms_left(converted: nn.Module) -> int | None:
    if not isinstance(converted, GraphModule):
        return None
    functions = (F.batch_norm, torch.batch_norm, torch.ops.aten.batch_norm.default)

    def is_norm(node: Node) -> bool:
        if node.op == "call_module":
            return isinstance(converted.get_submodule(str(node.target)), nn.BatchNorm2d)
        return node.op == "call_function" and node.target in functions

    norms = [node for node in converted.graph.nodes if is_norm(node)]
    return sum(sites.site_of(norm.all_input_nodes[0]) is not None for norm in norms)


def _rows(output: Any, part: slice) -> Any:
    return torch.utils._pytree.tree_map_only(Tensor, lambda t: t[part], output)


def _available_memory() -> float:
    """Return the bytes that can still be allocated, or infinity where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), float("inf"))


def counts(entries: list[Entry]) -> dict[str, dict[str, int]]:
    """Count the entries by status and by rung."""
    return {
        "status": dict(Counter(e.status for e in entries)),
        "rung": dict(Counter(e.rung for e in entries if e.status != "skipped")),
    }


def render(entries: list[Entry]) -> str:
    """Return the table, the reasons why models fell to a later rung, the failures and the counts."""
    headers = ("model", "pixels", "rung", "sites", "sparse", "norms", "rel err", "allowed", "convert s", "status")
    lines = [tabulate([_cells(e) for e in entries], headers=headers, disable_numparse=True), ""]
    for entry in entries:
        lines += [f"{entry.name}: rung '{rung}' refused: {why}" for rung, why in entry.refused.items()]
    for entry in entries:
        if entry.status != "ok":
            lines += ["", f"{entry.status}: {entry.family} {entry.name}: {entry.error}", entry.details]
    totals = counts(entries)
    lines.append("")
    for what, numbers in totals.items():
        lines.append(f"By {what}: " + ", ".join(f"{key} {number}" for key, number in sorted(numbers.items())) + ".")
    lines.append(f"{len(entries)} models in {sum(e.total for e in entries) / 60:.1f} minutes.")
    return "\n".join(lines)


def _cells(entry: Entry) -> list[str]:
    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    return [
        f"{entry.family} {entry.name}",
        number(entry.size, "d"),
        entry.rung,
        number(entry.convolutions, "d"),
        number(entry.sparse, "d"),
        number(entry.norms_left, "d"),
        number(entry.rel_err, ".1e"),
        number(entry.allowed, ".1e"),
        number(entry.seconds, ".1f"),
        entry.status,
    ]


def _line(entry: Entry) -> str:
    return "  ".join([*_cells(entry), f"{entry.total:.1f} s", entry.error[:200]])
