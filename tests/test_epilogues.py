"""Sparse convolutions do the activation and the addition behind them, where nobody can tell."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from models import masked_dense, random_masks, small_net
from torch import Tensor, nn
from torch.fx import Interpreter

import fxsparse
from fxsparse import sites
from fxsparse.epilogues import find
from fxsparse.graph_module import ConvertedModule
from fxsparse.node_kinds import activation_of


class Block(nn.Module):
    """Two convolutions and a step behind them."""

    def __init__(self, step: Callable[..., Tensor], act: nn.Module | None = None) -> None:
        super().__init__()
        self.a = nn.Conv2d(4, 8, 3, padding=1)
        self.b = nn.Conv2d(4, 8, 1)
        self.act = act or nn.ReLU()
        self.plane = nn.Conv2d(4, 8, 1)
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return self.step(self, x)


def converted(step: Callable[..., Tensor], act: nn.Module | None = None, size: int = 6) -> tuple[nn.Module, Tensor]:
    """Return a model, forced on the sparse paths, that knows its shapes."""
    model, x = Block(step, act).eval(), torch.randn(2, 4, size, size)
    settings = fxsparse.Settings(calibrate=False)
    fast = fxsparse.convert(model, random_masks(model, 0.15), example_inputs=(x,), settings=settings)
    fxsparse.set_mode(fast, "sparse")
    return fast, x


def fused(fast: nn.Module) -> dict[str, tuple[str, str | None, int]]:
    """Return (activation, added node, nodes replaced) by site."""
    assert isinstance(fast, ConvertedModule)
    return {
        node.meta[sites.META].name: (epilogue.activation, epilogue.add and epilogue.add.name, len(epilogue.replaced))
        for node, epilogue in find(fast, fast.graph).items()
    }


def same(fast: nn.Module, x: Tensor) -> bool:
    """Tell whether the code computes what the graph does, to the bit and the stride."""
    assert isinstance(fast, ConvertedModule)
    with torch.no_grad():
        got, wanted = fast(x.clone()), Interpreter(fast).run(x.clone())
    return torch.equal(got, wanted) and got.stride() == wanted.stride()


@pytest.mark.parametrize(
    ("step", "kind"),
    [
        (lambda m, x: torch.relu(m.a(x)), "relu"),
        (lambda m, x: F.relu(m.a(x), inplace=True), "relu"),
        (lambda m, x: m.a(x).relu_(), "relu"),
        (lambda m, x: m.act(m.a(x)), "relu"),
        (lambda m, x: F.relu6(m.a(x)), "relu6"),
        (lambda m, x: F.hardtanh(m.a(x), 0.0, 6.0), "relu6"),
        (lambda m, x: F.silu(m.a(x)), "silu"),
        (lambda m, x: F.hardswish(input=m.a(x)), "hardswish"),
    ],
)
def test_an_activation_is_fused(step: Callable[..., Tensor], kind: str) -> None:
    fast, x = converted(step)
    assert fused(fast)["a"] == (kind, None, 1)
    assert f"'{kind}')" in fast.code
    if kind in ("relu", "relu6"):  # the others are rounded otherwise
        assert same(fast, x)
    oracle = copy.deepcopy(fast).double()
    fxsparse.set_mode(oracle, "vanilla")
    assert (fast(x) - oracle(x.double())).abs().max() < 1e-5


@pytest.mark.parametrize("act", [nn.ReLU6(), nn.SiLU(inplace=True), nn.Hardswish()])
def test_modules_are_fused(act: nn.Module) -> None:
    fast, x = converted(lambda m, x: m.act(m.a(x)), act)
    assert fused(fast)["a"] == (type(act).__name__.lower(), None, 1)
    with torch.no_grad():
        assert torch.allclose(fast(x.clone()), Interpreter(fast).run(x.clone()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "step",
    [
        lambda m, x: m.a(x) + m.b(x),
        lambda m, x: torch.add(m.b(x), m.a(x)),
        lambda m, x: m.a(x).add(m.b(x)),
    ],
)
def test_the_later_convolution_adds_the_earlier_one(step: Callable[..., Tensor]) -> None:
    fast, x = converted(step)
    found = fused(fast)
    assert len(found) == 1
    ((kind, added, count),) = found.values()
    assert (kind, count) == ("none", 1)
    assert added is not None
    assert same(fast, x)


def test_an_addition_and_its_activation_are_one_call() -> None:
    fast, x = converted(lambda m, x: F.relu(m.act(m.a(x)) + m.b(x)))
    assert {name: (kind, count) for name, (kind, _, count) in fused(fast).items()} == {
        "a": ("relu", 1),
        "b": ("relu", 2),
    }
    assert same(fast, x)
    assert "operator" not in fast.code
    assert " + " not in fast.code


def test_an_addition_in_place_is_fused_where_the_convolution_is_written() -> None:
    def step(m: Block, x: Tensor) -> Tensor:
        b = m.b(x)
        a = m.a(x)
        a += b
        return a

    fast, x = converted(step)
    assert fused(fast)["a"][2] == 1
    assert same(fast, x)


def _writes_the_other(m: Block, x: Tensor) -> Tensor:
    b = m.b(x)
    a = m.a(x)
    return b.add_(a)


def _written_between(m: Block, x: Tensor) -> Tensor:
    b = m.b(x)
    a = m.a(x)
    b.mul_(2)
    return a + b


@pytest.mark.parametrize(
    "step",
    [
        _writes_the_other,
        _written_between,
        lambda m, x: m.a(x) * 2,
        lambda m, x: m.a(x) + x.mean(),
        lambda m, x: m.a(x) + 1.0,
        lambda m, x: torch.add(m.a(x), m.b(x), alpha=2),
        lambda m, x: m.a(x) + m.plane(x.mean((2, 3), keepdim=True)),
        lambda m, x: m.a(x) + F.avg_pool2d(m.b(x), 3, 1, 1),
        lambda m, x: F.leaky_relu(m.a(x)),
        lambda m, x: F.hardtanh(m.a(x), -1.0, 6.0),
        lambda m, x: F.threshold(m.a(x), 0.5, 0.0),
        lambda m, x: m.a(x).clamp_min(0),
    ],
)
def test_everything_else_stays_as_it_is(step: Callable[..., Tensor]) -> None:
    fast, x = converted(step)
    assert fused(fast) == {}
    assert same(fast, x)


def test_a_value_with_two_readers_is_kept() -> None:
    fast, x = converted(lambda m, x: torch.cat([y := m.a(x), torch.relu(y)]))
    assert fused(fast) == {}
    assert same(fast, x)


def test_a_value_is_not_added_to_itself() -> None:
    fast, x = converted(lambda m, x: (y := m.a(x)) + y)
    assert fused(fast) == {}
    assert same(fast, x)


def test_planes_of_one_pixel_might_be_broadcast_on_larger_images() -> None:
    fast, x = converted(lambda m, x: m.a(x) + m.plane(F.adaptive_avg_pool2d(x, 1)), size=1)
    assert fused(fast) == {}
    larger = torch.randn(2, 4, 5, 5)
    assert same(fast, larger)


def test_nothing_is_added_where_no_shape_is_known() -> None:
    model = Block(lambda m, x: torch.relu(m.a(x) + m.b(x))).eval()
    fast = fxsparse.convert(model, random_masks(model, 0.15))
    fxsparse.set_mode(fast, "sparse")
    assert fused(fast) == {}


def test_a_module_with_a_hook_is_called() -> None:
    fast, x = converted(lambda m, x: m.act(m.a(x)))
    seen: list[Tensor] = []
    fast.act.register_forward_hook(lambda _, __, output: seen.append(output))
    fast.recompile()
    fast(x)
    assert len(seen) == 1
    assert fused(fast) == {}


def test_a_subclass_may_do_anything() -> None:
    class Louder(nn.ReLU):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    fast, x = converted(lambda m, x: m.act(m.a(x)))
    fast.act = Louder()
    fast.recompile()
    assert all(activation_of(fast, node) is None for node in fast.graph.nodes)
    assert same(fast, x)


def test_nothing_in_between_hides_an_activation() -> None:
    fast, x = converted(lambda m, x: torch.relu(m.act(m.a(x))), nn.Identity())
    assert "'relu')" in fast.code
    assert "self.act" not in fast.code
    assert same(fast, x)
    seen: list[Tensor] = []
    fast.act.register_forward_hook(lambda _, __, output: seen.append(output))
    fast.recompile()
    fast(x)
    assert len(seen) == 1


def test_a_dropout_may_be_turned_on() -> None:
    fast, x = converted(lambda m, x: torch.relu(m.act(m.a(x))), nn.Dropout(0.5))
    before = fast(x)
    fast.act.train()
    assert not torch.equal(fast(x), before)


def test_vanilla_sites_and_other_modes_have_no_epilogue() -> None:
    fast, x = converted(lambda m, x: torch.relu(m.a(x)))
    for mode in ("vanilla", "training", "test", "benchmark"):
        with fxsparse.set_mode(fast, mode):
            assert fused(fast) == {}
    assert fused(fast) != {}


def test_the_graph_keeps_its_nodes_and_its_copies_are_fused_too() -> None:
    model = small_net()
    masks = random_masks(model, 0.15)
    x = torch.randn(2, 3, 8, 8)
    settings = fxsparse.Settings(calibrate=False)
    fast = fxsparse.convert(model, masks, example_inputs=(x,), settings=settings)
    fxsparse.set_mode(fast, "sparse")
    assert isinstance(fast, ConvertedModule)
    assert [node.name for node in fast.graph.nodes if "relu" in node.name]
    assert "relu" not in fast.code.replace("'relu'", "")
    assert copy.deepcopy(fast).code == fast.code
    assert (fast(x) - masked_dense(model, masks)(x)).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_it_rounds_once(dtype: torch.dtype) -> None:
    fast, x = converted(lambda m, x: torch.relu(m.a(x) + m.b(x)))
    exact = copy.deepcopy(fast).double()
    fast.to(dtype)
    with torch.no_grad():
        got, wanted = fast(x.to(dtype)), exact(x.double())
    assert got.dtype == dtype
    assert (got.double() - wanted).abs().max() < 4 * torch.finfo(dtype).eps * wanted.abs().max()


def test_gradients_pass_an_epilogue() -> None:
    fast, x = converted(lambda m, x: torch.relu(m.a(x) + m.b(x)))
    exact = copy.deepcopy(fast).double()
    fxsparse.set_mode(exact, "vanilla")
    x.requires_grad_()
    y = x.detach().double().requires_grad_()
    fast(x).sum().backward()
    exact(y).sum().backward()
    assert torch.allclose(x.grad.double(), y.grad, rtol=1e-4, atol=1e-5)


def test_a_site_without_an_output_shape_is_told_apart() -> None:
    fast, _ = converted(lambda m, x: m.a(x) + m.b(x))
    for node, site in list(sites.conv_sites(fast)):
        node.meta[sites.META] = dataclasses.replace(site, output_shape=None)
    assert find(fast, fast.graph) == {}
