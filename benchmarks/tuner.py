"""How good are calibration's decisions, and do they repeat? `python -m benchmarks tuner`.

One conversion is copied and calibrated several times at the usual budget, and once for ten times as long: that
long calibration is the reference. Three questions:

- flips: at which share of (site, repeat) is the path not the one that most repeats chose there? Only sites with
  a sparse candidate count. Sites whose two paths differ by less than 2 % in the reference are ties: a flip there costs
  nothing, so flips elsewhere are given on their own.
- path regret: how much longer do the chosen paths take, added up over the sites, than the best ones, at the
  reference's times? What the margin in favour of vanilla costs is in it, and what was given up at one site to save a
  change of layout at another; the reference's own regret shows how much that is.
- model regret: how much longer does the whole model take as calibrated than as the reference has it? Timed
  interleaved, every distinct outcome once.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from tabulate import tabulate
from torch import Tensor, nn

import fxsparse
from benchmarks.pruned import STRUCTURES, ZOO, Start, start
from fxsparse.arms import Arm
from fxsparse.timing import Ratio, interleaved

TIE = 0.02
LONGER = 10
# The last is the hard one: sparse and dense are close at many sites.
MASKS = (("unstructured", 0.1), ("regrouped", 0.1), ("unstructured", 0.2))

Paths = Mapping[str, str]  # by site, "vanilla" or "sparse"
Times = Mapping[str, tuple[float, float]]  # by site, milliseconds of vanilla and of sparse


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one or more of the repeats chose, measured as a whole model.

    Attributes:
        repeats: how many repeats chose exactly this (paths and layouts).
        as_reference: whether the reference chose it too: its times then show the noise.
        over_reference: its time over the reference's, paired by round.
        over_vanilla: the vanilla model's time over its own: above 1 it is faster.
    """

    repeats: int
    as_reference: bool
    over_reference: Ratio
    over_vanilla: Ratio


@dataclasses.dataclass(frozen=True)
class Case:
    """One model, pruned one way, at one batch size.

    Attributes:
        model, structure, density, batch: which.
        sites, ties: sites with a sparse candidate in the reference, and the ties among them.
        flips, clear_flips: shares of (site, repeat) that are not as most repeats: of all sites, without the ties.
        regrets: path regret of each repeat.
        reference_regret: path regret of the reference.
        seconds: of each repeat's calibration; reference_seconds: of the reference's.
        outcomes: distinct plans of the repeats, the most frequent first.
        times: by site, the reference's milliseconds of vanilla and of sparse.
        paths: what each repeat chose, by site; reference_paths: what the reference chose.
    """

    model: str
    structure: str
    density: float
    batch: int
    sites: int
    ties: int
    flips: float
    clear_flips: float
    regrets: list[float]
    reference_regret: float
    seconds: list[float]
    reference_seconds: float
    outcomes: list[Outcome]
    times: Times
    paths: list[Paths]
    reference_paths: Paths


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    names = ["resnet18", "mobilenet_v2", "vgg11_bn"]
    parser.add_argument("--models", choices=tuple(ZOO), nargs="+", default=names, metavar="NAME", help="which models")
    parser.add_argument("--density", type=float, nargs="+", help="shares kept; None is 0.1, and 0.2 unstructured")
    parser.add_argument("--structure", choices=STRUCTURES, nargs="+", default=list(STRUCTURES))
    parser.add_argument("--batch", type=int, default=1, help="batch size")
    parser.add_argument("--size", type=int, metavar="PIXELS", help="of the images' sides; None takes each model's own")
    parser.add_argument("--repeats", type=int, default=10, metavar="N", help="calibrations at the usual budget")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="for a calibration; None takes the library's")
    parser.add_argument("--measure", type=float, default=2.0, metavar="SECONDS", help="for each whole model timed")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the command: print the table and return all numbers."""
    given = [(structure, density) for density in arguments.density or () for structure in STRUCTURES]
    masks = [mask for mask in given or MASKS if mask[0] in arguments.structure]
    cases = []
    for name in arguments.models:
        for structure, density in masks:
            clock = time.perf_counter()
            cases.append(measure(name, structure, density, arguments))
            done = f"{name}, {structure}, {1 - density:.0%} zeros: done"
            print(f"{done} in {time.perf_counter() - clock:.0f} s", flush=True)
    print(f"\n{render(cases)}")
    return {"cases": [dataclasses.asdict(case) for case in cases]}


def measure(name: str, structure: str, density: float, arguments: argparse.Namespace) -> Case:
    """Calibrate copies of one conversion, and compare what they chose."""
    size, batch = arguments.size or ZOO[name][1], arguments.batch
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the zoos themselves
        begun = start(name, size, density, structure, [batch], fxsparse.Settings(cache=False))
    x = begun.inputs[batch]
    distinct: dict[Any, nn.Module] = {}  # by what was chosen; equal models need to be kept and timed only once
    chosen, paths, seconds = [], [], []
    for _ in range(arguments.repeats):
        model, took = calibrated(begun.model, x, arguments.budget)
        seconds.append(took)
        paths.append(paths_of(model))
        chosen.append(choices_of(model))
        distinct.setdefault(chosen[-1], model)
    usual = arguments.budget or statistics.median(seconds)
    reference, reference_seconds = calibrated(begun.model, x, LONGER * usual)
    times = times_of(reference)
    counts = Counter(chosen)
    outcomes = time_outcomes(begun, reference, [(distinct[key], n) for key, n in counts.most_common()], arguments)
    clear = [site for site in times if not is_tie(*times[site])]
    return Case(
        model=name,
        structure=structure,
        density=density,
        batch=batch,
        sites=len(times),
        ties=len(times) - len(clear),
        flips=flip_rate(paths, times),
        clear_flips=flip_rate(paths, clear),
        regrets=[regret(choice, times) for choice in paths],
        reference_regret=regret(paths_of(reference), times),
        seconds=seconds,
        reference_seconds=reference_seconds,
        outcomes=outcomes,
        times=times,
        paths=paths,
        reference_paths=paths_of(reference),
    )


def calibrated(model: nn.Module, x: Tensor, budget_s: float | None) -> tuple[nn.Module, float]:
    """Calibrate a copy; return it and the seconds that this took."""
    fresh = copy.deepcopy(model)
    clock = time.perf_counter()
    fxsparse.calibrate(fresh, x, budget_s=budget_s)
    return fresh, time.perf_counter() - clock


def time_outcomes(
    begun: Start, reference: nn.Module, models: Sequence[tuple[nn.Module, int]], arguments: argparse.Namespace
) -> list[Outcome]:
    """Time the distinct outcomes, each chosen by some number of repeats, with the reference and the vanilla model."""
    x = begun.inputs[arguments.batch]
    arms: dict[str, Arm] = {"vanilla": partial(begun.vanilla, x), "reference": partial(reference, x)}
    arms.update({f"outcome {i}": partial(model, x) for i, (model, _) in enumerate(models)})
    begun.check(arguments.batch, arms)
    budget_s = arguments.measure * len(arms)
    times = interleaved(arms, x.device, budget_s=budget_s, min_rounds=11, max_rounds=2001)
    return [
        Outcome(
            repeats=repeats,
            as_reference=choices_of(model) == choices_of(reference),
            over_reference=times.ratio(f"outcome {i}", "reference"),
            over_vanilla=times.ratio("vanilla", f"outcome {i}"),
        )
        for i, (model, repeats) in enumerate(models)
    ]


def _entry(model: nn.Module) -> Any:
    return model.plan.entries[-1]  # type: ignore[union-attr]


def paths_of(model: nn.Module) -> dict[str, str]:
    """Return each site's path in the newest entry of a model's plan."""
    return {name: site.path for name, site in _entry(model).sites.items()}


def choices_of(model: nn.Module) -> tuple[Any, ...]:
    """Return all that was chosen, to be compared: how each site runs, and the layout changes between them."""
    entry = _entry(model)
    sites = tuple((name, site.path, site.layout, site.packing) for name, site in sorted(entry.sites.items()))
    return sites, tuple(entry.moves)


def times_of(model: nn.Module) -> dict[str, tuple[float, float]]:
    """Return the milliseconds of vanilla and of sparse at every site where both were measured."""
    sites = _entry(model).sites.items()
    return {n: (s.vanilla_ms, s.sparse_ms) for n, s in sites if s.vanilla_ms is not None and s.sparse_ms is not None}


def is_tie(vanilla_ms: float, sparse_ms: float) -> bool:
    """Tell whether two times differ by less than `TIE`, as a share of the smaller."""
    return abs(vanilla_ms - sparse_ms) < TIE * min(vanilla_ms, sparse_ms)


def flip_rate(repeats: Sequence[Paths], sites: Any) -> float:
    """Return the share of (site, repeat) whose path is not the one that most repeats chose at the site.

    Args:
        repeats: what each repeat chose.
        sites: names of the sites that count; without any the share is 0.
    """
    flips = pairs = 0
    for site in sites:
        choices = Counter(paths[site] for paths in repeats)
        flips += choices.total() - max(choices.values())
        pairs += choices.total()
    return flips / pairs if pairs else 0.0


def regret(paths: Paths, times: Times) -> float:
    """Return by which share the chosen paths take longer than the best ones, added up over the sites of `times`."""
    best = sum(map(min, times.values()))
    taken = sum(sparse if paths[site] == "sparse" else vanilla for site, (vanilla, sparse) in times.items())
    return taken / best - 1 if best else 0.0


def render(cases: list[Case]) -> str:
    """Return the table."""
    rows = [
        [
            case.model,
            f"{case.structure} {1 - case.density:.0%}",
            case.sites,
            case.ties,
            f"{case.flips:.1%}",
            f"{case.clear_flips:.1%}",
            f"{statistics.mean(case.regrets):.2%} / {max(case.regrets):.2%}",
            f"{case.reference_regret:.2%}",
            len(case.outcomes),
            _model_regret(case.outcomes),
            f"{mean_over_vanilla(case.outcomes):.3f}",
            f"{statistics.median(case.seconds):.1f}",
            f"{case.reference_seconds:.0f}",
        ]
        for case in cases
    ]
    headers = (
        "model", "mask", "sites", "ties", "flips", "without ties", "path regret, mean / worst", "of reference",
        "plans", "model regret, mean / worst", "vanilla / calibrated", "calibration s", "reference s",
    )  # fmt: skip
    return tabulate(rows, headers=headers, disable_numparse=True)


def _model_regret(outcomes: list[Outcome]) -> str:
    worst = max((outcome.over_reference for outcome in outcomes), key=lambda ratio: ratio.median)
    interval = f"[{worst.low - 1:.1%}, {worst.high - 1:.1%}]"
    return f"{mean_model_regret(outcomes):.1%} / {worst.median - 1:.1%} {interval}"


def mean_model_regret(outcomes: list[Outcome]) -> float:
    """Return the whole model's regret, its mean over the repeats."""
    return _mean((outcome.over_reference.median, outcome.repeats) for outcome in outcomes) - 1


def mean_over_vanilla(outcomes: list[Outcome]) -> float:
    """Return the vanilla model's time over the calibrated one's, its mean over the repeats."""
    return _mean((outcome.over_vanilla.median, outcome.repeats) for outcome in outcomes)


def _mean(weighted: Any) -> float:
    pairs = list(weighted)
    return sum(value * weight for value, weight in pairs) / sum(weight for _, weight in pairs)
