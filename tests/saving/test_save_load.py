"""Round trips through a file: what comes back, what stays as it was, and what the loaded model can do."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from models import random_masks, small_net
from round_trips import Branches, assert_runs_as, assert_same, converted, round_trip
from safetensors.torch import save_file
from torch import nn

import fxsparse
from fxsparse import layouts, sites
from fxsparse.plan import Move

QUICK = fxsparse.Settings(calibrate=False)


def test_everything_that_hangs_on_a_model_comes_back(tmp_path: Path) -> None:
    model = small_net()
    fast = fxsparse.convert(
        model, random_masks(model), example_inputs=(2, 3, 16, 16), settings=fxsparse.Settings(budget_s=0.5)
    )
    fast.classes = ["cat", "dog"]
    loaded = round_trip(fast, tmp_path)
    assert type(loaded).__name__ == type(fast).__name__
    assert loaded.report == fast.report
    assert "picture" not in str(loaded.report.to_dict())
    assert [row.picture is None for row in loaded.report.rows] == [row.picture is None for row in fast.report.rows]
    assert loaded.plan == fast.plan
    assert loaded.classes == ["cat", "dog"]
    assert loaded.training is False
    for (_, ours), (_, theirs) in zip(sites.conv_sites(fast), sites.conv_sites(loaded), strict=True):
        assert ours == theirs
    ours, theirs = fast.state_dict(), loaded.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert_same(tensor, theirs[name])
    assert {n: p.requires_grad for n, p in fast.named_parameters()} == {
        n: p.requires_grad for n, p in loaded.named_parameters()
    }


def test_the_pictures_are_drawn_again_also_for_a_frozen_model(tmp_path: Path) -> None:
    fast = converted(small_net(), (2, 3, 16, 16))
    fxsparse.set_mode(fast, "vanilla", sites="block.short")
    before = [row.picture for row in fast.report.rows]
    for model in (fast, fxsparse.freeze(fast)):
        loaded = round_trip(model, tmp_path)
        for ours, row in zip(before, loaded.report.rows, strict=True):
            assert (ours.before == row.picture.before).all()
            assert (ours.after == row.picture.after).all()


def test_saving_does_not_change_the_model(tmp_path: Path) -> None:
    fast = converted(small_net(), (2, 3, 16, 16))
    layouts.place(fast, [Move("", "parameter block.conv1.weight", "channels_last", ())])
    fast.train()
    weight = fast.get_parameter("block.conv1.weight")
    weight.data.add_(1)  # stale packed values, which leaving the mode would bring up to date
    code, state = fast.code, copy.deepcopy(fast.state_dict())
    places = {name: tensor.data_ptr() for name, tensor in fast.state_dict().items()}
    fxsparse.save(fast, tmp_path / "model.pt2")
    assert fast.code == code
    assert fast.training
    assert {name: tensor.data_ptr() for name, tensor in fast.state_dict().items()} == places
    assert_same(state, fast.state_dict())


def test_a_frozen_model_stays_frozen_and_its_file_is_smaller_than_the_dense_ones(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(16, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1))
    fast = converted(model, (2, 16, 8, 8))
    fxsparse.set_mode(fast, "sparse")
    fxsparse.save(fast, tmp_path / "whole.pt2")
    fxsparse.freeze(fast)
    loaded = round_trip(fast, tmp_path)
    assert_runs_as(fast, loaded, torch.randn(3, 16, 9, 9))
    assert list(loaded.state_dict()) == list(fast.state_dict())
    assert loaded.report == fast.report
    with pytest.raises(fxsparse.FxsparseError, match="frozen"):
        fxsparse.set_mode(loaded, "vanilla")
    with pytest.raises(fxsparse.FxsparseError, match="frozen"):
        loaded.train()
    dense = sum(p.numel() * p.element_size() for p in model.parameters())
    whole, frozen = ((tmp_path / name).stat().st_size for name in ("whole.pt2", "model.pt2"))
    assert frozen < dense < whole
    x = torch.randn(2, 16, 8, 8)
    assert_runs_as(fxsparse.to_dense(fast), fxsparse.to_dense(loaded), x)


def test_a_frozen_weight_at_two_modules_is_stored_once(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, bias=False))
    model[2].weight = model[0].weight
    fast = fxsparse.convert(
        model.eval(), {"0": torch.rand(8, 8, 3, 3) < 0.1}, example_inputs=(2, 8, 6, 6), settings=QUICK
    )
    x = torch.randn(2, 8, 6, 6)
    loaded = round_trip(fast, tmp_path)
    assert loaded.get_parameter("0.weight") is loaded.get_parameter("2.weight")
    assert_runs_as(fast, loaded, x)
    fxsparse.set_mode(fast, "sparse")
    frozen = round_trip(fxsparse.freeze(fast), tmp_path)
    assert_runs_as(fast, frozen, x)
    assert list(frozen.state_dict()) == list(fast.state_dict())
    assert_runs_as(fxsparse.to_dense(fast), fxsparse.to_dense(frozen), x)


def test_a_plan_is_followed_after_loading_without_measuring(tmp_path: Path, monkeypatch) -> None:
    fast = converted(Branches(), {"x": torch.randn(2, 3, 12, 12), "scale": torch.tensor(2.0)})
    inputs = {"x": torch.randn(2, 3, 12, 12), "scale": torch.tensor(2.0)}
    fxsparse.calibrate(fast, inputs, budget_s=0.5)
    (entry,) = fast.plan.entries
    loaded = round_trip(fast, tmp_path)
    monkeypatch.setattr(fxsparse.calibration, "measure", lambda *args: pytest.fail("measured again"))
    paths = [site.path for _, site in sites.conv_sites(loaded)]
    now = layouts.current(loaded)
    fxsparse.set_mode(loaded, "vanilla")
    fxsparse.calibrate(loaded, inputs, deterministic=True)
    assert [site.path for _, site in sites.conv_sites(loaded)] == paths
    assert set(layouts.current(loaded)) == set(now)
    fxsparse.set_mode(loaded, "vanilla")
    fxsparse.calibrate(loaded, inputs, plan=loaded.plan)
    assert [site.path for _, site in sites.conv_sites(loaded)] == [site.path for site in entry.sites.values()]
    assert not [note for note in loaded.report.plan_notes if "no place" in note or "does not know" in note]


def test_a_loaded_model_can_do_all_that_the_saved_one_can(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 16, 16)
    fast = converted(small_net(), (x,))
    loaded = round_trip(fast, tmp_path)
    copied = copy.deepcopy(loaded)
    assert_runs_as(fast, copied, x)
    assert_runs_as(fxsparse.to_dense(fast), fxsparse.to_dense(loaded), x)
    again = round_trip(loaded, tmp_path)
    assert_runs_as(fast, again, x)
    assert again.report == loaded.report
    fxsparse.calibrate(loaded, x, budget_s=0.5)
    assert len(loaded.plan.entries) == 1
    assert all(row.vanilla_ms is not None for row in loaded.report.rows)
    frozen = round_trip(fxsparse.freeze(copy.deepcopy(loaded)), tmp_path)
    assert_runs_as(loaded, frozen, x)


def test_a_dense_checkpoint_loads_into_a_loaded_model(tmp_path: Path) -> None:
    model = small_net()
    masks = random_masks(model)
    fast = fxsparse.convert(model, masks, example_inputs=(2, 3, 8, 8), settings=QUICK)
    loaded = round_trip(fast, tmp_path)
    other = small_net().state_dict()
    fast.load_state_dict(other)
    loaded.load_state_dict(other)
    assert_runs_as(fast, loaded, torch.randn(2, 3, 8, 8))


def run_python(code: str, *arguments: str) -> str:
    """Run code in a fresh interpreter that finds fxsparse alone, and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(fxsparse.__file__).parents[1])},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_fresh_processes_load_it_without_the_models_class_also_without_compiled_operators(tmp_path: Path) -> None:
    fast = converted(Branches(), {"x": torch.randn(2, 3, 12, 12), "scale": torch.tensor(2.0)})
    x, scale = torch.randn(3, 3, 10, 10), torch.tensor(0.5)
    fxsparse.save(fast, tmp_path / "model.pt2")
    with torch.no_grad():
        values = {"x": x, "scale": scale, "expected": fast(x=x, scale=scale)["out"]}
    save_file(values, tmp_path / "values.safetensors")
    code = """
        import sys, torch
        from safetensors.torch import load_file

        def missing(path):
            raise OSError("not here")

        if sys.argv[3] == "reference":
            torch.ops.load_library = missing
        import fxsparse

        model = fxsparse.load(sys.argv[1])
        x, scale, expected = map(load_file(sys.argv[2]).get, ("x", "scale", "expected"))
        with torch.no_grad():
            error = (model(x=x, scale=scale)["out"] - expected).abs().max().item()
            fxsparse.set_mode(model, "test")
            model(x=x, scale=scale)
        print(fxsparse.capabilities().cpu, model.report.sparse, "models" in sys.modules, error)
    """
    files = (str(tmp_path / "model.pt2"), str(tmp_path / "values.safetensors"))
    for kernels, allowed in (("compiled", 0.0), ("reference", 1e-5)):
        found, sparse, knows_the_class, error = run_python(code, *files, kernels).split()
        assert (found == "reference") == (kernels == "reference")
        assert (sparse, knows_the_class) == (str(fast.report.sparse), "False")
        assert float(error) <= allowed
