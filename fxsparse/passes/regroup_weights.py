"""Regroup the weight of every site that may gain from it, and say why the others stay dense."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult
from tqdm import tqdm

from fxsparse import sites, tiled_weights
from fxsparse.passes.base import PassContext, finish
from fxsparse.regrouping import Regrouping, Target, regroup
from fxsparse.sites import ConvSite, Support

SUPPORTED_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Time of one block MAC over that of one MAC of the best dense convolution, measured by `python -m benchmarks layers`.
OVER_DENSE = 1.6
# Above this the cost model would have to be wrong by more than it ever was, and packing costs time and memory.
HOPELESS = 2.0
# Columns of a stem's weight at the most: 7 x 7 of three channels have 147.
_STEM_COLUMNS = 160


def regroup_weights(gm: GraphModule, ctx: PassContext) -> PassResult:
    """Give every supported site its regrouping; a weight used at two sites is regrouped once."""
    target = ctx.settings.target or Target()
    known: dict[tuple[int, int], Regrouping] = {}
    found = list(sites.conv_sites(gm))
    quiet = not ctx.settings.progress or len(found) < 2
    gaining: list[Node] = []
    joining: list[Node] = []
    dense: list[Node] = []
    for node, site in tqdm(found, desc="Regrouping", unit="conv", disable=quiet, leave=False):
        weight = sites.attribute(gm, site.weight)
        support = _support(site, weight, ctx)
        if support.ok:
            key = (id(weight), site.groups)
            if key not in known:
                known[key] = _regroup(site, weight, target, ctx)
            estimate = OVER_DENSE * known[key].cost(target) / known[key].dense_cost
            support = _expectation(known[key], estimate)
            sites.update(node, regrouping=known[key], estimate=estimate)
            if support.ok:
                gaining.append(node)
            elif _is_depthwise(weight, site.groups) or _is_stem(weight, site.groups):
                joining.append(node)
            elif _may_tile(gm, weight):
                dense.append(node)
        sites.update(node, support=support, reason=support.reason)
    # Packed, they do not part or delay the convolutions around them, which one call runs then; that is for calibration
    # to measure. Depthwise weights and those of stems are small. Others are not, and take part on CUDA, where one dense
    # layer costs the region two changes of layout, if they are the fewer.
    if len(dense) <= len(gaining):
        joining += dense
    for node in joining if gaining else ():
        sites.update(node, support=Support(True), reason="")
    return finish(gm, ctx, {"weights regrouped": len(known)})


def _support(site: ConvSite, weight: Tensor, ctx: PassContext) -> Support:
    if ctx.selected is not None and site.name not in ctx.selected:
        return Support.no("left out by the include and exclude rules")
    if weight.dtype not in SUPPORTED_DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in SUPPORTED_DTYPES)
        return Support.no(f"weight dtype {str(weight.dtype).removeprefix('torch.')} (supported: {names})")
    if weight.layout != torch.strided:
        return Support.no(f"weight layout {weight.layout} (supported: torch.strided)")
    if weight.numel() == 0:
        return Support.no("the weight is empty")
    return Support(True)


def _regroup(site: ConvSite, weight: Tensor, target: Target, ctx: PassContext) -> Regrouping:
    mask = ctx.masks.get(ctx.prefix + site.weight)
    if mask is not None and mask.regrouping is not None and mask.regrouping.groups == site.groups:
        return mask.regrouping
    kept = weight.detach() != 0 if mask is None else mask.kept
    return regroup(kept, target, groups=site.groups, cache=ctx.settings.cache)


def _is_depthwise(weight: Tensor, groups: int) -> bool:
    """Tell whether a convolution is depthwise, and where regions are: on a CPU."""
    return groups == weight.shape[0] > 1 and weight.shape[1] == 1 and weight.device.type == "cpu"


def _may_tile(gm: GraphModule, weight: Tensor) -> bool:
    """Tell whether a convolution of this weight may be a step of a region on CUDA."""
    return (
        weight.device.type in tiled_weights.DEVICES
        and weight.dtype in tiled_weights.DTYPES
        and getattr(gm, "may_tile", True)
    )


def _is_stem(weight: Tensor, groups: int) -> bool:
    """Tell whether a convolution has few columns, as one of images has.

    The operators read three channels as well as any number; dense kernels want them in eights or sixteens.
    """
    return groups == 1 and weight[0].numel() <= _STEM_COLUMNS


def _expectation(regrouping: Regrouping, estimate: float) -> Support:
    if regrouping.kept == regrouping.dense_cost:
        return Support.no("no zeros in the weight")
    if estimate > HOPELESS:
        return Support.no(f"the cost model expects {estimate:.2f}x the dense time at density {regrouping.density:.2f}")
    return Support(True)
