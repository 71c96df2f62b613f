"""The whole road: any model and masks in, an exact module and a full report out."""

from __future__ import annotations

import copy

import pytest
import torch
from models import error_in_float64, masked_dense, random_masks, small_net
from torch import Tensor, nn

import fxsparse
from fxsparse import sites
from fxsparse.report import graphs_of

RUNGS = ("symbolic", "export", "modules")


def force(model: nn.Module, path: str) -> None:
    """Put every packed site on one path."""
    for gm in graphs_of(model):
        for node, site in sites.conv_sites(gm):
            if site.packed:
                sites.set_path(gm, node, path)
        gm.graph.lint()
        gm.recompile()


def convert(model: nn.Module, masks: object = None, **options: object) -> nn.Module:
    """Convert without measuring."""
    inputs = options.pop("example_inputs", None)
    settings = fxsparse.Settings(calibrate=False, **options)
    return fxsparse.convert(model, masks, example_inputs=inputs, settings=settings)


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("path", ["sparse", "vanilla"])
def test_every_rung_and_path_computes_what_the_masked_dense_model_computes(rung: str, path: str) -> None:
    model, x = small_net(), torch.randn(3, 3, 15, 18)
    masks = random_masks(model)
    fast = convert(model, masks, capture=rung, example_inputs=x)
    force(fast, path)
    assert fast.report.rung == rung
    with torch.no_grad():
        assert error_in_float64(fast(x), masked_dense(model, masks), x) < 1e-6


@pytest.mark.parametrize("rung", RUNGS)
def test_all_rungs_find_the_same_sites_under_the_original_names(rung: str) -> None:
    model = small_net()
    fast = convert(model, random_masks(model), capture=rung, example_inputs=(2, 3, 16, 16))
    names = {row.name for row in fast.report.rows}
    assert names == {"stem.0", "block.conv1", "block.conv2", "block.short"}
    assert {row.path for row in fast.report.rows} == {"sparse"}


def test_the_users_model_is_never_changed() -> None:
    model = small_net()
    before = copy.deepcopy(model.state_dict())
    keys = set(model.__dict__)
    fxsparse.convert(model, random_masks(model), example_inputs=(1, 3, 16, 16))
    assert set(model.__dict__) == keys
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_convert_without_inputs_follows_the_estimate_and_says_so() -> None:
    model = small_net()
    fast = fxsparse.convert(model, random_masks(model))
    assert all("not measured: call fxsparse.calibrate(gm, x)" in row.reason for row in fast.report.rows)
    assert "not measured" in str(fast.report)


def test_a_dense_convolution_is_timed_too() -> None:
    model = small_net()
    masks = random_masks(model)
    del masks["block.conv2"]
    row = fxsparse.convert(model, masks, example_inputs=(1, 3, 8, 8)).report.row("block.conv2")
    assert (row.reason, row.input_shape, row.sparse_ms) == ("no zeros in the weight", (1, 32, 4, 4), None)
    assert row.vanilla_ms is not None and row.vanilla_ms > 0


def test_calibrating_a_model_in_training_mode_leaves_its_statistics_and_the_random_state_alone() -> None:
    model = small_net().train()
    fast = convert(model, random_masks(model))
    before = {name: buffer.clone() for name, buffer in fast.named_buffers() if "running" in name}
    assert before
    x = torch.randn(4, 3, 8, 8)
    state = torch.get_rng_state()
    fxsparse.calibrate(fast, x)
    assert torch.equal(torch.get_rng_state(), state)
    after = dict(fast.named_buffers())
    assert all(torch.equal(after[name], before[name]) for name in before)
    fast(x)
    assert all(not torch.equal(after[name], before[name]) for name in before)


def test_calibrate_replaces_the_estimates_and_their_note() -> None:
    model = small_net()
    fast = fxsparse.convert(model, random_masks(model))
    assert fxsparse.calibrate(fast, (4, 3, 16, 16)) is fast
    assert "not measured" not in str(fast.report)
    assert all(row.vanilla_ms and row.sparse_ms for row in fast.report.rows)


def test_zeros_of_the_weights_are_the_masks_when_none_are_given() -> None:
    model = small_net()
    masks = random_masks(model)
    dense = masked_dense(model, masks)
    fast = convert(dense)
    row = fast.report.row("block.conv1")
    assert row.density == pytest.approx(masks["block.conv1"].float().mean().item())
    x = torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        assert error_in_float64(fast(x), dense, x) < 1e-6


def test_a_dense_model_stays_dense_and_every_row_says_why() -> None:
    fast = convert(small_net())
    assert fast.report.sparse == 0
    assert {row.reason for row in fast.report.rows} == {"no zeros in the weight"}


def test_an_input_shape_does_in_place_of_inputs() -> None:
    model = small_net()
    fast = fxsparse.convert(model, random_masks(model), example_inputs=(2, 3, 16, 16))
    row = fast.report.row("stem.0")
    assert row.input_shape == (2, 3, 16, 16)
    assert fast.report.row("block.conv1").input_shape == (2, 16, 16, 16)
    assert row.vanilla_ms is not None and row.vanilla_ms > 0
    assert row.sparse_ms is not None and row.sparse_ms > 0


def test_batch_norms_are_folded_unless_asked_not_to() -> None:
    model = small_net()
    masks = random_masks(model)
    folded, kept = (convert(model, masks, fold_batch_norm=fold) for fold in (True, False))
    count = [sum(isinstance(m, nn.BatchNorm2d) for m in gm.modules()) for gm in (folded, kept)]
    assert count == [0, 3]


def test_a_weight_used_at_two_sites_is_packed_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(8, 8, 3, padding=1)
            self.b = nn.Conv2d(8, 8, 3, padding=1)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(self.a(x))

    model, x = Tied().eval(), torch.randn(1, 8, 6, 6)
    mask = torch.rand(8, 8, 3, 3) < 0.1
    fast = convert(model, {"a": mask})
    assert [k for k in fast.state_dict() if k.endswith("weight_values")] == ["a.weight_values"]
    assert len(fast.report.rows) == 3
    assert fast.report.sparse == 3
    dense = copy.deepcopy(model)
    dense.a.weight.data.masked_fill_(~mask, 0)
    with torch.no_grad():
        assert error_in_float64(fast(x), dense, x) < 1e-6


def test_include_and_exclude_choose_by_name_glob_and_pattern() -> None:
    model = small_net()
    masks = random_masks(model)
    fast = convert(model, masks, include=("block.*",), exclude=("re:.*short",))
    left_out = {row.name for row in fast.report.rows if "include and exclude" in row.reason}
    assert left_out == {"stem.0", "block.short"}


def test_a_rule_that_matches_nothing_is_an_error_with_near_names() -> None:
    with pytest.raises(fxsparse.FxsparseError, match=r"'block.conv3'.*Near names: 'block.conv"):
        convert(small_net(), include=("block.conv3",))


def test_the_report_and_the_paths_survive_a_deepcopy_and_stay_apart() -> None:
    model, x = small_net(), torch.randn(1, 3, 8, 8)
    fast = convert(model, random_masks(model))
    other = copy.deepcopy(fast)
    assert str(other.report) == str(fast.report)
    force(other, "vanilla")
    assert {s.path for gm in graphs_of(fast) for _, s in sites.conv_sites(gm)} == {"sparse"}
    with torch.no_grad():
        assert torch.allclose(fast(x), other(x), atol=1e-5)


def test_data_dependent_control_flow_and_hooks_convert_module_by_module() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small_net()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) if x.sum() > 0 else -self.net(x)

        def second_entry(self, x: Tensor) -> Tensor:
            return self.net.stem(x)

    model, x = Branching().eval(), torch.randn(2, 3, 12, 12)
    seen: list[str] = []
    model.net.block["conv1"].register_forward_hook(lambda m, a, out: seen.append("conv1"))
    masks = random_masks(model)
    fast = convert(model, masks, example_inputs=x)
    assert fast.report.rung == "modules"
    assert "forward hook" in fast.report.refused["symbolic"]
    assert "net.block.conv1" in fast.report.refused["export"]
    dense = masked_dense(model, masks)
    seen.clear()
    with torch.no_grad():
        for sample in (x, -x):
            assert error_in_float64(fast(sample), dense, sample) < 1e-6
        stem = fast.second_entry(x)
        assert torch.allclose(stem, dense.second_entry(x), atol=1e-5)
    assert seen.count("conv1") >= 2
    assert fast.report.sparse == 4
    assert set(dense.state_dict()) <= set(fast.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_every_floating_dtype_converts(dtype: torch.dtype) -> None:
    model = small_net().to(dtype)
    masks = random_masks(model)
    x = torch.randn(2, 3, 12, 12, dtype=dtype)
    fast = convert(model, masks, example_inputs=x)
    force(fast, "sparse")
    with torch.no_grad():
        got = fast(x)
    assert got.dtype == dtype
    assert error_in_float64(got, masked_dense(model, masks), x) < 16 * torch.finfo(dtype).eps


def test_channels_last_models_and_inputs_agree() -> None:
    model = small_net().to(memory_format=torch.channels_last)
    masks = random_masks(model)
    x = torch.randn(2, 3, 16, 16).to(memory_format=torch.channels_last)
    fast = convert(model, masks, example_inputs=x)
    with torch.no_grad():
        assert error_in_float64(fast(x), masked_dense(model, masks), x) < 1e-6


def test_one_graph_serves_any_batch_and_image_size() -> None:
    model = small_net()
    masks = random_masks(model)
    fast, dense = convert(model, masks), masked_dense(model, masks)
    for shape in [(1, 3, 16, 16), (7, 3, 5, 23), (2, 3, 33, 8)]:
        x = torch.randn(shape)
        with torch.no_grad():
            assert error_in_float64(fast(x), dense, x) < 1e-6
    with torch.no_grad():
        assert fast(torch.randn(0, 3, 8, 8)).shape == (0, 5)


def test_conv1d_and_transposed_convolutions_have_a_row_with_their_reason() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(3, 4, 2, stride=2)
            self.conv = nn.Conv2d(4, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.up(x))

    fast = convert(Mixed().eval())
    reasons = {row.name: row.reason for row in fast.report.rows}
    assert reasons["up"] == "transposed convolution (supported: 2-D convolution)"
    assert reasons["conv"] == "no zeros in the weight"


def test_module_by_module_lists_the_convolutions_that_it_does_not_swap() -> None:
    class Doubled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    model = nn.Sequential(nn.Conv2d(3, 16, 3), Doubled(16, 4, 3), nn.ConvTranspose2d(4, 4, 2)).eval()
    masks = {"0": torch.rand(16, 3, 3, 3) < 0.1}
    fast = convert(model, masks, capture="modules")
    reasons = {row.name: row.reason for row in fast.report.rows}
    assert reasons["1"] == "Doubled changes what nn.Conv2d computes at every call"
    assert reasons["2"] == "transposed convolution (supported: 2-D convolution)"
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        assert error_in_float64(fast(x), masked_dense(model, masks), x) < 1e-6


def test_a_parameter_whose_name_ends_in_weight_keeps_its_name() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.edge_weight = nn.Parameter(torch.randn(16, 4, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.conv2d(x, self.edge_weight)

    fast = convert(Functional().eval(), {"edge_weight": torch.rand(16, 4, 3, 3) < 0.1})
    assert fast.report.row("edge_weight").path == "sparse"
