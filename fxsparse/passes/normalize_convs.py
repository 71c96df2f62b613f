"""Bring every 2-D convolution of a graph into one form: `torch.conv2d` on parameters, with its ConvSite in the meta.

Module calls, `F.conv2d`, `torch.conv2d`, `aten.conv2d` and `aten.convolution` all mean the same; one form lets every
later pass look for one thing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.operator_schemas import normalize_function
from torch.fx.passes.infra.pass_base import PassResult
from torch.utils import _pytree as pytree

from fxsparse import sites
from fxsparse.passes.base import PassContext, finish
from fxsparse.sites import ConvSite

_aten = torch.ops.aten
CONV_FUNCTIONS = {torch.conv2d, _aten.conv2d.default, _aten.conv2d.padding, _aten.convolution.default}
_OTHER_FUNCTIONS = {
    torch.conv1d: "1-D convolution",
    torch.conv3d: "3-D convolution",
    torch.conv_transpose1d: "transposed convolution",
    torch.conv_transpose2d: "transposed convolution",
    torch.conv_transpose3d: "transposed convolution",
    _aten.conv1d.default: "1-D convolution",
    _aten.conv3d.default: "3-D convolution",
    _aten.conv_transpose1d.default: "transposed convolution",
    _aten.conv_transpose2d.input: "transposed convolution",
    _aten.conv_transpose3d.input: "transposed convolution",
}
_OTHER_MODULES = {
    nn.Conv1d: "1-D convolution",
    nn.Conv3d: "3-D convolution",
    nn.ConvTranspose1d: "transposed convolution",
    nn.ConvTranspose2d: "transposed convolution",
    nn.ConvTranspose3d: "transposed convolution",
}


def normalize_convs(gm: GraphModule, ctx: PassContext) -> PassResult:
    """Rewrite every 2-D convolution to the normal form; note in `ctx.others` every other convolution and why."""
    normalized = 0
    for node in list(gm.graph.nodes):
        if sites.site_of(node) is not None:
            normalized += 1
        elif node.op == "call_module":
            normalized += _normalize_module(gm, node, ctx)
        elif node.op == "call_function" and node.target in CONV_FUNCTIONS:
            normalized += _normalize_function(gm, node, ctx)
        elif node.op == "call_function" and node.target in _OTHER_FUNCTIONS:
            ctx.others.append((_other_name(node, ctx), _other_reason(_OTHER_FUNCTIONS[node.target])))
    for node, site in sites.conv_sites(gm):
        sites.update(node, name=ctx.full_name(site.name))
    return finish(gm, ctx, {"convolutions normalized": normalized})


def why_no_site(module: nn.Module) -> str | None:
    """Return why a convolution module is no conv site; None if it is one, or is no convolution."""
    for kind, what in _OTHER_MODULES.items():
        if isinstance(module, kind):
            return _other_reason(what)
    if isinstance(module, nn.Conv2d) and not sites.is_plain_conv(module):
        return f"{type(module).__name__} changes what nn.Conv2d computes at every call"
    return None


def _normalize_module(gm: GraphModule, node: Node, ctx: PassContext) -> bool:
    path = str(node.target)
    module = gm.get_submodule(path)
    reason = why_no_site(module)
    if reason is not None:
        ctx.others.append((ctx.full_name(path), reason))
    if not sites.is_plain_conv(module):
        return False
    site = sites.from_module(module, f"{path}.weight", f"{path}.bias")
    source = node.args[0] if node.args else node.kwargs["input"]
    assert isinstance(source, Node)
    _replace(gm, node, source, site)
    return True


def _normalize_function(gm: GraphModule, node: Node, ctx: PassContext) -> bool:
    arguments = _arguments(node)
    if arguments is None:
        ctx.others.append((_other_name(node, ctx), "its arguments do not fit conv2d's signature"))
        return False
    weight, bias = arguments["weight"], arguments.get("bias")
    if arguments.get("transposed"):
        ctx.others.append((_other_name(node, ctx), _other_reason("transposed convolution")))
        return False
    if not _is_tensor_attribute(gm, weight):
        ctx.others.append((_other_name(node, ctx), "its weight is computed from the inputs"))
        return False
    value = sites.attribute(gm, str(weight.target))
    if value.dim() != 4:
        ctx.others.append((_other_name(node, ctx), _other_reason(f"{value.dim() - 2}-D convolution")))
        return False
    if bias is not None and not _is_tensor_attribute(gm, bias):
        ctx.others.append((_other_name(node, ctx), "its bias is computed at every call"))
        return False
    options = [arguments.get(k) for k in ("stride", "padding", "dilation", "groups")]
    if any(isinstance(v, Node) for v in pytree.tree_leaves(options)):
        ctx.others.append((_other_name(node, ctx), "its stride, padding or dilation is computed at every call"))
        return False
    stride, padding, dilation, groups = options
    o, c, kh, kw = value.shape
    dilations = sites.pair(1 if dilation is None else dilation)
    site = ConvSite(
        name=sites.name_of(str(weight.target)),
        weight=str(weight.target),
        bias=None if bias is None else str(bias.target),
        weight_shape=(o, c, kh, kw),
        stride=sites.pair(1 if stride is None else stride),
        padding=sites.explicit_padding(0 if padding is None else padding, (kh, kw), dilations),
        dilation=dilations,
        groups=1 if groups is None else groups,
    )
    _replace(gm, node, arguments["input"], site)
    return True


def _arguments(node: Node) -> dict[str, Any] | None:
    """Return the arguments of a convolution call by name."""
    if isinstance(node.target, torch._ops.OpOverload):
        pair = normalize_function(node.target, node.args, node.kwargs, normalize_to_only_use_kwargs=True)
        return None if pair is None else pair.kwargs
    # torch.conv2d is a builtin with two overloads, which normalize_function cannot tell apart without types.
    order = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    return {**dict(zip(order, node.args, strict=False)), **node.kwargs}


def _replace(gm: GraphModule, node: Node, source: Node, site: ConvSite) -> None:
    with gm.graph.inserting_before(node):
        new = gm.graph.call_function(torch.conv2d, sites.vanilla_arguments(gm.graph, source, site))
    new.meta = {**node.meta, sites.META: site}
    node.replace_all_uses_with(new)
    sites.erase_unused(gm.graph, node)


def _is_tensor_attribute(gm: GraphModule, value: Any) -> bool:
    return (
        isinstance(value, Node)
        and value.op == "get_attr"
        and isinstance(sites.attribute(gm, str(value.target)), Tensor)
    )


def _other_reason(what: str) -> str:
    return f"{what} (supported: 2-D convolution)"


def _other_name(node: Node, ctx: PassContext) -> str:
    """Return the name that the weight gives where there is one, else the node's."""
    for argument in node.all_input_nodes:
        if argument.op == "get_attr" and str(argument.target).endswith("weight"):
            return ctx.full_name(sites.name_of(str(argument.target)))
    return ctx.full_name(node.name)
