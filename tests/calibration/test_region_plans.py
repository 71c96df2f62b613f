"""Plans for regions: what is tried, and how, where convolutions and what stands between them run as one call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import random_masks
from torch import nn

import fxsparse
from fxsparse import calibration
from fxsparse.calibration.samples import Samples
from fxsparse.calibration.whole_model import VANILLA, Verdict
from fxsparse.plan import PlanEntry

_VANILLA_MS = 2.0


def variants(
    monkeypatch: pytest.MonkeyPatch, *, sparse_ms: float, vanilla_ms: float = _VANILLA_MS
) -> dict[str, PlanEntry]:
    """Calibrate convolution, pooling, convolution with times written by hand and return what the whole model tried.

    The pooling is slow in contiguous memory, and changes of layout cost next to nothing.
    """
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3)).eval()
    x = torch.randn(1, 3, 12, 12)
    fast = fxsparse.convert(
        model, random_masks(model), example_inputs=(x,), settings=fxsparse.Settings(calibrate=False, cache=False)
    )
    tried: dict[str, PlanEntry] = {}
    measure = calibration.measure

    def written(*arguments: Any) -> Any:
        found = measure(*arguments)
        for shape in found.moves:
            found.moves[shape] = _constant(contiguous=0.01, channels_last=0.01)
        for node in found.others:
            found.others[node] = _constant(contiguous=5.0, channels_last=0.1)
        for measured in found.sites.values():
            times = {name: sparse_ms if "sparse" in name else vanilla_ms for name in measured.candidates}
            measured.samples = Samples({name: [ms] * 9 for name, ms in times.items()}, set(times))
        return found

    def fastest(model: Any, inputs: Any, variants: dict[str, PlanEntry], *rest: Any, **options: Any) -> Verdict:
        tried.update(variants)
        return Verdict(next(iter(variants), VANILLA), 2.0, 1.0, 0.0)

    monkeypatch.setattr(calibration, "measure", written)
    monkeypatch.setattr(calibration, "fastest", fastest)
    fxsparse.calibrate(fast, (x,), budget_s=0.01)
    return tried


def _constant(**ms: float) -> Samples:
    return Samples({name: [time] * 9 for name, time in ms.items()}, set(ms))


def _paths(entry: PlanEntry) -> list[str]:
    return [plan.path for plan in entry.sites.values()]


def test_a_slow_pooling_changes_its_layout_but_not_within_a_region(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = variants(monkeypatch, sparse_ms=1.0)
    assert next(iter(tried)) == "regions"
    assert _paths(tried["regions"]) == ["sparse", "sparse"]
    assert not tried["regions"].moves
    assert "channels_last" in {move.layout for move in tried["sparse"].moves}


def test_a_sparse_path_may_be_slower_alone_where_it_lengthens_a_region(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = variants(monkeypatch, sparse_ms=1.2 * _VANILLA_MS)
    assert "regions" not in tried
    assert _paths(tried["long regions"]) == ["sparse", "sparse"]
    reasons = {plan.reason for plan in tried["long regions"].sites.values()}
    assert reasons == {"slower alone, but one call with the convolutions around it"}


def test_a_sparse_path_that_is_much_slower_stays_out(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = variants(monkeypatch, sparse_ms=1.6 * _VANILLA_MS)
    assert not any("sparse" in _paths(entry) for entry in tried.values())


def test_a_long_call_is_timed_in_fewer_variants(monkeypatch: pytest.MonkeyPatch) -> None:
    quick: list[bool] = []
    is_quick = calibration._Run._is_quick

    def noted(self: Any, found: Any) -> bool:
        quick.append(is_quick(self, found))
        return quick[-1]

    monkeypatch.setattr(calibration._Run, "_is_quick", noted)
    variants(monkeypatch, sparse_ms=1.0)
    long = variants(monkeypatch, sparse_ms=1.0, vanilla_ms=1000.0)
    assert quick == [True, False]
    assert not {"without margin", "first half", "second half"} & set(long)
