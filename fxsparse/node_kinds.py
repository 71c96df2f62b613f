"""What single nodes of a graph compute, as far as a call of our operators can do it in their place."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from fxsparse import sites

SPARSE = torch.ops.fxsparse.conv2d.default
_aten = torch.ops.aten
_ACTIVATIONS: dict[Any, str] = {
    **dict.fromkeys((F.relu, torch.relu, torch.relu_, _aten.relu.default, _aten.relu_.default, nn.ReLU), "relu"),
    **dict.fromkeys(("relu", "relu_"), "relu"),
    **dict.fromkeys((F.relu6, nn.ReLU6, _aten.relu6.default), "relu6"),
    **dict.fromkeys((F.silu, nn.SiLU, _aten.silu.default, _aten.silu_.default), "silu"),
    **dict.fromkeys((F.hardswish, nn.Hardswish, _aten.hardswish.default, _aten.hardswish_.default), "hardswish"),
}
_ADDITIONS = frozenset({operator.add, torch.add, "add", _aten.add.Tensor})
_ADDITIONS_IN_PLACE = frozenset({operator.iadd, "add_", _aten.add_.Tensor})
_MAX_POOLS = frozenset({F.max_pool2d, torch.max_pool2d, _aten.max_pool2d.default})
_AVERAGE_POOLS = frozenset({F.adaptive_avg_pool2d, _aten.adaptive_avg_pool2d.default})
_FLATTENS = frozenset({torch.flatten, "flatten", _aten.flatten.using_ints})
_LINEARS = frozenset({F.linear, _aten.linear.default})
_HARDTANHS = frozenset({F.hardtanh, _aten.hardtanh.default, _aten.hardtanh_.default})


class Window(NamedTuple):
    """Of a maximum pooling: (vertical, horizontal) each."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    ceil_mode: bool


class Linear(NamedTuple):
    """A linear layer: the names of its parameters in the graph's module."""

    weight: str
    bias: str | None


def is_hooked(module: nn.Module) -> bool:
    """Tell whether a call of a module does more than its forward."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)


def does_nothing(gm: GraphModule, node: Node) -> bool:
    """Tell whether a node gives its input, whatever is done to its module later: exporting drops it."""
    if node.op != "call_module":
        return False
    module = gm.get_submodule(str(node.target))
    return type(module) is nn.Identity and not is_hooked(module)


def activation_of(gm: GraphModule, node: Node) -> str | None:
    """Return the name of the activation that a node is, as `fxsparse::conv2d` has it, or None."""
    if node.op == "call_function" and node.target in _HARDTANHS:  # exporting makes it of nn.ReLU6
        bounds = node.args[1:] or (node.kwargs.get("min_val"), node.kwargs.get("max_val"))
        return "relu6" if bounds == (0, 6) else None
    if len(node.all_input_nodes) != 1 or len(node.args) > 1 or set(node.kwargs) - {"inplace", "input"}:
        return None
    if node.op != "call_module":
        return _ACTIVATIONS.get(node.target)
    module = gm.get_submodule(str(node.target))
    # Not isinstance: a subclass may do anything. A module with hooks must be called.
    return None if is_hooked(module) else _ACTIVATIONS.get(type(module))


def added(node: Node, value: Node) -> Node | None:
    """Return what a node adds to a value, which it alone may write into; None where it is no plain addition."""
    if node.op not in ("call_function", "call_method") or node.kwargs or len(node.args) != 2:
        return None
    first, second = node.args
    if not isinstance(first, Node) or not isinstance(second, Node) or first is second:
        return None
    if node.target in _ADDITIONS or (node.target in _ADDITIONS_IN_PLACE and first is value):
        return second if first is value else first
    return None


def max_pool_of(gm: GraphModule, node: Node) -> Window | None:
    """Return the window of a node that is a maximum pooling, or None."""
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        if type(module) is not nn.MaxPool2d or module.return_indices or is_hooked(module):
            return None
        given: Any = vars(module)
    elif node.op == "call_function" and node.target in _MAX_POOLS:
        names = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
        given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    else:
        return None
    size = given["kernel_size"]
    sizes = (size, given.get("stride") or size, given.get("padding", 0), given.get("dilation", 1))
    computed = any(isinstance(value, Node) for value in pytree.tree_leaves(sizes))
    if computed or given.get("return_indices") or len(node.all_input_nodes) != 1:
        return None
    kernel_size, stride, padding, dilation = (sites.pair(value) for value in sizes)
    return Window(kernel_size, stride, padding, dilation, bool(given.get("ceil_mode", False)))


def averages_planes(gm: GraphModule, node: Node) -> bool:
    """Tell whether a node gives the mean of each plane of its input, as a plane of one pixel."""
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        plain = type(module) is nn.AdaptiveAvgPool2d and not is_hooked(module)
        return plain and module.output_size in (1, (1, 1))
    sizes = (*node.args[1:], *node.kwargs.values())
    return node.op == "call_function" and node.target in _AVERAGE_POOLS and sizes in ((1,), ((1, 1),), ([1, 1],))


def flattens(gm: GraphModule, node: Node) -> bool:
    """Tell whether a node makes one row of each image of its input."""
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        if type(module) is not nn.Flatten or is_hooked(module):
            return False
        return bool(module.start_dim == 1 and module.end_dim == -1)
    given = {**dict(zip(("input", "start_dim", "end_dim"), node.args, strict=False)), **node.kwargs}
    starts, ends = given.get("start_dim"), given.get("end_dim", -1)
    return bool(node.target in _FLATTENS and starts == 1 and ends == -1)


def linear_of(gm: GraphModule, node: Node) -> Linear | None:
    """Return the parameters of a node that is a linear layer, or None."""
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        if type(module) is not nn.Linear or is_hooked(module):
            return None
        return Linear(f"{node.target}.weight", None if module.bias is None else f"{node.target}.bias")
    if node.target not in _LINEARS:
        return None
    given: Any = {**dict(zip(("input", "weight", "bias"), node.args, strict=False)), **node.kwargs}
    source, weight, bias = (given.get(name) for name in ("input", "weight", "bias"))
    read = [value.op == "get_attr" for value in (source, weight, bias) if value is not None]
    if read != [False, True, True][: len(read)]:
        return None
    return Linear(str(weight.target), None if bias is None else str(bias.target))


def adds_alike(gm: GraphModule, node: Node) -> bool:
    """Tell whether a node adds two values of one shape, dtype and layout, and writes into neither."""
    if len(node.all_input_nodes) != 2 or node.target in _ADDITIONS_IN_PLACE:
        return False
    first, second = node.all_input_nodes
    return added(node, first) is not None and alike(gm, first, second)


def alike(gm: GraphModule, first: Node, second: Node) -> bool:
    """Tell whether two values have one shape, dtype and layout, whatever the input.

    That is known of results of sparse convolutions, and of what keeps these. Of planes of one pixel it is not: a plane
    that is added to every pixel looks so on small images.
    """
    shape = shape_of(gm, first)
    return shape is not None and min(shape[-2:]) > 1 and shape_of(gm, second) == shape


def shape_of(gm: GraphModule, node: Node) -> tuple[int, ...] | None:
    """Return the shape that a value had in calibration, if it comes from sparse convolutions alone."""
    if node.target is SPARSE:
        site = sites.site_of(node)
        return None if site is None else site.output_shape
    inputs = node.all_input_nodes
    if activation_of(gm, node):
        return shape_of(gm, inputs[0])
    window = max_pool_of(gm, node)
    if window is not None:
        shape = shape_of(gm, inputs[0])
        return None if shape is None else _pooled(shape, window)
    if averages_planes(gm, node):
        shape = shape_of(gm, inputs[0])
        return None if shape is None else (*shape[:-2], 1, 1)
    if len(inputs) == 2 and added(node, inputs[0]) is not None:
        first, second = (shape_of(gm, value) for value in inputs)
        return first if first == second else None
    return None


def _pooled(shape: tuple[int, ...], window: Window) -> tuple[int, ...]:
    image = torch.empty(shape[-3:], device="meta")
    return (*shape[:-3], *torch.max_pool2d(image, *window).shape)
