"""regroup_weights, lower_to_sparse and the paths of a site."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from graphs import agree, build, context
from torch import fx, nn

from fxsparse import sites, tiled_weights
from fxsparse.masks import WeightMask
from fxsparse.passes import PASSES
from fxsparse.passes.base import PassContext

X = torch.randn(2, 16, 9, 9)


def pruned_conv(density: float = 0.1, out: int = 32, **options: object) -> nn.Conv2d:
    conv = nn.Conv2d(16, out, 3, **options)
    conv.weight.data *= torch.rand_like(conv.weight) < density
    return conv


def lowered(conv: nn.Conv2d, ctx: PassContext | None = None):
    gm = build({"conv": conv}, lambda g, x: g.call_module("conv", (x,)))
    ctx = ctx or context()
    for run in PASSES:
        run(gm, ctx)
    ((node, site),) = sites.conv_sites(gm)
    return gm, node, site


def test_a_pruned_convolution_becomes_a_sparse_node_with_buffers_under_its_name() -> None:
    conv = pruned_conv()
    gm, node, site = lowered(conv)
    assert node.target is torch.ops.fxsparse.conv2d.default
    assert site.path == "sparse"
    assert {name for name, _ in gm.named_buffers()} == {
        "conv.weight_values",
        "conv.weight_columns",
        "conv.weight_panels",
        "conv.weight_rows",
        "conv.weight_mask",
    }
    assert site.mask == "conv.weight_mask"
    assert torch.equal(gm.conv.weight_mask, conv.weight != 0)
    assert agree(gm, conv(X), X)


@pytest.mark.parametrize("mode", ["zeros", "circular"])
@pytest.mark.parametrize("padding", ["same", 1])
def test_a_path_can_be_set_back_and_forth_and_leaves_no_dead_nodes(mode: str, padding: object) -> None:
    conv = pruned_conv(padding=padding, padding_mode=mode, bias=mode == "zeros")
    gm, node, _ = lowered(conv)
    sizes = {}
    for path in ("vanilla", "sparse", "vanilla", "sparse"):
        sites.set_path(gm, node, path)
        gm.graph.lint()
        gm.recompile()
        assert sites.site_of(node).path == path
        assert agree(gm, conv(X), X)
        sizes.setdefault(path, len(gm.graph.nodes))
        assert len(gm.graph.nodes) == sizes[path]
        assert all(n.users or n.op == "output" for n in gm.graph.nodes)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.Conv2d(16, 32, 3), "no zeros in the weight"),
        (lambda: pruned_conv(0.5, out=3), r"the cost model expects 2\.\d\dx the dense time at density 0\.[45]"),
        (lambda: pruned_conv().to(torch.float8_e5m2), "weight dtype float8_e5m2 .supported: float32, float64,"),
    ],
)
def test_what_stays_dense_says_why(make: Callable[[], nn.Conv2d], reason: str) -> None:
    gm, node, site = lowered(make())
    assert (site.path, site.packed, node.target) == ("vanilla", None, torch.conv2d)
    assert not site.support.ok
    assert re.search(reason, site.reason)


def test_a_convolution_left_out_by_the_rules_says_so() -> None:
    ctx = context()
    ctx.selected = frozenset({"other"})
    gm, _, site = lowered(pruned_conv(), ctx)
    assert site.reason == "left out by the include and exclude rules"
    assert torch.equal(gm.conv.weight_mask, gm.conv.weight != 0)


def test_a_mask_takes_another_name_where_the_users_model_has_that_one() -> None:
    conv = pruned_conv()
    conv.register_buffer("weight_mask", torch.ones(3))
    gm = build(
        {"conv": conv},
        lambda g, x: g.call_function(
            torch.add, (g.call_module("conv", (x,)), g.call_method("sum", (g.get_attr("conv.weight_mask"),)))
        ),
    )
    for run in PASSES:
        run(gm, context())
    ((_, site),) = sites.conv_sites(gm)
    assert site.mask == "conv.weight_mask_"
    assert agree(gm, conv(X) + 3, X)


def test_a_given_mask_wins_over_the_zeros_of_the_weight() -> None:
    conv = pruned_conv()
    kept = (conv.weight != 0) | (torch.rand_like(conv.weight) < 0.05)
    ctx = context()
    ctx.masks = {"conv.weight": WeightMask(kept, None, "masks")}
    gm, _, site = lowered(conv, ctx)
    assert site.density == pytest.approx(kept.float().mean().item())
    assert torch.equal(gm.conv.weight_mask, kept)


def test_an_empty_mask_leaves_the_bias() -> None:
    conv = nn.Conv2d(16, 32, 3)
    conv.weight.data.zero_()
    gm, _, site = lowered(conv)
    assert site.path == "sparse"
    assert agree(gm, F.conv2d(X, conv.weight, conv.bias), X)


@pytest.mark.parametrize(
    ("device", "may_tile", "dense", "joins"),
    [("cpu", True, 2, True), ("cpu", True, 3, False), ("cpu", False, 2, False), ("cuda", True, 2, False)],
)
def test_dense_convolutions_join_where_regions_are_of_tiles_if_they_are_the_fewer(
    device: str, may_tile: bool, dense: int, joins: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A device that the weights are not on stands for one without tiles.
    monkeypatch.setattr(tiled_weights, "DEVICES", (device,))
    convs = {f"dense{i}": nn.Conv2d(32, 32, 3) for i in range(dense)}
    convs |= {f"pruned{i}": pruned_32() for i in range(2)}

    def chain(g: fx.Graph, x: fx.Node) -> fx.Node:
        for name in convs:
            x = g.call_module(name, (x,))
        return x

    gm = build(convs, chain)
    gm.may_tile = may_tile
    for run in PASSES:
        run(gm, context())
    found = {site.name: site for _, site in sites.conv_sites(gm)}
    assert all(found[f"pruned{i}"].packed for i in range(2))
    for i in range(dense):
        site = found[f"dense{i}"]
        assert (site.packed is not None) == joins and site.path == "vanilla"
        assert site.reason == "no zeros in the weight" or joins
    if joins:
        for node, _ in sites.conv_sites(gm):
            sites.set_path(gm, node, "sparse")
        x = torch.randn(2, 32, 12, 12)
        assert agree(gm, nn.Sequential(*convs.values())(x), x)


def pruned_32() -> nn.Conv2d:
    conv = nn.Conv2d(32, 32, 3)
    conv.weight.data *= torch.rand_like(conv.weight) < 0.1
    return conv


def test_without_a_convolution_that_gains_dense_ones_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled_weights, "DEVICES", ("cpu",))
    gm, _, site = lowered(nn.Conv2d(32, 32, 3))
    assert site.packed is None and site.reason == "no zeros in the weight"
