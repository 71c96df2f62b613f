"""torch.compile(model, backend="fxsparse"): masks, names, graphs, inner backends, reports."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from compiling import ESTIMATED, TOLERANCE, Inner, assert_right, compiled, only_report, pruned_net, sparse_sites
from models import error_in_float64, masked_dense, random_masks, small_net
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from fxsparse import Settings, dynamo
from fxsparse.calibration import calibrate


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch.compiler.reset()


class Block(nn.Module):
    """A convolution after which Dynamo breaks the graph."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        torch._dynamo.graph_break()
        return torch.relu(x)


class Broken(nn.Module):
    """Blocks of one class with a graph break in each."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(3), Block(8), Block(8)])
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](x)  # not in a loop: Dynamo leaves a frame alone that breaks in one
        x = self.blocks[1](x)
        return self.last(self.blocks[2](x))


def test_the_entry_point_is_registered() -> None:
    assert "fxsparse" in torch._dynamo.list_backends()
    assert torch._dynamo.lookup_backend("fxsparse") is dynamo.backend


def test_zeros_of_the_weights_are_the_masks() -> None:
    model, inner = pruned_net(), Inner()
    fast = compiled(model, inner)
    assert_right(fast, model)
    assert inner.sparse() == [4]
    report = only_report(fast)
    assert [row.name for row in report.rows] == ["stem.0", "block.conv1", "block.conv2", "block.short"]
    assert all(row.path == "sparse" and row.density is not None and row.density < 0.15 for row in report.rows)
    assert all("not measured" in row.reason and "calibrate(" not in row.reason for row in report.rows)
    assert report.row("block.conv1").input_shape == (2, 16, 16, 16)
    assert "Batch norms are not folded" in str(report)
    assert report.rung == "dynamo"


@pytest.mark.parametrize("form", ["module", "parameter", "buffer", "blocks"])
def test_given_masks_are_written_into_the_graph_and_not_into_the_model(form: str) -> None:
    model = small_net()
    masks = random_masks(model, 0.05)
    ending = {"module": "", "parameter": ".weight", "buffer": ".weight_mask", "blocks": ""}[form]
    given = {name + ending: mask.float() for name, mask in masks.items()}
    if form == "blocks":
        given["stem.0"] = [([0, 1, 2], [0, 5, 26]), ([9, 4], [3])]
        masks["stem.0"] = torch.zeros(16, 27, dtype=torch.bool)
        masks["stem.0"][:3, [0, 5, 26]] = masks["stem.0"][[9, 4], 3] = True
        masks["stem.0"] = masks["stem.0"].reshape(16, 3, 3, 3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    inner = Inner()
    fast = compiled(model, inner, masks=given)
    assert_right(fast, masked_dense(model, masks))
    assert inner.sparse() == [4]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert "a convolution that Dynamo leaves out of its graphs computes with them" in str(only_report(fast))


def test_vanilla_sites_are_masked_too() -> None:
    model = small_net()
    masks = random_masks(model, 0.9)  # too dense to gain
    masks["block.conv1"] = torch.rand_like(model.block["conv1"].weight) < 0.05
    fast = compiled(model, masks=masks)
    assert_right(fast, masked_dense(model, masks))
    assert sparse_sites(fast) == [1]


def test_pruning_in_the_forward_pre_hook_is_recognised() -> None:
    model = small_net()
    for conv in (model.stem[0], model.block["conv1"], model.block["short"]):
        prune.random_unstructured(conv, "weight", 0.95)
    with torch.no_grad():
        model.block["short"].weight_orig[model.block["short"].weight_mask == 0] = 7.0
    inner = Inner()
    fast = compiled(model, inner)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = model.double()(x.double())
        model.float()
        torch.testing.assert_close(fast(x).double(), expected, rtol=1e-5, atol=1e-5)
    assert inner.sparse() == [3]
    report = only_report(fast)
    assert [row.name for row in report.rows] == ["stem.0", "block.conv1", "block.conv2", "block.short"]
    assert report.row("block.conv2").reason == "no zeros in the weight"
    with torch.no_grad():
        model.stem[0].weight_orig.mul_(-3)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
        model.stem[0].weight_mask[3:7] = 0
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    assert inner.count == 1
    prune.custom_from_mask(model.stem[0], "weight", torch.rand_like(model.stem[0].weight) < 0.5)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_pruned_bias_keeps_its_convolution_vanilla_and_says_why() -> None:
    model = pruned_net()
    prune.random_unstructured(model.block["short"], "bias", 0.5)
    fast = compiled(model)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    report = only_report(fast)
    assert report.sparse == 3
    assert [row.reason for row in report.rows if row.path == "vanilla"] == ["its bias is computed at every call"]


def test_one_weight_of_two_convolutions_is_packed_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            wide = F.conv2d(x, self.conv.weight * 2, padding=2, dilation=2)
            return self.conv(torch.relu(self.conv(x))) + wide

    model, inner = Twice(), Inner()
    model.conv.weight.data.masked_fill_(torch.rand_like(model.conv.weight) > 0.05, 0)
    fast = compiled(model, inner)
    x = torch.randn(2, 8, 16, 16)
    assert_right(fast, model, x)
    assert inner.sparse() == [3]
    assert len(list(inner.graphs[0].buffers())) == 2 * 4
    with torch.no_grad():
        model.conv.weight.mul_(3)
    assert_right(fast, model, x)


class Masked(nn.Module):
    """A parametrization by a mask."""

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.register_buffer("kept", torch.rand_like(like) < 0.05)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.kept


def test_parametrizations_are_packed_by_what_they_compute() -> None:
    model, inner = small_net(), Inner()
    conv = model.block["conv1"]
    parametrize.register_parametrization(conv, "weight", Masked(conv.weight))
    fast = compiled(model, inner)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
        assert inner.sparse() == [1]
        conv.parametrizations.weight.original.mul_(2)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    assert inner.count == 1
    assert only_report(fast).row("block.conv1").path == "sparse"


def test_each_graph_between_breaks_is_converted_on_its_own() -> None:
    model, inner = Broken().eval(), Inner()
    masks = random_masks(model, 0.05)
    fast = compiled(model, inner, masks=masks, settings=Settings(calibrate=False, exclude=("blocks.1.conv",)))
    dense = masked_dense(model, masks)
    for _ in range(2):
        assert_right(fast, dense)
    reports = dynamo.reports(fast)
    names = [row.name for report in reports for row in report.rows]
    assert names == ["blocks.0.conv", "blocks.1.conv", "blocks.2.conv", "last"]
    paths = {row.name: row.path for report in reports for row in report.rows}
    assert paths == {**dict.fromkeys(names, "sparse"), "blocks.1.conv": "vanilla"}
    count = inner.count
    assert_right(fast, dense)
    assert inner.count == count


def test_a_function_and_an_in_place_compiled_model_work_too() -> None:
    model = pruned_net()

    def twice(x: Tensor) -> Tensor:
        return model(x) * 2

    fast = compiled(twice)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x) * 2, rtol=1e-4, atol=1e-5)
    assert sparse_sites(None)[-1] == 4
    assert sparse_sites(model) == [4]
    other = pruned_net()
    dense = masked_dense(other, {})
    other.compile(backend="fxsparse", options={"inner": "eager", "settings": ESTIMATED})
    assert_right(other, dense)
    assert sparse_sites(other) == [4]


def test_dynamic_batches_compile_and_calibrate_once(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def counted(model, inputs, **kwargs):
        measured.append(kwargs["deterministic"])
        return calibrate(model, inputs, **kwargs)

    monkeypatch.setattr("fxsparse.dynamo.conversion.calibrate", counted)
    model, inner = pruned_net(), Inner()
    fast = compiled(model, inner, settings=Settings(budget_s=0.2))
    for batch in (4, 7, 9, 1, 12, 4):
        assert_right(fast, model, torch.randn(batch, 3, 16, 16))
    assert inner.count == 3  # batch 4, any batch, batch 1
    assert measured == [False, True, True]
    first, second, third = dynamo.reports(fast)
    assert first.model_ms is not None
    assert any("measured at batch 4, and is used at batch 7" in note for note in second.plan_notes)
    assert [row.path for row in first.rows] == [row.path for row in third.rows]


def test_fully_dynamic_shapes_need_one_graph() -> None:
    model, inner = pruned_net(), Inner()
    fast = torch.compile(
        model, backend="fxsparse", dynamic=True, fullgraph=True, options={"inner": inner, "settings": ESTIMATED}
    )
    for shape in ((2, 3, 16, 24), (5, 3, 24, 16), (3, 3, 8, 40)):
        assert_right(fast, model, torch.randn(shape))
    assert inner.count == 1


def test_calibration_leaves_no_trace() -> None:
    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 64, 3)
            self.norm = nn.BatchNorm2d(64)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x.mul_(2)))

    model = Writing()  # in training mode: the statistics move once a call
    model.conv.weight.data.masked_fill_(torch.rand_like(model.conv.weight) > 0.05, 0)
    other = masked_dense(model, {})
    fast = compiled(model, settings=Settings(budget_s=0.2))
    x = torch.randn(2, 3, 16, 16)
    a, b = x.clone(), x.clone()
    with torch.no_grad():
        torch.testing.assert_close(fast(a), other(b), rtol=1e-4, atol=1e-5)
    assert torch.equal(a, b)
    assert torch.equal(a, x * 2)
    torch.testing.assert_close(model.norm.running_mean, other.norm.running_mean)
    assert model.norm.num_batches_tracked == 1


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("context", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_inference_mode_and_autocast(inner: str, context) -> None:
    model = pruned_net()
    fast = compiled(model, inner)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad(), context():
        y, expected = fast(x), model(x)
    assert y.dtype == expected.dtype
    assert sparse_sites(fast) == [4]
    assert error_in_float64(y.detach().clone(), model, x) < (TOLERANCE if y.dtype == torch.float32 else 0.05)
    assert_right(fast, model)


def test_eight_threads_share_one_compiled_model() -> None:
    model = pruned_net()
    fast = compiled(model)
    xs = [torch.randn(2, 3, 16, 16) for _ in range(8)]
    with torch.no_grad():
        fast(xs[0])
        model.stem[0].weight.mul_(2)  # all threads find the packed weight old
        expected = [model(x) for x in xs]
    found: list[float] = []

    def work(i: int) -> None:
        with torch.no_grad():
            for _ in range(20):
                found.append(float((fast(xs[i]) - expected[i]).abs().max()))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 160
    assert max(found) < 1e-4
