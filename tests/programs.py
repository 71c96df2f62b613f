"""What graphs call."""

from __future__ import annotations

import torch
from torch.fx import Graph

from fxsparse.ops.region import Conv, steps_of


def sparse_calls(graph: Graph) -> int:
    """Return how many sparse convolutions a graph does, alone and in regions."""
    count = 0
    for node in graph.nodes:
        if node.target is torch.ops.fxsparse.conv2d.default:
            count += 1
        elif node.target is torch.ops.fxsparse.region.default:
            count += sum(isinstance(step, Conv) for step in steps_of(node.args[2]))
    return count
