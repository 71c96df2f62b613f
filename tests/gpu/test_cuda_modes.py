"""Modes on CUDA: what TEST allows and finds there, BENCHMARK's rows, and the training round trip."""

from __future__ import annotations

import pytest
import torch
from models import random_masks, small_net
from torch import Tensor, nn

import fxsparse
from fxsparse import Mode, sites
from fxsparse.report import graphs_of

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["tf32", "ieee"])
def precision(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    # Not cudnn.conv.fp32_precision, which torch.export cannot stand: it reads this one.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", request.param == "tf32")
    assert (torch.backends.cudnn.conv.fp32_precision == "tf32") == (request.param == "tf32")
    return request.param


def pruned(channels: int, out: int, size: int, density: float, dtype: torch.dtype, bias: bool = True) -> nn.Module:
    conv = nn.Conv2d(channels, out, size, padding=size // 2, bias=bias)
    fast = fxsparse.convert(
        nn.Sequential(conv).eval().to("cuda", dtype), {"0": torch.rand(conv.weight.shape) < density}
    )
    (site,) = (s for gm in graphs_of(fast) for _, s in sites.conv_sites(gm))
    assert site.packed
    return fast


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("channels", "size"), [(16, 3), (256, 3), (2048, 3), (64, 5), (512, 1)])
@pytest.mark.parametrize("values", [torch.randn, torch.rand, torch.ones], ids=["normal", "positive", "constant"])
@pytest.mark.parametrize("tuned", [False, True])
def test_honest_kernels_pass(
    dtype: torch.dtype, channels: int, size: int, values, tuned: bool, precision: str, monkeypatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", tuned)
    fast = pruned(channels, 64, size, 0.1, dtype)
    fxsparse.set_mode(fast, Mode.TEST)
    for shape in ((1, channels, 14, 14), (8, channels, 28, 28)):
        x = values(shape, device="cuda", dtype=dtype)
        with torch.no_grad():
            fast(x)
            fast(x.to(memory_format=torch.channels_last))
            with torch.autocast("cuda", dtype=torch.float16):
                fast(x)


def test_images_with_a_bright_spot_on_black_pass(precision: str) -> None:
    fast = pruned(64, 64, 3, 0.1, torch.float32, bias=False)
    fxsparse.set_mode(fast, Mode.TEST)
    x = torch.zeros(16, 64, 56, 56, device="cuda")
    x[:, :, 20, 20] = 1e6
    with torch.no_grad():
        fast(x)


def test_lost_weights_are_found(precision: str) -> None:
    fast = pruned(256, 64, 3, 0.1, torch.float32)
    ((gm, site),) = [(gm, s) for gm in graphs_of(fast) for _, s in sites.conv_sites(gm)]
    fxsparse.set_mode(fast, Mode.TEST)
    values = sites.attribute(gm, site.packed_names[0])
    values[int((values.abs() - values[values != 0].abs().median()).abs().argmin())] = 0
    with torch.no_grad(), pytest.raises(fxsparse.FxsparseError, match="packed weight of '0'.*in 1 places") as caught:
        fast(torch.randn(8, 256, 28, 28, device="cuda"))
    if precision == "ieee":  # the rounding of TF32 may hide one weight in the outputs
        assert "sparse path of '0'" in str(caught.value)


def test_benchmark_prints_a_row_a_node(capsys: pytest.CaptureFixture[str]) -> None:
    model = small_net().cuda()
    fast = fxsparse.convert(model, random_masks(model))
    with torch.no_grad(), fxsparse.set_mode(fast, Mode.BENCHMARK):
        fast(torch.randn(2, 3, 32, 32, device="cuda"))
    assert len(capsys.readouterr().out.splitlines()) == 5


@pytest.mark.parametrize("rung", ["symbolic", "export", "modules"])
def test_the_training_round_trip(rung: str, precision: str) -> None:
    model = small_net().cuda()
    x, y = torch.randn(4, 3, 16, 16, device="cuda"), torch.arange(4, device="cuda")
    chosen = fxsparse.Settings(calibrate=False, capture=rung)
    fast = fxsparse.convert(model, random_masks(model), example_inputs=x, settings=chosen).train()
    optimizer = torch.optim.SGD(fast.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(fast(x), y).backward()
        optimizer.step()

    def weights() -> list[tuple[Tensor, Tensor]]:
        found = [(gm, s) for gm in graphs_of(fast) for _, s in sites.conv_sites(gm)]
        return [(sites.attribute(gm, s.weight), sites.attribute(gm, s.mask)) for gm, s in found]

    assert all(not weight[~mask].any() for weight, mask in weights())
    fast.eval()
    with torch.no_grad(), fxsparse.set_mode(fast, Mode.TEST):
        fast(x)
