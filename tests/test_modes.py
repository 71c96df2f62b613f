"""Modes: every one of them, on every capture rung, by site, as context manager, and through copies."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import random_masks, small_net
from torch import Tensor, nn

import fxsparse
from fxsparse import Mode, calibration, layouts, sites
from fxsparse.plan import Move
from fxsparse.report import graphs_of

RUNGS = ("symbolic", "export", "modules")
X = torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def quick_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let calibrations without a budget take the fewest samples: what they choose is not asserted."""
    for seconds in ("_SITE_S", "_LEAST_S", "_MOST_S", "_MODEL_S"):
        monkeypatch.setattr(calibration, seconds, 0.01)


def converted(rung: str = "symbolic", masks: object = None, **options: object) -> nn.Module:
    model = small_net()
    masks = random_masks(model) if masks is None else masks
    chosen = fxsparse.Settings(calibrate=False, capture=rung, cache=False, **options)
    return fxsparse.convert(model, masks, example_inputs=X, settings=chosen)


def modes(model: nn.Module) -> dict[str, tuple[str, str]]:
    return {s.name: (s.mode, s.path) for gm in graphs_of(model) for _, s in sites.conv_sites(gm)}


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("mode", list(Mode))
def test_every_mode_computes_the_same_and_its_end_puts_everything_back(rung: str, mode: Mode) -> None:
    model = small_net()
    fast = converted(rung, random_masks(model))
    before = modes(fast)
    with torch.no_grad():
        expected = fast(X)
        with fxsparse.set_mode(fast, mode):
            assert {m for m, _ in modes(fast).values()} == {mode.value}
            assert torch.allclose(fast(X), expected, atol=1e-5)
            assert torch.allclose(fast(X[:1]), expected[:1], atol=1e-5)
        if mode is not Mode.CALIBRATION:
            assert modes(fast) == before
        assert torch.allclose(fast(X), expected, atol=1e-5)


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("mode", [m for m in Mode if m is not Mode.CALIBRATION])
def test_a_copy_is_in_the_same_mode_and_goes_its_own_way(rung: str, mode: Mode) -> None:
    fast = converted(rung)
    with torch.no_grad():
        expected = fast(X)
        fxsparse.set_mode(fast, mode)
        other = copy.deepcopy(fast)
        assert modes(other) == modes(fast)
        assert torch.allclose(other(X), expected, atol=1e-5)
        fxsparse.set_mode(other, Mode.SPARSE)
        assert {m for m, _ in modes(other).values()} == {"sparse"}
        assert torch.allclose(other(X), expected, atol=1e-5)
    assert {m for m, _ in modes(fast).values()} == {mode.value}


@pytest.mark.parametrize("mode", [Mode.TRAINING, Mode.VANILLA, Mode.SPARSE, Mode.TEST])
def test_every_mode_works_on_a_state_that_was_saved_and_loaded(mode: Mode) -> None:
    model = small_net()
    masks = random_masks(model)
    settings_ = fxsparse.Settings(calibrate=False)
    fast = fxsparse.convert(model, masks, settings=settings_)
    with torch.no_grad():
        fast.train().get_parameter("block.conv1.weight").mul_(2)
    fast.eval()
    second = fxsparse.convert(model, masks, settings=settings_)
    second.load_state_dict(fast.state_dict())
    with torch.no_grad(), fxsparse.set_mode(second, mode):
        assert torch.allclose(second(X), fast(X), atol=1e-5)


def test_modes_are_set_by_name_glob_and_pattern() -> None:
    fast = converted()
    fxsparse.set_mode(fast, "vanilla", sites="stem.0")
    fxsparse.set_mode(fast, Mode.TEST, sites=["re:block.conv[12]"])
    found = modes(fast)
    assert found == {
        "stem.0": ("vanilla", "vanilla"),
        "block.conv1": ("test", "sparse"),
        "block.conv2": ("test", "sparse"),
        "block.short": ("sparse", "sparse"),
    }
    assert fast.report.row("stem.0").path == "vanilla"
    assert fast.report.row("stem.0").reason == "set by fxsparse.set_mode"


def test_an_exception_inside_leaves_the_mode_too() -> None:
    fast = converted()
    before = modes(fast), str(fast.report)
    with pytest.raises(ZeroDivisionError), fxsparse.set_mode(fast, Mode.VANILLA):
        assert fast.report.sparse == 0
        raise ZeroDivisionError
    assert (modes(fast), str(fast.report)) == before


def test_contexts_nest() -> None:
    fast = converted()
    with fxsparse.set_mode(fast, Mode.VANILLA):
        with fxsparse.set_mode(fast, Mode.TRAINING, sites="stem.0") as same:
            assert same is fast
            with fxsparse.set_mode(fast, Mode.TEST):
                assert modes(fast)["stem.0"] == ("test", "vanilla")
            assert modes(fast)["stem.0"] == ("training", "vanilla")
        assert modes(fast)["stem.0"] == ("vanilla", "vanilla")
    assert modes(fast)["stem.0"] == ("sparse", "sparse")


@settings(max_examples=25, deadline=None)
@given(steps=st.lists(st.sampled_from(["train", "eval", "copy", *(m.value for m in Mode)]), max_size=6))
def test_any_sequence_of_modes_computes_the_same(steps: list[str]) -> None:
    torch.manual_seed(0)
    fast = converted()
    with torch.no_grad():
        expected = fast(X)
        for step in steps:
            if step == "copy":
                fast = copy.deepcopy(fast)
            elif step in ("train", "eval"):
                getattr(fast, step)()
            else:
                fxsparse.set_mode(fast, step)
        fxsparse.set_mode(fast, "test" if steps and steps[-1] == "calibration" else "sparse")
        assert torch.allclose(fast(X), expected, atol=1e-5)
        fast.graph.lint()
        assert all(n.users or n.op in ("output", "placeholder") for n in fast.graph.nodes)


# Errors


def test_a_model_that_was_not_converted_is_refused() -> None:
    with pytest.raises(fxsparse.FxsparseError, match=r"not converted. Call fxsparse.convert\(model, masks\) first"):
        fxsparse.set_mode(small_net(), Mode.TEST)


def test_an_unknown_mode_lists_the_known_ones() -> None:
    with pytest.raises(fxsparse.FxsparseError, match="'fast' is no mode.*'training', 'vanilla', 'sparse'"):
        fxsparse.set_mode(converted(), "fast")


def test_a_rule_that_matches_nothing_is_an_error_and_changes_nothing() -> None:
    fast = converted()
    before = modes(fast)
    with pytest.raises(
        fxsparse.FxsparseError, match="sites rule 'stem.1' matches no convolution. Near names: 'stem.0'"
    ):
        fxsparse.set_mode(fast, Mode.VANILLA, sites=["stem.0", "stem.1"])
    assert modes(fast) == before


def test_sparse_leaves_what_is_not_packed_vanilla_unless_a_rule_names_only_that() -> None:
    fast = converted(exclude=("stem.0",))
    fxsparse.set_mode(fast, Mode.TRAINING)
    fxsparse.set_mode(fast, Mode.SPARSE)
    assert modes(fast)["stem.0"] == ("vanilla", "vanilla")
    assert modes(fast)["block.conv1"] == ("sparse", "sparse")
    with pytest.raises(fxsparse.FxsparseError, match="'stem.0': left out by the include and exclude rules"):
        fxsparse.set_mode(fast, Mode.SPARSE, sites="stem.*")


# TEST and BENCHMARK


@pytest.mark.parametrize("rung", RUNGS)
def test_test_names_the_node_and_where_lost_weights_show(rung: str) -> None:
    fast = converted(rung)
    gm, site = next((gm, s) for gm in graphs_of(fast) for _, s in sites.conv_sites(gm) if s.name == "block.conv1")
    values = sites.attribute(gm, site.packed_names[0])
    values[::3] = 0
    fxsparse.set_mode(fast, Mode.TEST)
    with pytest.raises(fxsparse.FxsparseError) as caught, torch.no_grad():
        fast(X)
    text = str(caught.value)
    for part in (
        "packed weight of 'block.conv1' differs from the dense one in ",
        "sparse path of 'block.conv1'",
        "(3, 16, 12, 12), float32",
        "largest absolute error",
        "largest relative error",
        "(n, c, y, x) = (",
        "Settings(exclude=('block.conv1',))",
    ):
        assert part in text


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "circular"])
def test_test_passes_on_every_dtype_padding_and_input(dtype: torch.dtype, padding_mode: str) -> None:
    conv = nn.Conv2d(8, 16, 3, padding=1 if padding_mode != "zeros" else "same", padding_mode=padding_mode)
    fast = fxsparse.convert(nn.Sequential(conv).eval().to(dtype), {"0": torch.rand(16, 8, 3, 3) < 0.2})
    fxsparse.set_mode(fast, Mode.TEST)
    with torch.no_grad():
        for shape in ((2, 8, 9, 7), (0, 8, 9, 7), (8, 9, 7)):
            assert fast(torch.randn(shape, dtype=dtype)).shape == (*shape[:-3], 16, 9, 7)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            fast(torch.randn(2, 8, 9, 7, dtype=dtype))


def test_test_gives_the_gradients_of_the_planned_path() -> None:
    fast = converted()
    found = []
    for mode in (Mode.SPARSE, Mode.TEST):
        fxsparse.set_mode(fast, mode)
        x = X.clone().requires_grad_()
        fast(x).sum().backward()
        found.append(x.grad)
    assert torch.equal(*found)


@pytest.mark.parametrize("rung", RUNGS)
def test_benchmark_prints_one_aligned_row_a_node_and_a_header_a_forward(
    rung: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fast = converted(rung, exclude=("block.short",))
    with torch.no_grad(), fxsparse.set_mode(fast, Mode.BENCHMARK):
        fast(X)
        fast(X)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    assert lines[0] == lines[5]
    assert lines[0].split() == ["convolution", "input", "vanilla", "ms", "sparse", "ms", "gain", "path"]
    rows = {line.split()[0]: line.split()[1:] for line in lines[1:5]}
    assert rows["stem.0"][0] == "3x3x12x12"
    assert rows["stem.0"][-1] == "sparse"
    assert rows["block.short"][2:] == ["-", "-", "vanilla"]
    assert len({line.index(line.split()[-1], 60) for line in lines}) == 1


# CALIBRATION


@pytest.mark.parametrize("rung", ["symbolic", "modules"])
def test_calibration_measures_on_each_new_signature_once(rung: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = calibration.calibrate

    def counted(model: nn.Module, inputs: object, **options: object) -> nn.Module:
        calls.append((tuple(inputs.args[0].shape), options["sites"]))
        return real(model, inputs, budget_s=0.05, **options)

    monkeypatch.setattr(calibration, "calibrate", counted)
    fast = converted(rung)
    with torch.no_grad():
        with fxsparse.set_mode(fast, Mode.CALIBRATION, sites="block.*"):
            other = copy.deepcopy(fast)
            for x in (X, X, X[:1]):
                fast(x)
            assert {m for m, _ in modes(fast).values()} == {"calibration", "sparse"}
        fast(X[:2])
        names = ("block.conv1", "block.conv2", "block.short")
        assert calls == [((3, 3, 12, 12), names), ((1, 3, 12, 12), names)]
        assert {m == p for m, p in modes(fast).values()} == {True}
        assert not fast._forward_pre_hooks
        other(X)
        assert len(calls) == 3


def test_calibration_takes_keywords_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 16, 3)

        def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
            return self.conv(x) * scale

    fast = fxsparse.convert(Keyword().eval(), {"conv": torch.rand(16, 8, 3, 3) < 0.1})
    x = torch.randn(1, 8, 6, 6)
    with torch.no_grad(), fxsparse.set_mode(fast, "calibration"):
        fast(x, scale=2.0)
    assert fast.report.row("conv").vanilla_ms is not None


def test_hooks_and_attributes_of_swapped_convolutions_survive_a_copy() -> None:
    fast = converted("modules")
    seen: list[int] = []
    fast.stem[0].register_forward_hook(lambda m, a, out: seen.append(1))
    other = copy.deepcopy(fast)
    with torch.no_grad():
        other(X)
    assert seen == [1]
    assert other.stem[0].out_channels == 16


# Changes of layout


def _moved() -> nn.Module:
    fast = converted()
    node = next(n for n, s in sites.conv_sites(fast) if s.name == "block.conv1")
    source = sites.input_node(node)
    assert not layouts.place(fast, [Move("", source.name, "channels_last", (node.name,))])
    fast.recompile()
    return fast


@pytest.mark.parametrize("mode", [Mode.TRAINING, Mode.VANILLA, Mode.SPARSE])
def test_forced_paths_and_training_run_without_the_plans_layouts_and_exits_restore_them(mode: Mode) -> None:
    fast = _moved()
    before = layouts.current(fast)
    assert len(before) == 1
    with torch.no_grad():
        expected = fast(X)
        with fxsparse.set_mode(fast, mode):
            assert not layouts.current(fast)
            assert torch.allclose(fast(X), expected, atol=1e-5)
        assert layouts.current(fast) == before
        assert torch.equal(fast(X), expected)


@pytest.mark.parametrize("mode", [Mode.TEST, Mode.BENCHMARK, Mode.CALIBRATION])
def test_modes_that_follow_the_plan_keep_its_layouts(mode: Mode) -> None:
    fast = _moved()
    before = layouts.current(fast)
    fxsparse.set_mode(fast, mode)
    assert layouts.current(fast) == before


def test_layouts_come_back_after_training_through_a_copy_as_well() -> None:
    fast = _moved()
    before = layouts.current(fast)
    fast.train()
    assert not layouts.current(fast)
    other = copy.deepcopy(fast).eval()
    assert layouts.current(other) == before
    fxsparse.set_mode(fast, Mode.VANILLA, sites="stem.0")
    assert not layouts.current(fast.eval())


# Export and compile


@pytest.mark.parametrize("mode", [Mode.TRAINING, Mode.VANILLA, Mode.SPARSE])
@pytest.mark.parametrize("rung", RUNGS)
def test_a_model_in_a_mode_without_checks_exports_and_compiles_whole(rung: str, mode: Mode) -> None:
    fast = converted(rung)
    fxsparse.set_mode(fast, mode)
    with torch.no_grad():
        expected = fast(X)
        exported = torch.export.export(fast, (X,))
        assert torch.allclose(exported.module()(X), expected, atol=1e-5)
        torch.compiler.reset()
        compiled = torch.compile(fast, backend="eager", fullgraph=True)
        assert torch.allclose(compiled(X), expected, atol=1e-5)
