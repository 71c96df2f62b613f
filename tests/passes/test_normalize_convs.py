"""normalize_convs: every form of a 2-D convolution becomes one, everything else keeps its reason."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from graphs import agree, build, context
from torch import nn

from fxsparse import sites
from fxsparse.passes.normalize_convs import normalize_convs

aten = torch.ops.aten
W, B = torch.randn(6, 2, 3, 3), torch.randn(6)
X = torch.randn(2, 4, 9, 10)


def functional(call):
    return build({"weight": W, "bias": B}, lambda g, x: call(g, x, g.get_attr("weight"), g.get_attr("bias")))


FORMS = {
    "F.conv2d": lambda g, x, w, b: g.call_function(F.conv2d, (x, w, b, 2, 1, 1, 2)),
    "torch.conv2d, keywords": lambda g, x, w, b: g.call_function(
        torch.conv2d, (x,), {"weight": w, "bias": b, "stride": 2, "padding": 1, "groups": 2}
    ),
    "torch.conv2d, input as a keyword": lambda g, x, w, b: g.call_function(
        torch.conv2d, (), {"input": x, "weight": w, "bias": b, "stride": 2, "padding": (1, 1), "groups": 2}
    ),
    "aten.conv2d": lambda g, x, w, b: g.call_function(aten.conv2d.default, (x, w, b, [2, 2], [1, 1], [1, 1], 2)),
    "aten.conv2d, defaults": lambda g, x, w, b: g.call_function(
        aten.conv2d.default, (x, w, b, [2], [1]), {"groups": 2}
    ),
    "aten.convolution": lambda g, x, w, b: g.call_function(
        aten.convolution.default, (x, w, b, [2, 2], [1, 1], [1, 1], False, [0, 0], 2)
    ),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_every_functional_form_becomes_the_same_site(form) -> None:
    gm, ctx = functional(form), context()
    result = normalize_convs(gm, ctx)
    assert result.modified and ctx.counts["convolutions normalized"] == 1
    ((node, site),) = sites.conv_sites(gm)
    assert node.target is torch.conv2d
    assert (site.weight, site.bias, site.weight_shape) == ("weight", "bias", (6, 2, 3, 3))
    assert (site.stride, site.padding, site.dilation, site.groups) == ((2, 2), (1, 1, 1, 1), (1, 1), 2)
    assert agree(gm, F.conv2d(X, W, B, 2, 1, 1, 2), X)


@pytest.mark.parametrize("kernel", [3, 4, (2, 5)])
@pytest.mark.parametrize("padding", ["same", "valid", 2, (1, 0)])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_module_calls_keep_every_padding(kernel, padding, mode) -> None:
    conv = nn.Conv2d(4, 6, kernel, padding=padding, dilation=(1, 2), padding_mode=mode)
    gm, ctx = build({"conv": conv}, lambda g, x: g.call_module("conv", (x,))), context()
    normalize_convs(gm, ctx)
    ((_, site),) = sites.conv_sites(gm)
    assert site.name == "conv"
    assert agree(gm, conv(X), X)


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_string_padding_of_functions_becomes_numbers(padding: str) -> None:
    for call in (F.conv2d, aten.conv2d.padding):
        gm = functional(
            lambda g, x, w, b, call=call: g.call_function(
                call, (x, w, b), {"padding": padding, "dilation": (2, 1), "groups": 2}
            )
        )
        normalize_convs(gm, context())
        assert len(list(sites.conv_sites(gm))) == 1
        assert agree(gm, F.conv2d(X, W, B, padding=padding, dilation=(2, 1), groups=2), X)


def test_a_name_is_the_modules_in_the_users_model() -> None:
    ctx = context()
    ctx.prefix = "layer1."
    gm = build({"conv": nn.Conv2d(4, 6, 3)}, lambda g, x: g.call_module("conv", (x,)))
    normalize_convs(gm, ctx)
    assert next(iter(sites.conv_sites(gm)))[1].name == "layer1.conv"


class Subclass(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


REFUSALS = {
    "a weight computed from the inputs": (
        lambda g, x: g.call_function(F.conv2d, (x, g.call_function(torch.mean, (x,), {"dim": 0, "keepdim": True}))),
        {},
        "its weight is computed from the inputs",
    ),
    "a bias computed at every call": (
        lambda g, x: g.call_function(
            F.conv2d, (x, g.get_attr("w"), g.call_function(torch.mean, (x,), {"dim": (0, 2, 3)}))
        ),
        {"w": torch.randn(4, 4, 1, 1)},
        "its bias is computed at every call",
    ),
    "a stride computed at every call": (
        lambda g, x: g.call_function(F.conv2d, (x, g.get_attr("w"), None, g.call_function(len, (x,)))),
        {"w": torch.randn(4, 4, 1, 1)},
        "its stride, padding or dilation is computed at every call",
    ),
    "aten.convolution, transposed": (
        lambda g, x: g.call_function(
            aten.convolution.default, (x, g.get_attr("w"), None, [1, 1], [0, 0], [1, 1], True, [0, 0], 1)
        ),
        {"w": torch.randn(4, 4, 2, 2)},
        "transposed convolution (supported: 2-D convolution)",
    ),
    "aten.convolution in one dimension": (
        lambda g, x: g.call_function(
            aten.convolution.default,
            (g.call_function(torch.select, (x, 2, 0)), g.get_attr("w"), None, [1], [0], [1], False, [0], 1),
        ),
        {"w": torch.randn(4, 4, 2)},
        "1-D convolution (supported: 2-D convolution)",
    ),
    "conv_transpose2d": (
        lambda g, x: g.call_function(F.conv_transpose2d, (x, g.get_attr("w"))),
        {"w": torch.randn(4, 4, 2, 2)},
        "transposed convolution (supported: 2-D convolution)",
    ),
    "a transposed module": (
        lambda g, x: g.call_module("up", (x,)),
        {"up": nn.ConvTranspose2d(4, 4, 2)},
        "transposed convolution (supported: 2-D convolution)",
    ),
    "a subclass with its own forward": (
        lambda g, x: g.call_module("conv", (x,)),
        {"conv": Subclass(4, 4, 1)},
        "Subclass changes what nn.Conv2d computes at every call",
    ),
}


@pytest.mark.parametrize(("make", "root", "reason"), REFUSALS.values(), ids=REFUSALS.keys())
def test_what_is_no_site_is_left_alone_with_its_reason(make, root, reason) -> None:
    gm, ctx = build(root, make), context()
    with torch.no_grad():
        expected = gm(X)
    assert not normalize_convs(gm, ctx).modified
    assert not list(sites.conv_sites(gm))
    assert [why for _, why in ctx.others] == [reason]
    assert agree(gm, expected, X)
