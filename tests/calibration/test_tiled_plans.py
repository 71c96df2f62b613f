"""Plans for regions on CUDA, by times written by hand: on the CPU, where the operators' references stand in."""

from __future__ import annotations

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

pytestmark = pytest.mark.skipif(
    fxsparse.capabilities().cpu == "reference", reason="the compiled operators are not built"
)


class Net(nn.Module):
    """Two residual blocks; the sums are written in place, as torchvision does."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.first = nn.Conv2d(16, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.mean = nn.AdaptiveAvgPool2d(1)
        self.short = nn.Identity()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.stem(x)))
        out = self.first(x)
        out += self.short(x)
        x = self.relu(out)
        out = self.second(x)
        out += x
        return self.mean(self.relu(out)).flatten(1)


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled_weights, "DEVICES", ("cpu",))


def calibrated(
    monkeypatch: pytest.MonkeyPatch, *, sparse_ms: float, move_ms: float
) -> tuple[Any, nn.Module, Tensor, dict[str, PlanEntry]]:
    """Calibrate with times written by hand; return the model, the dense one, an input, and what was tried."""
    model, x = Net().eval(), torch.randn(8, 3, 12, 12)
    masks = random_masks(model)
    fast = fxsparse.convert(model, masks, example_inputs=(x,), settings=fxsparse.Settings(calibrate=False))
    tried: dict[str, PlanEntry] = {}
    measure = calibration.measure

    def written(*arguments: Any) -> Any:
        found = measure(*arguments)
        for shape, samples in found.moves.items():
            assert set(samples.by_arm) == {"contiguous", "channels_last", BATCH_INNER}
            found.moves[shape] = Samples({name: [move_ms] * 9 for name in samples.by_arm}, set(samples.by_arm))
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


def test_a_network_whose_convolutions_win_is_one_region_without_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, dense, x, tried = calibrated(monkeypatch, sparse_ms=1.5, move_ms=0.4)
    entry = tried["regions"]
    assert paths(entry) == {"sparse"} and not entry.moves
    assert {plan.layout for plan in entry.sites.values()} == {"contiguous"}
    assert fast.code.count("torch.ops.fxsparse.region_batch_inner") == 1
    with torch.no_grad():
        assert torch.allclose(fast(x), dense(x), rtol=1e-4, atol=1e-5)


def test_small_gains_do_not_pay_for_changes_of_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, dense, x, tried = calibrated(monkeypatch, sparse_ms=1.8, move_ms=3.0)
    assert "regions" not in tried and "region_batch_inner" not in fast.code
    assert "changes of memory layout" in str(fast.report)
    with torch.no_grad():
        assert torch.allclose(fast(x), dense(x), rtol=1e-4, atol=1e-5)


def test_a_site_alone_pays_for_two_changes_of_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Tanh(), nn.Conv2d(16, 16, 3)).eval(), torch.randn(8, 3, 9, 9)
    fast = fxsparse.convert(
        model, random_masks(model), example_inputs=(x,), settings=fxsparse.Settings(calibrate=False)
    )
    fxsparse.calibrate(fast, (x,), budget_s=0.05, sites="2")
    assert {row.name: row.path for row in fast.report.rows}["0"] == "vanilla"
