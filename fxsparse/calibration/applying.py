"""Bring a converted model to what a plan's entry says."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator

from torch import nn
from torch.fx import GraphModule, Node

from fxsparse import layouts, sites
from fxsparse.calibration import packings
from fxsparse.plan import Move, PlanEntry, SitePlan
from fxsparse.sites import ConvSite


def graphs(model: nn.Module) -> dict[str, GraphModule]:
    """Return the graphs of a converted model that hold conv sites, by their name in the model."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, GraphModule) and any(sites.conv_sites(module))
    }


def keyed(model: nn.Module) -> Iterator[tuple[str, GraphModule, Node]]:
    """Yield every conv site with its key in a plan: its name, with a number from the second call on."""
    calls: Counter[str] = Counter()
    for gm in graphs(model).values():
        for node, site in sites.conv_sites(gm):
            calls[site.name] += 1
            yield site.name if calls[site.name] == 1 else f"{site.name}#{calls[site.name]}", gm, node


def all_vanilla(model: nn.Module) -> None:
    """Take a model's sites to the vanilla path and its changes of layout away."""
    for gm in graphs(model).values():
        layouts.clear(gm)
        for node, _ in sites.conv_sites(gm):
            sites.set_path(gm, node, "vanilla")
            sites.update(node, layout=None)
        gm.recompile()


def current(model: nn.Module) -> tuple[dict[str, SitePlan], tuple[Move, ...]]:
    """Return how a model's sites run now, by key, and its changes of layout."""
    fields = [field.name for field in dataclasses.fields(SitePlan)]
    plans = {}
    for key, _, node in keyed(model):
        site = node.meta[sites.META]
        plans[key] = SitePlan(**{name: getattr(site, name) for name in fields})
    moves = tuple(move for prefix, gm in graphs(model).items() for move in layouts.current(gm, prefix))
    return plans, moves


def apply(model: nn.Module, entry: PlanEntry) -> list[str]:
    """Re-target a model's sites and change its layouts as an entry says.

    Args:
        model: a converted model.
        entry: of a plan.

    Returns:
        What could not be done, as sentences for the report.
    """
    notes = []
    for key, gm, node in keyed(model):
        planned = entry.sites.get(key)
        if planned is None:
            notes.append(f"The plan does not know the convolution '{key}': it stays as it was.")
            continue
        notes += _apply_site(gm, node, key, planned)
    notes += place_moves(model, entry.moves)
    for gm in graphs(model).values():
        gm.graph.lint()
        gm.recompile()
    return notes


def place_moves(model: nn.Module, moves: tuple[Move, ...]) -> list[str]:
    """Replace the changes of layout in a model; return what has no place as sentences."""
    known = graphs(model)
    left = [move for move in moves if move.graph not in known]
    for prefix, gm in known.items():
        layouts.clear(gm)
        left += layouts.place(gm, [move for move in moves if move.graph == prefix])
    return [f"The plan's change of memory layout after '{move.value}' has no place in this graph." for move in left]


def _apply_site(gm: GraphModule, node: Node, key: str, planned: SitePlan) -> list[str]:
    site: ConvSite = node.meta[sites.META]
    changes = dataclasses.asdict(planned)
    del changes["path"], changes["packing"]  # these change the graph and the tensors
    if planned.path == "sparse" and site.packed is None:
        sites.set_path(gm, node, "vanilla")
        return [f"The plan runs '{key}' sparse; here it has no packed weight: {site.reason}."]
    if site.packed is not None and planned.packing != site.packing:
        packings.repack(gm, site, planned.packing)
        for other, _ in [pair for pair in sites.conv_sites(gm) if pair[1].packed == site.packed]:
            sites.update(other, packing=planned.packing)
    sites.set_path(gm, node, planned.path)
    sites.update(node, **changes)
    return []
