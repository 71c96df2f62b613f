"""Weights of convolutions as functions of parameters: the parameter itself, or what a few nodes compute from some.

`nn.utils.prune` multiplies by a mask in the graph that Dynamo captures, a parametrization runs there, and the masks
that a user gives to the backend are written there. All are alike: the weight is the same until a parameter changes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from fxsparse.dynamo.naming import plain_name
from fxsparse.masks import WeightMask
from fxsparse.passes.normalize_convs import CONV_FUNCTIONS
from fxsparse.writes import written_input


@dataclasses.dataclass(frozen=True)
class Weight:
    """The weight of some convolutions of one graph.

    Attributes:
        name: that the user knows it by, such as "layer1.0.conv1.weight".
        node: that the convolutions read.
        sources: the placeholders that it is computed from.
        groups: of its first convolution.
        program: computes it from the sources; None where it is the one source itself.
    """

    name: str
    node: Node
    sources: tuple[Node, ...]
    groups: int
    program: GraphModule | None

    def value(self, *sources: Tensor) -> Tensor:
        """Compute the weight; where it is a parameter, the result shares its memory."""
        result: Tensor = sources[0] if self.program is None else self.program(*sources)
        return result.detach()


def weight_node(conv: Node) -> Node | None:
    """Return the node that gives a convolution its weight."""
    weight = conv.args[1] if len(conv.args) > 1 else conv.kwargs.get("weight")
    return weight if isinstance(weight, Node) else None


def convolutions(gm: GraphModule) -> list[Node]:
    """Return the calls of 2-D convolutions in a graph."""
    return [node for node in gm.graph.nodes if node.op == "call_function" and node.target in CONV_FUNCTIONS]


def find_weights(gm: GraphModule, attributes: Mapping[Node, str]) -> dict[Node, Weight]:
    """Find the weights that depend on the model's parameters and buffers alone.

    Args:
        gm: as Dynamo captured it.
        attributes: the placeholders that stand for parameters and buffers, with their names.

    Returns:
        The weights, by the node that gives them.
    """
    found: dict[Node, Weight] = {}
    for conv in convolutions(gm):
        node = weight_node(conv)
        if node is None or node in found:
            continue
        sources: dict[Node, None] = {}
        if not _is_constant(node, attributes, sources) or not sources:
            continue
        # nn.utils.prune reads its mask before the weight.
        named = [attributes[source] for source in sources]
        name = next((plain for given in named if (plain := plain_name(given)) != given), named[0])
        while any(other.name == name for other in found.values()):  # one parameter, two weights
            name += "_"
        program = None if node in attributes else _program(gm, node, list(sources))
        found[node] = Weight(name, node, tuple(sources), _groups(conv), program)
    return found


def why_not(gm: GraphModule, weight: Weight, values: Mapping[Node, Any]) -> str:
    """Say why a weight cannot be packed while the model goes on owning it; "" if it can."""
    if any(values[source].is_inference() for source in weight.sources):
        return "its weight was made in inference mode, where torch does not count the writes to a tensor"
    writer = _writer(gm, weight.sources)
    if writer is not None:
        return f"the model writes into its weight ('{writer}')"
    if weight.program is not None:
        sources = [values[source] for source in weight.sources]
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            if not torch.equal(weight.value(*sources), weight.value(*sources)):
                return "its weight is another one at every call"
    return ""


def pruning_mask(weight: Weight, attributes: Mapping[Node, str], values: Mapping[Node, Any]) -> WeightMask | None:
    """Return the mask by which `nn.utils.prune` multiplies a weight, or None."""
    named = {attributes[source]: source for source in weight.sources}
    for name, source in named.items():
        if name.endswith("_mask") and name.removesuffix("_mask") + "_orig" in named:
            return WeightMask(values[source].detach() != 0, None, "nn.utils.prune")
    return None


def write_mask(gm: GraphModule, weight: Weight, kept: Tensor) -> None:
    """Let the convolutions of a graph read a weight with zeros where a mask prunes it; the caller recompiles.

    Args:
        gm: the graph; it gets the mask as a buffer.
        weight: of some of its convolutions.
        kept: bool, of the weight's shape.
    """
    readers = [conv for conv in convolutions(gm) if weight_node(conv) is weight.node]
    name = f"fxsparse_mask_{sum(1 for _ in gm.buffers())}"
    gm.register_buffer(name, kept)
    with gm.graph.inserting_before(readers[0]):
        # Not a product, which would keep a NaN.
        masked = gm.graph.call_function(torch.where, (gm.graph.get_attr(name), weight.node, 0))
    for conv in readers:
        conv.replace_input_with(weight.node, masked)


def _is_constant(node: Node, attributes: Mapping[Node, str], sources: dict[Node, None]) -> bool:
    if node in attributes:
        sources[node] = None
        return True
    if node.op == "get_attr":
        return True
    return node.op in ("call_function", "call_method") and all(
        _is_constant(n, attributes, sources) for n in node.all_input_nodes
    )


def _program(gm: GraphModule, node: Node, sources: list[Node]) -> GraphModule:
    graph = Graph()
    copies = {source: graph.placeholder(source.name) for source in sources}

    def copied(original: Node) -> Node:
        if original not in copies:
            for other in original.all_input_nodes:
                copied(other)
            copies[original] = graph.node_copy(original, copies.__getitem__)
        return copies[original]

    graph.output(copied(node))
    return GraphModule(gm, graph)


def _groups(conv: Node) -> int:
    groups = conv.args[-1] if len(conv.args) in (7, 9) else conv.kwargs.get("groups", 1)
    return groups if isinstance(groups, int) else 1


def _writer(gm: GraphModule, sources: tuple[Node, ...]) -> Node | None:
    """Return a node that may write into the memory of some placeholders."""
    for node in gm.graph.nodes:
        written = written_input(gm, node)
        if written is not None and _may_be(written, sources, set()):
            found: Node = node
            return found
    return None


def _may_be(node: Node, sources: tuple[Node, ...], known: set[Node]) -> bool:
    """Tell whether a value may share memory with one of some placeholders; a convolution's output does not."""
    if node in sources:
        return True
    if node in known or node.target in CONV_FUNCTIONS:
        return False
    known.add(node)
    return any(_may_be(other, sources, known) for other in node.all_input_nodes)
