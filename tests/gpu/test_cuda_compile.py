"""torch.compile on CUDA, both ways: of a converted model, and of a model with the backend "fxsparse"."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import error_in_float64, masked_dense, random_masks, small_net
from torch import Tensor, nn

import fxsparse
from fxsparse import Settings, dynamo

pytestmark = pytest.mark.gpu

TOLERANCE = 1e-5
ESTIMATED = Settings(calibrate=False)


@pytest.fixture(autouse=True)
def _fresh_dynamo(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def pruned_net() -> nn.Module:
    model = small_net()
    return masked_dense(model, random_masks(model, 0.05)).cuda()


def batch(size: int = 2, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    return torch.randn(size, 3, 16, 16, device="cuda").to(memory_format=layout)


def call(fast: Any, x: Tensor) -> Tensor:
    """Call a compiled model; a replayed CUDA graph writes every output to the same memory."""
    torch.compiler.cudagraph_mark_step_begin()
    with torch.no_grad():
        return fast(x).clone()


def assert_right(fast: Any, model: nn.Module, x: Tensor | None = None, tolerance: float = TOLERANCE) -> None:
    x = batch() if x is None else x
    error = error_in_float64(call(fast, x), model, x)
    assert error < tolerance, error


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_converted_model_compiles_in_each_mode(mode: str | None, layout: torch.memory_format) -> None:
    model = pruned_net()
    gm = fxsparse.convert(model, settings=ESTIMATED)
    fast = torch.compile(gm, mode=mode, fullgraph=True)
    for path in ("sparse", "vanilla", "sparse"):
        fxsparse.set_mode(gm, path)
        for size in (2, 2, 2, 5, 5, 5):  # warm up, record, replay
            assert_right(fast, model, batch(size, layout))


def test_a_converted_model_trains_and_evaluates_on_the_new_weights() -> None:
    gm = fxsparse.convert(pruned_net(), settings=ESTIMATED)
    fxsparse.set_mode(gm, "sparse")
    fast = torch.compile(gm, mode="reduce-overhead", fullgraph=True)
    x = batch(4)
    before = [call(fast, x) for _ in range(3)][-1]
    gm.train()
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.05)
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        optimizer.zero_grad()
        fast(x).square().sum().backward()
        optimizer.step()
    gm.eval()
    after = call(fast, x)
    with torch.no_grad():
        torch.testing.assert_close(after, gm(x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(after, before)


@pytest.mark.parametrize("options", [{"inner": "eager"}, {}, {"inner_mode": "reduce-overhead"}])
def test_the_backend_follows_the_weights(options: dict[str, Any]) -> None:
    model = pruned_net()
    fast = torch.compile(model, backend="fxsparse", options={"settings": ESTIMATED, **options})
    for _ in range(4):
        assert_right(fast, model)
    with torch.no_grad():
        for change in (
            lambda p: p.mul_(-1.5),
            lambda p: p.copy_(p * 2),
            lambda p: setattr(p, "data", p.data * 0.5),
        ):
            for p in model.parameters():
                change(p)
            for _ in range(3):
                assert_right(fast, model)
    model.load_state_dict({k: v * 2 if v.dim() == 4 else v for k, v in model.state_dict().items()})
    assert_right(fast, model)
    assert [report.sparse for report in dynamo.reports(fast)] == [4]
    with torch.no_grad():
        model.block["conv1"].weight.add_(0.1)
    for _ in range(3):
        assert_right(fast, model)
    assert [report.sparse for report in dynamo.reports(fast)] == [0]


def test_the_mode_of_torch_compile_is_inductors() -> None:
    model = pruned_net()
    fast = torch.compile(model, backend="fxsparse", mode="reduce-overhead")
    for _ in range(4):
        assert_right(fast, model)
    (report,) = dynamo.reports(fast)
    assert report.model_ms is not None
    assert "device" in report.environment


def test_dynamic_shapes_with_numbers_as_inputs() -> None:
    model = pruned_net()
    settings = Settings(budget_s=0.5)
    fast = torch.compile(model, backend="fxsparse", dynamic=True, options={"inner": "eager", "settings": settings})
    for size in (2, 5, 3):
        assert_right(fast, model, batch(size))
    assert len(dynamo.reports(fast)) == 1


@pytest.mark.parametrize("context", [torch.inference_mode, lambda: torch.autocast("cuda", torch.float16)])
def test_inference_mode_and_autocast(context: Any) -> None:
    model = pruned_net()
    fast = torch.compile(model, backend="fxsparse", options={"settings": ESTIMATED})
    x = batch()
    with torch.no_grad(), context():
        y, expected = fast(x).clone(), model(x).clone()
    assert y.dtype == expected.dtype
    assert error_in_float64(y, model, x) < (TOLERANCE if y.dtype == torch.float32 else 0.02)
    assert dynamo.reports(fast)[0].sparse == 4


def test_masks_on_the_cpu_serve_a_model_on_cuda() -> None:
    model = small_net()
    masks = random_masks(model, 0.05)
    dense = masked_dense(model, masks).cuda()
    fast = torch.compile(model.cuda(), backend="fxsparse", options={"masks": masks, "settings": ESTIMATED})
    assert_right(fast, dense)
    fast(batch()).square().sum().backward()
    assert not model.stem[0].weight.grad[~masks["stem.0"].cuda()].any()


def test_a_model_that_moves_to_cuda_compiles_again() -> None:
    model = pruned_net().cpu()
    fast = torch.compile(model, backend="fxsparse", options={"inner": "eager", "settings": Settings(budget_s=0.3)})
    with torch.no_grad():
        fast(torch.randn(2, 3, 16, 16))
    model.cuda()
    assert_right(fast, model)
    first, second = dynamo.reports(fast)[-2:]
    assert first.environment["device"] != second.environment["device"]


def test_weights_that_change_between_streams_are_packed_before_either_reads_them() -> None:
    model = pruned_net()
    fast = torch.compile(model, backend="fxsparse", options={"inner": "eager", "settings": ESTIMATED})
    x = batch()
    assert_right(fast, model, x)
    streams = [torch.cuda.Stream() for _ in range(4)]
    for factor in (2.0, -0.5, 3.0):
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(factor)
        torch.cuda.synchronize()
        found = []
        for stream in streams:
            with torch.cuda.stream(stream), torch.no_grad():
                found.append(fast(x))
        torch.cuda.synchronize()
        for y in found:
            assert error_in_float64(y, model, x) < TOLERANCE
