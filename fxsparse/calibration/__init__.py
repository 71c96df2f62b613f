"""Calibration: measure every way to run every convolution, decide jointly, and let the whole model have the last word.

The measuring happens on copies that share the model's tensors, so the model itself is not touched until the plan
stands.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import statistics
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils import _pytree as pytree
from tqdm import tqdm

from fxsparse import layouts, names, roofline
from fxsparse import plan as plans
from fxsparse import report as reports
from fxsparse.calibration.applying import all_vanilla, apply, current, graphs, keyed
from fxsparse.calibration.deciding import decide
from fxsparse.calibration.measuring import Effort, Measurements, measure, observe
from fxsparse.calibration.ranks import share
from fxsparse.calibration.whole_model import VANILLA, Verdict, distinct, fastest, sharing_copy
from fxsparse.errors import FxsparseError
from fxsparse.graph_module import follow_training_flag
from fxsparse.inputs import ExampleInputs, remember, unchanged_state
from fxsparse.plan import DEPLOYMENTS, Plan, PlanEntry, PlanKey, SitePlan
from fxsparse.sites import META, site_of, update

log = logging.getLogger(__name__)

# Seconds, where no budget is given: for each convolution, for all of them at least and at most, for the whole model.
_SITE_S, _LEAST_S, _MOST_S, _MODEL_S = 0.1, 2.0, 10.0, 2.0
_BAR = "{l_bar}{bar}| {n:.0f}/{total:.0f} s"
# How much slower a sparse convolution may be alone, so that no region ends before it: a share of its time.
_FOR_REGIONS = -0.3
# On CUDA a region ends with two changes of layout and with the fusion of what stands between: almost any slower one.
_FOR_ONE_REGION = -0.95
# A call that takes longer is not timed in as many variants.
_LONG_MS = 150.0
# Shares of a time budget; the rest goes to copies, packing and the run itself.
_SITES_SHARE, _MODEL_SHARE = 0.55, 0.3
_NOISY = 0.25  # distance of the quartiles over the median, of all-vanilla times


def calibrate(
    model: nn.Module,
    example_inputs: Any,
    *,
    margin: float = 0.05,
    budget_s: float | None = None,
    deploy: str = "eager",
    plan: Plan | None = None,
    deterministic: bool = False,
    sites: str | tuple[str, ...] = "*",
    progress: bool = False,
) -> nn.Module:
    """Choose how each convolution runs by measuring it where it stands.

    Every convolution is timed on the input that the example inputs give it: vanilla and sparse, in both memory layouts
    and in every configuration of the sparse operator. The choice is made for the whole graph at once, since a change
    of layout between neighbours costs time, and the model as chosen must beat the model with every convolution
    vanilla. Under torch.distributed every rank must call this: rank 0 measures, and all follow its plan.

    Args:
        model: what `fxsparse.convert` returned; it is changed in place.
        example_inputs: a tensor, a tuple of arguments, a dict of keyword arguments, or an input shape.
        margin: share by which a choice must be faster than vanilla to be taken: 0.05 is 5 %.
        budget_s: seconds to spend, about; None gives every convolution 0.1 s, all of them 2 s to 10 s,
            and the whole model 2 s.
        deploy: how the model will run: "eager", "compiled" (whole models are timed through torch.compile) or "graph"
            (everything is timed as replays of CUDA graphs).
        plan: recorded earlier, maybe elsewhere; merged into the model's own. An entry for just these inputs, on this
            device, is followed without measuring.
        deterministic: measure nothing: follow the recorded entry nearest to these inputs.
        sites: names of the convolutions to decide: exact, glob or `re:` pattern. The others stay as they are.
        progress: show a progress bar.

    Returns:
        The same model. Its `.plan` has the new entry, its `.report` the times.

    Raises:
        FxsparseError: there are no example inputs, the model was not converted or is frozen, the two paths of a
            convolution disagree, or there is no plan to follow.
    """
    inputs = ExampleInputs.of(example_inputs, model)
    if inputs is None:
        raise FxsparseError("calibrate needs example inputs: a tensor, a tuple of arguments, or an input shape.")
    report = reports.report_of(model)
    if report.bytes_after is not None:
        raise FxsparseError("This model is frozen: only one path of each convolution is left. Calibrate before freeze.")
    device = _device(model, inputs)
    if deploy not in DEPLOYMENTS or (deploy == "graph" and device.type != "cuda"):
        raise FxsparseError(
            f"deploy='{deploy}' is not possible on {device}. Choose one of {', '.join(DEPLOYMENTS)}; "
            "'graph' needs CUDA."
        )
    rules = (sites,) if isinstance(sites, str) else tuple(sites)
    known = [site.name for _, gm, node in keyed(model) if (site := site_of(node)) is not None]
    chosen = frozenset(names.matching(rules, known, "sites"))
    only = None if chosen == set(known) else chosen

    key = PlanKey(plans.device_name(device), _dtype(model, inputs, device), _shapes(inputs), deploy)
    recorded = model.__dict__.get("plan", Plan()).merged(plan or Plan())
    warnings: tuple[str, ...] = ()
    entry = recorded.exact(key) if plan is not None and only is None else None
    if deterministic:
        if only is not None:
            raise FxsparseError("deterministic=True follows a plan as a whole. Leave sites at '*'.")
        entry, warnings = recorded.nearest(key)
    if entry is None:
        run = _Run(model, inputs, key, device, margin, budget_s, only, progress)
        (entry,) = share(lambda: Plan((run.entry(),)), device).entries
        recorded = recorded.merged(Plan((entry,)))
    follow(model, entry, recorded, warnings)
    remember(model, inputs)
    return model


def follow(model: nn.Module, entry: PlanEntry, recorded: Plan, warnings: tuple[str, ...] = ()) -> None:
    """Bring a model to what an entry says, and its plan and report with it."""
    report = reports.report_of(model)
    notes = (*warnings, *entry.notes, *apply(model, entry))
    for gm in graphs(model).values():
        follow_training_flag(gm)
    reports.attach(model, "plan", recorded)
    reports.refresh(
        model,
        report,
        plan_notes=notes,
        environment=dict(entry.environment),
        model_vanilla_ms=entry.model_vanilla_ms,
        model_ms=entry.model_ms,
    )


def record_shapes(model: nn.Module, inputs: ExampleInputs) -> None:
    """Run a converted model once and note the shapes of its inputs and at every convolution; nothing is timed."""
    with unchanged_state(model):
        found = observe(model, inputs)
    for node, seen in found.sites.items():
        update(node, input_shape=seen.input.shape, output_shape=seen.output_shape)
    for gm in graphs(model).values():
        gm.recompile()  # additions go into convolutions where the shapes are known
    remember(model, inputs)


@dataclasses.dataclass
class _Run:
    """One measurement of a model; it touches the model's copies only."""

    model: nn.Module
    inputs: ExampleInputs
    key: PlanKey
    device: torch.device
    margin: float
    budget_s: float | None
    only: frozenset[str] | None
    progress: bool

    def entry(self) -> PlanEntry:
        """Measure and decide."""
        measured = sharing_copy(self.model)
        all_vanilla(measured)
        found = self._measure(measured)
        bounds = _bounds(measured, found, self.device)
        environment = plans.environment(self.device)

        def decided(by: Measurements = found, margin: float = self.margin, **allowed: bool) -> PlanEntry:
            only = self.only is not None
            by_graph = [
                decide(gm, name, by, margin, only=only, shown=found, **allowed) for name, gm in graphs(measured).items()
            ]
            plan_of = {node: plan for decision in by_graph for node, plan in decision.sites.items()}
            by_key = {
                key: dataclasses.replace(plan_of[node], bound_ms=bounds.get((node, plan_of[node].path)))
                for key, _, node in keyed(measured)
            }
            moves = tuple(move for decision in by_graph for move in decision.moves)
            return PlanEntry(self.key, by_key, moves, environment=environment)

        def whole(entry: PlanEntry) -> PlanEntry:
            return entry if self.only is None else _merged(self.model, entry, self.only)

        sparse_alone = decided(moving=False)
        candidates = [("sparse", whole(sparse_alone))]
        if self.only is None:
            candidates.insert(0, ("regions", decided(moving=False, free_between=True)))
            candidates.insert(1, ("long regions", decided(moving=False, free_between=True, margin=_FOR_REGIONS)))
        if self.only is None and self.device.type == "cuda":
            whole_network = decided(moving=False, free_between=True, margin=_FOR_ONE_REGION)
            candidates.insert(2, ("one region", whole_network))
        if self.only is None:
            candidates.append(("layouts", decided(sparse=False)))
            candidates.append(("sparse and layouts", decided()))
        if self.only is None and self.key.deploy != "compiled" and self._is_quick(found):  # compiling each takes long
            # Its neighbours: what less caution, or other samples, would have chosen.
            candidates.append(("without margin", decided(margin=0.0)))
            candidates.append(("first half", decided(by=found.half(0))))
            candidates.append(("second half", decided(by=found.half(1))))
        variants = distinct(candidates)
        verdict = self._whole_model(variants)
        log.info("Whole model: '%s' is the fastest of %s", verdict.name, [VANILLA, *variants])
        best = variants.get(verdict.name)
        return dataclasses.replace(
            best or whole(_reverted(sparse_alone)),
            model_vanilla_ms=verdict.vanilla_ms,
            model_ms=verdict.model_ms,
            notes=(*_noise_notes(found, verdict.spread), *_layout_notes(found)),
        )

    def _is_quick(self, found: Measurements) -> bool:
        """Tell whether a call of the model is so short that more variants of it can be timed."""
        return sum(site.ms[site.default] for site in found.sites.values()) < _LONG_MS

    def _measure(self, measured: nn.Module) -> Measurements:
        names_of = [site.name for _, gm, node in keyed(measured) if (site := site_of(node)) is not None]
        count = sum(self.only is None or name in self.only for name in names_of)
        seconds = min(max(_SITE_S * count, _LEAST_S), _MOST_S)
        if self.budget_s is not None:
            seconds = self.budget_s * _SITES_SHARE
        effort = Effort(seconds, self.margin, self.key.deploy == "graph", self.only)
        quiet = not self.progress
        with (
            unchanged_state(self.model),
            tqdm(total=seconds, desc="Calibrating", bar_format=_BAR, disable=quiet, leave=False) as bar,
        ):
            return measure(measured, self.inputs, effort, bar)

    def _whole_model(self, variants: dict[str, PlanEntry]) -> Verdict:
        seconds = _MODEL_S if self.budget_s is None else self.budget_s * _MODEL_SHARE
        with unchanged_state(self.model):
            return fastest(self.model, self.inputs, variants, self.device, budget_s=seconds, deploy=self.key.deploy)


def _merged(model: nn.Module, entry: PlanEntry, only: frozenset[str]) -> PlanEntry:
    """Return an entry that changes the named sites only; the rest is as it is in the model."""
    now, moves = current(model)
    kept = {key: plan for key, plan in now.items() if key.partition("#")[0] not in only}
    decided = [node for _, _, node in keyed(model) if node.meta[META].name in only]
    values = {name for node in decided for name in (node.name, layouts.move_of_weight("", node.meta[META], "").value)}
    around = tuple(move for move in moves if move.value not in values)
    return dataclasses.replace(
        entry, sites={**entry.sites, **kept}, moves=around + entry.moves, model_vanilla_ms=None, model_ms=None
    )


def _reverted(entry: PlanEntry) -> PlanEntry:
    """Return the entry with every site vanilla, because the whole model gained nothing."""

    def vanilla(plan: SitePlan) -> SitePlan:
        reason = "wins alone, but the whole model was not faster" if plan.path == "sparse" else plan.reason
        return dataclasses.replace(plan, path="vanilla", layout=None, reason=reason)

    return dataclasses.replace(entry, sites={key: vanilla(plan) for key, plan in entry.sites.items()}, moves=())


def _bounds(model: nn.Module, found: Measurements, device: torch.device) -> dict[tuple[Node, str], float]:
    """Return the roofline bound of each site's paths: arithmetic and traffic at the machine's measured speed."""
    work: dict[tuple[Node, str], tuple[torch.dtype, int, int]] = {}
    achieved: dict[torch.dtype, float] = {}
    for _, gm, node in keyed(model):
        measured = found.sites.get(node)
        if measured is None:
            continue
        row = reports.row_of(gm, update(node, output_shape=measured.output_shape))
        dtype = measured.input.dtype
        moved = (math.prod(measured.input.shape) + math.prod(measured.output_shape)) * dtype.itemsize
        for path, macs, weight_bytes in (
            ("vanilla", row.macs, row.vanilla_bytes),
            ("sparse", row.sparse_macs, row.sparse_bytes),
        ):
            best = measured.best(path)
            if macs is not None and weight_bytes is not None and best is not None:
                work[node, path] = (dtype, macs, moved + weight_bytes)
                achieved[dtype] = max(achieved.get(dtype, 0.0), 2e3 * macs / measured.ms[best])
    lines = {}
    for dtype, flops_per_s in achieved.items():
        line = roofline.measure(device, dtype)
        # The machine can do at least what it has just done.
        lines[dtype] = dataclasses.replace(line, flops_per_s=max(line.flops_per_s, flops_per_s))
    return {key: lines[dtype].bound_ms(macs, nbytes) for key, (dtype, macs, nbytes) in work.items()}


def _noise_notes(found: Measurements, spread: float) -> tuple[str, ...]:
    worst = max((measured.spread for measured in found.sites.values()), default=0.0)
    if max(spread, statistics.median([m.spread for m in found.sites.values()] or [0.0])) <= _NOISY:
        return ()
    return (
        f"The times scatter (quartiles {spread:.0%} apart for the whole model, up to {worst:.0%} for one convolution): "
        "calibrate again on a quiet machine.",
    )


def _layout_notes(found: Measurements) -> tuple[str, ...]:
    refused = {support.reason for support in found.layouts.values() if not support.ok}
    return tuple(f"Memory layouts stay as they are: {reason}." for reason in sorted(refused))


def _tensors(inputs: ExampleInputs) -> list[Tensor]:
    return [value for value in pytree.tree_leaves((inputs.args, inputs.kwargs)) if isinstance(value, Tensor)]


def _shapes(inputs: ExampleInputs) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(tensor.shape) for tensor in _tensors(inputs))


def _dtype(model: nn.Module, inputs: ExampleInputs, device: torch.device) -> str:
    """Name the dtype that convolutions compute in: that of autocast where it is on, else that of the inputs."""
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    else:
        floating = [t.dtype for t in (*_tensors(inputs), *model.parameters()) if t.is_floating_point()]
        dtype = floating[0] if floating else torch.get_default_dtype()
    return str(dtype).removeprefix("torch.")


def _device(model: nn.Module, inputs: ExampleInputs) -> torch.device:
    found = [tensor.device for tensor in (*_tensors(inputs), *model.parameters())]
    return next((device for device in found if device.type != "cpu"), torch.device("cpu"))
