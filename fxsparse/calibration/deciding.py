"""From measurements to a plan: which path, packing and layout every convolution takes."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict

from torch import Tensor
from torch.fx import GraphModule, Node

from fxsparse import layouts, node_kinds, regions, sites
from fxsparse.calibration.joint import Option, Step, solve
from fxsparse.calibration.measuring import Measurements
from fxsparse.calibration.samples import BATCH_INNER, Candidate, Measured, Samples
from fxsparse.calibration.transparency import is_transparent
from fxsparse.layouts import MEMORY_FORMATS
from fxsparse.plan import Move, SitePlan
from fxsparse.sites import ConvSite

NOT_REACHED = "the example inputs do not reach it"


@dataclasses.dataclass(frozen=True)
class Decision:
    """What the sites of one graph do: how each runs, by node, and the changes of layout between them."""

    sites: dict[Node, SitePlan]
    moves: tuple[Move, ...] = ()


def decide(
    gm: GraphModule,
    prefix: str,
    found: Measurements,
    margin: float,
    *,
    sparse: bool = True,
    moving: bool = True,
    free_between: bool = False,
    only: bool = False,
    shown: Measurements | None = None,
) -> Decision:
    """Choose for every site of a graph.

    Args:
        gm: the graph, every site vanilla.
        prefix: its name in the model, for the moves.
        found: measurements of this graph's nodes.
        margin: share by which anything must be faster than vanilla in the layout that arrives; below 0 that by which
            a sparse path may be slower.
        sparse: allow sparse paths.
        moving: allow vanilla paths in another layout than the captured one.
        free_between: what stands between convolutions costs nothing, as where a region runs it; its own measured times,
            as calls of their own, would have a slow pooling change its layout and so part one region into two.
        only: not all sites were measured: nothing around those that were may change.
        shown: where the times in the result come from, if not from `found`.
    """
    allowed = _candidates(gm, found, margin, sparse=sparse)
    if not moving:
        for node, candidates in allowed.items():
            default = found.sites[node].default
            allowed[node] = [c for c in candidates if c.path == "sparse" or c == default]
    if found.layouts[gm].ok and not only:
        chosen, moves = _jointly(gm, prefix, found, allowed, margin, free_between)
    else:
        chosen, moves = _one_by_one(prefix, found, allowed, margin)
    plans = {}
    for node, site in sites.conv_sites(gm):
        measured = (shown or found).sites.get(node)
        plans[node] = _not_reached() if measured is None else _site_plan(site, measured, chosen[node], margin)
    weights = {
        layouts.move_of_weight(prefix, site, chosen[node].gives)
        for node, site in sites.conv_sites(gm)
        if node in chosen and chosen[node].path == "vanilla" and chosen[node] != found.sites[node].default
    }
    return Decision(plans, (*moves, *sorted(weights, key=lambda move: move.value)))


def _candidates(gm: GraphModule, found: Measurements, margin: float, *, sparse: bool) -> dict[Node, list[Candidate]]:
    """Return what may be chosen at each site.

    Sites that share a packed weight share the packing, and a dense weight that serves several keeps its layout.
    """
    uses = Counter(id(sites.attribute(gm, site.weight)) for _, site in sites.conv_sites(gm))
    totals: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for node, site in sites.conv_sites(gm):
        measured = found.sites.get(node)
        if measured is None or site.packed is None:
            continue
        ms = measured.ms
        for packing in {c.packing for c in ms if c.path == "sparse"}:
            totals[site.packed][packing] += min(ms[c] for c in ms if c.packing == packing)
    allowed = {}
    for node, site in sites.conv_sites(gm):
        if node not in found.sites:
            continue
        packing = min(totals[site.packed], key=totals[site.packed].__getitem__) if site.packed in totals else ""
        allowed[node] = [
            candidate
            for candidate in found.sites[node].candidates.values()
            if candidate == found.sites[node].default
            or (candidate.path == "vanilla" and uses[id(sites.attribute(gm, site.weight))] == 1)
            or (
                candidate.path == "sparse"
                and sparse
                and candidate.packing == packing
                and (margin < 0 or found.sites[node].beyond_noise(candidate))
            )
        ]
    return allowed


def _costs(measured: Measured, margin: float) -> dict[Candidate, float]:
    """Return the times of all candidates; the default, vanilla as its input arrives, must be beaten clearly.

    On a CPU the sparse operator copies what is not contiguous, so with that it takes no less, whatever the samples say:
    a change of layout in front of it ends a region.
    """
    costs = {c: ms if c == measured.default else ms * (1 + margin) for c, ms in measured.ms.items()}
    for candidate in costs if measured.input.device.type == "cpu" else ():
        if candidate.path == "sparse" and candidate.needs != "contiguous":
            contiguous = dataclasses.replace(candidate, needs="contiguous")
            costs[candidate] = max(costs[candidate], costs.get(contiguous, 0.0))
    return costs


def _one_by_one(
    prefix: str, found: Measurements, allowed: dict[Node, list[Candidate]], margin: float
) -> tuple[dict[Node, Candidate], tuple[Move, ...]]:
    """Choose at each site alone; its output goes back into the layout that it has in the all-vanilla model."""
    chosen, moves = {}, []
    for node, candidates in allowed.items():
        measured = found.sites[node]
        costs = _costs(measured, margin)
        gives = measured.default.gives
        for candidate in candidates:
            if candidate.gives != gives and node in found.values:
                seen = found.values[node]
                costs[candidate] += _times(found.moves[(seen.shape, seen.dtype)])[gives]
            if candidate.needs == BATCH_INNER:  # a region of its own; what comes in costs about what goes out does
                costs[candidate] += costs[candidate] - _costs(measured, margin)[candidate]
        here = [c for c in candidates if c.needs in (measured.default.needs, BATCH_INNER)]
        chosen[node] = min(here, key=costs.__getitem__)
        if chosen[node].gives != gives:
            moves.append(Move(prefix, node.name, gives, layouts.readers_of(node)))
    return chosen, tuple(moves)


def _jointly(
    gm: GraphModule,
    prefix: str,
    found: Measurements,
    allowed: dict[Node, list[Candidate]],
    margin: float,
    free_between: bool,
) -> tuple[dict[Node, Candidate], tuple[Move, ...]]:
    of_site = {node: sites.input_node(node) for node in allowed}
    pads = {node.args[0] for node, source in of_site.items() if node.args[0] is not source}
    layout_of = _baseline_layouts(gm, found)
    steps = []
    for node in gm.graph.nodes:
        if node in pads or node.op == "output" or node.op == "get_attr":
            inputs: list[Node] = []
        else:
            inputs = [of_site[node]] if node in of_site else node.all_input_nodes
        read = tuple(dict.fromkeys(value for value in inputs if value in layout_of))
        options = _options(gm, node, read, found, allowed, layout_of, margin, free_between)
        steps += _steps(node, read, options, layout_of)
    for node in gm.graph.nodes:
        if node.op == "output":
            for value in node.all_input_nodes:
                if value in layout_of:
                    needs = Option(layout_of[value], "", 0.0)
                    steps.append(Step(f"output {value.name}", (value.name,), (needs,)))
    moves_ms = {
        (node.name, layout): ms
        for node, seen in found.values.items()
        if node in layout_of
        for layout, ms in _times(found.moves[(seen.shape, seen.dtype)]).items()
    }
    choice = solve(steps, moves_ms)
    chosen = {}
    for node, candidates in allowed.items():
        label = choice.options[node.name].label
        chosen[node] = next(candidate for candidate in candidates if str(candidate) == label)
    return chosen, _moves(prefix, steps, choice.options)


def _times(samples: Samples | None) -> dict[str, float]:
    """Return the medians by layout; without samples the layout makes no difference."""
    if samples is None:
        return dict.fromkeys((*MEMORY_FORMATS, BATCH_INNER), 0.0)
    return {layout: samples.summary(layout).median_ms for layout in samples.by_arm}


def _options(
    gm: GraphModule,
    node: Node,
    read: tuple[Node, ...],
    found: Measurements,
    allowed: dict[Node, list[Candidate]],
    layout_of: dict[Node, str],
    margin: float,
    free_between: bool,
) -> tuple[Option, ...] | None:
    """Return the ways to run a node, or None where it is opaque."""
    if node in allowed:
        measured = found.sites[node]
        costs = _costs(measured, margin)
        # Where the strides fit both layouts, as with one pixel, the candidate runs alike in both.
        return tuple(
            Option(needs, gives, costs[c], str(c))
            for c in allowed[node]
            for needs, gives in ([(c.needs, c.gives)] if measured.input.layout else _either(c))
        )
    in_regions = any(candidate.needs == BATCH_INNER for candidates in allowed.values() for candidate in candidates)
    if len(read) == 1 and found.values[read[0]].shape[2:] == (1, 1) and node_kinds.flattens(gm, node):
        # Planes of one pixel are rows in any layout, and may be read within a region by a linear layer at its end.
        shape, users = found.values[read[0]].shape, list(node.users)
        inside = in_regions and len(users) == 1 and regions.is_classifier(gm, users[0], shape)
        return tuple(Option(layout, "", 0.0) for layout in (*MEMORY_FORMATS, *([BATCH_INNER] if inside else [])))
    if node not in layout_of or not read or node.op == "placeholder" or not is_transparent(gm, node):
        return None
    if any(_is_map(gm, value) for value in node.all_input_nodes):
        return None
    times = _times(None if free_between else found.others.get(node))
    options = tuple(Option(layout, layout, times[layout]) for layout in MEMORY_FORMATS)
    if not in_regions or not _is_step(gm, node, found):
        return options
    # There a node costs no more than in the better of torch's layouts.
    return (*options, Option(BATCH_INNER, BATCH_INNER, min(option.cost for option in options)))


def _is_step(gm: GraphModule, node: Node, found: Measurements) -> bool:
    """Tell whether a region on CUDA can do a node, as a step or as an epilogue, where all around it is in it."""
    if node_kinds.does_nothing(gm, node) or regions.other_step(gm, node, {}) is not None:
        return True
    # An addition counts by the shapes seen: its inputs come from sparse convolutions only once these are chosen.
    inputs = node.all_input_nodes
    shapes = {found.values[value].shape for value in inputs if value in found.values}
    return len(inputs) == 2 and len(shapes) == 1 and any(node_kinds.added(node, value) is not None for value in inputs)


def _either(candidate: Candidate) -> list[tuple[str, str]]:
    if candidate.needs == BATCH_INNER:
        return [(BATCH_INNER, BATCH_INNER)]
    return [(layout, layout if candidate.path == "vanilla" else candidate.gives) for layout in MEMORY_FORMATS]


def _is_map(gm: GraphModule, node: Node) -> bool:
    """Tell whether a node reads a parameter with pixels, whose own layout may decide that of a result."""
    if node.op != "get_attr":
        return False
    value = sites.attribute(gm, str(node.target))
    return not isinstance(value, Tensor) or (value.dim() == 4 and value.shape[2:] != (1, 1))


def _steps(
    node: Node, read: tuple[Node, ...], options: tuple[Option, ...] | None, layout_of: dict[Node, str]
) -> list[Step]:
    """Return the steps of a node: an opaque one reads every input in the layout that it was captured with."""
    if options is not None:
        return [Step(node.name, tuple(value.name for value in read), options)]
    steps = [
        Step(f"{node.name} reads {value.name}", (value.name,), (Option(layout_of[value], "", 0.0),)) for value in read
    ]
    if node in layout_of:
        steps.append(Step(node.name, (), (Option("", layout_of[node], 0.0),)))
    return steps


def _baseline_layouts(gm: GraphModule, found: Measurements) -> dict[Node, str]:
    """Return the layout of every 4-D value in the all-vanilla model.

    Where the strides fit both (one channel, one pixel), the layout of the node's input, so that a value of another
    size at another call is taken for what it will be.
    """
    layout_of: dict[Node, str] = {}
    for node in gm.graph.nodes:
        seen = found.values.get(node)
        if seen is None or (seen.shape, seen.dtype) not in found.moves:
            continue
        inherited = next((layout_of[value] for value in node.all_input_nodes if value in layout_of), "contiguous")
        layout_of[node] = seen.layout or inherited
    return layout_of


def _moves(prefix: str, steps: list[Step], options: dict[str, Option]) -> tuple[Move, ...]:
    readers: dict[tuple[str, str], list[str]] = defaultdict(list)
    for step in steps:
        option = options[step.name]
        for name in step.inputs:
            # Into a region, nodes hand on what they have: it changes the layout itself.
            if option.needs not in (options[name].gives, BATCH_INNER):
                readers[(name, option.needs)].append(_reader(step.name))
    return tuple(
        Move(prefix, name, layout, tuple(sorted(set(names)))) for (name, layout), names in sorted(readers.items())
    )


def _reader(step: str) -> str:
    """Return the node that a step stands for."""
    return "output" if step.startswith("output ") else step.partition(" reads ")[0]


def _not_reached() -> SitePlan:
    return SitePlan("vanilla", reason=NOT_REACHED)


def _site_plan(site: ConvSite, measured: Measured, chosen: Candidate, margin: float) -> SitePlan:
    # The other path is shown as it would run here: without a change of layout that the plan does not make.
    vanilla = measured.vanilla_on(chosen.needs)
    sparse = chosen if chosen.path == "sparse" else measured.best("sparse")
    ms = measured.ms
    return SitePlan(
        path=chosen.path,
        layout="contiguous" if chosen.gives == BATCH_INNER else chosen.gives,  # as it leaves a region
        packing=sparse.packing if sparse else "blocks",
        input_shape=measured.input.shape,
        output_shape=measured.output_shape,
        vanilla_ms=ms[vanilla],
        vanilla_ci=measured.ci(vanilla),
        sparse_ms=ms[sparse] if sparse else None,
        sparse_ci=measured.ci(sparse) if sparse else None,
        reason=_reason(site, measured, chosen, vanilla, sparse, margin),
    )


def _reason(
    site: ConvSite, measured: Measured, chosen: Candidate, vanilla: Candidate, sparse: Candidate | None, margin: float
) -> str:
    if sparse is None:
        return site.reason
    ms = measured.ms
    if chosen.path == "sparse" and ms[chosen] > ms[vanilla]:
        return "slower alone, but one call with the convolutions around it"
    if chosen.path == "sparse":
        return "measured" if chosen.packing == "blocks" else "measured; every weight in rows beats blocks and residual"
    if ms[sparse] * (1 + margin) >= ms[vanilla]:
        return f"sparse does not win by {margin:.0%}" if margin >= 0 else f"sparse is slower by more than {-margin:.0%}"
    if not measured.beyond_noise(sparse):
        return "sparse wins, but within the noise of the measurement"
    return "sparse wins alone, but not with the changes of memory layout that it brings"
