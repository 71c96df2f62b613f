"""`fxsparse.prune`: without training, with training, to a share or to milliseconds."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pruning_nets import images, net, steps
from torch import Tensor, nn

import fxsparse
from fxsparse import FxsparseError, PruneSettings, pruning
from fxsparse.inputs import ExampleInputs
from fxsparse.pruning import costs, refit
from fxsparse.pruning.refill import run as call
from fxsparse.pruning.strips import LayerCost

MACS = PruneSettings(cost="macs")


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    model = net()
    steps(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), 40)
    return model.eval()


def correct(model: nn.Module) -> float:
    x, y = images(400, seed=99)
    with torch.no_grad():
        return float((model.eval()(x).argmax(1) == y).float().mean())


def test_without_training_the_pruned_model_stays_near_the_dense_one(trained: nn.Module) -> None:
    before = copy.deepcopy(trained.state_dict())
    data, _ = images(256, seed=5)
    pruned = fxsparse.prune(trained, 0.35, data, settings=MACS)
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())
    bare = copy.deepcopy(trained)
    with pruning.hold(bare, pruned.masks):
        pass
    x, _ = images(200, seed=7)
    with torch.no_grad():
        wanted, found, raw = (model(x) for model in (trained, pruned.model, bare))
    assert (found - wanted).norm() < 0.5 * (raw - wanted).norm()
    assert correct(pruned.model) > correct(trained) - 0.05
    report = pruned.report
    assert report.unit == "MACs" and report.expected <= report.budget == 0.35 * report.dense
    assert json.loads(report.to_json())["kept"] == pytest.approx(report.kept)
    assert "body" in str(report) and "expected MACs" in str(report)


def strided(*widths: int) -> nn.Sequential:
    """Convolutions of stride 2 with batch norms that have seen images: few positions, many columns."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, width in itertools.pairwise(widths):
        layers += [nn.Conv2d(before, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    model = nn.Sequential(*layers)
    with torch.no_grad():
        for seed in range(30):
            model(images(64, seed=seed)[0])
    return model.eval()


def test_a_fit_to_few_positions_holds_on_other_images(monkeypatch: pytest.MonkeyPatch) -> None:
    model = strided(3, 32, 64, 96)
    data, others = images(128, seed=105)[0], images(200, seed=107)[0]

    def error() -> float:
        pruned = fxsparse.prune(model, 0.5, data, settings=MACS)
        with torch.no_grad():
            wanted = model(others)
            return float((pruned.model(others) - wanted).norm() / (wanted - wanted.mean(0)).norm())

    found = error()
    monkeypatch.setattr(refit, "doubt", lambda first, second, fitted: 0.0)
    assert found < 0.75 and found < 0.9 * error()


def test_masks_are_blocks_that_convert_exactly(trained: nn.Module) -> None:
    data, _ = images(64)
    pruned = fxsparse.prune(trained, 0.4, data, settings=MACS)
    for name, mask in pruned.masks.items():
        conv = pruned.model.get_submodule(name)
        assert not bool(conv.weight[~mask].any())
        found = fxsparse.Regrouping.from_identical_rows(mask, groups=conv.groups)
        assert found.residual_count == 0 and bool(mask.flatten(1).any(1).all())
    x, _ = images(4, seed=3)
    settings = fxsparse.Settings(calibrate=False, cache=False)
    fast = fxsparse.convert(pruned.model, pruned.masks, example_inputs=x, settings=settings)
    fxsparse.set_mode(fast, "sparse")
    torch.testing.assert_close(fast(x), pruned.model(x), rtol=1e-4, atol=1e-4)


def test_batch_norms_are_moved_by_what_the_pruning_changed(trained: nn.Module) -> None:
    data, _ = images(128)
    pruned = fxsparse.prune(trained, 0.3, data, settings=PruneSettings(cost="macs", exclude=("stem", "last")))
    changed = pruned.model.get_submodule("norm")
    assert not torch.equal(changed.running_mean, trained.norm.running_mean)
    seen: list[Tensor] = []
    trained.norm.register_forward_hook(lambda m, args, out: seen.append(out))
    changed.register_forward_hook(lambda m, args, out: seen.append(out))
    with torch.no_grad():
        trained(data), pruned.model(data)
    dense, found = (value.transpose(0, 1).flatten(1) for value in seen)
    torch.testing.assert_close(found.mean(1), dense.mean(1), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.std(1), dense.std(1), rtol=1e-3, atol=1e-3)
    trained.norm._forward_hooks.clear()


def test_refit_of_nothing_changes_nothing(trained: nn.Module) -> None:
    model = copy.deepcopy(trained)
    data, _ = images(64)
    assert refit.refit(model, {}, data, call) == {}
    for name, value in trained.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-3, atol=1e-4)
    assert all("forward" not in vars(module) for module in model.modules())


def test_with_training_rounds_shrink_geometrically_and_rewind(trained: nn.Module) -> None:
    seen: list[tuple[int, float, float]] = []

    def train(model: nn.Module, step: pruning.Round) -> None:
        seen.append((step.number, pruning.kept_share(step.masks), float(model.head.weight.sum())))
        steps(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3), 40)

    settings = PruneSettings(cost="macs", rounds=3, rewind=True)
    early = net().state_dict()
    pruned = fxsparse.prune(trained, 0.2, images(1)[0], train=train, early=early, settings=settings)
    assert [number for number, _, _ in seen] == [1, 2, 3]
    shares = [share for _, share, _ in seen]
    assert shares == pytest.approx([0.2 ** (i / 3) for i in (1, 2, 3)], abs=0.05)
    assert all(total == pytest.approx(float(early["head.weight"].sum())) for _, _, total in seen)
    assert correct(pruned.model) > 0.8
    assert not bool(pruned.model.body.weight[~pruned.masks["body"]].any())


def test_training_goes_on_from_its_file(trained: nn.Module, tmp_path: Path) -> None:
    def train_until(limit: int) -> Any:
        def train(model: nn.Module, step: pruning.Round) -> None:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
            for epoch in range(step.restore(optimizer=optimizer).get("epoch", 0), 3):
                if step.number * 10 + epoch >= limit:
                    raise KeyboardInterrupt
                steps(model, optimizer, 1, seed=int(torch.randint(0, 100, ())))
                step.save({"epoch": epoch + 1}, optimizer=optimizer)

        return train

    settings = PruneSettings(cost="macs", rounds=2)
    found = []
    for name, limits in (("whole", (99,)), ("killed", (21, 99))):
        torch.manual_seed(0)
        for limit in limits:
            try:
                pruned = fxsparse.prune(
                    trained, 0.3, images(1)[0], train=train_until(limit), file=tmp_path / name, settings=settings
                )
                found.append(pruned)
            except KeyboardInterrupt:
                torch.manual_seed(77)
    first, second = (pruned.model.state_dict() for pruned in found)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_measured_prices_come_from_calibration(trained: nn.Module) -> None:
    if fxsparse.capabilities().cpu == "reference":
        pytest.skip("the compiled operators are not built")
    inputs = ExampleInputs((torch.randn(2, 3, 16, 16),), {})
    groups = {"body": np.arange(32) // 16, "last": np.arange(32) // 16}
    found = costs.measure(trained, inputs, groups, budget_s=0.05)
    assert found.unit == "ms" and found.total > 0 and found.rest >= 0
    for cost in found.layers.values():
        assert cost.dense > 0 and cost.fixed >= 0 and cost.per_weight > 0
    missing = costs.measure(trained, inputs, groups, source="macs")
    assert missing.unit == "MACs" and missing.layers["body"].dense == 2 * 16 * 16 * 32 * 16 * 9


@pytest.fixture
def priced(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Price layers by a rule: in one call they take 0.8 of the sum of their prices; return the trials."""
    trials: list[float] = []

    def measure(model: nn.Module, inputs: Any, groups: Any, **options: Any) -> costs.Costs:
        layers = {n: LayerCost(10.0, 1.0, 9.0 / model.get_submodule(n).weight.numel()) for n in groups}
        return costs.Costs("ms", 10.0 * len(groups) + 5, 5.0, layers)

    def model_ms(model: nn.Module, masks: dict[str, Tensor], inputs: Any, seconds: Any) -> float:
        trials.append(5 + 0.8 * sum(1 + 9 * float(mask.float().mean()) for mask in masks.values()))
        return trials[-1]

    monkeypatch.setattr(costs, "measure", measure)
    monkeypatch.setattr(costs, "model_ms", model_ms)
    return trials


def test_a_share_of_the_time_is_one_of_the_prices(trained: nn.Module, priced: list[float]) -> None:
    report = fxsparse.prune(trained, 0.5, images(32)[0]).report
    assert report.unit == "ms" and 16 < report.expected <= report.budget == 17.5 and not priced
    assert report.measured_ms is None and "expected ms" in str(report)


def test_trials_correct_what_the_sum_of_the_prices_does_not_know(trained: nn.Module, priced: list[float]) -> None:
    report = fxsparse.prune(trained, "17.5 ms", images(32)[0]).report
    assert report.unit == "ms" and report.budget == pytest.approx(17.5) and report.dense == 35
    assert 1 < len(priced) <= 3 and report.measured_ms == pytest.approx(17.5, rel=0.04)
    assert f"measured {report.measured_ms:.3f}." in str(report)


def test_a_time_below_the_least_is_refused_after_a_trial(trained: nn.Module, priced: list[float]) -> None:
    with pytest.raises(
        FxsparseError, match=r"The budget of 6 ms cannot be kept: .* takes 8\.\d+ ms.*; 5 ms are not in"
    ):
        fxsparse.prune(trained, "6 ms", images(32)[0])
    assert len(priced) == 1


def test_the_line_through_two_times_is_never_free() -> None:
    cost = costs.line(1.0 + 12.0, 1.0 + 40.0, 100, 90.0)
    assert (cost.dense, cost.fixed, cost.per_weight) == (90.0, pytest.approx(1.0), pytest.approx(1.0))
    noisy = costs.line(30.0, 20.0, 100, 90.0)
    assert noisy.per_weight == pytest.approx(0.3 * 20 / 40) and noisy.fixed > 0
    assert cost.of(100, 100) == 90.0 and cost.of(95, 100) == 90.0 and cost.of(10, 100) == pytest.approx(11.0)


class Thin(nn.Module):
    """A depthwise and a pointwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.pointwise = nn.Conv2d(16, 32, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.relu(self.pointwise(F.relu(self.depthwise(x + y))))


def test_depthwise_layers_stay_dense_are_fitted_and_say_why() -> None:
    model = Thin().eval()
    data = [(torch.randn(8, 16, 6, 6), torch.randn(8, 16, 6, 6)) for _ in range(4)]
    pruned = fxsparse.prune(model, 0.5, data, settings=MACS)
    assert list(pruned.masks) == ["pointwise"]
    rows = {row.name: row for row in pruned.report.rows}
    assert rows["depthwise"].kept == 1 and rows["depthwise"].reason.startswith("1 rows in each convolution group")
    out = pruned.model(*data[0])
    assert (out - model(*data[0])).norm() < 0.6 * model(*data[0]).norm()
    kwargs = [{"x": x, "y": y} for x, y in data]
    again = fxsparse.prune(model, 0.5, kwargs, settings=MACS)
    assert torch.equal(again.masks["pointwise"], pruned.masks["pointwise"])


def test_a_forward_of_the_users_own_is_called(trained: nn.Module) -> None:
    x, y = images(32)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 8)
    pruned = fxsparse.prune(
        trained, 0.5, loader, forward=lambda model, batch: model(batch[0]), example_inputs=x[:1], settings=MACS
    )
    assert pruned.masks


class SamePadding(nn.Conv2d):
    """Pads in its own way, as EfficientNets do, and calls the function."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


def test_convolutions_of_the_models_own_are_fitted_where_they_call_the_function() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        SamePadding(3, 32, 2, bias=False), nn.BatchNorm2d(32), nn.ReLU(), SamePadding(32, 32, 2)
    ).eval()
    x = torch.randn(64, 3, 8, 8)
    pruned = fxsparse.prune(model, 0.6, x, settings=MACS)
    bare = copy.deepcopy(model)
    with pruning.hold(bare, pruned.masks):
        pass
    with torch.no_grad():
        wanted, found, raw = (net(x) for net in (model, pruned.model, bare))
    assert set(pruned.masks) <= {"0", "3"} and (found - wanted).norm() < 0.7 * (raw - wanted).norm()


class Folding(nn.Module):
    """Puts the images of a batch into the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.sum(0, keepdim=True))


class Unused(Folding):
    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("model", "arguments", "says"),
    [
        (net, (1.5, torch.randn(2, 3, 8, 8)), "budget=1.5 is none. Give a share of the dense time"),
        (net, ("3 s", torch.randn(2, 3, 8, 8)), "budget='3 s' is none"),
        (net, ("3ms", torch.randn(2, 3, 8, 8)), "A budget in milliseconds needs measured times"),
        (net, (0.5,), "There are neither data nor train"),
        (net, (0.5, 3), "data is a int. Give a tensor of images, or an iterable"),
        (net, (0.5, []), "data holds no input"),
        (net, (0.5, [(torch.randn(2, 3, 8, 8), torch.randn(3))]), "tensors of [2, 3] images"),
        (net, (1e-6, torch.randn(2, 3, 8, 8)), "the least that they take is"),
        (lambda: nn.Sequential(nn.Linear(3, 3)), (0.5, torch.randn(2, 3)), "There is no convolution to prune"),
        (
            lambda: nn.Sequential(nn.Conv2d(4, 4, 1)),
            (0.5, torch.randn(2, 4, 3, 3)),
            "No convolution can be pruned: 4",
        ),
        (Folding, (0.5, torch.randn(4, 3, 4, 4)), "'conv' gets an input of shape (1, 3, 4, 4), which is not twice"),
        (Unused, (0.5, torch.randn(4, 3, 4, 4)), "'conv' is not called on"),
    ],
)
def test_what_cannot_be_pruned_is_refused(model: Any, arguments: Any, says: str) -> None:
    with pytest.raises(FxsparseError) as error:
        fxsparse.prune(model().eval(), *arguments, settings=MACS)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"cost": "flops"}, "cost='flops' is not known. Choose one of measured, macs"),
        ({"partitioner": "hypergraph"}, "partitioner='hypergraph' is not known"),
        ({"group_rows": 0}, "group_rows=0 is no number"),
        ({"samples": 2.5}, "samples=2.5 is no number"),
        ({"ridge": 0.0}, "ridge=0.0 is outside (0, 1)"),
    ],
)
def test_settings_that_cannot_be_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(FxsparseError) as error:
        PruneSettings(**options)
    assert says in str(error.value)


def test_a_budget_that_cannot_be_kept_is_refused_before_any_training() -> None:
    def train(model: nn.Module, step: pruning.Round) -> None:
        raise AssertionError("nothing may be trained")

    with pytest.raises(FxsparseError, match="the least that they take is"):
        fxsparse.prune(net(), 1e-6, images(2)[0], train=train, settings=MACS)


def test_early_and_file_want_training() -> None:
    with pytest.raises(FxsparseError, match="early and file are for pruning with training"):
        fxsparse.prune(net(), 0.5, images(2)[0], file="run.safetensors")
