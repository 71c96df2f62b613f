"""fold_constant_weights: a weight computed from parameters alone becomes a parameter."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from graphs import agree, build, context

from fxsparse import sites
from fxsparse.passes.fold_constant_weights import fold_constant_weights
from fxsparse.passes.normalize_convs import normalize_convs

W, M = torch.randn(6, 4, 3, 3), (torch.rand(6, 4, 3, 3) < 0.3).float()
X = torch.randn(2, 4, 7, 7)


def test_a_masked_product_is_folded_and_becomes_a_site() -> None:
    gm = build(
        {"w": W, "m": M},
        lambda g, x: g.call_function(F.conv2d, (x, g.call_function(torch.mul, (g.get_attr("w"), g.get_attr("m"))))),
    )
    ctx = context()
    assert fold_constant_weights(gm, ctx).modified
    normalize_convs(gm, ctx)
    ((_, site),) = sites.conv_sites(gm)
    assert site.weight == "w_folded"
    assert torch.equal(gm.w_folded, W * M)
    assert agree(gm, F.conv2d(X, W * M), X)


def test_methods_and_chains_are_folded() -> None:
    gm = build(
        {"w": W.flatten()},
        lambda g, x: g.call_function(
            F.conv2d, (x, g.call_method("reshape", (g.call_method("abs", (g.get_attr("w"),)), (6, 4, 3, 3))))
        ),
    )
    assert fold_constant_weights(gm, context()).modified
    assert agree(gm, F.conv2d(X, W.abs()), X)


@pytest.mark.parametrize(
    "weight",
    [
        lambda g, x: g.call_function(torch.add, (g.get_attr("w"), g.call_function(torch.mean, (x,)))),
        lambda g, x: g.call_function(torch.rand_like, (g.get_attr("w"),)),
        lambda g, x: g.call_function(torch.ops.aten.rand_like.default, (g.get_attr("w"),)),
        lambda g, x: g.call_function(F.dropout, (g.get_attr("w"), 0.5, True)),
        lambda g, x: g.call_method("add_", (g.get_attr("w"), 1)),
        lambda g, x: g.call_function(operator.iadd, (g.get_attr("w"), 1)),
    ],
    ids=["input", "random", "random aten", "dropout", "in place method", "in place operator"],
)
def test_what_changes_between_calls_is_not_folded(weight) -> None:
    gm = build({"w": W.clone()}, lambda g, x: g.call_function(F.conv2d, (x, weight(g, x))))
    assert not fold_constant_weights(gm, context()).modified
    assert torch.equal(gm.w, W)
