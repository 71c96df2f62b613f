"""`fxsparse.calibrate` as a user calls it, on the real clock; what it decides is for the benchmarks to judge."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import error_in_float64, masked_dense, random_masks, small_net
from torch import Tensor, nn

import fxsparse
from fxsparse import calibration, sites, timing
from fxsparse.calibration.applying import keyed
from fxsparse.calibration.whole_model import VANILLA, Verdict

X = (2, 3, 12, 12)


def uncalibrated(model: nn.Module, masks: object = None) -> nn.Module:
    return fxsparse.convert(model, masks, settings=fxsparse.Settings(calibrate=False))


def test_every_site_gets_times_intervals_and_a_bound() -> None:
    model = small_net()
    fast = fxsparse.convert(model, random_masks(model), example_inputs=X)
    for row in fast.report.rows:
        assert row.vanilla_ms > 0 and row.sparse_ms > 0 and row.bound_ms > 0
        assert row.vanilla_ci[0] <= row.vanilla_ms <= row.vanilla_ci[1]
        assert row.sparse_ci[0] <= row.sparse_ms <= row.sparse_ci[1]
        assert row.layout in ("contiguous", "channels_last")
        assert row.macs > 0 and row.sparse_macs > 0 and row.vanilla_bytes > 0 and row.sparse_bytes > 0
    assert fast.report.model_vanilla_ms > 0
    assert fast.report.environment["torch"] == torch.__version__


def test_the_plan_and_the_report_survive_a_deepcopy() -> None:
    model = small_net()
    fast = fxsparse.convert(model, random_masks(model), example_inputs=X)
    other = copy.deepcopy(fast)
    assert other.plan == fast.plan
    assert other.report == fast.report
    x = torch.randn(X)
    with torch.no_grad():
        assert torch.equal(fast(x), other(x))


def test_the_multiply_adds_are_those_of_the_shapes_seen() -> None:
    model = nn.Sequential(nn.Conv2d(8, 32, 3, stride=2, padding=1, groups=2)).eval()
    mask = torch.zeros(32, 4, 3, 3, dtype=torch.bool)
    mask[:16, 0, 0, :2] = True
    report = fxsparse.explain(model, {"0": mask}, example_inputs=(5, 8, 9, 9))
    row = report.row("0")
    assert (row.input_shape, row.macs) == ((5, 8, 9, 9), 5 * 25 * 32 * 4 * 9)
    assert row.sparse_macs == 5 * 25 * 16 * 2
    assert (row.vanilla_bytes, row.sparse_ms) == (32 * 4 * 9 * 4, None)
    assert "not measured" in str(report)


def test_explain_gives_the_table_of_convert() -> None:
    model = small_net()
    masks = random_masks(model)
    report = fxsparse.explain(model, masks)
    assert str(report) == str(uncalibrated(model, masks).report)
    assert not hasattr(model, "report")


def test_a_model_that_does_not_gain_goes_back_to_vanilla_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing_gained(*args: object, **options: object) -> Verdict:
        return Verdict(VANILLA, 1.0, 1.0, 0.0)

    monkeypatch.setattr(calibration, "fastest", nothing_gained)
    model = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1)).eval()
    masks = {"0": torch.rand(64, 64, 3, 3) < 0.02}
    fast = fxsparse.convert(model, masks, example_inputs=(1, 64, 32, 32))
    row = fast.report.row("0")
    assert row.path == "vanilla"
    assert row.reason == "wins alone, but the whole model was not faster"
    assert fast.report.model_ms == fast.report.model_vanilla_ms


def test_a_scattering_clock_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing.Timings, "spread", lambda self, name: 0.6)
    model = small_net()
    fast = fxsparse.convert(model, random_masks(model), example_inputs=X)
    assert "calibrate again on a quiet machine" in str(fast.report)
    assert any("quiet machine" in note for note in fast.plan.entries[0].notes)


def test_what_the_inputs_do_not_reach_stays_vanilla() -> None:
    class Dead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3)

        def forward(self, x: Tensor, deep: bool = True) -> Tensor:
            return self.b(self.a(x)) if deep else self.a(x)

    model = Dead().eval()
    masks = random_masks(model)
    fast = fxsparse.convert(
        model, masks, example_inputs={"x": torch.randn(1, 3, 9, 9), "deep": False}, settings=settings_of("modules")
    )
    assert fast.report.row("b").reason == "the example inputs do not reach it"
    assert fast.report.row("b").path == "vanilla"
    x = torch.randn(1, 3, 9, 9)
    with torch.no_grad():
        assert error_in_float64(fast(x), masked_dense(model, masks), x) < 1e-6


def settings_of(rung: str) -> fxsparse.Settings:
    return fxsparse.Settings(capture=rung)


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (3, 8, 8)])
def test_an_empty_batch_and_a_single_image_calibrate(shape: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3)).eval()
    masks = random_masks(model)
    fast = fxsparse.convert(model, masks, example_inputs=shape)
    with torch.no_grad():
        assert torch.allclose(fast(torch.ones(shape)), masked_dense(model, masks)(torch.ones(shape)), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_calibrate_and_are_in_the_key(dtype: torch.dtype) -> None:
    model = small_net().to(dtype)
    fast = fxsparse.convert(model, random_masks(model), example_inputs=X)
    assert fast.plan.entries[0].key.dtype == str(dtype).removeprefix("torch.")


def test_autocast_is_measured_as_it_runs() -> None:
    model = small_net()
    fast = uncalibrated(model, random_masks(model))
    with torch.autocast("cpu", torch.bfloat16):
        fxsparse.calibrate(fast, X)
    assert fast.plan.entries[0].key.dtype == "bfloat16"


def test_a_model_runs_as_compiled_where_that_is_how_it_is_deployed() -> None:
    model = nn.Sequential(nn.Conv2d(16, 32, 3)).eval()
    fast = fxsparse.convert(
        model,
        {"0": torch.rand(32, 16, 3, 3) < 0.05},
        example_inputs=(1, 16, 10, 10),
        settings=fxsparse.Settings(deploy="compiled", budget_s=2),
    )
    assert fast.plan.entries[0].key.deploy == "compiled"
    assert fast.report.model_vanilla_ms > 0


def test_calibrating_twice_replaces_the_entry() -> None:
    model = small_net()
    fast = fxsparse.convert(model, random_masks(model), example_inputs=X)
    fxsparse.calibrate(fast, X, budget_s=1)
    assert len(fast.plan.entries) == 1


def test_a_second_call_of_a_module_has_its_own_place_in_the_plan() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(torch.relu(self.conv(x)))

    model = Twice().eval()
    fast = fxsparse.convert(model, {"conv": torch.rand(8, 8, 3, 3) < 0.1}, example_inputs=(1, 8, 6, 6))
    assert [key for key, _, _ in keyed(fast)] == ["conv", "conv#2"] == list(fast.plan.entries[0].sites)


def test_what_is_wrong_is_said() -> None:
    model = small_net()
    fast = uncalibrated(model, random_masks(model))
    with pytest.raises(fxsparse.FxsparseError, match="needs example inputs"):
        fxsparse.calibrate(fast, None)
    with pytest.raises(fxsparse.FxsparseError, match="was not converted"):
        fxsparse.calibrate(model, X)
    with pytest.raises(fxsparse.FxsparseError, match="'graph' needs CUDA"):
        fxsparse.calibrate(fast, X, deploy="graph")
    with pytest.raises(fxsparse.FxsparseError, match=r"deploy='fast'.*eager, compiled, graph"):
        fxsparse.calibrate(fast, X, deploy="fast")
    with pytest.raises(fxsparse.FxsparseError, match="no entr"):
        fxsparse.calibrate(fast, X, deterministic=True)
    with pytest.raises(fxsparse.FxsparseError, match="frozen"):
        fxsparse.calibrate(fxsparse.freeze(copy.deepcopy(fast)), X)
    for bad in ({"budget_s": 0}, {"deploy": "x"}):
        with pytest.raises(fxsparse.FxsparseError):
            fxsparse.Settings(**bad)


def test_a_plan_of_another_model_is_followed_as_far_as_it_goes_and_the_rest_is_said() -> None:
    model = small_net()
    plan = fxsparse.convert(model, random_masks(model), example_inputs=X).plan
    other = uncalibrated(nn.Sequential(nn.Conv2d(3, 8, 3)).eval())
    fxsparse.calibrate(other, X, plan=plan, deterministic=True)
    assert "does not know the convolution '0'" in str(other.report)


def test_a_plan_that_wants_a_packed_weight_where_there_is_none_leaves_the_site_vanilla() -> None:
    model = small_net()
    masks = random_masks(model)
    entry = fxsparse.convert(model, masks, example_inputs=X).plan.entries[0]
    everything_sparse = {
        key: fxsparse.plan.SitePlan("sparse", packing=site.packing) for key, site in entry.sites.items()
    }
    plan = fxsparse.Plan((fxsparse.plan.PlanEntry(entry.key, everything_sparse),))
    dense = uncalibrated(small_net())
    fxsparse.calibrate(dense, X, plan=plan)
    assert dense.report.sparse == 0
    assert "here it has no packed weight: no zeros in the weight" in str(dense.report)


def test_disagreeing_paths_are_an_error_that_names_the_convolution() -> None:
    model = small_net()
    fast = uncalibrated(model, random_masks(model))
    node, site = next(sites.conv_sites(fast))
    sites.attribute(fast, site.packed_names[0]).mul_(1.5)
    with pytest.raises(fxsparse.FxsparseError, match=r"sparse path of 'stem.0' differs.*exclude=\('stem.0',\)"):
        fxsparse.calibrate(fast, torch.randn(X))


_RANK = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, {tests!r})
import fxsparse
from fxsparse import timing
from models import random_masks, small_net
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://{store}", rank=rank, world_size=2)
torch.manual_seed(0)
model = small_net()
masks = random_masks(model)
if rank:
    def refuse(*args, **kwargs):
        raise AssertionError("rank 1 measured")
    timing.interleaved = refuse
try:
    if {fail} and not rank:
        timing.interleaved = None
    fast = fxsparse.convert(model, masks, example_inputs=(2, 3, 12, 12))
    x = torch.arange(2.0 * 3 * 12 * 12).reshape(2, 3, 12, 12) / 100
    print(fast.plan.to_json())
    open({out!r} + str(rank), "w").write(fast.plan.to_json() + fast.code)
except Exception as error:
    open({out!r} + str(rank), "w").write(type(error).__name__ + ": " + str(error))
dist.destroy_process_group()
"""


@pytest.mark.parametrize("fail", [False, True])
def test_two_ranks_hold_one_plan_that_rank_0_measured(tmp_path: Path, fail: bool) -> None:
    code = _RANK.format(
        tests=str(Path(__file__).parent.parent), store=tmp_path / "store", out=str(tmp_path / "out"), fail=fail
    )
    ranks = [subprocess.Popen([sys.executable, "-c", code, str(rank)], stdout=subprocess.DEVNULL) for rank in (0, 1)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    zero, one = ((tmp_path / f"out{rank}").read_text() for rank in (0, 1))
    if fail:
        assert zero.startswith("TypeError")
        assert one.startswith("FxsparseError: Rank 0 could not make the plan: TypeError")
    else:
        assert zero == one
        assert json.loads(zero[: zero.index("\n}") + 2])["entries"]
