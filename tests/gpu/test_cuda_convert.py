"""The whole road on CUDA: capture, calibration by events, every path, autocast and CUDA graphs."""

from __future__ import annotations

import copy

import pytest
import torch
from models import error_in_float64, masked_dense, random_masks, small_net

import fxsparse
from fxsparse import sites
from fxsparse.report import graphs_of

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("exact_float32")]


@pytest.mark.parametrize("rung", ["symbolic", "export", "modules"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_converted_model_agrees_on_both_paths(rung: str, dtype: torch.dtype) -> None:
    model = small_net().to("cuda", dtype)
    masks = random_masks(model)
    x = torch.randn(3, 3, 17, 18, device="cuda", dtype=dtype)
    fast = fxsparse.convert(model, masks, example_inputs=x, settings=fxsparse.Settings(capture=rung))
    assert all(row.vanilla_ms and row.sparse_ms for row in fast.report.rows)
    dense = masked_dense(model, masks)
    for path in ("sparse", "vanilla"):
        for gm in graphs_of(fast):
            for node, _ in sites.conv_sites(gm):
                sites.set_path(gm, node, path)
            gm.recompile()
        with torch.no_grad():
            assert error_in_float64(fast(x), dense, x) < 16 * torch.finfo(dtype).eps


def test_a_converted_model_replays_in_a_cuda_graph() -> None:
    model = small_net().cuda()
    fast = fxsparse.convert(model, random_masks(model))
    assert fast.report.sparse == 4
    x = torch.randn(2, 3, 16, 16, device="cuda")
    with torch.no_grad():
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(3):
                fast(x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = fast(x)
        for _ in range(20):
            x.copy_(torch.randn_like(x))
            graph.replay()
            assert torch.equal(out, fast(x))


def test_autocast_gives_the_dtype_of_the_region() -> None:
    model = small_net().cuda()
    masks = random_masks(model)
    fast = fxsparse.convert(model, masks)
    x = torch.randn(2, 3, 16, 16, device="cuda")
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
        got = fast(x)
    assert got.dtype == torch.bfloat16
    assert error_in_float64(got, masked_dense(model, masks), x) < 16 * torch.finfo(torch.bfloat16).eps


def test_a_model_converted_on_cpu_moves_to_cuda() -> None:
    model = small_net()
    masks = random_masks(model)
    fast = fxsparse.convert(model, masks)
    moved = copy.deepcopy(fast).cuda()
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.allclose(moved(x.cuda()).cpu(), fast(x), atol=1e-4)


def test_inputs_on_another_device_than_the_model_are_refused() -> None:
    with pytest.raises(fxsparse.FxsparseError, match="Example input '0' is on cpu; the model is on cuda:0"):
        fxsparse.convert(small_net().cuda(), example_inputs=torch.randn(1, 3, 8, 8))
