"""Consecutive sparse convolutions run as one call, where nobody can tell."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from models import masked_dense, random_masks, small_net
from torch import Tensor, nn
from torch.fx import Interpreter

import fxsparse
from fxsparse.epilogues import fused
from fxsparse.graph_module import ConvertedModule
from fxsparse.regions import find

pytestmark = pytest.mark.skipif(
    fxsparse.capabilities().cpu == "reference", reason="the compiled operators are not built"
)


class Net(nn.Module):
    """Some convolutions and a forward."""

    def __init__(self, forward: Callable[..., Tensor]) -> None:
        super().__init__()
        self.a = nn.Conv2d(4, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, padding=1)
        self.c = nn.Conv2d(8, 8, 1)
        self.side = nn.Conv2d(4, 8, 1)
        self.pool = nn.MaxPool2d(2)
        self.nothing = nn.Identity()
        self.step = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.step(self, x)


def converted(forward: Callable[..., Tensor], size: int = 8) -> tuple[ConvertedModule, Tensor]:
    """Return a model, forced on the sparse paths, that knows its shapes."""
    model, x = Net(forward).eval(), torch.randn(2, 4, size, size)
    settings = fxsparse.Settings(calibrate=False)
    fast = fxsparse.convert(model, random_masks(model, 0.15), example_inputs=(x,), settings=settings)
    fxsparse.set_mode(fast, "sparse")
    assert isinstance(fast, ConvertedModule)
    return fast, x


def regions(fast: ConvertedModule) -> list[int]:
    """Return the number of steps of each region."""
    return [len(group.nodes) for group in find(fast, fused(fast))]


def same(fast: ConvertedModule, x: Tensor) -> bool:
    """Tell whether the code computes what the graph does, to the order of its sums, and in the same layout."""
    with torch.no_grad():
        got, wanted = fast(x.clone()), Interpreter(fast).run(x.clone())
    return torch.allclose(got, wanted, rtol=1e-6, atol=1e-6) and got.stride() == wanted.stride()


@pytest.mark.parametrize(
    ("forward", "steps"),
    [
        (lambda m, x: m.b(m.a(x)), [2]),
        (lambda m, x: m.c(F.relu(m.b(F.relu(m.a(x))))), [3]),
        (lambda m, x: m.b(m.pool(m.a(x))), [3]),
        (lambda m, x: F.max_pool2d(m.b(m.a(x)), 3, 2, 1, ceil_mode=True), [3]),
        (lambda m, x: torch.max_pool2d(m.a(x), (2, 1), stride=(1, 2)), [2]),
        (lambda m, x: F.adaptive_avg_pool2d(m.b(F.relu(m.a(x))), 1).flatten(1), [3]),
        (lambda m, x: m.b(F.adaptive_avg_pool2d(y := m.a(x), (1, 1))) * y, [3]),
        # The addition of two pooled values is a step of its own, and so is its activation.
        (lambda m, x: F.relu(m.pool(m.a(x)) + m.pool(m.side(x))), [6]),
        (lambda m, x: m.b(y := m.a(x)) + m.c(y), [3]),
        (lambda m, x: m.b(m.nothing(m.a(x))), [2]),
        # Two convolutions of one value need not depend on each other.
        (lambda m, x: m.b(m.a(x)) + m.side(x), [3]),
        # What is not known to a region ends it, for what comes behind.
        (lambda m, x: m.c(torch.sin(m.b(m.a(x)))), [2]),
        (lambda m, x: m.c(m.b(torch.sin(m.c(m.a(x))))), [2, 2]),
        # Something that needs a value of a region can wait until the region has run.
        (lambda m, x: torch.sin(y := m.a(x)) + m.c(m.b(y)), [3]),
        # The last convolution adds the one before, and so reads the second region.
        (lambda m, x: m.c(m.b(m.a(x)).sin()) + m.side(x), [2, 2]),
    ],
)
def test_regions_are_found(forward: Callable[..., Tensor], steps: list[int]) -> None:
    fast, x = converted(forward)
    assert regions(fast) == steps
    assert fast.code.count("fxsparse.region.default") == len(steps)
    assert same(fast, x)
    assert same(fast, torch.randn(5, 4, 12, 10))


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: F.relu(m.a(x)),
        lambda m, x: m.c(m.a(x).sin()),
        lambda m, x: m.pool(x).sum() + m.a(x),
        lambda m, x: F.max_pool2d(m.a(x), 2, return_indices=True)[0],
        lambda m, x: F.max_pool2d(m.a(x), x.shape[-1]),
        lambda m, x: F.avg_pool2d(m.a(x), 2),
        lambda m, x: F.adaptive_avg_pool2d(m.a(x), (1, 2)),
        lambda m, x: m.b(m.a(x).mul_(2)),
    ],
)
def test_single_steps_stay_calls(forward: Callable[..., Tensor]) -> None:
    fast, x = converted(forward)
    assert regions(fast) == []
    assert "fxsparse.region" not in fast.code
    assert same(fast, x)


def test_images_of_two_batches_are_two_regions() -> None:
    """Nothing says that values which do not meet are of one batch."""

    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3)

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            p, q = self.a(x), self.a(y)
            return self.b(p), self.b(q)

    model = Siamese().eval()
    x, y = torch.randn(2, 4, 9, 9), torch.randn(3, 4, 9, 9)
    settings = fxsparse.Settings(calibrate=False)
    fast = fxsparse.convert(model, random_masks(model, 0.15), example_inputs=(x, y), settings=settings)
    fxsparse.set_mode(fast, "sparse")
    with torch.no_grad():
        for got, wanted in zip(fast(x, y), Interpreter(fast).run(x, y), strict=True):
            assert torch.allclose(got, wanted, rtol=1e-6, atol=1e-6)


def test_a_write_ends_a_region() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        z = m.side(x)
        x.mul_(2)
        return m.b(y) + z + m.side(x)

    fast, x = converted(forward)
    assert same(fast, x)
    assert regions(fast) == [2, 2]


def _activated_in_place(m: Net, x: Tensor) -> Tensor:
    y = m.b(m.a(x))
    z = F.relu(y, inplace=True)
    return m.c(y) + z  # y is z


@pytest.mark.parametrize("other", [_activated_in_place, lambda m, x: m.c(F.relu_(y := m.b(m.a(x)))) - y])
def test_an_activation_in_place_is_seen_by_all_readers(other: Callable[..., Tensor]) -> None:
    fast, x = converted(other)
    model = fxsparse.to_dense(fast)
    assert same(fast, x)
    with torch.no_grad():
        assert torch.allclose(fast(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_pooling_with_a_hook_is_called() -> None:
    fast, x = converted(lambda m, x: m.b(m.pool(m.a(x))))
    seen: list[Tensor] = []
    fast.pool.register_forward_hook(lambda _, __, output: seen.append(output))
    fast.recompile()
    assert regions(fast) == []
    fast(x)
    assert len(seen) == 1


def test_other_modes_have_no_region() -> None:
    fast, x = converted(lambda m, x: m.b(m.a(x)))
    for mode in ("vanilla", "training", "test", "benchmark"):
        with fxsparse.set_mode(fast, mode):
            assert regions(fast) == []
    fxsparse.set_mode(fast, "vanilla", sites="b")
    assert regions(fast) == []
    assert same(fast, x)


def test_copies_casts_and_unbatched_images() -> None:
    fast, x = converted(lambda m, x: m.c(F.relu(m.b(F.relu(m.a(x))))))
    assert copy.deepcopy(fast).code == fast.code
    with torch.no_grad():
        wanted = fast(x)
        assert torch.allclose(fast(x[0]), wanted[0], rtol=1e-5, atol=1e-6)
        assert torch.allclose(copy.deepcopy(fast).double()(x.double()).float(), wanted, rtol=1e-5, atol=1e-5)
        assert fast(x[:0]).shape == (0, *wanted.shape[1:])


def test_on_another_device_there_is_no_region() -> None:
    fast, _ = converted(lambda m, x: m.b(m.a(x)))
    fast.to("meta")
    assert "fxsparse.region" not in fast.code
    assert fast(torch.empty(2, 4, 8, 8, device="meta")).shape == (2, 8, 8, 8)


def test_a_calibrated_model_agrees_with_the_masked_dense_one() -> None:
    model = small_net()
    masks = random_masks(model, 0.1)
    x = torch.randn(4, 3, 16, 16)
    fast = fxsparse.convert(model, masks, example_inputs=(x,), settings=fxsparse.Settings(budget_s=0.5))
    fxsparse.set_mode(fast, "sparse")
    assert "fxsparse.region" in fast.code
    oracle = masked_dense(model, masks).double()
    with torch.no_grad():
        assert (fast(x) - oracle(x.double())).abs().max() < 1e-4


def test_it_compiles_and_exports() -> None:
    fast, x = converted(lambda m, x: m.c(F.relu(m.b(m.pool(F.relu(m.a(x)))))))
    with torch.no_grad():
        wanted = fast(x)
        assert torch.equal(torch.compile(fast, fullgraph=True, backend="aot_eager")(x), wanted)
        batch = torch.export.Dim.AUTO
        exported = torch.export.export(fast, (x,), dynamic_shapes=({0: batch},), strict=False)
        assert torch.equal(exported.module()(x), wanted)
        assert torch.equal(exported.module()(x[:1].repeat(5, 1, 1, 1))[:1], fast(x[:1].repeat(5, 1, 1, 1))[:1])


def test_gradients_pass_a_region() -> None:
    fast, x = converted(lambda m, x: m.c(F.relu(m.b(F.relu(m.a(x))))))
    dense = fxsparse.to_dense(fast).double()
    x.requires_grad_()
    y = x.detach().double().requires_grad_()
    fast(x).square().sum().backward()
    dense(y).square().sum().backward()
    assert torch.allclose(x.grad.double(), y.grad, rtol=1e-3, atol=1e-5)
