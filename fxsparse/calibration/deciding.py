"""From measurements to a plan: which path, packing and layout every convolution takes."""

from __future__ import annotations

import dataclasses
from collections import defaultdict

from torch import Tensor
from torch.fx import GraphModule, Node

from fxsparse import sites
from fxsparse.calibration.joint import Option, Step, solve
from fxsparse.calibration.measuring import Candidate, Measured, Measurements
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
    gm: GraphModule, prefix: str, found: Measurements, margin: float, *, sparse: bool = True, moving: bool = True
) -> Decision:
    """Choose for every site of a graph.

    Args:
        gm: the graph, every site vanilla.
        prefix: its name in the model, for the moves.
        found: measurements of this graph's nodes.
        margin: share by which anything must be faster than vanilla in the layout that arrives.
        sparse: allow sparse paths.
        moving: allow changes of layout; only where the graph does.
    """
    allowed = _candidates(gm, found, sparse=sparse)
    if moving and found.layouts[gm].ok:
        chosen, moves = _jointly(gm, prefix, found, allowed, margin)
    else:
        chosen, moves = _one_by_one(found, allowed, margin), ()
    plans = {}
    for node, site in sites.conv_sites(gm):
        measured = found.sites.get(node)
        plans[node] = _not_reached() if measured is None else _site_plan(site, measured, chosen[node], margin)
    return Decision(plans, moves)


def _candidates(gm: GraphModule, found: Measurements, *, sparse: bool) -> dict[Node, list[Candidate]]:
    """Return what may be chosen at each site; sites that share a packed weight share the packing too."""
    totals: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for node, site in sites.conv_sites(gm):
        measured = found.sites.get(node)
        if measured is None or site.packed is None:
            continue
        for packing in {c.packing for c in measured.ms if c.path == "sparse"}:
            best = min(ms for c, ms in measured.ms.items() if c.packing == packing)
            totals[site.packed][packing] += best
    allowed = {}
    for node, site in sites.conv_sites(gm):
        if node not in found.sites:
            continue
        packing = min(totals[site.packed], key=totals[site.packed].__getitem__) if site.packed in totals else ""
        allowed[node] = [
            candidate
            for candidate in found.sites[node].ms
            if candidate.path == "vanilla"
            or (sparse and candidate.packing == packing and candidate in found.sites[node].beyond_noise)
        ]
    return allowed


def _cost(measured: Measured, candidate: Candidate, margin: float) -> float:
    """Return the time of a candidate; vanilla in the layout that arrives is the default, others must win clearly."""
    default = candidate == next(iter(measured.ms))
    return measured.ms[candidate] * (1 if default else 1 + margin)


def _one_by_one(found: Measurements, allowed: dict[Node, list[Candidate]], margin: float) -> dict[Node, Candidate]:
    chosen = {}
    for node, candidates in allowed.items():
        measured = found.sites[node]
        arrives = next(iter(measured.ms)).needs
        here = [candidate for candidate in candidates if candidate.needs == arrives]
        chosen[node] = min(here, key=lambda candidate: _cost(measured, candidate, margin))
    return chosen


def _jointly(
    gm: GraphModule, prefix: str, found: Measurements, allowed: dict[Node, list[Candidate]], margin: float
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
        options = _options(gm, node, read, found, allowed, layout_of, margin)
        steps += _steps(node, read, options, layout_of)
    for node in gm.graph.nodes:
        if node.op == "output":
            for value in node.all_input_nodes:
                if value in layout_of:
                    needs = Option(layout_of[value], "", 0.0)
                    steps.append(Step(f"output {value.name}", (value.name,), (needs,)))
    moves_ms = {
        (node.name, layout): found.moves[(seen.shape, seen.dtype, layout)]
        for node, seen in found.values.items()
        if node in layout_of
        for layout in MEMORY_FORMATS
    }
    choice = solve(steps, moves_ms)
    chosen = {}
    for node, candidates in allowed.items():
        label = choice.options[node.name].label
        chosen[node] = next(candidate for candidate in candidates if _label(candidate) == label)
    return chosen, _moves(prefix, steps, choice.options)


def _label(candidate: Candidate) -> str:
    return f"{candidate.path} {candidate.packing} {candidate.needs}"


def _options(
    gm: GraphModule,
    node: Node,
    read: tuple[Node, ...],
    found: Measurements,
    allowed: dict[Node, list[Candidate]],
    layout_of: dict[Node, str],
    margin: float,
) -> tuple[Option, ...] | None:
    """Return the ways to run a node, or None where it is opaque."""
    if node in allowed:
        measured = found.sites[node]
        # Where the strides fit both layouts, as with one pixel, the candidate runs alike in both.
        return tuple(
            Option(layout, layout if c.path == "vanilla" else c.gives, _cost(measured, c, margin), _label(c))
            for c in allowed[node]
            for layout in ((c.needs,) if measured.input.layout else MEMORY_FORMATS)
        )
    if node not in layout_of or not read or node.op == "placeholder" or not is_transparent(gm, node):
        return None
    if any(_is_map(gm, value) for value in node.all_input_nodes):
        return None
    times = found.others.get(node, dict.fromkeys(MEMORY_FORMATS, 0.0))
    return tuple(Option(layout, layout, times[layout]) for layout in MEMORY_FORMATS)


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
        if seen is None or (seen.shape, seen.dtype, "contiguous") not in found.moves:
            continue
        inherited = next((layout_of[value] for value in node.all_input_nodes if value in layout_of), "contiguous")
        layout_of[node] = seen.layout or inherited
    return layout_of


def _moves(prefix: str, steps: list[Step], options: dict[str, Option]) -> tuple[Move, ...]:
    readers: dict[tuple[str, str], list[str]] = defaultdict(list)
    for step in steps:
        option = options[step.name]
        for name in step.inputs:
            if option.needs != options[name].gives:
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
    vanilla = Candidate("vanilla", "", chosen.needs)
    sparse = chosen if chosen.path == "sparse" else measured.best("sparse")
    return SitePlan(
        path=chosen.path,
        layout=chosen.gives,
        packing=sparse.packing if sparse else "blocks",
        input_shape=measured.input.shape,
        output_shape=measured.output_shape,
        vanilla_ms=measured.ms[vanilla],
        vanilla_ci=measured.ci[vanilla],
        sparse_ms=measured.ms[sparse] if sparse else None,
        sparse_ci=measured.ci[sparse] if sparse else None,
        reason=_reason(site, measured, chosen, vanilla, sparse, margin),
    )


def _reason(
    site: ConvSite, measured: Measured, chosen: Candidate, vanilla: Candidate, sparse: Candidate | None, margin: float
) -> str:
    if sparse is None:
        return site.reason
    if chosen.path == "sparse":
        return "measured" if chosen.packing == "blocks" else "measured; every weight in rows beats blocks and residual"
    if measured.ms[sparse] * (1 + margin) >= measured.ms[vanilla]:
        return f"sparse does not win by {margin:.0%}"
    if sparse not in measured.beyond_noise:
        return "sparse wins, but within the noise of the measurement"
    return "sparse wins alone, but not with the changes of memory layout that it brings"
