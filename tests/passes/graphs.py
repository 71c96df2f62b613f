"""Hand-built graphs for the pass tests."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node

from fxsparse.passes.base import PassContext
from fxsparse.settings import Settings


def build(root: dict[str, object], make: Callable[[Graph, Node], Node]) -> GraphModule:
    """Return an eval-mode graph module with parameters and modules `root` and one input."""
    holder = nn.Module()
    for name, value in root.items():
        if isinstance(value, nn.Module):
            holder.add_module(name, value)
        else:
            holder.register_parameter(name, nn.Parameter(value, requires_grad=False))
    graph = Graph()
    source = graph.placeholder("x")
    graph.output(make(graph, source))
    return GraphModule(holder.eval(), graph).eval()


def context(**settings: object) -> PassContext:
    """Return a context with these settings and no disk cache."""
    return PassContext(Settings(cache=False, **settings))


def agree(gm: GraphModule, expected: torch.Tensor, x: torch.Tensor) -> bool:
    """Tell whether a graph computes the expected output to float32 rounding."""
    with torch.no_grad():
        return torch.allclose(gm(x), expected, rtol=1e-5, atol=1e-5)
