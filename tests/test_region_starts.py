"""What begins a region besides a sparse convolution, and depthwise convolutions inside of one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from models import masked_dense, random_masks
from test_regions import regions, same
from torch import Tensor, nn

import fxsparse
from fxsparse import sites
from fxsparse.graph_module import ConvertedModule
from fxsparse.ops.region import Conv, MaxPool, steps_of
from fxsparse.regions import executed

pytestmark = pytest.mark.skipif(
    fxsparse.capabilities().cpu == "reference", reason="the compiled operators are not built"
)


class Net(nn.Module):
    """A dense convolution, sparse ones, and a forward."""

    def __init__(self, forward: Callable[..., Tensor]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 8, 7, padding=3)  # of more columns than join a region unpruned
        self.a = nn.Conv2d(4, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, padding=1)
        self.c = nn.Conv2d(8, 8, 1)
        self.pool = nn.MaxPool2d(2)
        self.step = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.step(self, x)


class Inverted(nn.Module):
    """An inverted residual block behind a pointwise convolution."""

    def __init__(self, stride: int = 1) -> None:
        super().__init__()
        self.expand = nn.Conv2d(8, 16, 1)
        self.depthwise = nn.Conv2d(16, 16, 3, stride, 1, groups=16)
        self.project = nn.Conv2d(16, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(F.relu6(self.depthwise(F.relu6(self.expand(x)))))


def converted(model: nn.Module, x: Tensor, *dense: str) -> ConvertedModule:
    """Convert a model with masks on all convolutions but the ones named, and force it on the sparse paths."""
    masks = {name: mask for name, mask in random_masks(model, 0.15).items() if name not in dense}
    fast = fxsparse.convert(model, masks, example_inputs=(x,), settings=fxsparse.Settings(calibrate=False))
    fxsparse.set_mode(fast, "sparse")
    assert isinstance(fast, ConvertedModule)
    return fast


def with_stem(forward: Callable[..., Tensor]) -> tuple[ConvertedModule, Tensor]:
    model, x = Net(forward).eval(), torch.randn(2, 4, 12, 10)
    return converted(model, x, "stem"), x


def first_steps(fast: ConvertedModule) -> list[type]:
    """Return the kind of each region's first step."""
    calls = [node for node in executed(fast).nodes if node.target is torch.ops.fxsparse.region.default]
    return [type(next(steps_of(node.args[2]))) for node in calls]


@pytest.mark.parametrize(
    ("forward", "steps"),
    [
        (lambda m, x: m.b(m.pool(m.stem(x))), [2]),
        (lambda m, x: m.b(F.max_pool2d(F.relu(m.stem(x)), 3, 2, 1)), [2]),
        (lambda m, x: m.b(y := m.pool(m.stem(x))) + m.c(y), [3]),
        # What others make of the convolution's output is theirs.
        (lambda m, x: m.b(m.pool(y := m.stem(x))) + F.avg_pool2d(y, 2), [2]),
    ],
)
def test_a_pooling_of_what_a_dense_convolution_gives_begins_a_region(forward: Callable, steps: list[int]) -> None:
    fast, x = with_stem(forward)
    assert regions(fast) == steps
    assert first_steps(fast) == [MaxPool]
    assert same(fast, x)
    assert same(fast, torch.randn(5, 4, 9, 15))


@pytest.mark.parametrize("read", [torch.sin, torch.sum, lambda y: F.avg_pool2d(y, 1), lambda y: y.mT])
def test_a_pooling_that_something_else_reads_begins_none(read: Callable[[Tensor], Tensor]) -> None:
    fast, x = with_stem(lambda m, x: m.c(m.b(y := m.pool(m.stem(x)))) * read(y).sum())
    assert first_steps(fast) == [Conv]
    assert regions(fast) == [2]
    assert same(fast, x)


def test_a_pooling_that_a_residual_addition_reads_begins_none() -> None:
    fast, x = with_stem(lambda m, x: m.c(m.b(y := m.pool(m.stem(x)))) + y)
    assert first_steps(fast) == [Conv]
    assert same(fast, x)
    assert same(fast, x.to(memory_format=torch.channels_last))


def test_a_pooling_that_is_an_output_begins_none() -> None:
    fast, x = with_stem(lambda m, x: (y := m.pool(m.stem(x)), m.c(m.b(y))))
    assert first_steps(fast) == [Conv]
    with torch.no_grad():
        pooled, _ = fast(x.to(memory_format=torch.channels_last))
        wanted = F.max_pool2d(fast.stem(x.to(memory_format=torch.channels_last)), 2)
    assert torch.allclose(pooled, wanted, rtol=1e-6, atol=1e-6)
    assert pooled.stride() == wanted.stride()


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.c(m.b(F.relu_(m.stem(x)))),
        lambda m, x: m.c(m.b(F.relu(m.stem(x), inplace=True))),
        lambda m, x: m.c(m.b(m.pool(m.stem(x)).relu_())),
        lambda m, x: m.c(m.b(m.pool(m.stem(x)).mul_(2))),
    ],
)
def test_a_write_begins_no_region(forward: Callable[..., Tensor]) -> None:
    fast, x = with_stem(forward)
    assert first_steps(fast) == [Conv]
    assert regions(fast) == [2]
    assert same(fast, x)


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.c(m.b(m.pool(F.relu_(m.stem(x))))),
        lambda m, x: m.c(m.b(m.pool(m.stem(x).mul_(2)))),
        lambda m, x: (y := m.stem(x), y.mul_(2), m.c(m.b(m.pool(y))))[2],
    ],
)
def test_a_pooling_sees_what_was_written_before(forward: Callable[..., Tensor]) -> None:
    fast, x = with_stem(forward)
    assert same(fast, x)


def test_a_pooling_does_not_see_what_is_written_after() -> None:
    fast, x = with_stem(lambda m, x: (y := m.stem(x), z := m.pool(y), y.mul_(2), m.c(m.b(z)) + m.pool(y))[3])
    assert first_steps(fast) == [Conv]
    assert same(fast, x)


def test_channels_last_inputs_give_the_same_values() -> None:
    for forward in (
        lambda m, x: m.c(m.b(m.pool(m.stem(x)))),
        lambda m, x: m.c(m.b(F.relu(m.stem(x)))),
        lambda m, x: m.b(y := m.pool(m.stem(x))) + m.c(y),
    ):
        fast, x = with_stem(forward)
        assert len(regions(fast)) == 1
        last = x.to(memory_format=torch.channels_last)
        assert same(fast, last)
        with torch.no_grad():
            assert torch.allclose(fast(last), fast(x), rtol=1e-5, atol=1e-6)
            fast.to(memory_format=torch.channels_last)
            assert same(fast, last)
            assert torch.allclose(fast(last), fxsparse.to_dense(fast)(x), rtol=1e-5, atol=1e-5)


def test_a_pooling_beside_an_unfinished_region_does_not_split_it() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        beside = m.pool(m.stem(x))
        return m.pool(m.c(m.b(y))) + m.c(beside)

    fast, x = with_stem(forward)
    assert max(regions(fast)) >= 3
    assert first_steps(fast)[0] is Conv
    assert same(fast, x)


def test_a_pooling_behind_a_finished_region_begins_the_next() -> None:
    fast, x = with_stem(lambda m, x: m.c(m.b(m.pool(torch.sin(m.b(m.a(x)))))))
    assert regions(fast) == [2, 3]
    assert first_steps(fast) == [Conv, MaxPool]
    assert same(fast, x)


@pytest.mark.parametrize("stride", [1, 2])
def test_an_unpruned_depthwise_convolution_joins_its_neighbours(stride: int) -> None:
    model, x = Inverted(stride).eval(), torch.randn(2, 8, 9, 11)
    fast = converted(model, x, "depthwise")
    known = {site.name: site for _, site in sites.conv_sites(fast)}
    assert known["depthwise"].packed == "depthwise.weight"
    assert known["depthwise"].mask is None
    assert known["depthwise"].path == "sparse"
    assert regions(fast) == [3]
    assert fast.code.count("fxsparse.region.default") == 1
    assert "conv2d" not in fast.code
    assert same(fast, x)


@pytest.mark.parametrize("size", [3, 7])
def test_an_unpruned_stem_joins_what_follows(size: int) -> None:
    """A convolution of images has few columns; it may be in the region, and other modes see its own weight."""

    class Stemmed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 16, size, 2, size // 2)
            self.body = nn.Conv2d(16, 24, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(F.max_pool2d(F.relu(self.stem(x)), 3, 2, 1))

    model, x = Stemmed().eval(), torch.randn(1, 3, 21, 22)
    fast = converted(model, x, "stem")
    known = {site.name: site for _, site in sites.conv_sites(fast)}
    assert (known["stem"].packed, known["stem"].mask, known["stem"].path) == ("stem.weight", None, "sparse")
    assert regions(fast) == [3]
    assert same(fast, x)
    assert torch.equal(fxsparse.to_dense(fast).stem.weight, model.stem.weight)


def test_nothing_joins_in_a_dense_model() -> None:
    x = torch.randn(1, 8, 9, 11)
    fast = converted(Inverted().eval(), x, "expand", "depthwise", "project")
    assert {site.reason for _, site in sites.conv_sites(fast)} == {"no zeros in the weight"}


def test_a_depthwise_convolution_comes_back_dense() -> None:
    model, x = Inverted().eval(), torch.randn(2, 8, 9, 11)
    masks = {name: mask for name, mask in random_masks(model, 0.15).items() if name != "depthwise"}
    settings = fxsparse.Settings(calibrate=False)
    fast = fxsparse.convert(model, masks, example_inputs=(x,), settings=settings)
    fxsparse.set_mode(fast, "sparse")
    oracle = masked_dense(model, masks)
    dense = fxsparse.to_dense(fast)
    state, wanted = dense.state_dict(), oracle.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[key], wanted[key]) for key in wanted)
    assert {"depthwise.weight", "depthwise.weight_values"} <= set(fast.state_dict())
    with torch.no_grad():
        expected = oracle.double()(x.double())
        assert (fast(x) - expected).abs().max() < 1e-5
        assert (dense(x) - expected).abs().max() < 1e-5


def test_a_state_dict_carries_a_depthwise_weight() -> None:
    model, x = Inverted().eval(), torch.randn(2, 8, 9, 11)
    first = converted(model, x, "depthwise")
    with torch.no_grad():
        model.depthwise.weight.mul_(3)
    masks = {name: getattr(first, name).weight != 0 for name in ("expand", "project")}
    second = fxsparse.convert(model, masks, example_inputs=(x,), settings=fxsparse.Settings(calibrate=False))
    fxsparse.set_mode(second, "sparse")
    with torch.no_grad():
        assert not torch.allclose(first(x), second(x), atol=1e-3)
        second.load_state_dict(first.state_dict())
        assert torch.equal(first(x), second(x))
        assert torch.allclose(fxsparse.to_dense(second)(x), first(x), rtol=1e-5, atol=1e-5)


def test_other_modes_of_a_depthwise_site_agree() -> None:
    x = torch.randn(2, 8, 9, 11)
    fast = converted(Inverted().eval(), x, "depthwise")
    with torch.no_grad():
        wanted = fast(x)
        for mode in ("vanilla", "test", "training"):
            with fxsparse.set_mode(fast, mode):
                assert torch.allclose(fast(x), wanted, rtol=1e-5, atol=1e-5)
        with fxsparse.set_mode(fast, "training"):
            fast.depthwise.weight.mul_(2)
        assert torch.allclose(fast(x), fxsparse.to_dense(fast)(x), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(fast(x), wanted, rtol=1e-5, atol=1e-5)
        frozen = fxsparse.freeze(fast)
        assert torch.equal(frozen(x), fast(x))


def test_an_unpruned_ordinary_convolution_stays_dense() -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.expand = nn.Conv2d(8, 20, 1)
            self.ordinary = nn.Conv2d(20, 20, 3, padding=1)
            self.pairs = nn.Conv2d(20, 20, 3, padding=1, groups=10)
            self.project = nn.Conv2d(20, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.project(self.pairs(self.ordinary(self.expand(x))))

    x = torch.randn(2, 8, 9, 11)
    fast = converted(Grouped().eval(), x, "ordinary", "pairs")
    known = {site.name: site for _, site in sites.conv_sites(fast)}
    for name in ("ordinary", "pairs"):
        assert known[name].packed is None
        assert known[name].reason == "no zeros in the weight"
    assert regions(fast) == []
    assert same(fast, x)
