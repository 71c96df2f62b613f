"""Calibration on CUDA: eager calls and replays of graphs, layouts, and plans that cross devices."""

from __future__ import annotations

import pytest
import torch
from models import error_in_float64, masked_dense, random_masks, small_net
from torch import nn

import fxsparse

pytestmark = pytest.mark.gpu
X = (4, 3, 16, 16)


@pytest.mark.parametrize("deploy", ["eager", "graph", "compiled"])
def test_a_model_calibrates_as_it_is_deployed(deploy: str) -> None:
    if deploy == "compiled":
        pytest.importorskip("triton")
    model = small_net().cuda()
    masks = random_masks(model)
    fast = fxsparse.convert(model, masks, example_inputs=X, settings=fxsparse.Settings(deploy=deploy, budget_s=8))
    (entry,) = fast.plan.entries
    assert entry.key.deploy == deploy
    assert entry.key.device == torch.cuda.get_device_name()
    assert all(row.vanilla_ms > 0 and row.sparse_ms > 0 and row.bound_ms > 0 for row in fast.report.rows)
    x = torch.randn(X, device="cuda")
    with torch.no_grad():
        assert error_in_float64(fast(x), masked_dense(model, masks), x) < 2e-3  # TF32 where cuDNN stays


def test_bfloat16_in_channels_last_calibrates_and_agrees() -> None:
    model = nn.Sequential(nn.Conv2d(16, 64, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(64, 32, 1)).eval()
    model = model.cuda().bfloat16().to(memory_format=torch.channels_last)
    masks = random_masks(model)
    x = torch.randn(8, 16, 12, 12, device="cuda", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    fast = fxsparse.convert(model, masks, example_inputs=x)
    assert fast.plan.entries[0].key.dtype == "bfloat16"
    with torch.no_grad():
        got = fast(x)
        assert got.stride() == model(x).stride()
        assert error_in_float64(got, masked_dense(model, masks), x) < 2e-2


def test_a_plan_of_the_cpu_is_followed_on_cuda_with_a_warning() -> None:
    model = small_net()
    masks = random_masks(model)
    plan = fxsparse.convert(model, masks, example_inputs=X).plan
    fast = fxsparse.convert(model.cuda(), masks, settings=fxsparse.Settings(calibrate=False))
    fxsparse.calibrate(fast, X, plan=plan, deterministic=True)
    assert "and is used on 'NVIDIA" in str(fast.report)
    x = torch.randn(X, device="cuda")
    dense = masked_dense(model, {name: mask.cuda() for name, mask in masks.items()})
    with torch.no_grad():
        assert error_in_float64(fast(x), dense, x) < 2e-3


def test_calibrating_on_a_side_stream_works_there() -> None:
    model = small_net().cuda()
    masks = random_masks(model)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        fast = fxsparse.convert(model, masks, example_inputs=X)
        x = torch.randn(X, device="cuda")
        with torch.no_grad():
            got = fast(x)
    stream.synchronize()
    assert error_in_float64(got, masked_dense(model, masks), x) < 2e-3
