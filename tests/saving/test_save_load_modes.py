"""Modes through a file: what a site is in when it is saved it is in when it is loaded, and every mode works there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import random_masks, small_net
from torch import nn

import fxsparse
from fxsparse import calibration, sites
from fxsparse.calibration_mode import CalibratingHook
from fxsparse.sites import ConvSite

MODES = ("training", "vanilla", "sparse", "test", "benchmark", "calibration")


@pytest.fixture(autouse=True)
def quick_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let calibrations without a budget take the fewest samples: what they choose is not asserted."""
    for seconds in ("_SITE_S", "_LEAST_S", "_MOST_S", "_MODEL_S"):
        monkeypatch.setattr(calibration, seconds, 0.01)


def fast_net(**settings: object) -> nn.Module:
    model = small_net()
    quick = fxsparse.Settings(calibrate=False, **settings)
    return fxsparse.convert(model, random_masks(model), example_inputs=(2, 3, 12, 12), settings=quick)


def sites_of(model: nn.Module) -> list[ConvSite]:
    return [site for _, site in sites.conv_sites(model)]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_saved_and_can_be_set_after_loading(mode: str, tmp_path: Path) -> None:
    fast = fast_net()
    fxsparse.set_mode(fast, mode, sites="block.*")
    fxsparse.save(fast, tmp_path / "model.pt2")
    loaded = fxsparse.load(tmp_path / "model.pt2")
    assert sites_of(loaded) == sites_of(fast)
    x = torch.randn(3, 3, 10, 10)
    hooks = [type(hook) for hook in loaded._forward_pre_hooks.values()]
    assert hooks == ([CalibratingHook] if mode == "calibration" else [])
    if mode != "calibration":  # which would choose by the clock
        with torch.no_grad():
            assert torch.equal(loaded(x), fast(x))
    for other in MODES[:-1]:
        for model in (fast, loaded):
            fxsparse.set_mode(model, other)
        with torch.no_grad():
            assert torch.equal(loaded(x), fast(x))
        assert [site.mode for site in sites_of(loaded)] == [site.mode for site in sites_of(fast)]


def test_the_calibration_mode_measures_after_loading(tmp_path: Path) -> None:
    fast = fast_net()
    fxsparse.set_mode(fast, "calibration")
    fxsparse.save(fast, tmp_path / "model.pt2")
    loaded = fxsparse.load(tmp_path / "model.pt2")
    loaded(torch.randn(2, 3, 8, 8))
    assert len(loaded.plan.entries) == 1


def test_a_model_in_training_trains_on_after_loading(tmp_path: Path) -> None:
    fast = fast_net()
    fast.train()
    with torch.no_grad():
        fast.get_parameter("stem.0.weight").add_(0.5)  # as an optimizer would, while the packed values stay behind
    fxsparse.save(fast, tmp_path / "model.pt2")
    loaded = fxsparse.load(tmp_path / "model.pt2")
    assert loaded.training
    x = torch.randn(2, 3, 8, 8)
    grads = []
    for model in (fast, loaded):
        model.zero_grad()
        model(x).square().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert len(grads[0]) >= 8
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]), name
    for model in (fast, loaded):
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        model.eval()
    assert sites_of(loaded) == sites_of(fast)
    for path in ("vanilla", "sparse", "test"):
        for model in (fast, loaded):
            fxsparse.set_mode(model, path)
        with torch.no_grad():
            assert torch.equal(loaded(x), fast(x))


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.drop = nn.Dropout()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.conv(x))


def test_what_a_graph_holds_of_training_is_said_or_refused(tmp_path: Path) -> None:
    model = Dropping().eval()
    quick = fxsparse.Settings(calibrate=False)
    fast = fxsparse.convert(model, random_masks(model), example_inputs=(2, 3, 8, 8), settings=quick)
    fxsparse.save(fast, tmp_path / "model.pt2")
    loaded = fxsparse.load(tmp_path / "model.pt2")
    assert "Saved in evaluation mode: 'drop'" in str(loaded.report)
    fast.train()
    with pytest.raises(fxsparse.FxsparseError, match=r"'drop' \(Dropout\) computes otherwise.*model.eval\(\)"):
        fxsparse.save(fast, tmp_path / "model.pt2")


def test_sites_that_rules_left_out_and_unsupported_convolutions_keep_their_reasons(tmp_path: Path) -> None:
    model = nn.Sequential(small_net().stem, nn.ConvTranspose2d(16, 4, 2), nn.Conv2d(4, 4, 1)).eval()
    masks = {name: mask for name, mask in random_masks(model).items() if name == "0.0"}
    fast = fxsparse.convert(
        model, masks, example_inputs=(2, 3, 8, 8), settings=fxsparse.Settings(calibrate=False, exclude=("2",))
    )
    fxsparse.save(fast, tmp_path / "model.pt2")
    loaded = fxsparse.load(tmp_path / "model.pt2")
    assert loaded.report == fast.report
    assert "transposed convolution" in str(loaded.report)
    assert "left out by the include and exclude rules" in str(loaded.report)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(fast(x), loaded(x))
