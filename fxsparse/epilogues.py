"""Epilogues: each sparse convolution with what follows it in one call.

A converted graph keeps a node for every step, because modes, layouts, plans and files go by them. Its code is generated
from a copy in which a sparse convolution does the activation and the residual addition behind it too, so that its
result is written once instead of three times.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from fxsparse import sites
from fxsparse.node_kinds import SPARSE, activation_of, added, alike, does_nothing
from fxsparse.writes import written_input


class Epilogue(NamedTuple):
    """What a sparse convolution does besides.

    Attributes:
        activation: as `fxsparse::conv2d` names it.
        add: the node whose value is added before the activation, or None.
        replaced: the nodes that it stands for.
    """

    activation: str
    add: Node | None
    replaced: tuple[Node, ...]


def fused(gm: GraphModule) -> Graph:
    """Return the graph of a module, or a copy with the epilogues in its convolutions and without `nn.Identity`."""
    graph = gm._graph  # not `graph`, which a ConvertedModule makes of this one
    nothing = {node: node.all_input_nodes[0] for node in graph.nodes if does_nothing(gm, node)}
    graph = _without(graph, nothing) if nothing else graph
    epilogues = find(gm, graph)
    if not epilogues:
        return graph
    replaced = {node: conv for conv, epilogue in epilogues.items() for node in epilogue.replaced}
    return _without(graph, replaced, epilogues)


def _without(graph: Graph, replaced: Mapping[Node, Node], epilogues: Mapping[Node, Epilogue] | None = None) -> Graph:
    """Return a copy of a graph in which some nodes' values are those of other nodes, and some have an epilogue."""
    result = empty_copy(graph)
    copies: dict[Node, Node] = {}
    for node in graph.nodes:
        if node in replaced:
            copies[node] = copies[replaced[node]]
        elif node.op == "output":
            result.output(map_arg(node.args[0], copies.__getitem__), node.type)
        else:
            copies[node] = result.node_copy(node, copies.__getitem__)
        if epilogues is not None and node in epilogues:
            epilogue = epilogues[node]
            addend = () if epilogue.add is None else (copies[epilogue.add],)
            copies[node].args = (*copies[node].args, epilogue.activation, *addend)
    return result


def empty_copy(graph: Graph) -> Graph:
    """Return a graph without nodes that generates code as another one does."""
    empty = Graph(graph.owning_module, graph._tracer_cls, graph._tracer_extras)
    empty.set_codegen(graph._codegen)
    return empty


def find(gm: GraphModule, graph: Graph) -> dict[Node, Epilogue]:
    """Return what the sparse convolutions of a graph can do besides, by node.

    Args:
        gm: owns the modules.
        graph: of it, without nodes that do nothing.
    """
    nodes = list(graph.nodes)
    order = {node: i for i, node in enumerate(nodes)}
    found: dict[Node, Epilogue] = {}
    taken: set[Node] = set()

    def written_between(first: Node, last: Node) -> bool:
        between = nodes[order[first] + 1 : order[last]]
        return any(node not in taken and written_input(gm, node) is not None for node in between)

    # The last of two convolutions that are added takes the other one's result: by then that is there.
    for conv in reversed(nodes):
        if conv.target is not SPARSE or sites.site_of(conv) is None:
            continue
        replaced: list[Node] = []
        last, add = conv, None
        user = _only_user(conv)
        if user is not None and user not in taken:
            other = added(user, conv)
            if (
                other is not None
                and order[other] < order[conv]
                and alike(gm, conv, other)
                and not written_between(conv, user)  # it is read sooner than before
            ):
                last, add = user, other
                replaced.append(user)
        user = _only_user(last)
        activation = None if user is None or user in taken else activation_of(gm, user)
        if user is not None and activation is not None:
            replaced.append(user)
        if replaced:
            found[conv] = Epilogue(activation or "none", add, tuple(replaced))
            taken.update(replaced)
    return found


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
