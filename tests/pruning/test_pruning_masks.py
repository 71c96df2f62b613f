"""Magnitude, random and gradual masks; refill and refill+."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pruning_nets import images, net, steps
from torch import nn

from fxsparse import FxsparseError, pruning


def test_global_magnitude_keeps_the_largest_weights_of_all_layers() -> None:
    model = net()
    masks = pruning.magnitude_masks(model, 0.25)
    kept = torch.cat([model.get_submodule(n).weight[m].abs() for n, m in masks.items()])
    gone = torch.cat([model.get_submodule(n).weight[~m].abs() for n, m in masks.items()])
    assert kept.min() >= gone.max()
    assert kept.numel() == round(0.25 * (kept.numel() + gone.numel()))


def test_layer_magnitude_keeps_the_same_share_everywhere() -> None:
    masks = pruning.magnitude_masks(net(), 0.25, scope="layer", exclude=("stem",))
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {"body": 1152, "last": 128}


def test_no_layer_is_emptied_by_a_global_threshold() -> None:
    model = net()
    with torch.no_grad():
        model.stem.weight *= 1e-6
    assert all(bool(mask.any()) for mask in pruning.magnitude_masks(model, 0.01).values())


def test_random_masks_depend_on_the_seed_alone() -> None:
    first, again, other = (pruning.random_masks(net(i), 0.3, seed=s) for i, s in ((0, 1), (1, 1), (0, 2)))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
    assert abs(pruning.kept_share(first) - 0.3) < 1e-3


@settings(deadline=None, max_examples=15)
@given(st.floats(0.05, 1.0), st.floats(0.05, 1.0))
def test_what_is_pruned_stays_pruned(first: float, second: float) -> None:
    model = net()
    before = pruning.random_masks(model, first)
    after = pruning.magnitude_masks(model, second, masks=before)
    assert all(not bool((mask & ~before[name]).any()) for name, mask in after.items())


def test_the_cubic_schedule_starts_fast_and_ends_flat() -> None:
    shares = [pruning.cubic_share(i / 10, 0.1) for i in range(11)]
    assert (shares[0], shares[10]) == (1.0, 0.1)
    falls = [a - b for a, b in zip(shares, shares[1:], strict=False)]
    assert falls == sorted(falls, reverse=True) and falls[-1] > 0
    assert pruning.cubic_share(0.5, 0.2) == pytest.approx(0.2 + 0.8 * 0.125)


def test_gradual_pruning_reaches_its_share_and_goes_on_from_its_state() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    gradual = pruning.Gradual(model, 0.2, 9, every=3)
    shares = []
    for step in range(12):
        steps(model, optimizer, 1, seed=step)
        if gradual.step(step):
            shares.append(pruning.kept_share(gradual.masks))
    assert shares == pytest.approx([1.0, 0.437, 0.23, 0.2], abs=2e-3)
    gradual.release()
    assert pruning.sparsity(model)[""] == pytest.approx(0.8, abs=2e-3)
    other = pruning.Gradual(net(1), 0.2, 9)
    other.load_state_dict(gradual.state_dict())
    assert all(torch.equal(mask, gradual.masks[name]) for name, mask in other.masks.items())
    other.release()


def hand_made() -> nn.Sequential:
    """Two channels in, four out; channel c computes (c + 1) times the sum of its inputs."""
    conv = nn.Conv2d(2, 4, 1, bias=False)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0], [4.0, 4.0]])[:, :, None, None])
    return nn.Sequential(conv)


MASK = torch.tensor([[1, 1], [1, 0], [1, 0], [0, 0]], dtype=torch.bool)[:, :, None, None]


def weighted(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A loss on which the first channel has all the influence."""
    return (model(x)[:, 0] * 10).sum() + (model(x)[:, 1:] * 1e-3).sum()


@pytest.mark.parametrize(
    ("criterion", "channels"),
    [
        ("weight_l1", [2, 3]),
        ("remaining", [0, 1]),
        ("feature_l1", [2, 3]),
        ("feature_l2", [2, 3]),
        ("saliency", [0, 3]),
    ],
)
def test_refill_keeps_the_best_channels_whole(criterion: str, channels: list[int]) -> None:
    model = hand_made()
    found = pruning.refill(model, {"0": MASK}, criterion=criterion, data=[torch.ones(3, 2, 2, 2)], loss=weighted)["0"]
    assert found.all(dim=1).flatten().nonzero().flatten().tolist() == channels  # 4 weights are 2 channels
    assert int(found.sum()) == 4 and model[0].weight.grad is None


def test_feature_maps_of_each_layer_score_that_layer() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.Conv2d(2, 2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, 5.0]).reshape(2, 1, 1, 1))
        model[1].weight.copy_(torch.tensor([[1.0, 1.0], [0.1, 0.1]])[:, :, None, None])
    masks = {"0": torch.tensor([1, 0], dtype=torch.bool).reshape(2, 1, 1, 1), "1": torch.eye(2)[:, :, None, None]}
    found = pruning.refill(model, masks, criterion="feature_l1", data=[torch.ones(1, 1, 2, 2)])
    assert found["0"].flatten().tolist() == [False, True]
    assert found["1"][:, 0].flatten().tolist() == [True, False]


def test_refill_plus_keeps_more_channels() -> None:
    found = pruning.refill(hand_made(), {"0": MASK}, extra=0.5)["0"]
    assert int(found.sum()) == 6  # 2 channels, and half of the other 2


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m: pruning.magnitude_masks(m, 0.0), "keep=0.0 is no share"),
        (
            lambda m: pruning.magnitude_masks(m, 0.5, scope="net"),
            "scope='net' is not known. Choose one of global",
        ),
        (lambda m: pruning.magnitude_masks(m, 0.5, include=("bady",)), "matches no convolution. Near names: 'body'"),
        (lambda m: pruning.magnitude_masks(m, 0.5, exclude=("*",)), "There is no convolution to prune"),
        (lambda m: pruning.cubic_share(0.5, 2.0), "final=2.0 is no share"),
        (lambda m: pruning.Gradual(m, 0.5, 0), "steps=0, every=50: both are numbers of steps"),
        (
            lambda m: pruning.refill(m, {}, criterion="taylor"),
            "criterion='taylor' is not known. Choose one of",
        ),
        (lambda m: pruning.refill(m, {}, extra=1.0), "extra=1.0 is no share"),
        (lambda m: pruning.refill(m, {}, criterion="feature_l1"), "looks at feature maps. Give data"),
        (lambda m: pruning.refill(m, {}, criterion="saliency", data=[]), "needs the gradient of a loss. Give loss"),
        (lambda m: pruning.refill(m, {}, criterion="feature_l2", data=[]), "data holds no batch"),
        (lambda m: pruning.Magnitude(1.0), "rate=1.0 is no share"),
        (lambda m: pruning.Random(0.2, "all"), "scope='all' is not known"),
        (lambda m: pruning.Regroup(by="norm"), "by='norm' is not known. Choose 'energy' or 'count'"),
    ],
)
def test_what_cannot_be_is_refused(call: object, says: str) -> None:
    with pytest.raises(FxsparseError) as error:
        call(net())  # type: ignore[operator]
    assert says in str(error.value)


def test_a_convolution_that_computes_its_weight_is_refused_by_name() -> None:
    model = net()
    nn.utils.parametrizations.weight_norm(model.body)
    with pytest.raises(FxsparseError, match="'body' computes its weight from others"):
        pruning.magnitude_masks(model, 0.5)
    assert set(pruning.magnitude_masks(model, 0.5, exclude=("body",))) == {"stem", "last"}


def test_refill_leaves_gradients_and_statistics_alone() -> None:
    model = net()
    x, y = images(8)
    model.train()
    F.cross_entropy(model(x), y).backward()
    grad, mean = model.body.weight.grad.clone(), model.norm.running_mean.clone()
    masks = pruning.magnitude_masks(model, 0.3)
    pruning.refill(
        model, masks, criterion="saliency", data=[(x, y)], loss=lambda m, batch: F.cross_entropy(m(batch[0]), batch[1])
    )
    assert torch.equal(model.body.weight.grad, grad) and torch.equal(model.norm.running_mean, mean)
