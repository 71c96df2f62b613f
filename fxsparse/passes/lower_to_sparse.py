"""Keep the masks and pack the regrouped weights beside the dense ones; choose each first path by the cost model.

Calibration replaces the estimate by a measurement wherever there are example inputs.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from fxsparse import layouts, sites
from fxsparse.ops.packing import pack
from fxsparse.passes.base import PassContext, finish
from fxsparse.passes.regroup_weights import SUPPORTED_DTYPES
from fxsparse.regrouping import Regrouping
from fxsparse.sites import ConvSite

# Unmeasured, sparse must be expected to win clearly: vanilla is the default.
EXPECTED_GAIN = 0.8
NOT_MEASURED = "not measured: call fxsparse.calibrate(gm, x)"


def lower_to_sparse(gm: GraphModule, ctx: PassContext) -> PassResult:
    """Add masks and packed tensors as buffers under the original module's name; re-target the sites worth it."""
    packed: dict[tuple[int, int], str] = {}
    masks = _register_masks(gm, ctx)
    lowered = 0
    for node, site in sites.conv_sites(gm):
        if not site.support.ok or site.regrouping is None or site.estimate is None:
            continue
        weight = sites.attribute(gm, site.weight)
        key = (id(weight), site.groups)
        if key not in packed:
            owner, _, leaf = site.weight.rpartition(".")
            _register(gm.get_submodule(owner), leaf, weight, site.regrouping)
            packed[key] = site.weight
        reason = f"estimate {site.estimate:.2f}x the dense time; {NOT_MEASURED}"
        sites.update(node, packed=packed[key], reason=reason)
        sites.set_path(gm, node, "sparse" if site.estimate < EXPECTED_GAIN else "vanilla")
        lowered += 1
    return finish(gm, ctx, {"sites lowered": lowered, "weights masked": masks})


def _register_masks(gm: GraphModule, ctx: PassContext) -> int:
    """Keep the mask of every pruned weight, packed or not, for training, and its layout; return how many there are."""
    masks: dict[int, str | None] = {}
    for node, site in sites.conv_sites(gm):
        weight = sites.attribute(gm, site.weight)
        if id(weight) not in masks:
            masks[id(weight)] = _register_mask(gm, site, weight, ctx)
        sites.update(node, mask=masks[id(weight)], weight_layout=layouts.layout_of(weight))
    return sum(name is not None for name in masks.values())


def _register_mask(gm: GraphModule, site: ConvSite, weight: torch.Tensor, ctx: PassContext) -> str | None:
    # Not from the regrouping, whose blocks hold zeros as well.
    if weight.dtype not in SUPPORTED_DTYPES or weight.layout != torch.strided:
        return None
    given = ctx.masks.get(ctx.prefix + site.weight)
    kept = weight.detach() != 0 if given is None else given.kept
    if bool(kept.all()):
        return None
    owner = gm.get_submodule(site.weight.rpartition(".")[0])
    name = site.weight + "_mask"
    while hasattr(owner, name.rpartition(".")[2]):  # a buffer that the user's own code reads
        name += "_"
    owner.register_buffer(name.rpartition(".")[2], kept.to(weight.device))
    return name


def _register(owner: nn.Module, leaf: str, weight: torch.Tensor, regrouping: Regrouping) -> None:
    tensors = pack(weight, regrouping)
    for suffix, tensor in zip(
        sites.PACKED_SUFFIXES, (tensors.values, tensors.columns, tensors.panels, tensors.rows), strict=True
    ):
        owner.register_buffer(leaf + suffix, tensor)
