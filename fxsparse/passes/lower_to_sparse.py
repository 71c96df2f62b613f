"""Pack the regrouped weights beside the dense ones and choose each site's first path by the cost model.

Calibration replaces the estimate by a measurement wherever there are example inputs.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from fxsparse import sites
from fxsparse.ops.packing import pack
from fxsparse.passes.base import PassContext, finish
from fxsparse.regrouping import Regrouping

# Unmeasured, sparse must be expected to win clearly: vanilla is the default.
EXPECTED_GAIN = 0.8
NOT_MEASURED = "not measured: call fxsparse.calibrate(gm, x)"


def lower_to_sparse(gm: GraphModule, ctx: PassContext) -> PassResult:
    """Add the packed tensors as buffers under the original module's name and re-target the sites worth it."""
    packed: dict[tuple[int, int], str] = {}
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
    return finish(gm, ctx, {"sites lowered": lowered})


def _register(owner: nn.Module, leaf: str, weight: torch.Tensor, regrouping: Regrouping) -> None:
    tensors = pack(weight, regrouping)
    for suffix, tensor in zip(
        sites.PACKED_SUFFIXES, (tensors.values, tensors.columns, tensors.panels, tensors.rows), strict=True
    ):
        owner.register_buffer(leaf + suffix, tensor)
