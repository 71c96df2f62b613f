"""Evaluate convolution weights that are computed from parameters alone.

Weight standardisation, a parametrisation that export traced through, or a cast between a parameter and its
convolution all give the same weight at every call. Computed once, it can be looked at for zeros and packed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.fx.passes.infra.pass_base import PassResult

from fxsparse import sites
from fxsparse.passes.base import PassContext, finish
from fxsparse.passes.normalize_convs import CONV_FUNCTIONS

# In a graph's meta: by name of a folded weight, how it was computed (`Computed`), to do that again from a checkpoint.
COMPUTED_WEIGHTS = "fxsparse_computed_weights"


@dataclasses.dataclass(frozen=True)
class Computed:
    """How a weight is computed.

    Attributes:
        graph: reads parameters by `get_attr` and returns the weight.
        kept: masks of these parameters, by name, where they were given; a new value must be masked first.
    """

    graph: Graph
    kept: dict[str, Tensor]

    @property
    def sources(self) -> list[str]:
        """Names of the parameters that it reads."""
        return [str(node.target) for node in self.graph.nodes if node.op == "get_attr"]

    def evaluate(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Compute the weight from other values of its parameters, by name."""
        known: dict[Node, Any] = {n: parameters[str(n.target)] for n in self.graph.nodes if n.op == "get_attr"}
        (result,) = self.graph.output_node().args
        assert isinstance(result, Node)
        weight: Tensor = _evaluate(nn.Module(), result, known)
        return weight


def fold_constant_weights(gm: GraphModule, ctx: PassContext) -> PassResult:
    """Replace every constant computed weight of a 2-D convolution by a parameter that holds its value."""
    folded = 0
    for node in gm.graph.nodes:
        if node.op != "call_function" or node.target not in CONV_FUNCTIONS:
            continue
        weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
        if not isinstance(weight, Node) or weight.op == "get_attr":
            continue
        sources: list[str] = []
        if gm.training or not _is_constant(weight, sources) or not sources:
            continue
        value = _constant_value(gm, weight, sources)
        if value is None:
            continue
        name = _fresh_name(gm, sources[0])
        trained = value.is_floating_point() and any(sites.attribute(gm, source).requires_grad for source in sources)
        owner, _, leaf = name.rpartition(".")
        gm.get_submodule(owner).register_parameter(leaf, nn.Parameter(value.clone(), requires_grad=trained))
        kept = {s: ctx.masks[ctx.prefix + s].kept for s in sources if ctx.prefix + s in ctx.masks}
        gm.meta.setdefault(COMPUTED_WEIGHTS, {})[name] = Computed(_expression(weight), kept)
        with gm.graph.inserting_before(weight):
            weight.replace_all_uses_with(gm.graph.get_attr(name))
        folded += 1
    if folded:
        gm.graph.eliminate_dead_code()
    return finish(gm, ctx, {"constant weights folded": folded})


def _is_constant(node: Node, sources: list[str]) -> bool:
    """Tell whether a value comes from parameters alone, through functions and methods; collect the parameters."""
    if node.op == "get_attr":
        sources.append(str(node.target))
        return True
    return node.op in ("call_function", "call_method") and all(_is_constant(n, sources) for n in node.all_input_nodes)


def _constant_value(gm: GraphModule, weight: Node, sources: list[str]) -> Tensor | None:
    """Evaluate twice; None if that gave two values (something random) or changed a parameter (something in place)."""
    parameters = [sites.attribute(gm, name) for name in sources]
    before = [p.detach().clone() for p in parameters]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        first, second = (_evaluate(gm, weight, {}) for _ in range(2))
        if not all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True)):
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
            return None
    return first if isinstance(first, Tensor) and torch.equal(first, second) else None


def _expression(weight: Node) -> Graph:
    """Copy what computes a weight into a graph of its own."""
    graph = Graph()
    copies: dict[Node, Node] = {}

    def copied(node: Node) -> Node:
        if node not in copies:
            for source in node.all_input_nodes:
                copied(source)
            copies[node] = graph.node_copy(node, copies.__getitem__)
        return copies[node]

    graph.output(copied(weight))
    return graph


def _evaluate(gm: nn.Module, node: Node, known: dict[Node, Any]) -> Any:
    if node not in known:
        if node.op == "get_attr":
            known[node] = sites.attribute(gm, str(node.target))
        else:
            args, kwargs = map_arg((node.args, node.kwargs), lambda n: _evaluate(gm, n, known))
            if node.op == "call_function":
                known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
            else:
                known[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return known[node]


def _fresh_name(gm: GraphModule, source: str) -> str:
    owner, _, leaf = source.rpartition(".")
    module = gm.get_submodule(owner)
    candidate = leaf + sites.FOLDED
    while hasattr(module, candidate):
        candidate += "_"
    return f"{owner}.{candidate}" if owner else candidate
