"""save_weights and load_weights on CUDA, and between it and the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import random_masks, small_net

import fxsparse

pytestmark = pytest.mark.gpu

X = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)


@pytest.mark.parametrize("rung", ["symbolic", "modules"])
@pytest.mark.parametrize("frozen", [False, True])
def test_weights_come_back_on_the_device_of_the_plain_model(rung: str, frozen: bool, tmp_path: Path) -> None:
    model = small_net().cuda()
    settings = fxsparse.Settings(capture=rung, calibrate=False)
    fast = fxsparse.convert(model, random_masks(model), example_inputs=X.cuda(), settings=settings)
    fxsparse.set_mode(fast, "sparse")
    if frozen:
        fxsparse.freeze(fast)
    fxsparse.save_weights(fast, tmp_path / "cuda")
    loaded = fxsparse.load_weights(tmp_path / "cuda", small_net().cuda())
    assert torch.equal(loaded(X.cuda()), fast(X.cuda()))
    assert fxsparse.saving.info(tmp_path / "cuda").device == "cuda:0"

    on_cpu = fxsparse.load_weights(tmp_path / "cuda", small_net())
    assert {tensor.device.type for tensor in on_cpu.state_dict().values()} == {"cpu"}
    assert torch.equal(on_cpu(X), fast.cpu()(X))
    fxsparse.save_weights(on_cpu, tmp_path / "cpu")
    again = fxsparse.load_weights(tmp_path / "cpu", small_net().cuda())
    assert torch.equal(again(X.cuda()), loaded(X.cuda()))
