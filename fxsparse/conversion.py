"""The pipeline: masks, capture, passes, calibration, report."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from fxsparse import checkpoints, names, sites
from fxsparse.calibration import calibrate, record_shapes
from fxsparse.capture import Captured, capture
from fxsparse.graph_module import follow_training_flag
from fxsparse.inputs import ExampleInputs
from fxsparse.masks import BakedModel, bake
from fxsparse.ops.library import has_kernel
from fxsparse.passes import PASSES
from fxsparse.passes.base import PassContext
from fxsparse.passes.lower_to_sparse import NOT_MEASURED
from fxsparse.passes.normalize_convs import why_no_site
from fxsparse.report import Report, Row, draw, graphs_of, refresh
from fxsparse.settings import Settings

log = logging.getLogger(__name__)


def convert(
    model: nn.Module,
    masks: Mapping[str, Any] | None = None,
    *,
    example_inputs: Any = None,
    settings: Settings | None = None,
) -> nn.Module:
    """Make a pruned model faster, without changing it or what it computes.

    Args:
        model: any `nn.Module`; it is copied, never changed. Call `model.eval()` first for inference.
        masks: by module name, parameter name or `*_mask` buffer name: a tensor of the weight's shape (bool, or
            numbers: non-zero = kept), or a block list [(rows, columns), ...] over the weight as
            [O, (C / groups)·kh·kw]. None takes the masks of `nn.utils.prune`, or else the zeros of the weights.
        example_inputs: a tensor, a tuple of arguments, a dict of keyword arguments, or an input shape. Each
            convolution is measured on what these give it. None: each follows the cost model's estimate until
            `fxsparse.calibrate` is called.
        settings: everything else.

    Returns:
        A GraphModule (or, from the capture rung `modules`, a copy of the model with its convolutions swapped) that
        computes what the masked model computes. Its `.report` says what became of every convolution, and why.

    Raises:
        FxsparseError: a mask, a rule or the inputs do not fit the model, or no rung can capture it.
    """
    settings = settings or Settings()
    inputs = ExampleInputs.of(example_inputs, model)
    baked = bake(model, masks)
    selected = _select(baked.model, settings)
    keys = list(baked.model.state_dict())
    captured = capture(baked.model, inputs, settings.capture)
    for prefix, gm in captured.graphs:
        checkpoints.record(gm, keys, prefix)
    others = _run_passes(captured, baked, settings, selected)
    if inputs is not None:
        record_shapes(captured.model, inputs)
    refresh(captured.model, _first_report(captured, baked, others), draw(captured.model))
    if inputs is not None and settings.calibrate:
        calibrate(
            captured.model,
            example_inputs,
            margin=settings.margin,
            budget_s=settings.budget_s,
            deploy=settings.deploy,
            progress=settings.progress,
        )
    for gm in graphs_of(captured.model):
        follow_training_flag(gm)
    return captured.model


def explain(
    model: nn.Module,
    masks: Mapping[str, Any] | None = None,
    *,
    example_inputs: Any = None,
    settings: Settings | None = None,
) -> Report:
    """Say what `convert` would make of a model, without measuring and without keeping the result.

    Args:
        model, masks, settings: as for `convert`.
        example_inputs: as for `convert`; with them the report has the shapes and multiply-adds of every convolution.

    Returns:
        The report, with the paths that the cost model expects to be faster.

    Raises:
        FxsparseError: as `convert`.
    """
    settings = dataclasses.replace(settings or Settings(), calibrate=False)
    report: Report = convert(model, masks, example_inputs=example_inputs, settings=settings).report  # type: ignore[assignment]
    return report


def _select(model: nn.Module, settings: Settings) -> frozenset[str]:
    """Apply the include and exclude rules to the names that conv sites can have."""
    known = list(
        dict.fromkeys(
            sites.name_of(name)
            for named in (model.named_parameters, model.named_buffers)
            for name, tensor in named(remove_duplicate=False)
            if tensor.dim() == 4
        )
    )
    chosen = names.matching(settings.include, known, "include")
    return frozenset(chosen - names.matching(settings.exclude, known, "exclude"))


def _run_passes(
    captured: Captured, baked: BakedModel, settings: Settings, selected: frozenset[str]
) -> list[tuple[str, str]]:
    """Run the passes over every graph; return the convolutions that are no conv sites, with the reason."""
    others: list[tuple[str, str]] = []
    if captured.rung == "modules":  # what was not swapped is in no graph
        for path, module in captured.model.named_modules():
            reason = why_no_site(module)
            if reason is not None:
                others.append((path, reason))
    quiet = not settings.progress or len(captured.graphs) < 2
    for prefix, gm in tqdm(captured.graphs, desc="Converting", unit="conv", disable=quiet, leave=False):
        ctx = PassContext(settings, baked.masks, prefix, selected=selected)
        for run in PASSES:
            run(gm, ctx)
        log.info("Passes on '%s': %s", prefix, dict(ctx.counts))
        others += ctx.others
    return others


def _first_report(captured: Captured, baked: BakedModel, others: list[tuple[str, str]]) -> Report:
    rows = tuple(Row(name, reason=reason) for name, reason in others)
    notes = [*captured.notes, *baked.notes]
    for device in sorted({parameter.device.type for parameter in captured.model.parameters()}):
        if not has_kernel(torch.device(device)):
            notes.append(
                f"There is no compiled kernel for '{device}' here (see fxsparse.capabilities()): sparse paths run on "
                "the pure-torch reference, exact but slow."
            )
    estimated = f"The paths follow the cost model's estimate, {NOT_MEASURED}."
    return Report(rows, captured.rung, captured.refused, tuple(notes), (estimated,))
