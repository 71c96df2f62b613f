"""Rung 3: every convolution module alone, swapped for a graph of its own inside the (private) model."""

from __future__ import annotations

import torch
from torch import nn
from torch.fx import Graph, GraphModule

from fxsparse import sites
from fxsparse.capture.refusal import Refusal
from fxsparse.graph_module import HOOKS, ConvertedModule
from fxsparse.inputs import ExampleInputs

# What other code of the model may read of its convolution, and what its hooks hang on.
_MIRRORED = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "transposed",
    "output_padding",
    "groups",
    "padding_mode",
    "training",
    *HOOKS,
)


def capture_modules(
    model: nn.Module, inputs: ExampleInputs | None
) -> tuple[nn.Module, list[tuple[str, GraphModule]], list[str]]:
    """Swap each plain `nn.Conv2d` of the model for a GraphModule under the same name, with its hooks and attributes.

    Nothing runs here, so nothing can be dropped; the example inputs are not needed.
    """
    if isinstance(model, nn.Conv2d):
        raise Refusal("the model is itself a convolution: there is no module to swap it in")
    swapped: dict[nn.Module, GraphModule] = {}
    graphs = []
    for path, module in model.named_modules():
        if sites.is_plain_conv(module):
            swapped[module] = _graph_of(module)
            graphs.append((path + ".", swapped[module]))
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child in swapped:
                module._modules[name] = swapped[child]
    note = (
        "Convolutions were swapped one by one inside a copy of the model: batch norms are not folded, and "
        "convolutions called as functions stay dense."
    )
    return model, graphs, [note]


def _graph_of(conv: nn.Module) -> GraphModule:
    graph = Graph()
    source = graph.placeholder("input")
    site = sites.from_module(conv, "weight", "bias")
    node = graph.call_function(torch.conv2d, sites.vanilla_arguments(graph, source, site))
    node.meta[sites.META] = site
    graph.output(node)
    gm = ConvertedModule(conv, graph, "ConvSite")
    for name in _MIRRORED:
        gm.__dict__[name] = getattr(conv, name)
    return gm


def plain_conv(gm: GraphModule) -> nn.Conv2d:
    """Return a swapped convolution as the `nn.Conv2d` that it was, on the parameters that it has now."""
    given = {name: getattr(gm, name) for name in _MIRRORED if name not in (*HOOKS, "training")}
    del given["transposed"], given["output_padding"]
    conv = nn.Conv2d(**given, bias=False, device="meta")
    for name in ("weight", "bias"):
        conv.register_parameter(name, getattr(gm, name, None))
    for name in (*HOOKS, "training"):
        conv.__dict__[name] = getattr(gm, name)
    return conv
