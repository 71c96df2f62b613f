"""Fold an eval-mode batch norm into the convolution before it.

Frozen statistics make the pair one affine map, so the sparse operator gets one bias and the graph loses a node. Zeros
stay zeros: a row of the weight is only scaled.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.operator_schemas import normalize_function
from torch.fx.passes.infra.pass_base import PassResult

from fxsparse import sites
from fxsparse.passes.base import PassContext, finish
from fxsparse.sites import ConvSite

_aten = torch.ops.aten
# In a graph's meta: what was folded into what, as plain data, so that a dense checkpoint can be folded again. A list
# of {"weight", "bias": names of the convolution's parameters now; "old_bias": whether the bias was there before;
# "norm": {"mean", "var", "weight", "bias": names in the model as it was, or None}; "eps"}.
FOLDED_NORMS = "fxsparse_folded_norms"


class Norm(NamedTuple):
    """A batch norm with frozen statistics, y = (x - mean) / sqrt(var + eps) * weight + bias."""

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float


class _Found(NamedTuple):
    """A norm, and the names of its tensors in the graph's module, by field."""

    norm: Norm
    names: dict[str, str | None]


def fold_batch_norm(gm: GraphModule, ctx: PassContext) -> PassResult:
    """Fold every batch norm that follows a conv site and has frozen statistics."""
    if not ctx.settings.fold_batch_norm:
        return PassResult(gm, False)
    folded = 0
    uses = _weight_uses(gm)
    for node, site in list(sites.conv_sites(gm)):
        readers = sites.value_users(node)
        if len(readers) != 1:  # another reader needs the value before the norm
            continue
        if uses[site.weight] > 1 or (site.bias is not None and uses[site.bias] > 1):
            continue  # a weight that serves several sites has one value, and their norms differ
        user = readers[0]
        found = _frozen_norm(gm, user)
        if found is None or user.all_input_nodes[0] is not node or found.norm.mean.numel() != site.weight_shape[0]:
            continue
        _fold(gm, node, site, found)
        user.replace_all_uses_with(node)
        sites.erase_unused(gm.graph, user)
        folded += 1
    result = finish(gm, ctx, {"batch norms folded": folded})
    if folded:
        gm.delete_all_unused_submodules()
    return result


def _weight_uses(gm: GraphModule) -> dict[str, int]:
    """Count how many nodes read each parameter (get_attr nodes may be several for one parameter)."""
    uses: dict[str, int] = {}
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            uses[str(node.target)] = uses.get(str(node.target), 0) + len(node.users)
    # Two names may be one tensor (tied weights).
    by_tensor: dict[int, int] = {}
    ids = {name: id(sites.attribute(gm, name)) for name in uses}
    for name, count in uses.items():
        by_tensor[ids[name]] = by_tensor.get(ids[name], 0) + count
    return {name: by_tensor[ids[name]] for name in uses}


def folded(weight: Tensor, bias: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor]:
    """Return the weight and the bias, in double, of the convolution that computes another one and its norm.

    Args:
        weight: [O, C / groups, kh, kw], of the convolution.
        bias: [O], or None where it has none.
        norm: four tensors [O].
    """
    # In double, so that the fold costs one rounding and no more.
    scale = (norm.var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    new_bias = ((0.0 if bias is None else bias.double()) - norm.mean.double()) * scale
    if norm.bias is not None:
        new_bias = new_bias + norm.bias.double()
    return weight.double() * scale[:, None, None, None], new_bias


def _frozen_norm(gm: GraphModule, node: Node) -> _Found | None:
    if node.op == "call_module":
        path = str(node.target)
        module = gm.get_submodule(path)
        if type(module) is not nn.BatchNorm2d or module.training or module.running_mean is None:
            return None
        assert module.running_var is not None
        norm = Norm(module.running_mean, module.running_var, module.weight, module.bias, module.eps)
        leaves = {"mean": "running_mean", "var": "running_var", "weight": "weight", "bias": "bias"}
        return _Found(
            norm, {key: f"{path}.{leaf}" if getattr(norm, key) is not None else None for key, leaf in leaves.items()}
        )
    if node.op != "call_function" or node.target not in (F.batch_norm, _aten.batch_norm.default):
        return None
    normal = normalize_function(node.target, node.args, node.kwargs, normalize_to_only_use_kwargs=True)
    if normal is None or normal.kwargs.get("training", False) is not False:
        return None
    tensors: list[Any] = []
    names: dict[str, str | None] = {}
    for key in ("running_mean", "running_var", "weight", "bias"):
        value = normal.kwargs.get(key)
        name = None
        if isinstance(value, Node):
            if value.op != "get_attr":
                return None
            name = str(value.target)
            value = sites.attribute(gm, name)
        tensors.append(value)
        names[key.removeprefix("running_")] = name
    mean, var, weight, bias = tensors
    if mean is None or var is None or isinstance(normal.kwargs["eps"], Node):
        return None
    return _Found(Norm(mean, var, weight, bias, normal.kwargs["eps"]), names)


def _fold(gm: GraphModule, node: Node, site: ConvSite, found: _Found) -> None:
    norm = found.norm
    with torch.no_grad():
        weight = sites.attribute(gm, site.weight)
        old_bias = None if site.bias is None else sites.attribute(gm, site.bias)
        new_weight, new_bias = folded(weight, old_bias, norm)
        sites.set_attribute(
            gm, site.weight, nn.Parameter(new_weight.to(weight.dtype), requires_grad=weight.requires_grad)
        )
        name = site.bias or site.weight.removesuffix("weight") + "bias"
        # Whoever trains the result trains the folded weight, and a bias that holds what any of these would learn.
        trained = any(t is not None and t.requires_grad for t in (weight, old_bias, norm.bias))
        sites.set_attribute(gm, name, nn.Parameter(new_bias.to(weight.dtype), requires_grad=trained))
    gm.meta.setdefault(FOLDED_NORMS, []).append(
        {
            "weight": site.weight,
            "bias": name,
            "old_bias": site.bias is not None,
            "norm": found.names,
            "eps": float(norm.eps),
        }
    )
    with gm.graph.inserting_before(node):
        bias = gm.graph.get_attr(name)
    sites.update(node, bias=name)
    old = node.args[2]
    node.update_arg(2, bias)
    if isinstance(old, Node):
        sites.erase_unused(gm.graph, old)
