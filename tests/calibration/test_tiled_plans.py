"""Plans for regions on CUDA, by times written by hand: on the CPU, where the operators' references stand in."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from models import masked_dense, random_masks
from torch import Tensor, nn

import fxsparse
from fxsparse import calibration, tiled_weights
from fxsparse.calibration.samples import BATCH_INNER, Samples
from fxsparse.calibration.whole_model import VANILLA, Verdict
from fxsparse.plan import PlanEntry

_VANILLA_MS = 2.0
_IMAGES = (8, 3, 12, 12)

pytestmark = pytest.mark.skipif(
    fxsparse.capabilities().cpu == "reference", reason="the compiled operators are not built"
)


class Net(nn.Module):
    """Two residual blocks; the sums are written in place, as torchvision does; with or without a classifier."""

    def __init__(self, classes: int = 0) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.first = nn.Conv2d(16, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.mean = nn.AdaptiveAvgPool2d(1)
        self.short = nn.Identity()
        self.relu = nn.ReLU(inplace=True)
        self.linear = nn.Linear(16, classes) if classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.stem(x)))
        out = self.first(x)
        out += self.short(x)
        x = self.relu(out)
        out = self.second(x)
        out += x
        return self.linear(self.mean(self.relu(out)).flatten(1))


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled_weights, "DEVICES", ("cpu",))


def calibrated(
    monkeypatch: pytest.MonkeyPatch, *, sparse_ms: float, move_ms: float, classes: int = 0
) -> tuple[Any, nn.Module, Tensor, dict[str, PlanEntry]]:
    """Calibrate with times written by hand; return the model, the dense one, an input, and what was tried.

    To move as many bytes as the images have takes `move_ms`.
    """
    model, x = Net(classes).eval(), torch.randn(_IMAGES)
    masks = random_masks(model)
    fast = fxsparse.convert(model, masks, example_inputs=(x,), settings=fxsparse.Settings(calibrate=False))
    tried: dict[str, PlanEntry] = {}
    measure = calibration.measure

    def written(*arguments: Any) -> Any:
        found = measure(*arguments)
        for (shape, dtype), samples in found.moves.items():
            assert set(samples.by_arm) == {"contiguous", "channels_last", BATCH_INNER}
            ms = move_ms * math.prod(shape) / math.prod(_IMAGES)
            found.moves[shape, dtype] = Samples({name: [ms] * 9 for name in samples.by_arm}, set(samples.by_arm))
        found.others.clear()
        for measured in found.sites.values():
            assert f"sparse blocks {BATCH_INNER}" in measured.candidates
            times = {name: sparse_ms if "sparse" in name else _VANILLA_MS for name in measured.candidates}
            measured.samples = Samples({name: [ms] * 9 for name, ms in times.items()}, set(times))
        return found

    def fastest(model: Any, inputs: Any, variants: dict[str, PlanEntry], *rest: Any, **options: Any) -> Verdict:
        tried.update(variants)
        return Verdict(next(iter(variants), VANILLA), 2.0, 1.0, 0.0)

    monkeypatch.setattr(calibration, "measure", written)
    monkeypatch.setattr(calibration, "fastest", fastest)
    fxsparse.calibrate(fast, (x,), budget_s=0.01)
    return fast, masked_dense(model, masks), x, tried


def paths(entry: PlanEntry) -> set[str]:
    return {plan.path for plan in entry.sites.values()}


def test_a_network_whose_convolutions_win_is_one_region(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, dense, x, tried = calibrated(monkeypatch, sparse_ms=1.5, move_ms=0.4)
    entry = tried["regions"]
    assert paths(entry) == {"sparse"} and {move.value for move in entry.moves} <= {"mean"}
    assert {plan.layout for plan in entry.sites.values()} == {"contiguous"}
    assert fast.code.count("torch.ops.fxsparse.region_batch_inner") == 1
    with torch.no_grad():
        assert torch.allclose(fast(x), dense(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("classes", "inside"), [(10, True), (65, False)])
def test_a_small_classifier_is_in_the_region(monkeypatch: pytest.MonkeyPatch, classes: int, inside: bool) -> None:
    fast, dense, x, tried = calibrated(monkeypatch, sparse_ms=1.5, move_ms=0.4, classes=classes)
    assert {move.value for move in tried["regions"].moves} == (set() if inside else {"mean"})
    assert fast.code.count("torch.ops.fxsparse.region_batch_inner") == 1
    assert ("linear(" not in fast.code) == inside
    with torch.no_grad():
        assert torch.allclose(fast(x), dense(x), rtol=1e-4, atol=1e-5)


def test_small_gains_do_not_pay_for_changes_of_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, dense, x, tried = calibrated(monkeypatch, sparse_ms=1.8, move_ms=3.0)
    assert "regions" not in tried and "region_batch_inner" not in fast.code
    assert "changes of memory layout" in str(fast.report)
    with torch.no_grad():
        assert torch.allclose(fast(x), dense(x), rtol=1e-4, atol=1e-5)


def test_one_site_of_a_model_can_be_calibrated() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Tanh(), nn.Conv2d(16, 16, 3)).eval(), torch.randn(8, 3, 9, 9)
    masks = random_masks(model)
    fast = fxsparse.convert(model, masks, example_inputs=(x,), settings=fxsparse.Settings(calibrate=False))
    fxsparse.calibrate(fast, (x,), budget_s=0.05, sites="2")
    measured = {row.name: row.sparse_ms for row in fast.report.rows}
    assert measured["0"] is None and measured["2"] is not None
    with torch.no_grad():
        assert torch.allclose(fast(x), masked_dense(model, masks)(x), rtol=1e-4, atol=1e-5)
