"""Which nodes of a graph work in either memory layout, and whether a graph's layouts may be chosen at all.

A transparent node computes the same values in both layouts and hands the layout of its inputs on. Everything else is
opaque: it gets its inputs, and gives its output, in the layout that the graph had when it was captured, so that a
`view` deeper in the model never meets strides that it cannot take.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, Node

from fxsparse import sites
from fxsparse.sites import Support
from fxsparse.writes import written_input


def _words(names: str) -> frozenset[str]:
    return frozenset(names.split())


# Same cost in both layouts while all inputs have one shape.
_ELEMENTWISE_FUNCTIONS = frozenset(
    {
        *(operator.add, operator.sub, operator.mul, operator.truediv, operator.neg),
        *(operator.iadd, operator.isub, operator.imul, operator.itruediv),
        *(torch.add, torch.sub, torch.mul, torch.div, torch.relu, torch.sigmoid, torch.tanh, torch.clamp, torch.exp),
        *(F.relu, F.relu6, F.silu, F.hardswish, F.hardsigmoid, F.gelu, F.leaky_relu, F.elu, F.mish, F.softplus),
        *(F.hardtanh, F.dropout, F.dropout2d, torch.dropout, F.sigmoid, F.tanh, torch.relu_, F.selu),
    }
)
_ELEMENTWISE_METHODS = _words(
    "add sub mul div relu sigmoid tanh clamp neg exp add_ sub_ mul_ div_ relu_ sigmoid_ clamp_ hardtanh"
)
_ELEMENTWISE_MODULES = (
    *(nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.GELU, nn.LeakyReLU, nn.ELU, nn.Mish, nn.SELU),
    *(nn.Sigmoid, nn.Tanh, nn.Hardtanh, nn.Softplus, nn.Identity, nn.Dropout, nn.Dropout2d, nn.PReLU),
)
_ELEMENTWISE_ATEN = _words(
    "add sub mul div relu relu_ sigmoid tanh clamp neg exp silu silu_ hardswish hardswish_ hardsigmoid gelu "
    "leaky_relu elu mish hardtanh hardtanh_ softplus dropout add_ mul_"
)
# Their cost depends on the layout: they are timed in both.
_OTHER_FUNCTIONS = frozenset(
    {
        *(F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.batch_norm, F.interpolate),
        *(F.pad, torch.cat, torch.max_pool2d, torch.batch_norm, torch.concat),
    }
)
_OTHER_MODULES = (
    *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.BatchNorm2d, nn.Upsample),
    *(nn.ZeroPad2d, nn.UpsamplingBilinear2d, nn.UpsamplingNearest2d),
)
_OTHER_ATEN = _words(
    "max_pool2d avg_pool2d adaptive_avg_pool2d batch_norm cat constant_pad_nd pad upsample_nearest2d "
    "upsample_bilinear2d"
)
# Their results never share memory with what they read.
_ALLOCATING: tuple[Any, ...] = (
    frozenset({F.linear, torch.matmul, operator.matmul, torch.bmm, F.layer_norm, torch.mean, torch.sum, torch.cat}),
    frozenset({"mean", "sum", "matmul", "bmm", "mm"}),
    (nn.Linear, nn.LayerNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d),
    frozenset({"linear", "addmm", "mm", "bmm", "matmul", "layer_norm", "mean", "sum", "cat", "batch_norm"}),
)
# Transparent, but their result may be what they read.
_PASSING_ON: tuple[Any, ...] = (
    frozenset({F.dropout, F.dropout2d, torch.dropout, F.interpolate, F.adaptive_avg_pool2d, F.pad}),
    frozenset(),
    (nn.Identity, nn.Dropout, nn.Dropout2d, nn.AdaptiveAvgPool2d, nn.Upsample, nn.ZeroPad2d),
    frozenset({"dropout", "adaptive_avg_pool2d", "pad", "constant_pad_nd"}),
)
# Readers that depend on strides, not only on values.
_STRIDE_METHODS = frozenset({"stride", "is_contiguous", "data_ptr", "storage_offset", "as_strided", "storage"})


def is_transparent(gm: GraphModule, node: Node) -> bool:
    """Tell whether a node computes the same in either layout and hands it on."""
    return is_elementwise(gm, node) or _in(gm, node, _OTHER_FUNCTIONS, frozenset(), _OTHER_MODULES, _OTHER_ATEN)


def is_elementwise(gm: GraphModule, node: Node) -> bool:
    """Tell whether a node computes each element from the elements at its place."""
    return _in(gm, node, _ELEMENTWISE_FUNCTIONS, _ELEMENTWISE_METHODS, _ELEMENTWISE_MODULES, _ELEMENTWISE_ATEN)


def _in(
    gm: GraphModule,
    node: Node,
    functions: frozenset[Any],
    methods: frozenset[str],
    modules: tuple[type[nn.Module], ...],
    aten: frozenset[str],
) -> bool:
    if node.op == "call_function":
        if isinstance(node.target, torch._ops.OpOverload):
            return node.target.namespace == "aten" and node.target._schema.name.removeprefix("aten::") in aten
        return node.target in functions
    if node.op == "call_method":
        return node.target in methods
    # Not isinstance: a subclass may do anything.
    return node.op == "call_module" and type(gm.get_submodule(str(node.target))) in modules


def may_choose_layouts(gm: GraphModule) -> Support:
    """Tell whether values of a graph may change their layout without anybody noticing but the clock.

    A change of layout is a copy. Where a node writes into its input, the copy would take the write, so the input must
    be a value that nobody else can read. A node that asks for strides would see others.
    """
    for node in gm.graph.nodes:
        if node.op == "call_method" and node.target in _STRIDE_METHODS:
            return Support.no(f"'{node.name}' asks for the memory layout of '{_shown(node.args[0])}'")
        written = written_input(gm, node)
        if written is not None and not _is_alone(gm, written):
            return Support.no(f"'{node.name}' writes into '{_shown(written)}', which other nodes may read")
    return Support(True)


def _shown(node: Any) -> str:
    """Name a node as the user knows it."""
    site = sites.site_of(node) if isinstance(node, Node) else None
    return site.name if site else str(node)


def _is_alone(gm: GraphModule, node: Node) -> bool:
    """Tell whether the memory of a node's value is read by one node only, whatever is a view of what."""
    if len(node.users) != 1 or node.op in ("placeholder", "get_attr"):
        return False
    written = written_input(gm, node)
    if written is not None:  # its result is that memory
        return _is_alone(gm, written)
    if sites.site_of(node) is not None or _in(gm, node, *_ALLOCATING):
        return True
    if is_transparent(gm, node) and not _in(gm, node, *_PASSING_ON):
        return True
    return all(_is_alone(gm, value) for value in node.all_input_nodes)
