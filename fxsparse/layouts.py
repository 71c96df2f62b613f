"""Changes of memory layout in a converted graph: plain `contiguous` calls that a plan places and takes away.

A layout is strides, not a type: the tensor stays [N, C, H, W]. "contiguous" is torch.contiguous_format,
"channels_last" is torch.channels_last. A call on a tensor that is in the layout already returns it as it is.

With the calls go the layouts of dense weights: `torch.conv2d` gives channels_last if either its input or its weight is
in that, and copies a weight in the other layout at every call. A move of a weight has the value "parameter NAME".
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxsparse import sites
from fxsparse.plan import Move
from fxsparse.sites import ConvSite

MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
_META = "fxsparse_move"
_PARAMETER = "parameter "


def current(gm: GraphModule, prefix: str = "") -> tuple[Move, ...]:
    """Return the changes of layout that a graph and its dense weights are in."""
    moves = [
        Move(prefix, str(node.all_input_nodes[0]), node.meta[_META], readers_of(node))
        for node in gm.graph.nodes
        if _META in node.meta
    ]
    for site in _by_weight(gm).values():
        weight = _weight(gm, site)
        if weight is not None and not _is_in(weight, site.weight_layout):
            moves.append(move_of_weight(prefix, site, layout_of(weight)))
    return tuple(moves)


def move_of_weight(prefix: str, site: ConvSite, layout: str) -> Move:
    """Return the move that stores a site's dense weight in a layout."""
    return Move(prefix, _PARAMETER + site.weight, layout, ())


def moved_to(node: Node) -> str | None:
    """Return the layout that a node, which a plan placed, brings its input into; None of any other node."""
    layout: str | None = node.meta.get(_META)
    return layout


def clear(gm: GraphModule) -> None:
    """Take every change of layout out of a graph, and out of its dense weights; the caller recompiles."""
    for site in _by_weight(gm).values():
        _lay_out(_weight(gm, site), site.weight_layout)
    for node in [node for node in gm.graph.nodes if _META in node.meta]:
        node.replace_all_uses_with(node.all_input_nodes[0])
        gm.graph.erase_node(node)


def place(gm: GraphModule, moves: Iterable[Move]) -> list[Move]:
    """Put changes of layout into a graph and its dense weights; the caller recompiles.

    Returns:
        The moves that this graph has no place for: a value, a weight or a reader of that name does not exist.
    """
    nodes = {node.name: node for node in gm.graph.nodes}
    weights = {_PARAMETER + site.weight: site for site in _by_weight(gm).values()}
    left = []
    for move in moves:
        if move.value in weights:
            _lay_out(_weight(gm, weights[move.value]), move.layout)
            continue
        value = nodes.get(move.value)
        readers = [_reading_node(nodes[name], value) for name in move.readers if name in nodes and value is not None]
        if value is None or len(readers) < len(move.readers) or None in readers:
            left.append(move)
            continue
        with gm.graph.inserting_after(value):
            moved = gm.graph.call_method("contiguous", (value,), {"memory_format": MEMORY_FORMATS[move.layout]})
        moved.meta[_META] = move.layout
        for reader in readers:
            assert reader is not None
            reader.replace_input_with(value, moved)
    return left


def layout_of(tensor: Tensor) -> str:
    """Return the layout of a weight: "channels_last" only where it is not contiguous too."""
    last = tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
    return "channels_last" if last else "contiguous"


def _by_weight(gm: GraphModule) -> dict[str, ConvSite]:
    return {site.weight: site for _, site in sites.conv_sites(gm)}


def _weight(gm: GraphModule, site: ConvSite) -> Tensor | None:
    """Return a site's dense weight, or None where `freeze` dropped it."""
    owner, _, leaf = site.weight.rpartition(".")
    return getattr(gm.get_submodule(owner), leaf, None)


def _is_in(tensor: Tensor, layout: str) -> bool:
    return tensor.is_contiguous(memory_format=MEMORY_FORMATS[layout])


def _lay_out(weight: Tensor | None, layout: str) -> None:
    if weight is not None and not _is_in(weight, layout):
        # The same parameter, for optimizers that hold it.
        weight.data = weight.detach().contiguous(memory_format=MEMORY_FORMATS[layout])


def readers_of(node: Node) -> tuple[str, ...]:
    """Name the readers of a value by nodes that stay when a site changes its path: not by the pad before it."""
    names = set()
    for user in node.users:
        padded = [n.name for n in user.users if sites.site_of(n) is not None and sites.input_node(n) is node]
        names.update(padded or [user.name])
    return tuple(sorted(names))


def _reading_node(reader: Node, value: Node | None) -> Node | None:
    """Return the node that reads a value for a reader: itself, or the pad before a convolution."""
    if value in reader.all_input_nodes:
        return reader
    return next((n for n in reader.all_input_nodes if value in n.all_input_nodes), None)
