"""Is a calibrated model ever slower than the vanilla one? `python -m benchmarks never-slower`.

Twenty models of the zoos, pruned to several densities, at two batch sizes. Each is converted once and then
calibrated for one batch size after the other, as a user would who needs both: the later calibration extends
the plan of the earlier. After each, the outputs are checked and the model is timed against the vanilla one,
which is the same graph with every site as captured, so that folded batch norms give no advantage. The ratio is
vanilla time over calibrated time, paired by round; below 0.98 is more than noise, and the command fails.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import fnmatch
import gc
import statistics
import time
import traceback
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from tabulate import tabulate

import fxsparse
from benchmarks.pruned import STRUCTURES, ZOO, Start, start
from fxsparse.arms import Arm
from fxsparse.timing import Ratio, interleaved

LEAST = 0.98
DENSITIES = (1.0, 0.5, 0.2, 0.1, 0.05)
BATCHES = (1, 16)
RULE = (
    f"A ratio below {LEAST} is measured once more, for twice as long; the second measurement decides, "
    "and the first is kept beside it."
)


@dataclasses.dataclass
class Cell:
    """One model, pruned one way, at one batch size.

    Attributes:
        model, size, density, structure, batch: which. Nothing pruned is "unstructured".
        error, details: why there are no numbers, and the traceback; else "".
        sites, sparse, moves: convolutions, those that run sparse, and layout changes in the plan.
        rel_err, allowed: see `fxsparse/output_agreement.py`.
        convert_s: wall-clock seconds from the bare model to the converted one; None after the first batch size.
        calibrate_s: wall-clock seconds.
        vanilla_ms, calibrated_ms: medians of one run of the model.
        ratio: vanilla over calibrated; what the verdict is about.
        first: the measurement that fell below `LEAST` and that `ratio` replaced, or None.
        channels_last: as `ratio`, the vanilla model in channels_last over the calibrated one.
    """

    model: str
    size: int
    density: float
    structure: str
    batch: int
    error: str = ""
    details: str = ""
    sites: int = 0
    sparse: int = 0
    moves: int = 0
    rel_err: float | None = None
    allowed: float | None = None
    convert_s: float | None = None
    calibrate_s: float | None = None
    vanilla_ms: float | None = None
    calibrated_ms: float | None = None
    ratio: Ratio | None = None
    first: Ratio | None = None
    channels_last: Ratio | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """What names the cell."""
        return self.model, self.size, self.density, self.structure, self.batch

    @property
    def ok(self) -> bool:
        """True if it was measured and is not slower."""
        return not self.error and self.ratio is not None and self.ratio.median >= LEAST

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Cell:
        """Read what `dataclasses.asdict` wrote."""
        ratios = {name: Ratio(**values[name]) for name in ("ratio", "first", "channels_last") if values[name]}
        return Cell(**{**values, **ratios})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--only", default="*", metavar="GLOB", help="names of the models to run")
    parser.add_argument("--batch", type=int, nargs="+", default=list(BATCHES), help="batch sizes, in this order")
    parser.add_argument("--density", type=float, nargs="+", default=list(DENSITIES), help="shares kept")
    parser.add_argument("--structure", choices=STRUCTURES, nargs="+", default=list(STRUCTURES))
    parser.add_argument("--size", type=int, metavar="PIXELS", help="of the images' sides; None takes each model's own")
    parser.add_argument("--partitioner", choices=("consecutive", "clustering"), default="clustering")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="for a calibration; None takes the library's")
    parser.add_argument("--measure", type=float, default=3.0, metavar="SECONDS", help="for one measurement")
    parser.add_argument("--resume", action="store_true", help="skip what the file of --json has already")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the command: print a line per cell and the summary; return all numbers."""
    settings = {key: getattr(arguments, key) for key in ("partitioner", "budget", "measure")}
    done = earlier(arguments.results.load(), settings) if arguments.resume else []
    chosen = conversions(arguments)
    known = {cell.key for cell in done}
    todo = [cells for cells in chosen if not {cell.key for cell in cells} <= known]
    count = sum(map(len, todo))
    print(f"{count} cells to measure; {len(done)} are in the file already. {RULE}", flush=True)
    number = 0
    for cells in todo:
        keys = {cell.key for cell in cells}
        # Calibrations of one model build on each other, so a conversion that was cut is done again as a whole.
        done = [cell for cell in done if cell.key not in keys]
        for cell in measure(cells, arguments):
            done.append(cell)
            number += 1
            arguments.results.save(result(done, settings, left=count - number))
            print(f"[{number}/{count}] {line(cell)}", flush=True)
        gc.collect()
    print(f"\n{render(done)}")
    return result(done, settings, left=0)


def conversions(arguments: argparse.Namespace) -> list[list[Cell]]:
    """Return the cells to measure, those of one conversion together."""
    return [
        [Cell(name, arguments.size or size, density, structure, batch) for batch in arguments.batch]
        for name, (_, size) in ZOO.items()
        if fnmatch.fnmatchcase(name, arguments.only)
        for density in arguments.density
        # Where nothing is pruned the two structures are one.
        for structure in (arguments.structure if density < 1 else STRUCTURES[:1])
    ]


def earlier(file: dict[str, Any], settings: dict[str, Any]) -> list[Cell]:
    """Return the measured cells of an earlier run; what failed is run again.

    Raises:
        SystemExit: that run had other settings, so its cells do not compare with new ones.
    """
    if file and file["settings"] != settings:
        raise SystemExit(f"The earlier run had the settings {file['settings']}, now they are {settings}.")
    cells = [Cell.from_dict(values) for values in file.get("cells", ())]
    return [cell for cell in cells if not cell.error]


def measure(cells: list[Cell], arguments: argparse.Namespace) -> Iterator[Cell]:
    """Convert once, then calibrate and measure one batch size after the other; yield each cell, filled in.

    Never raises: a cell has its error.
    """
    first = cells[0]
    target = fxsparse.Target(partitioner=arguments.partitioner)
    settings = fxsparse.Settings(cache=False, target=target)
    batches = [cell.batch for cell in cells]
    begun: Start | None = None
    for cell in cells:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the zoos themselves
                if begun is None:
                    clock = time.perf_counter()
                    begun = start(first.model, first.size, first.density, first.structure, batches, settings)
                    first.convert_s = time.perf_counter() - clock
                _measure_one(cell, begun, arguments)
        except Exception as error:  # the other cells are to be measured all the same
            cell.error = f"{type(error).__name__}: {error}"
            cell.details = traceback.format_exc()
        yield cell


def _measure_one(cell: Cell, begun: Start, arguments: argparse.Namespace) -> None:
    model, x = begun.model, begun.inputs[cell.batch]
    clock = time.perf_counter()
    fxsparse.calibrate(model, x, budget_s=arguments.budget)
    cell.calibrate_s = time.perf_counter() - clock
    entry = model.plan.entries[-1]  # type: ignore[union-attr]
    cell.sites, cell.moves = len(entry.sites), len(entry.moves)
    cell.sparse = sum(site.path == "sparse" for site in entry.sites.values())
    last = copy.deepcopy(begun.vanilla).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    arms: dict[str, Arm] = {
        "vanilla": partial(begun.vanilla, x),
        "calibrated": partial(model, x),
        "channels_last": partial(last, x.contiguous(memory_format=torch.channels_last)),
    }
    cell.allowed = begun.allowed[cell.batch]
    cell.rel_err = begun.check(cell.batch, arms)
    _time(cell, arms, arguments.measure)
    if not cell.ok:
        cell.first = cell.ratio
        _time(cell, arms, 2 * arguments.measure)


def _time(cell: Cell, arms: dict[str, Arm], budget_s: float) -> None:
    times = interleaved(arms, torch.device("cpu"), budget_s=budget_s, min_rounds=11, max_rounds=2001)
    cell.vanilla_ms, cell.calibrated_ms = times["vanilla"].median_ms, times["calibrated"].median_ms
    cell.ratio = times.ratio("vanilla", "calibrated")
    cell.channels_last = times.ratio("channels_last", "calibrated")


def result(cells: list[Cell], settings: dict[str, Any], left: int) -> dict[str, Any]:
    """Return what `--json` writes; `left` cells are still to be measured."""
    return {
        "ok": bool(cells) and not left and all(cell.ok for cell in cells),
        "left": left,
        "worst": min((ratio for ratio, _ in _measured(cells)), default=None),
        "rule": RULE,
        "settings": settings,
        "summary": summary(cells),
        "cells": [dataclasses.asdict(cell) for cell in cells],
    }


def _measured(cells: list[Cell]) -> list[tuple[float, Cell]]:
    return [(cell.ratio.median, cell) for cell in cells if cell.ratio is not None and not cell.error]


def summary(cells: list[Cell]) -> list[dict[str, Any]]:
    """Return the spread of the ratio over the models, by batch size, density and structure."""
    groups: dict[tuple[int, float, str], list[tuple[float, str]]] = {}
    for ratio, cell in _measured(cells):
        groups.setdefault((cell.batch, cell.density, cell.structure), []).append((ratio, cell.model))
    rows = []
    for (batch, density, structure), found in sorted(groups.items(), key=lambda item: (item[0][0], -item[0][1])):
        ratios = [ratio for ratio, _ in found]
        rows.append(
            {
                "batch": batch,
                "density": density,
                "structure": structure if density < 1 else "-",
                "models": len(found),
                "min": min(ratios),
                "median": statistics.median(ratios),
                "max": max(ratios),
                "worst": min(found)[1],
            }
        )
    return rows


def line(cell: Cell) -> str:
    """Return what is printed of a cell as soon as it is measured."""
    which = f"{cell.model}@{cell.size}  {1 - cell.density:.0%} zeros {cell.structure}  batch {cell.batch}"
    if cell.error or cell.ratio is None or cell.channels_last is None:
        return f"{which}  FAILED  {cell.error[:200]}"
    again = f" (first {_interval(cell.first)})" if cell.first else ""
    return (
        f"{which}  {cell.sparse}/{cell.sites} sparse, {cell.moves} moves  vanilla {cell.vanilla_ms:.2f} ms, "
        f"calibrated {cell.calibrated_ms:.2f} ms, ratio {_interval(cell.ratio)}{again}, "
        f"against channels_last {_interval(cell.channels_last)}  calibrated in {cell.calibrate_s:.1f} s"
        f"{'' if cell.ok else '  SLOWER'}"
    )


def _interval(ratio: Ratio) -> str:
    return f"{ratio.median:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"


def render(cells: list[Cell]) -> str:
    """Return the summary table, what is slower or failed, and the verdict."""
    rows = [
        [
            row["batch"],
            f"{1 - row['density']:.0%}",
            row["structure"],
            row["models"],
            *(f"{row[key]:.3f}" for key in ("min", "median", "max")),
            row["worst"],
        ]
        for row in summary(cells)
    ]
    headers = ("batch", "zeros", "mask", "models", "min", "median", "max", "worst model")
    lines = [tabulate(rows, headers=headers, disable_numparse=True), ""]
    lines += [line(cell) for cell in cells if not cell.ok]
    lines += [cell.details for cell in cells if cell.details]
    measured = _measured(cells)
    if measured:
        worst = min(measured, key=lambda pair: pair[0])[1]
        lines.append(f"Worst of {len(measured)} cells: {line(worst)}")
    slower = sum(not cell.ok for _, cell in measured)
    failed = len(cells) - len(measured)
    again = sum(cell.first is not None for cell in cells)
    lines.append(f"{slower} of {len(cells)} cells below {LEAST}, {failed} failed, {again} measured twice. {RULE}")
    return "\n".join(lines)
