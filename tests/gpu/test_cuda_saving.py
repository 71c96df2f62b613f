"""Saving on CUDA: a file loads where it was saved, on the CPU and back, and computes the same bits on each device."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from models import random_masks, small_net
from torch import Tensor, nn

import fxsparse
from fxsparse import sites

pytestmark = pytest.mark.gpu
QUICK = fxsparse.Settings(calibrate=False)


@pytest.fixture(autouse=True)
def _deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)


def fast_net(device: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = small_net().to(device, dtype)
    inputs = torch.randn(2, 3, 16, 16, device=device, dtype=dtype)
    return fxsparse.convert(model, random_masks(model), example_inputs=inputs, settings=QUICK)


def assert_same_bits(a: nn.Module, b: nn.Module, device: str, dtype: torch.dtype = torch.float32) -> None:
    x = torch.randn(3, 3, 10, 14, device=device, dtype=dtype)
    for path in ("vanilla", "sparse"):
        for model in (a, b):
            fxsparse.set_mode(model, path)
        with torch.no_grad():
            assert torch.equal(a(x), b(x)), path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_model_from_cuda_loads_there_again(dtype: torch.dtype, tmp_path: Path) -> None:
    fast = fast_net("cuda", dtype)
    fxsparse.save(fast, tmp_path / "m.pt2")
    loaded = fxsparse.load(tmp_path / "m.pt2")
    assert {str(tensor.device) for tensor in (*loaded.parameters(), *loaded.buffers())} == {"cuda:0"}
    assert loaded.report == fast.report
    assert_same_bits(fast, loaded, "cuda", dtype)


@pytest.mark.parametrize(("saved", "wanted"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_files_cross_between_devices(saved: str, wanted: str, tmp_path: Path) -> None:
    fast = fast_net(saved)
    fxsparse.save(fast, tmp_path / "m.pt2")
    loaded = fxsparse.load(tmp_path / "m.pt2", map_location=wanted)
    assert {tensor.device.type for tensor in (*loaded.parameters(), *loaded.buffers())} == {wanted}
    assert_same_bits(copy.deepcopy(fast).to(wanted), loaded, wanted)
    fxsparse.save(loaded, tmp_path / "back.pt2")
    assert_same_bits(fast, fxsparse.load(tmp_path / "back.pt2", map_location=saved), saved)


class MakesTensors(nn.Module):
    """Asks for its size in Python, so that export captures it with the device burnt in; one weight has two names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.first = nn.Linear(8, 4)
        self.second = nn.Linear(8, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] > 100:
            x = x[:, :, :100]
        x = self.conv(x)
        x = x * torch.arange(1, 9, device=x.device).view(8, 1, 1) + torch.ones(1).to(x.device)
        x = x.mean((2, 3))
        return self.first(x) + self.second(x)


@pytest.mark.parametrize("saved", ["cuda", "cpu"])
def test_devices_in_the_graph_and_tied_weights_move_too(saved: str, tmp_path: Path) -> None:
    model = MakesTensors().eval().to(saved)
    x = torch.randn(2, 3, 8, 8)
    fast = fxsparse.convert(model, random_masks(model), example_inputs=x.to(saved), settings=QUICK)
    assert fast.report.rung == "export"
    fxsparse.save(fast, tmp_path / "m.pt2")
    for device in ("cpu", "cuda"):
        loaded = fxsparse.load(tmp_path / "m.pt2", map_location=device)
        assert list(loaded.state_dict()) == list(fast.state_dict())
        # Capture by export keeps one name of the two in torch 2.11, and both later.
        assert len({id(tensor) for name, tensor in loaded.named_parameters() if tensor.shape == (4, 8)}) == 1
        with torch.no_grad():
            got = loaded(x.to(device))
            assert got.device.type == device
            if device == saved:
                assert torch.equal(fast(x.to(device)), got)


def test_a_frozen_calibrated_model_keeps_its_plan(tmp_path: Path) -> None:
    model = small_net().cuda()
    x = torch.randn(2, 3, 16, 16, device="cuda")
    fast = fxsparse.convert(model, random_masks(model), example_inputs=x, settings=fxsparse.Settings(budget_s=1.0))
    fxsparse.save(fast, tmp_path / "m.pt2")
    loaded = fxsparse.load(tmp_path / "m.pt2")
    assert loaded.plan.entries[0].sites == fast.plan.entries[0].sites
    assert [site.path for _, site in sites.conv_sites(loaded)] == [site.path for _, site in sites.conv_sites(fast)]
    with torch.no_grad():
        assert torch.equal(fast(x), loaded(x))
    fxsparse.freeze(fast)
    fxsparse.save(fast, tmp_path / "m.pt2")
    with torch.no_grad():
        assert torch.equal(fast(x), fxsparse.load(tmp_path / "m.pt2")(x))
