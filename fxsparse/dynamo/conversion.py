"""The backend: what torch.compile calls with every graph that Dynamo captured, and the road from there."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.guards import GuardBuilder
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule
from torch.utils.weak import WeakTensorKeyDictionary

from fxsparse import layouts, names, sites
from fxsparse.calibration import calibrate, record_shapes
from fxsparse.dynamo.binding import bind, unbind
from fxsparse.dynamo.captured import Captured
from fxsparse.dynamo.live import Followed, LiveGraph, Record
from fxsparse.dynamo.options import Compiled, Options
from fxsparse.dynamo.weights import convolutions, weight_node
from fxsparse.graph_module import ConvertedModule
from fxsparse.inputs import ExampleInputs
from fxsparse.passes.base import PassContext
from fxsparse.passes.lower_to_sparse import NOT_MEASURED, lower_to_sparse
from fxsparse.passes.normalize_convs import normalize_convs
from fxsparse.passes.regroup_weights import regroup_weights
from fxsparse.plan import Plan
from fxsparse.report import Report, Row, draw, refresh, report_of
from fxsparse.settings import Settings

log = logging.getLogger(__name__)

_PASSES = (normalize_convs, regroup_weights, lower_to_sparse)
_FAKE = "torch compiles with fake tensors, which have no values to look at"
_GRADIENTS = "gradients are needed: call the model under torch.no_grad() or torch.inference_mode() for sparse paths"
# By a graph's first parameter, then by what else counts: a graph that is captured again is not measured again.
_plans = WeakTensorKeyDictionary()


def backend(
    gm: GraphModule, example_inputs: Sequence[Any], *, options: Any = None, mode: str | None = None
) -> Compiled:
    """Compile a graph, its pruned convolutions sparse where that is faster; the name of this backend is "fxsparse".

    The model is not changed and stays the owner of its weights: an optimizer step, `load_state_dict` or new `.data` is
    seen at the next call, and the packed weights follow. A weight that is not zero any more where it was when the graph
    was compiled takes its whole graph to the vanilla path, until it is again; `torch.compiler.reset()` starts over.
    Writes that torch does not count (`p.data.mul_(2)`, NumPy) need `fxsparse.dynamo.refresh(model)`. Calls that need
    gradients run vanilla: with the zeros that `options["masks"]` writes, and otherwise exactly as the model.

    Convolutions are measured when a graph is compiled, on the inputs of that call, and once a graph: what is compiled
    again for other shapes follows that plan. Each set of weights has a graph of its own: a model that breaks its graph
    inside of a block which it has more often than `torch._dynamo.config.recompile_limit` needs a higher limit.

    Args:
        gm: from Dynamo.
        example_inputs: of the graph.
        options: "masks" (as for `fxsparse.convert`), "inner" (what compiles the rest: the name of a backend or a
            function; "inductor"), "inner_mode" (of Inductor, "reduce-overhead" for example), "inner_options" (for the
            inner backend), "settings" (a `fxsparse.Settings`).
        mode: the `mode` of torch.compile, which takes no options beside it: another way to give "inner_mode".

    Returns:
        What Dynamo calls in the place of the graph.

    Raises:
        FxsparseError: the options are wrong; torch reports it as the cause of its BackendCompilerFailed.
    """
    chosen = Options.of({"inner_mode": mode} if mode is not None else options)
    if not convolutions(gm):
        return chosen.compile_inner(gm, example_inputs)
    graph = Captured(gm, dict(zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True)))
    if any(isinstance(value, FakeTensor) for value in example_inputs):
        return _vanilla(graph, chosen, _FAKE)
    graph.write_masks(chosen.masks)
    if torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in example_inputs):
        if chosen.masks is not None:
            _guard(graph)
        return _vanilla(graph, chosen, _GRADIENTS)
    _guard(graph)
    with torch.inference_mode(False), torch.no_grad():
        bound = bind(gm, graph.packable, graph.bound, graph.values)
        bound.may_tile = False  # `live` follows the packed weights alone
        _convert(bound, graph, chosen.settings)
        record = Record(report_of(bound), graph.tensors)
        if not any(site.path == "sparse" for _, site in sites.conv_sites(bound)) and not layouts.current(bound):
            return _recorded(chosen.compile_inner(gm, example_inputs), record)
        changed, made = unbind(bound, gm, graph.packable, graph.values)
    return _live(changed, made, bound, graph, chosen, record)


def _vanilla(graph: Captured, options: Options, reason: str) -> Compiled:
    """Compile a graph with all convolutions dense."""
    rows = tuple(Row(sites.name_of(weight.name), reason=reason) for weight in graph.weights.values())
    record = Record(Report(rows, "dynamo", {}, (*graph.notes, f"This graph runs vanilla: {reason}.")), graph.tensors)
    return _recorded(options.compile_inner(graph.gm, list(graph.values.values())), record)


def _convert(bound: ConvertedModule, graph: Captured, settings: Settings) -> None:
    """Run the passes and the calibration over a bound graph."""
    chosen = names.matching(settings.include, graph.known, "include")
    chosen -= names.matching(settings.exclude, graph.known, "exclude")
    ctx = PassContext(settings, graph.masks, selected=frozenset(chosen))
    for run in _PASSES:
        run(bound, ctx)
    log.info("Passes on a graph from Dynamo: %s", dict(ctx.counts))
    for node, site in sites.conv_sites(bound):
        sites.update(node, reason=site.reason.replace(NOT_MEASURED, "not measured"))
    rows = tuple(_row(graph, name, reason) for name, reason in ctx.others)
    report = Report(rows, "dynamo", {}, graph.notes, ("The paths follow the cost model's estimate, not measured.",))
    refresh(bound, report, draw(bound))
    inputs = _inputs(graph)
    if inputs is None or not any(site.packed for _, site in sites.conv_sites(bound)):
        return
    record_shapes(bound, inputs)
    refresh(bound, report_of(bound))
    if settings.calibrate:
        _calibrate(bound, graph, inputs, settings)


def _row(graph: Captured, name: str, reason: str) -> Row:
    """Describe a convolution that is no conv site, by the name of its node where its weight was refused."""
    for conv in convolutions(graph.gm):
        weight = graph.weights.get(weight_node(conv))  # type: ignore[arg-type]
        if conv.name == name and weight is not None and weight.name in graph.refused:
            return Row(sites.name_of(weight.name), reason=graph.refused[weight.name])
    return Row(name, reason=reason)


def _inputs(graph: Captured) -> ExampleInputs | None:
    """Return inputs to measure on: copies, since the graph may write into them; None where there are no values."""
    args: list[Any] = []
    for node, value in graph.values.items():
        if node in graph.bound:
            continue
        if isinstance(value, torch.SymInt) and not value.node.has_hint():  # torch._dynamo.decorators.mark_unbacked
            return None
        if isinstance(value, Tensor):
            value = value.detach().clone()
        elif isinstance(value, torch.SymInt):
            value = value.node.hint  # int(value) would tie the graph to this size
        args.append(value)
    return ExampleInputs(tuple(args), {})


def _calibrate(bound: ConvertedModule, graph: Captured, inputs: ExampleInputs, settings: Settings) -> None:
    """Measure, or follow the plan of the same convolutions at other shapes."""
    found = [site for _, site in sites.conv_sites(bound)]
    first = sites.attribute(bound, next(site.weight for site in found if site.packed))
    autocast = torch.is_autocast_enabled(first.device.type) and torch.get_autocast_dtype(first.device.type)
    key = (first.device, first.dtype, autocast, tuple((site.name, site.density) for site in found))
    known: dict[Any, Plan] = _plans.setdefault(graph.tensors[0], {})
    plan = known.get(key)
    calibrate(
        bound,
        inputs,
        margin=settings.margin,
        budget_s=settings.budget_s,
        deploy=settings.deploy,
        plan=plan,
        deterministic=plan is not None,
        progress=settings.progress,
    )
    known[key] = bound.plan  # type: ignore[assignment]


def _live(
    changed: GraphModule,
    made: frozenset[str],
    bound: ConvertedModule,
    graph: Captured,
    options: Options,
    record: Record,
) -> Compiled:
    """Compile a converted graph, and let its packed weights follow the model's."""
    placeholders = list(graph.values)
    followed = []
    for weight in graph.packable.values():
        served = [site for _, site in sites.conv_sites(bound) if site.weight == weight.name]
        stems = {site.packed_names for site in served if site.path == "sparse"}
        packed = next((tuple(sites.attribute(changed, name) for name in stem) for stem in stems), None)
        copied = sites.attribute(changed, weight.name) if weight.name in made else None
        if packed is None and copied is None:
            continue
        mask = next(site.mask for site in served)
        kept = None if mask is None else sites.attribute(bound, mask)
        positions = tuple(placeholders.index(source) for source in weight.sources)
        followed.append(Followed(weight, positions, kept, copied, packed))
    compiled = options.compile_inner(changed, list(graph.values.values()))
    dynamic = any(isinstance(value, torch.SymInt) for value in graph.values.values())
    dense = graph.gm  # and not `graph`, whose values are the inputs of this call

    def vanilla() -> Compiled:
        # A compilation of its own, with guards of its own: Dynamo has written those of this graph by now.
        result: Compiled = torch.compile(dense, backend=options.compile_inner, dynamic=dynamic)
        return result

    return LiveGraph(followed, compiled, vanilla, record).call


def _guard(graph: Captured) -> None:
    """Let Dynamo compile again for other weights.

    It would use one graph for all modules of one class, and each has its own zeros and masks.
    """
    guards = TracingContext.get().guards_context.dynamo_guards
    for weight in graph.weights.values():
        for node in weight.sources:
            guards.add(node._dynamo_source.make_guard(GuardBuilder.ID_MATCH))  # type: ignore[attr-defined]


def _recorded(compiled: Compiled, record: Record) -> Compiled:
    """Return a compiled graph that keeps the record of itself alive."""

    def call(*inputs: Any, _record: Record = record) -> Any:
        return compiled(*inputs)

    return call
