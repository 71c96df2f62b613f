"""The configurations of the sparse operator that calibration chooses from: how a weight is packed.

`blocks` packs the weight as it was regrouped. `rows` packs every kept weight as residual: where a mask is unstructured
the regrouping finds few good blocks, and one pass over rows can be faster than blocks and residual together.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxsparse import sites
from fxsparse.ops.packing import pack
from fxsparse.passes.regroup_weights import HOPELESS
from fxsparse.regrouping import Regrouping, Target
from fxsparse.sites import ConvSite

Tensors: TypeAlias = tuple[Tensor, ...]
PACKINGS = ("blocks", "rows")


def candidates(gm: GraphModule, site: ConvSite) -> tuple[str, ...]:
    """Return the packings worth timing at a site; none where it is not packed."""
    if site.packed is None or site.regrouping is None:
        return ()
    target = Target()
    rows_cost = site.regrouping.kept * target.residual_cost
    if not site.regrouping.blocks:
        return ("blocks",)
    return PACKINGS if rows_cost <= HOPELESS * site.regrouping.cost(target) else ("blocks",)


def regrouping_of(gm: GraphModule, site: ConvSite, packing: str) -> Regrouping:
    """Return the regrouping that a packing stores."""
    assert site.regrouping is not None
    if packing == "blocks":
        return site.regrouping
    assert site.mask is not None
    kept = sites.attribute(gm, site.mask).reshape(site.weight_shape[0], -1).cpu().numpy()
    return Regrouping.all_residual(kept, site.groups)


def tensors(gm: GraphModule, site: ConvSite, packing: str) -> Tensors:
    """Return the packed tensors of a site's weight in a packing: those it has, or new ones."""
    if packing == site.packing:
        return tuple(sites.attribute(gm, name) for name in site.packed_names)
    with torch.no_grad():
        packed = pack(sites.attribute(gm, site.weight), regrouping_of(gm, site, packing))
    return (packed.values, packed.columns, packed.panels, packed.rows)


def repack(gm: GraphModule, site: ConvSite, packing: str) -> None:
    """Replace the packed tensors of a site's weight by those of another packing."""
    for name, tensor in zip(site.packed_names, tensors(gm, site, packing), strict=True):
        sites.set_attribute(gm, name, tensor)
