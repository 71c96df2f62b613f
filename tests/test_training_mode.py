"""The mode TRAINING: pruned weights stay zero, kept ones learn, and the sparse path computes with what they learned."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from models import error_in_float64, masked_dense, random_masks, small_net
from torch import Tensor, nn

import fxsparse
from fxsparse import Mode, sites
from fxsparse.graph_module import follow_training_flag, refresh_packed
from fxsparse.report import graphs_of

RUNGS = ("symbolic", "export", "modules")
X = torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def converted(rung: str = "symbolic", masks: object = None, **options: object) -> nn.Module:
    model = small_net()
    masks = random_masks(model) if masks is None else masks
    chosen = fxsparse.Settings(calibrate=False, capture=rung, cache=False, **options)
    return fxsparse.convert(model, masks, example_inputs=X, settings=chosen)


def modes(model: nn.Module) -> dict[str, tuple[str, str]]:
    return {s.name: (s.mode, s.path) for gm in graphs_of(model) for _, s in sites.conv_sites(gm)}


def weights(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    return [
        (sites.attribute(gm, s.weight), sites.attribute(gm, s.mask))
        for gm in graphs_of(model)
        for _, s in sites.conv_sites(gm)
    ]


def _steps(model: nn.Module, make: Callable[..., torch.optim.Optimizer], count: int = 5) -> None:
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    for _ in range(count):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X), torch.tensor([0, 1, 2])).backward()
        optimizer.step()


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3),
}


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_keeps_pruned_weights_zero_lets_kept_ones_learn_and_packs_them_again(
    rung: str, optimizer: str
) -> None:
    fast = converted(rung)
    before = modes(fast)
    start = [weight.detach().clone() for weight, _ in weights(fast)]
    fast.train()
    assert {m for m, _ in modes(fast).values()} == {"training"}
    _steps(fast, OPTIMIZERS[optimizer])
    for (weight, mask), old in zip(weights(fast), start, strict=True):
        assert not weight[~mask].any()
        assert (weight[mask] != old[mask]).float().mean() > 0.3  # a dead ReLU gives many no gradient
    with torch.no_grad():
        fast.eval()
        assert modes(fast) == before
        with fxsparse.set_mode(fast, Mode.VANILLA):
            trained = fast(X)
        with fxsparse.set_mode(fast, Mode.TEST):
            assert torch.allclose(fast(X), trained, atol=1e-5)


def test_an_overflowed_gradient_brings_no_pruned_weight_to_life() -> None:
    fast = converted().train()
    (fast(X) * torch.inf).sum().backward()
    for weight, mask in weights(fast):
        assert not weight.grad[~mask].any()


def test_what_an_optimizer_wrote_into_pruned_places_is_gone_after_training() -> None:
    fast = converted().train()
    with torch.no_grad():
        for weight, _ in weights(fast):
            weight.add_(torch.randn_like(weight))
        expected = fast(X)
        fast.eval()
        assert all(not weight[~mask].any() for weight, mask in weights(fast))
        with fxsparse.set_mode(fast, Mode.TEST):
            assert torch.allclose(fast(X), expected, atol=1e-4)


def test_training_twice_and_other_modes_in_between_are_remembered() -> None:
    fast = converted()
    fxsparse.set_mode(fast, Mode.TEST, sites="stem.0")
    before = modes(fast)
    fast.train().train()
    fast.eval()
    assert modes(fast) == before
    fast.train()
    fxsparse.set_mode(fast, Mode.VANILLA, sites="block.conv1")
    assert modes(fast)["block.short"] == ("training", "sparse")
    fast.eval()
    assert modes(fast) == {**before, "block.conv1": ("vanilla", "vanilla")}
    fast.eval()
    assert modes(fast) == {**before, "block.conv1": ("vanilla", "vanilla")}


def test_training_a_submodule_of_a_swapped_model_trains_only_its_convolutions() -> None:
    fast = converted("modules")
    fast.stem.train()
    assert modes(fast)["stem.0"] == ("training", "sparse")
    assert modes(fast)["block.conv1"] == ("sparse", "sparse")
    fast.eval()
    assert modes(fast)["stem.0"] == ("sparse", "sparse")


def test_a_copy_made_in_training_ends_its_training_alone() -> None:
    fast = converted()
    fxsparse.set_mode(fast, Mode.VANILLA, sites="stem.0")
    before = modes(fast)
    other = copy.deepcopy(fast.train())
    _steps(other, OPTIMIZERS["sgd"], 1)
    other.eval()
    assert modes(other) == before
    assert {m for m, _ in modes(fast).values()} == {"training"}
    with torch.no_grad(), fxsparse.set_mode(other, Mode.TEST):
        assert not torch.allclose(other(X), fast(X))


def test_convolutions_left_out_keep_their_zeros_in_training_too() -> None:
    fast = converted(exclude=("*",))
    assert fast.report.sparse == 0
    fast.train()
    _steps(fast, OPTIMIZERS["sgd"], 2)
    assert all(not weight[~mask].any() for weight, mask in weights(fast))


def test_a_dense_convolution_just_trains() -> None:
    fast = converted(masks={})
    fast.train()
    weight = fast.get_parameter("stem.0.weight")
    old = weight.detach().clone()
    _steps(fast, OPTIMIZERS["sgd"], 1)
    assert (weight != old).float().mean() > 0.9


def test_refresh_packed_takes_up_weights_written_from_outside() -> None:
    fast = converted()
    with torch.no_grad():
        for weight, _ in weights(fast):
            weight.mul_(2).add_(1)
        refresh_packed(fast)
        sparse = fast(X)
        with fxsparse.set_mode(fast, Mode.VANILLA):
            assert torch.allclose(fast(X), sparse, rtol=1e-4, atol=1e-4)
    assert all(not weight[~mask].any() for weight, mask in weights(fast))


def test_a_model_converted_in_training_mode_trains_on_masked_weights() -> None:
    model = small_net().train()
    masks = random_masks(model)
    fast = fxsparse.convert(model, masks, settings=fxsparse.Settings(calibrate=False))
    follow_training_flag(fast)
    assert {m for m, _ in modes(fast).values()} == {"training"}
    assert any(isinstance(m, nn.BatchNorm2d) and m.training for m in fast.modules())
    fast.eval()
    with torch.no_grad():
        assert error_in_float64(fast(X), masked_dense(model.eval(), masks), X) < 1e-6
