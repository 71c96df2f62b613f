"""Whatever the times say, the plan computes the same, in the same layouts as far as the model's own code can tell."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import error_in_float64, masked_dense, random_masks, small_net
from torch import Tensor, nn

import fxsparse
from fxsparse import calibration, layouts, sites
from fxsparse.calibration import measuring
from fxsparse.calibration.samples import Samples
from fxsparse.calibration.whole_model import VANILLA, Verdict
from fxsparse.plan import LAYOUTS
from fxsparse.report import graphs_of
from fxsparse.timing import Ratio, Timing


class Residual(nn.Module):
    """In-place activations and sums, a pool, a concatenation, and a view that takes contiguous memory only."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.a = nn.Conv2d(16, 16, 3, padding=1)
        self.b = nn.Conv2d(16, 16, 3, padding=1, padding_mode="circular")
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.left, self.right = nn.Conv2d(16, 8, 1), nn.Conv2d(16, 24, 3, padding=(1, 1))
        self.gate = nn.Conv2d(32, 32, 1)
        self.last = nn.Conv2d(32, 8, 3, stride=2)
        self.order = (0, 1, 2, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.pool(self.relu(self.stem(x)))
        y = self.relu(self.a(x))
        y = self.b(y)
        y += x
        y = self.relu(y)
        y = torch.cat([self.left(y), self.right(y)], 1)
        y = y * torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True)))
        z = self.last(y)
        return y, z.permute(self.order).view(z.shape[0], -1)


class Shuffled(nn.Module):
    """Views between the convolutions, as in a channel shuffle, and a weight that serves two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3, padding=1)
        self.b = nn.Conv2d(16, 16, 3, padding=1, groups=4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        n, c, h, w = y.shape
        y = y.view(n, 4, c // 4, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
        return self.b(torch.relu(self.b(y))) + y


def shuffle_the_clock(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Make every measured time random but certain, and the last variant the fastest."""
    draw = random.Random(seed)
    times: dict[tuple[int, str], float] = {}

    def summary(self: Samples, arm: str) -> Timing:
        # Changes of layout are cheap, so that there are some.
        ms = times.setdefault((id(self), arm), draw.uniform(0, 0.5) if arm in LAYOUTS else draw.uniform(1, 10))
        return Timing(ms, ms, ms, ms, ms, 9)

    def fastest(model: nn.Module, inputs: Any, variants: dict[str, Any], device: Any, **options: Any) -> Verdict:
        return Verdict(list(variants)[-1] if variants else VANILLA, 2.0, 1.0, 0.0)

    monkeypatch.setattr(Samples, "summary", summary)
    monkeypatch.setattr(Samples, "ratio", lambda self, a, b: Ratio(2.0, 2.0, 2.0))
    monkeypatch.setattr(Samples, "drop", lambda self, losers: None)
    monkeypatch.setattr(measuring, "_MIN_SAMPLES", 1)
    monkeypatch.setattr(calibration, "fastest", fastest)


MODELS: dict[str, Callable[[], nn.Module]] = {"small": small_net, "residual": Residual, "shuffled": Shuffled}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("rung", ["symbolic", "export", "modules"])
def test_any_plan_computes_the_masked_dense_model(
    name: str, memory_format: torch.memory_format, rung: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MODELS[name]().eval().to(memory_format=memory_format)
    if memory_format == torch.channels_last:
        model.order = (0, 2, 3, 1)  # a view of that memory only
    masks = random_masks(model, 0.2)
    x = torch.randn(2, 3, 14, 18).contiguous(memory_format=memory_format)
    dense = masked_dense(model, masks)
    fast = fxsparse.convert(model, masks, example_inputs=x, settings=fxsparse.Settings(calibrate=False, capture=rung))
    moved = 0
    for seed in range(6):
        shuffle_the_clock(monkeypatch, seed)
        fxsparse.calibrate(fast, x)
        moved += sum(len(layouts.current(gm)) for gm in graphs_of(fast))
        # Export fixes the image size.
        size = (14, 18) if rung == "export" else (9, 11)
        for sample in (x, torch.randn(3, 3, *size).contiguous(memory_format=memory_format)):
            with torch.no_grad():
                got, wanted = fast(sample), dense(sample)
            for g, w in zip(_tuple(got), _tuple(wanted), strict=True):
                assert torch.allclose(g, w, rtol=1e-4, atol=1e-4)
                if name == "residual" and rung != "modules":
                    assert g.stride() == w.stride()
    if name != "shuffled":
        assert moved or rung == "modules"


def _tuple(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def test_a_copy_into_another_layout_never_speeds_a_sparse_operator_on_a_cpu_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would only copy back: samples that say so are noise, and a change of layout parts two regions."""

    def summary(self: Samples, arm: str) -> Timing:
        path = 10.0 if "vanilla" in str(arm) else 1.0 if "channels_last" in str(arm) else 5.0
        ms = 0.01 if arm in LAYOUTS else path
        return Timing(ms, ms, ms, ms, ms, 9)

    shuffle_the_clock(monkeypatch, 0)
    monkeypatch.setattr(Samples, "summary", summary)
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 3)).eval()
    fast = fxsparse.convert(model, random_masks(model, 0.2), example_inputs=torch.randn(1, 8, 14, 14))
    assert fast.report.sparse == 3
    assert not any(layouts.current(gm) for gm in graphs_of(fast))


def test_a_plan_that_is_saved_and_loaded_gives_the_same_graph(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    model, x = Residual().eval(), torch.randn(1, 3, 12, 12)
    masks = random_masks(model, 0.2)
    shuffle_the_clock(monkeypatch, 3)
    first = fxsparse.convert(model, masks, example_inputs=x)
    first.plan.save(tmp_path / "plan.json")
    second = fxsparse.convert(model, masks)
    plan = fxsparse.Plan.load(tmp_path / "plan.json")
    monkeypatch.setattr(calibration, "measure", None)  # nothing may be measured
    fxsparse.calibrate(second, x, plan=plan, deterministic=True)
    assert second.code == first.code
    assert second.report.rows == first.report.rows
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(first(x), second(x), strict=True))


def test_an_entry_for_just_these_inputs_is_followed_without_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = small_net(), torch.randn(1, 3, 12, 12)
    masks = random_masks(model)
    shuffle_the_clock(monkeypatch, 1)
    plan = fxsparse.convert(model, masks, example_inputs=x).plan
    other = fxsparse.convert(model, masks)
    monkeypatch.setattr(calibration, "measure", None)
    fxsparse.calibrate(other, x, plan=plan)
    assert other.plan == plan


def test_calibrations_at_several_shapes_make_one_plan_and_the_nearest_entry_serves_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = small_net()
    fast = fxsparse.convert(model, random_masks(model))
    for batch in (1, 4, 16):
        shuffle_the_clock(monkeypatch, batch)
        fxsparse.calibrate(fast, (batch, 3, 10, 10))
    assert [entry.key.shapes[0][0] for entry in fast.plan.entries] == [1, 4, 16]
    paths = {site: plan.path for site, plan in fast.plan.entries[1].sites.items()}
    monkeypatch.setattr(calibration, "measure", None)
    fxsparse.calibrate(fast, (5, 3, 10, 10), deterministic=True)
    assert {row.name: row.path for row in fast.report.rows} == paths
    assert "measured at batch 4, and is used at batch 5" in str(fast.report)


def test_only_the_named_sites_are_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = small_net(), torch.randn(2, 3, 12, 12)
    fast = fxsparse.convert(model, random_masks(model), example_inputs=x, settings=fxsparse.Settings(calibrate=False))
    before = {row.name: row for row in fast.report.rows}
    shuffle_the_clock(monkeypatch, 0)
    fxsparse.calibrate(fast, x, sites="block.*")
    after = {row.name: row for row in fast.report.rows}
    assert after["stem.0"] == before["stem.0"]
    assert all(after[name].vanilla_ms for name in after if name.startswith("block"))
    with pytest.raises(fxsparse.FxsparseError, match="sites rule 'bloc' matches no convolution"):
        fxsparse.calibrate(fast, x, sites="bloc")


def test_a_vanilla_site_in_channels_last_stores_its_weight_so_and_keeps_the_parameter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Residual().eval()
    x = torch.randn(1, 3, 12, 12)
    fast = fxsparse.convert(model, random_masks(model, 0.2), settings=fxsparse.Settings(calibrate=False))
    parameters = {name: parameter for name, parameter in fast.named_parameters()}
    values = {name: parameter.clone() for name, parameter in parameters.items()}
    for seed in range(4):
        shuffle_the_clock(monkeypatch, seed)
        fxsparse.calibrate(fast, x)
        for _, site in sites.conv_sites(fast):
            if site.path == "vanilla" and site.layout is not None:
                weight = sites.attribute(fast, site.weight)
                assert weight.is_contiguous(memory_format=layouts.MEMORY_FORMATS[site.layout])
    assert all(parameters[name] is parameter for name, parameter in fast.named_parameters())
    assert all(torch.equal(values[name], parameter) for name, parameter in fast.named_parameters())


def test_both_packings_are_exact_and_change_the_stored_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(nn.Conv2d(16, 64, 3, padding=1)).eval(), torch.randn(1, 16, 9, 9)
    # Half of the rows share columns, so that there are blocks and residual weights.
    mask = torch.rand(64, 16, 3, 3) < 0.1
    mask[:32] |= (torch.rand(1, 16, 3, 3) < 0.2).expand(32, -1, -1, -1)
    fast = fxsparse.convert(model, {"0": mask}, settings=fxsparse.Settings(calibrate=False))
    seen = set()
    for seed in range(20):
        shuffle_the_clock(monkeypatch, seed)
        fxsparse.calibrate(fast, x)
        (_, site) = next(sites.conv_sites(fast))
        row = fast.report.row("0")
        if site.path == "sparse":
            seen.add((site.packing, row.blocks == 0, row.residual == 1.0))
        with torch.no_grad():
            assert error_in_float64(fast(x), masked_dense(model, {"0": mask}), x) < 1e-6
    assert seen == {("blocks", False, False), ("rows", True, True)}


def test_forcing_a_mode_takes_the_layouts_of_weights_back_and_leaving_it_brings_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = Residual().eval(), torch.randn(2, 3, 14, 18)
    masks = random_masks(model, 0.2)
    fast = fxsparse.convert(model, masks, settings=fxsparse.Settings(calibrate=False))
    dense = masked_dense(model, masks)

    def laid_out() -> set[str]:
        return {name for name, p in fast.named_parameters() if p.dim() == 4 and not p.is_contiguous()}

    for seed in range(6):
        shuffle_the_clock(monkeypatch, seed)
        fxsparse.calibrate(fast, x)
        planned, moves = laid_out(), layouts.current(fast)
        with fxsparse.set_mode(fast, "vanilla"):
            assert not laid_out()
            with torch.no_grad():
                for got, wanted in zip(fast(x), dense(x), strict=True):
                    assert got.stride() == wanted.stride()
        assert (laid_out(), layouts.current(fast)) == (planned, moves)
        fast.train()
        assert not laid_out()
        fast.eval()
        assert (laid_out(), layouts.current(fast)) == (planned, moves)
        with fxsparse.set_mode(fast, "test"), torch.no_grad():
            fast(x)
        if planned:
            return
    raise AssertionError("no plan had a weight in channels_last")


def test_a_weight_that_serves_two_sites_keeps_its_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Shuffled().eval()
    fast = fxsparse.convert(model, None, settings=fxsparse.Settings(calibrate=False))
    for seed in range(8):
        shuffle_the_clock(monkeypatch, seed)
        fxsparse.calibrate(fast, torch.randn(2, 3, 14, 18))
        assert fast.b.weight.is_contiguous()


def test_a_sparse_site_in_a_graph_that_may_not_change_layouts_gives_back_what_vanilla_gave(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 16, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            y[:, :2].relu_()
            return y.permute(0, 2, 3, 1).view(-1)

    model = Written().eval().to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 9, 9).contiguous(memory_format=torch.channels_last)
    masks = random_masks(model, 0.1)
    fast = fxsparse.convert(model, masks, settings=fxsparse.Settings(calibrate=False))
    paths = set()
    for seed in range(6):
        shuffle_the_clock(monkeypatch, seed)
        fxsparse.calibrate(fast, x)
        paths.add(fast.report.row("conv").path)
        assert "writes into" in str(fast.report)
        with torch.no_grad():
            assert torch.allclose(fast(x), masked_dense(model, masks)(x), atol=1e-5)
    assert paths == {"vanilla", "sparse"}
