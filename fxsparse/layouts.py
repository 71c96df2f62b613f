"""Changes of memory layout in a converted graph: plain `contiguous` calls that a plan places and takes away.

A layout is strides, not a type: the tensor stays [N, C, H, W]. "contiguous" is torch.contiguous_format,
"channels_last" is torch.channels_last. A call on a tensor that is in the layout already returns it as it is.

With the calls go the layouts of dense weights: `torch.conv2d` gives channels_last if either its input or its weight is
in that, and copies a weight in the other layout at every call.
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


def current(gm: GraphModule, prefix: str = "") -> tuple[Move, ...]:
    """Return the changes of layout that a graph holds."""
    return tuple(
        Move(prefix, str(node.all_input_nodes[0]), node.meta[_META], readers_of(node))
        for node in gm.graph.nodes
        if _META in node.meta
    )


def clear(gm: GraphModule) -> bool:
    """Take every change of layout out of a graph, and out of its dense weights.

    Returns:
        Whether there was one in the graph; the caller recompiles.
    """
    for _, site in sites.conv_sites(gm):
        _lay_out_weight(gm, site, site.weight_layout)
    found = [node for node in gm.graph.nodes if _META in node.meta]
    for node in found:
        node.replace_all_uses_with(node.all_input_nodes[0])
        gm.graph.erase_node(node)
    return bool(found)


def place(gm: GraphModule, moves: Iterable[Move]) -> list[Move]:
    """Put changes of layout into a graph, and into the dense weights of its planned sites; the caller recompiles.

    Returns:
        The moves that this graph has no place for: a value or a reader of that name does not exist.
    """
    nodes = {node.name: node for node in gm.graph.nodes}
    left = []
    for move in moves:
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
    for _, site in sites.conv_sites(gm):
        if site.path == "vanilla" and site.layout is not None:
            _lay_out_weight(gm, site, site.layout)
    return left


def layout_of(tensor: Tensor) -> str:
    """Return the layout of a weight: "channels_last" only where it is not contiguous too."""
    last = tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
    return "channels_last" if last else "contiguous"


def _lay_out_weight(gm: GraphModule, site: ConvSite, layout: str) -> None:
    owner, _, leaf = site.weight.rpartition(".")
    weight = getattr(gm.get_submodule(owner), leaf, None)
    if weight is None:  # dropped by `freeze`
        return
    moved = weight.detach().contiguous(memory_format=MEMORY_FORMATS[layout])
    if moved.data_ptr() != weight.data_ptr():
        weight.data = moved  # the same parameter, for optimizers that hold it


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
