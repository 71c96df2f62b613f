"""The graph that Dynamo captured, with the model's tensors as attributes instead of inputs, and back.

The passes and the calibration work on graphs that own their weights. What they leave then goes to the inner backend in
the form that Dynamo expects: the same inputs in the same order, so that the model's tensors are read where they are.
The packed weights are buffers of that graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from torch import Tensor, nn
from torch._dynamo.source import ConstantSource
from torch.fx import Graph, GraphModule, Node

from fxsparse import regions, sites
from fxsparse.dynamo.weights import Weight, weight_node
from fxsparse.graph_module import ConvertedModule
from fxsparse.passes.normalize_convs import CONV_FUNCTIONS


def bind(
    gm: GraphModule, weights: Mapping[Node, Weight], attributes: Set[Node], values: Mapping[Node, Any]
) -> ConvertedModule:
    """Return a copy of a graph that owns its parameters.

    Args:
        gm: as Dynamo captured it; not changed.
        weights: of its convolutions, by node: parameters of the result, under the names that the user knows.
        attributes: the placeholders that become attributes, under their own names.
        values: of the placeholders. The result shares their memory; its parameters are other objects.
    """
    graph, root = Graph(), {}
    copies: dict[Node, Node] = {}
    for node in gm.graph.nodes:
        if node in attributes:
            root[node.name] = _shared(values[node])
            copies[node] = graph.get_attr(node.name)
            continue
        if node.op in ("get_attr", "call_module"):
            root[node.target] = sites.attribute(gm, node.target)
        read = copies
        read_weight = weight_node(node) if node.target in CONV_FUNCTIONS else None
        if read_weight is not None and read_weight in weights:
            weight = weights[read_weight]
            if weight.name not in root:
                tensor = weight.value(*(values[source] for source in weight.sources))
                root[weight.name] = nn.Parameter(tensor, requires_grad=False)
            read = {**copies, weight.node: graph.get_attr(weight.name)}
        copies[node] = graph.node_copy(node, read.__getitem__)
    for node in weights:  # and what computed it, unless somebody else reads that
        _erase(graph, copies[node])
    return ConvertedModule(root, graph, "Captured").eval()


def unbind(
    bound: GraphModule, gm: GraphModule, weights: Mapping[Node, Weight], values: Mapping[Node, Any]
) -> tuple[GraphModule, frozenset[str]]:
    """Return a bound graph with the inputs of the one that it was made from.

    Args:
        bound: what `bind` made, after the passes.
        gm: what it was made from.
        weights, values: as for `bind`.

    Returns:
        The graph, and the names in `bound` of the tensors that it reads besides its inputs and those of `gm`: they hold
        what was made of the weights, which may change.
    """
    graph, root = Graph(), {}
    inputs: dict[str, Node] = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        inputs[node.name] = graph.node_copy(node)
        inputs[node.name]._dynamo_source = getattr(node, "_dynamo_source", None)
    direct = {w.name: w.node for w in weights.values() if w.program is None}
    made = set()
    copies: dict[Node, Node] = {}
    for node in regions.executed(bound).nodes:
        target = str(node.target)
        if node.op == "placeholder":
            copies[node] = inputs[node.name]
            continue
        if node.op in ("get_attr", "call_module"):
            if target in inputs:
                copies[node] = inputs[target]
                continue
            value = sites.attribute(bound, target)
            source = direct.get(target)
            if source is not None and value.data_ptr() == values[source].data_ptr():  # its layout is the user's
                copies[node] = inputs[source.name]
                continue
            if not _has(gm, target):
                made.add(target)
                value = value.detach()
            root[target] = value
        copies[node] = graph.node_copy(node, copies.__getitem__)
        copies[node].meta.pop(sites.META, None)
    result = GraphModule(root, graph, type(gm).__name__)
    result.meta = dict(gm.meta)
    known = getattr(gm, "_param_name_to_source", None)
    if known is not None:
        result.__dict__["_param_name_to_source"] = dict(known)
        name_buffers(result)
    return result, frozenset(made)


def name_buffers(gm: GraphModule) -> None:
    """Give the buffers that a graph from Dynamo was given later a source: AOTAutograd wants one for each."""
    known: Any = getattr(gm, "_param_name_to_source", None)
    if known is not None:
        for name, _ in (*gm.named_parameters(remove_duplicate=False), *gm.named_buffers(remove_duplicate=False)):
            known.setdefault(name, ConstantSource(f"fxsparse_{name}"))


def _shared(value: Tensor) -> Tensor:
    alias = value.detach()
    return nn.Parameter(alias, requires_grad=False) if isinstance(value, nn.Parameter) else alias


def _erase(graph: Graph, node: Node) -> None:
    if not node.users and node.op != "placeholder" and not node._erased:
        inputs = node.all_input_nodes
        graph.erase_node(node)
        for other in inputs:
            _erase(graph, other)


def _has(gm: nn.Module, name: str) -> bool:
    owner, _, leaf = name.rpartition(".")
    try:
        return hasattr(gm.get_submodule(owner), leaf)
    except AttributeError:
        return False
