"""Measure both paths of every site at its real input and keep vanilla unless sparse wins by a margin.

The last word has the whole model: if the chosen paths together do not beat all-vanilla, everything stays vanilla.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from tqdm import tqdm

from fxsparse import report as reports
from fxsparse import sites, timing
from fxsparse.errors import FxsparseError
from fxsparse.inputs import ExampleInputs, unchanged_state
from fxsparse.passes.lower_to_sparse import NOT_MEASURED
from fxsparse.sites import ConvSite

log = logging.getLogger(__name__)


@dataclasses.dataclass
class _Measured:
    """What one site took, summed over its calls in one run of the model (a shared module may be called twice)."""

    shape: tuple[int, ...]
    vanilla_ms: float = 0.0
    vanilla_low_ms: float = 0.0
    sparse_ms: float = 0.0


def calibrate(model: nn.Module, example_inputs: Any, *, margin: float = 0.05, progress: bool = False) -> nn.Module:
    """Choose each site's path by measuring it.

    Args:
        model: what `fxsparse.convert` returned; its sites are re-targeted in place.
        example_inputs: a tensor, a tuple of arguments, a dict of keyword arguments, or an input shape.
        margin: share by which sparse must be faster to be kept: 0.05 is 5 %.
        progress: show a progress bar.

    Returns:
        The same model; its `.report` has the times.

    Raises:
        FxsparseError: there are no example inputs, the model was not converted, or the two paths of a site
            disagree.
    """
    inputs = ExampleInputs.of(example_inputs, model)
    if inputs is None:
        raise FxsparseError("calibrate needs example inputs: a tensor, a tuple of arguments, or an input shape.")
    report = model.__dict__.get("report")
    if not isinstance(report, reports.Report):
        raise FxsparseError("This model was not converted. Call fxsparse.convert(model, masks) first.")
    every = [(gm, node) for gm in reports.graphs_of(model) for node, _ in sites.conv_sites(gm)]
    candidates = [(gm, node) for gm, node in every if node.meta[sites.META].packed]
    with (
        unchanged_state(model),
        tqdm(total=len(every), desc="Calibrating", unit="conv", disable=not progress, leave=False) as bar,
    ):
        measured = _measure_sites(model, inputs, every, bar)
    for node, times in measured.items():
        if not node.meta[sites.META].packed:
            sites.update(node, input_shape=times.shape, vanilla_ms=times.vanilla_ms)
    _set_paths(candidates, {node: _decide(node, measured.get(node), margin) for _, node in candidates})
    with unchanged_state(model):
        changes: dict[str, Any] = _check_whole_model(model, inputs, candidates)
    notes = tuple(note for note in report.notes if NOT_MEASURED not in note)
    reports.refresh(model, report, notes=notes, **changes)
    return model


def _decide(node: Node, measured: _Measured | None, margin: float) -> str:
    if measured is None:
        sites.update(node, reason="the example inputs do not reach it")
        return "vanilla"
    reason = "measured"
    if measured.sparse_ms * (1 + margin) >= measured.vanilla_ms:
        reason = f"sparse does not win by {margin:.0%}"
    elif measured.sparse_ms >= measured.vanilla_low_ms:
        reason = "sparse wins, but within the noise of the measurement"
    sites.update(
        node,
        input_shape=measured.shape,
        vanilla_ms=measured.vanilla_ms,
        sparse_ms=measured.sparse_ms,
        reason=reason,
    )
    return "sparse" if reason == "measured" else "vanilla"


def _set_paths(candidates: list[tuple[GraphModule, Node]], paths: dict[Node, str]) -> None:
    changed = {}
    for gm, node in candidates:
        if node.meta[sites.META].path != paths[node]:
            sites.set_path(gm, node, paths[node])
            changed[id(gm)] = gm
    for gm in changed.values():
        gm.graph.lint()
        gm.recompile()


def _measure_sites(
    model: nn.Module,
    inputs: ExampleInputs,
    every: list[tuple[GraphModule, Node]],
    bar: tqdm[Any],
) -> dict[Node, _Measured]:
    """Run the model once and time each site, on both paths where it has two, right where its input arrives."""
    measured: dict[Node, _Measured] = {}

    def visit(gm: GraphModule, node: Node, source: Tensor) -> None:
        site = sites.site_of(node)
        assert site is not None
        arms: dict[str, Callable[[], Tensor]] = {"vanilla": lambda: sites.run_vanilla(gm, site, source)}
        if site.packed:
            _check_paths_agree(gm, site, source)
            arms["sparse"] = lambda: sites.run_sparse(gm, site, source)
        times = timing.interleaved(arms, source.device)
        total = measured.setdefault(node, _Measured(tuple(source.shape)))
        total.vanilla_ms += times["vanilla"].median_ms
        total.vanilla_low_ms += times["vanilla"].low_ms
        if site.packed:
            total.sparse_ms += times["sparse"].median_ms
        bar.update()

    with _probed(every, visit), torch.no_grad():
        inputs.run(model)
    return measured


@contextmanager
def _probed(
    candidates: list[tuple[GraphModule, Node]], visit: Callable[[GraphModule, Node, Tensor], None]
) -> Iterator[None]:
    """Call `visit` with each site's input right before the site runs."""
    probes = []
    for gm, node in candidates:

        def probe(source: Tensor, gm: GraphModule = gm, node: Node = node) -> None:
            visit(gm, node, source)

        with gm.graph.inserting_before(node):
            probes.append((gm, gm.graph.call_function(probe, (sites.input_node(node),))))
    graphs = {id(gm): gm for gm, _ in candidates}.values()
    for gm in graphs:
        gm.recompile()
    try:
        yield
    finally:
        for gm, node in probes:
            gm.graph.erase_node(node)
        for gm in graphs:
            gm.recompile()


def _check_paths_agree(gm: GraphModule, site: ConvSite, source: Tensor) -> None:
    vanilla, sparse = sites.run_vanilla(gm, site, source), sites.run_sparse(gm, site, source)
    finite = vanilla.isfinite()
    error = torch.where(finite, (sparse - vanilla).abs(), 0).max() if vanilla.numel() else vanilla.new_zeros(())
    scale = torch.where(finite, vanilla.abs(), 0).max() if vanilla.numel() else vanilla.new_zeros(())
    terms = math.prod(site.weight_shape[1:])
    # Two orders of summation of `terms` products differ by about eps * sqrt(terms); 8 leaves room for the tail.
    allowed = 8 * torch.finfo(vanilla.dtype).eps * math.sqrt(terms) * float(scale)
    if not float(error) <= allowed:
        raise FxsparseError(
            f"The sparse path of '{site.name}' differs from the vanilla one by {float(error):.3g} (allowed "
            f"{allowed:.3g}) at input {tuple(source.shape)}, {source.dtype}. This is a bug of fxsparse: please report "
            f"it, and leave the convolution out with Settings(exclude=('{site.name}',))."
        )


def _check_whole_model(
    model: nn.Module, inputs: ExampleInputs, candidates: list[tuple[GraphModule, Node]]
) -> dict[str, float]:
    """Time the model as chosen against all-vanilla; put everything back to vanilla if that is not slower."""
    chosen = {node: node.meta[sites.META].path for _, node in candidates}
    if "sparse" not in chosen.values():
        return {}
    device = next(model.parameters()).device
    vanilla = dict.fromkeys(chosen, "vanilla")
    rounds: list[dict[str, float]] = []
    for _ in range(7):
        times = {}
        for name, paths in (("vanilla", vanilla), ("chosen", chosen)):
            _set_paths(candidates, paths)
            arm = {name: lambda: inputs.run(model)}
            times[name] = timing.interleaved(arm, device, budget_s=0.1, min_rounds=2, max_rounds=5)[name].median_ms
        rounds.append(times)
    # Within a round the two follow each other closely, so their ratio stands even where the machine's speed drifts.
    ratio = statistics.median(times["chosen"] / times["vanilla"] for times in rounds)
    vanilla_ms = statistics.median(times["vanilla"] for times in rounds)
    if ratio >= 1:
        _set_paths(candidates, vanilla)
        for node, path in chosen.items():
            if path == "sparse":
                sites.update(node, reason="wins alone, but the whole model was not faster")
        return {"model_vanilla_ms": vanilla_ms, "model_ms": vanilla_ms}
    return {"model_vanilla_ms": vanilla_ms, "model_ms": vanilla_ms * ratio}
