"""fold_batch_norm: folds frozen norms, and only where that changes nothing."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from graphs import agree, build, context
from torch import nn

from fxsparse.passes.fold_batch_norm import fold_batch_norm
from fxsparse.passes.normalize_convs import normalize_convs

X = torch.randn(2, 4, 9, 9)


def norm(features: int = 6, **options: bool) -> nn.BatchNorm2d:
    bn = nn.BatchNorm2d(features, **options).eval()
    if bn.running_mean is not None:
        bn.running_mean.normal_()
        bn.running_var.uniform_(0.2, 3)
    if bn.affine:
        nn.init.normal_(bn.weight)
        nn.init.normal_(bn.bias)
    return bn


def folded(gm, **settings) -> int:
    ctx = context(**settings)
    with torch.no_grad():
        expected = gm(X)
    normalize_convs(gm, ctx)
    fold_batch_norm(gm, ctx)
    assert agree(gm, expected, X)
    return ctx.counts["batch norms folded"]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_a_module_norm_is_folded(bias: bool, affine: bool) -> None:
    root = {"conv": nn.Conv2d(4, 6, 3, bias=bias), "bn": norm(affine=affine)}
    gm = build(root, lambda g, x: g.call_module("bn", (g.call_module("conv", (x,)),)))
    assert folded(gm) == 1
    assert "bn" not in dict(gm.named_modules())


@pytest.mark.parametrize("aten", [False, True])
def test_a_functional_norm_is_folded(aten: bool) -> None:
    bn = norm()
    root = {
        "conv": nn.Conv2d(4, 6, 3),
        "m": bn.running_mean,
        "v": bn.running_var,
        "w": bn.weight,
        "b": bn.bias,
    }

    def make(g, x):
        y = g.call_module("conv", (x,))
        m, v, w, b = (g.get_attr(n) for n in "mvwb")
        if aten:
            return g.call_function(torch.ops.aten.batch_norm.default, (y, w, b, m, v, False, 0.1, 1e-3, False))
        return g.call_function(F.batch_norm, (y, m, v, w, b), {"eps": 1e-3})

    assert folded(build(root, make)) == 1


def test_zeros_of_the_weight_stay_zeros() -> None:
    conv = nn.Conv2d(4, 6, 3)
    conv.weight.data *= torch.rand_like(conv.weight) < 0.3
    zero = conv.weight == 0
    gm = build({"conv": conv, "bn": norm()}, lambda g, x: g.call_module("bn", (g.call_module("conv", (x,)),)))
    assert folded(gm) == 1
    assert torch.equal(gm.conv.weight == 0, zero)


@pytest.mark.parametrize("trained", ["conv.weight", "conv.bias", "bn.bias", "nothing"])
def test_a_folded_weight_is_trained_where_it_was_and_a_bias_where_anything_was(trained: str) -> None:
    root = {"conv": nn.Conv2d(4, 6, 3), "bn": norm()}
    gm = build(root, lambda g, x: g.call_module("bn", (g.call_module("conv", (x,)),)))
    for name, parameter in gm.named_parameters():
        parameter.requires_grad_(name == trained)
    assert folded(gm) == 1
    assert gm.conv.weight.requires_grad == (trained == "conv.weight")
    assert gm.conv.bias.requires_grad == (trained != "nothing")


def two_readers(g, x):
    y = g.call_module("conv", (x,))
    return g.call_function(torch.add, (g.call_module("bn", (y,)), y))


def tied(g, x):
    a = g.call_module("bn", (g.call_module("conv", (x,)),))
    return g.call_function(torch.add, (a, g.call_module("conv", (x,))))


REFUSALS = {
    "another reader needs the value before": ({"bn": norm()}, two_readers),
    "the weight serves another site": ({"bn": norm()}, tied),
    "no running statistics": (
        {"bn": norm(track_running_stats=False)},
        lambda g, x: g.call_module("bn", (g.call_module("conv", (x,)),)),
    ),
    "a norm that is no batch norm": (
        {"bn": nn.GroupNorm(2, 6)},
        lambda g, x: g.call_module("bn", (g.call_module("conv", (x,)),)),
    ),
    "something in between": (
        {"bn": norm()},
        lambda g, x: g.call_module("bn", (g.call_function(torch.relu, (g.call_module("conv", (x,)),)),)),
    ),
}


@pytest.mark.parametrize(("root", "make"), REFUSALS.values(), ids=REFUSALS.keys())
def test_a_norm_that_cannot_be_folded_stays(root, make) -> None:
    assert folded(build({"conv": nn.Conv2d(4, 6, 3), **root}, make)) == 0


def test_a_norm_in_training_mode_stays() -> None:
    gm = build(
        {"conv": nn.Conv2d(4, 6, 3), "bn": norm()},
        lambda g, x: g.call_module("bn", (g.call_module("conv", (x,)),)),
    )
    gm.bn.train()
    ctx = context()
    normalize_convs(gm, ctx)
    fold_batch_norm(gm, ctx)
    assert ctx.counts["batch norms folded"] == 0


def test_the_setting_turns_it_off() -> None:
    gm = build(
        {"conv": nn.Conv2d(4, 6, 3), "bn": norm()},
        lambda g, x: g.call_module("bn", (g.call_module("conv", (x,)),)),
    )
    assert folded(gm, fold_batch_norm=False) == 0


def test_readers_of_the_shape_alone_do_not_keep_a_norm() -> None:
    def make(g, x):
        y = g.call_module("conv", (x,))
        rank = g.call_function(getattr, (y, "ndim"))
        g.call_function(torch._assert, (g.call_function(operator.eq, (rank, 4)), "expected 4 dimensions"))
        size = g.call_method("size", (y, 0))
        return g.call_method("reshape", (g.call_module("bn", (y,)), size, -1))

    assert folded(build({"conv": nn.Conv2d(4, 6, 3), "bn": norm()}, make)) == 1
