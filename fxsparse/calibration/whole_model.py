"""The last word: the whole model, as chosen in several ways, against the model with every convolution vanilla."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from fxsparse import timing
from fxsparse.calibration.applying import all_vanilla, apply
from fxsparse.inputs import ExampleInputs
from fxsparse.plan import PlanEntry

VANILLA = "vanilla"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the whole model says.

    Attributes:
        name: of the fastest variant, or `VANILLA`.
        vanilla_ms: median time of the all-vanilla model.
        model_ms: of the chosen one, from the ratio of the two within each round.
        spread: distance of the quartiles of the all-vanilla times, as a share of their median.
    """

    name: str
    vanilla_ms: float
    model_ms: float
    spread: float


def sharing_copy(model: nn.Module) -> nn.Module:
    """Copy a model's modules and graphs; its parameters are new objects on the same memory, its buffers the same."""
    shared = {id(buffer): buffer for buffer in model.buffers()}
    shared |= {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, shared)


def fastest(
    model: nn.Module,
    inputs: ExampleInputs,
    variants: dict[str, PlanEntry],
    device: torch.device,
    *,
    budget_s: float,
    deploy: str,
) -> Verdict:
    """Time a model in several variants and all-vanilla, all interleaved, and name the fastest.

    Args:
        model: a converted model; it is not touched.
        inputs: of the runs.
        variants: by name, the simplest first: where two are as fast, the earlier one is chosen.
        device: where the model is.
        budget_s: seconds for the timing.
        deploy: "eager", "compiled" or "graph".
    """
    built = {VANILLA: sharing_copy(model)}
    all_vanilla(built[VANILLA])
    for name, entry in variants.items():
        built[name] = sharing_copy(model)
        apply(built[name], entry)
    arms = {name: deployed(variant, inputs, device, deploy) for name, variant in built.items()}
    times = timing.interleaved(arms, device, budget_s=budget_s, min_rounds=7, max_rounds=200, sample_ms=2.0)
    best, gain = VANILLA, 1.0
    for name in variants:
        faster = times.ratio(VANILLA, name)
        # An unclear gain is none; a later variant must beat the best so far by more than noise, too.
        if faster.low > 1 and (best == VANILLA or times.ratio(best, name).low > 1):
            best, gain = name, faster.median
    vanilla_ms = times[VANILLA].median_ms
    return Verdict(best, vanilla_ms, vanilla_ms / gain, times.spread(VANILLA))


def deployed(model: nn.Module, inputs: ExampleInputs, device: torch.device, deploy: str) -> Callable[[], Any]:
    """Return a call of a model as it will run."""
    if deploy == "compiled":
        model.compile()
    call = partial(inputs.run, model)
    return timing.graphed(call, device) if deploy == "graph" else call


def distinct(variants: Sequence[tuple[str, PlanEntry]]) -> dict[str, PlanEntry]:
    """Return the variants that differ in what runs, and that are not all-vanilla; the first of equals stays."""
    kept: dict[Any, tuple[str, PlanEntry]] = {}
    for name, entry in variants:
        runs = tuple((key, plan.path, plan.packing, plan.layout) for key, plan in entry.sites.items())
        plain = not entry.moves and all(plan.path == "vanilla" for plan in entry.sites.values())
        if not plain:
            kept.setdefault((runs, entry.moves), (name, entry))
    return dict(kept.values())
