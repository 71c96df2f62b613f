"""Masks hold through any optimizer, and go to torch.nn.utils.prune and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from pruning_nets import images, net, steps
from torch import Tensor, nn
from torch.nn.utils import prune

from fxsparse import FxsparseError, pruning

OPTIMIZERS: dict[str, Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum and decay": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
}


def pruned_are_zero(model: nn.Module, masks: dict[str, Tensor]) -> bool:
    return all(not bool(model.get_submodule(name).weight[~mask].any()) for name, mask in masks.items())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pruned_weights_stay_zero_when_velocity_from_before_would_revive_them(name: str) -> None:
    model = net()
    optimizer = OPTIMIZERS[name](model.parameters())
    steps(model, optimizer, 3)  # momentum gathers
    masks = pruning.magnitude_masks(model, 0.3)
    before = {key: model.get_submodule(key).weight.detach().clone() for key in masks}
    with pruning.hold(model, masks):
        for i in range(4):
            steps(model, optimizer, 1, seed=i)
            assert pruned_are_zero(model, masks)
            for key, mask in masks.items():
                assert not bool(model.get_submodule(key).weight.grad[~mask].any())
    for key, mask in masks.items():  # kept weights learn
        assert bool((model.get_submodule(key).weight[mask] != before[key][mask]).any())


def test_an_optimizer_that_is_not_torchs_and_a_loaded_state_are_masked_before_the_next_forward() -> None:
    model = net()
    masks = pruning.magnitude_masks(model, 0.3)
    x, _ = images(2)
    with pruning.hold(model, masks):
        wanted = model(x)
        for parameter in model.parameters():
            assert parameter.requires_grad
        state = model.state_dict()
        model.load_state_dict(state | {"body.weight": torch.where(masks["body"], state["body.weight"], 1.0)})
        assert not pruned_are_zero(model, masks)
        torch.testing.assert_close(model(x), wanted)
        assert pruned_are_zero(model, masks)


def test_a_weight_that_is_used_twice_can_be_held_and_trained() -> None:
    conv = nn.Conv2d(8, 8, 3, padding=1)
    model = nn.Sequential(conv, nn.ReLU(), conv)
    masks = {"0": torch.rand_like(conv.weight) < 0.5}
    with pruning.hold(model, masks):
        model(torch.randn(1, 8, 6, 6)).sum().backward()
    assert not bool(conv.weight.grad[~masks["0"]].any())


def test_after_release_the_model_is_plain_again() -> None:
    model = net()
    with pruning.hold(model, pruning.magnitude_masks(model, 0.3)):
        pass
    assert not any(module._forward_pre_hooks for module in model.modules())
    steps(model, torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1), 1)
    assert bool(model.body.weight.all())


def test_masks_hold_in_compiled_training() -> None:
    model = net()
    masks = pruning.magnitude_masks(model, 0.3)
    with pruning.hold(model, masks):
        compiled = torch.compile(model, backend="eager")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        steps(compiled, optimizer, 3)
        assert pruned_are_zero(model, masks)


def test_masks_go_to_torch_prune_and_back() -> None:
    model = net()
    masks = pruning.magnitude_masks(model, 0.3)
    pruning.to_torch(model, masks)
    assert prune.is_pruned(model) and pruning.from_torch(model).keys() == masks.keys()
    assert all(torch.equal(mask, masks[name]) for name, mask in pruning.from_torch(model).items())
    found = pruning.make_permanent(model)
    assert not prune.is_pruned(model) and all(torch.equal(found[name], masks[name]) for name in masks)
    assert pruned_are_zero(model, masks)


def test_nan_in_a_pruned_place_does_not_survive_torch_prune() -> None:
    conv = nn.Conv2d(4, 4, 1)
    prune.custom_from_mask(conv, "weight", torch.eye(4)[:, :, None, None])
    conv.weight_orig.data[0, 1] = torch.nan
    pruning.make_permanent(conv)
    assert bool(torch.isfinite(conv.weight).all())


@pytest.mark.parametrize(
    ("masks", "says"),
    [
        ({"boby": torch.ones(1)}, "'boby', which has no weight of its own. Near names: 'body'"),
        ({"body": torch.ones(2, 2)}, "Mask 'body' has shape (2, 2); the weight has (32, 16, 3, 3)"),
        ({"body": torch.zeros(32, 16, 3, 3)}, "Mask 'body' keeps no weight"),
        ([1], "masks is a list. Give a mapping"),
    ],
)
def test_masks_that_do_not_fit_are_refused(masks: object, says: str) -> None:
    with pytest.raises(FxsparseError) as error:
        pruning.hold(net(), masks)  # type: ignore[arg-type]
    assert says in str(error.value)


def test_torch_prune_wants_module_names() -> None:
    model = net()
    with pytest.raises(FxsparseError, match=r"'body.weight', which is no module"):
        pruning.to_torch(model, {"body.weight": torch.ones_like(model.body.weight)})
