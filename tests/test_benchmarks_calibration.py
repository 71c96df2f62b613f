"""The commands of `python -m benchmarks` that judge calibration: `tuner` and `never-slower`."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import small_net
from torch import nn

from benchmarks import __main__ as command
from benchmarks import never_slower, pruned, tuner
from benchmarks.never_slower import Cell
from benchmarks.results import Results
from fxsparse.plan import Move, PlanEntry, PlanKey, SitePlan
from fxsparse.timing import Ratio, Timings


def _planned(*, layout: str | None = None, moves: tuple[Move, ...] = (), **paths: str) -> nn.Module:
    """Return a model with a plan: at site a sparse wins clearly, at b vanilla, c is a tie, d has no sparse path."""
    times = {"a": (4.0, 2.0), "b": (3.0, 6.0), "c": (1.0, 1.01), "d": (5.0, None)}
    sites = {
        name: SitePlan(paths.get(name, "vanilla"), layout, vanilla_ms=vanilla, sparse_ms=sparse)
        for name, (vanilla, sparse) in times.items()
    }
    entry = PlanEntry(PlanKey("here", "float32", ((1, 3, 8, 8),), "eager"), sites, moves)
    model = nn.Identity()
    model.plan = SimpleNamespace(entries=(None, entry))
    return model


def test_flips_are_counted_against_the_majority_of_the_repeats() -> None:
    repeats = [tuner.paths_of(_planned(a="sparse", c=c)) for c in ("sparse", "vanilla", "sparse", "sparse")]
    assert tuner.flip_rate(repeats, ["a", "b", "c"]) == 1 / 12
    assert tuner.flip_rate(repeats, ["a", "b"]) == 0
    assert tuner.flip_rate(repeats, []) == 0


def test_regret_is_the_time_lost_to_the_best_paths_at_the_references_times() -> None:
    times = tuner.times_of(_planned())
    assert times == {"a": (4.0, 2.0), "b": (3.0, 6.0), "c": (1.0, 1.01)}  # d has nothing to choose
    assert tuner.regret(tuner.paths_of(_planned(a="sparse")), times) == 0
    assert tuner.regret(tuner.paths_of(_planned()), times) == pytest.approx(2 / 6)
    everywhere = tuner.paths_of(_planned(a="sparse", b="sparse", c="sparse"))
    assert tuner.regret(everywhere, times) == pytest.approx(3.01 / 6)
    assert tuner.regret({}, {}) == 0
    assert [tuner.is_tie(*pair) for pair in times.values()] == [False, False, True]


def test_plans_that_differ_in_layout_alone_are_different() -> None:
    move = Move("", "relu", "channels_last", ("conv",))
    plans = [_planned(), _planned(layout="channels_last"), _planned(moves=(move,)), _planned(a="sparse")]
    assert len({tuner.choices_of(plan) for plan in plans}) == 4
    assert tuner.choices_of(_planned()) == tuner.choices_of(plans[0])


def test_model_regret_weighs_a_plan_by_its_repeats() -> None:
    outcomes = [
        tuner.Outcome(repeats, False, Ratio(slower, slower, slower), Ratio(1 / slower, 1, 1))
        for repeats, slower in ((3, 1.0), (1, 1.25))
    ]
    assert tuner.mean_model_regret(outcomes) == pytest.approx(0.25 / 4)
    assert tuner.mean_over_vanilla(outcomes) == pytest.approx((3 + 0.8) / 4)


def _cell(model: str, ratio: float, **changes: Any) -> Cell:
    cell = Cell(model, 64, 0.1, "regrouped", 1, vanilla_ms=1.0, calibrated_ms=1.0, calibrate_s=1.0)
    measured = Ratio(ratio, ratio - 0.01, ratio + 0.01)
    return dataclasses.replace(cell, **{"ratio": measured, "channels_last": measured, **changes})


def test_summary_names_the_worst_model_of_each_kind_of_cell() -> None:
    cells = [_cell("a", 1.2), _cell("b", 0.97), _cell("c", 1.5), _cell("a", 3.0, batch=16), _cell("d", 0, error="x")]
    small, large = never_slower.summary(cells)
    assert (small["models"], small["min"], small["median"], small["max"]) == (3, 0.97, 1.2, 1.5)
    assert (small["worst"], small["batch"], large["batch"], large["models"]) == ("b", 1, 16, 1)
    printed = never_slower.render(cells)
    assert "Worst of 4 cells: b@64" in printed
    assert "1 of 5 cells below 0.98, 1 failed, 0 measured twice" in printed


def test_only_a_whole_grid_without_slow_or_failed_cells_is_ok() -> None:
    def ok(*cells: Cell, left: int = 0) -> bool:
        return bool(never_slower.result(list(cells), {}, left)["ok"])

    good = _cell("a", 0.98)
    assert ok(good)
    assert not ok()
    assert not ok(good, left=1)
    assert not ok(good, _cell("b", 0.979))
    assert not ok(good, _cell("b", 1.0, error="it broke"))
    assert never_slower.result([good, _cell("b", 0.9)], {}, 0)["worst"] == 0.9


def test_a_slow_cell_is_measured_again_for_twice_as_long_and_keeps_both(monkeypatch: pytest.MonkeyPatch) -> None:
    budgets = []

    def timed(arms: Any, *_: Any, budget_s: float, **__: Any) -> Timings:
        budgets.append(budget_s)
        return Timings({"vanilla": [0.9 + 0.1 * len(budgets)] * 9, "calibrated": [1.1] * 9, "channels_last": [2.2] * 9})

    model = _planned(a="sparse")
    x = torch.zeros(1, 3, 8, 8)
    begun = pruned.Start(model, nn.Identity(), {1: x}, {1: x}, {1: 0.0})
    monkeypatch.setattr(never_slower, "interleaved", timed)
    monkeypatch.setattr(never_slower, "start", lambda *_: begun)
    monkeypatch.setattr(never_slower.fxsparse, "calibrate", lambda *_, **__: model, raising=False)
    arguments = argparse.Namespace(partitioner="clustering", budget=None, measure=3.0)
    (cell,) = never_slower.measure([Cell("any", 8, 0.1, "regrouped", 1)], arguments)
    assert (cell.error, budgets, cell.sparse, cell.sites) == ("", [3.0, 6.0], 1, 4)
    assert cell.first is not None and cell.ratio is not None and cell.channels_last is not None
    assert (cell.first.median, cell.ratio.median) == pytest.approx((1.0 / 1.1, 1.1 / 1.1))
    assert cell.channels_last.median == 2
    assert cell.ok


def _fake(monkeypatch: pytest.MonkeyPatch, fail: str = "") -> list[tuple[str, float]]:
    """Replace the measuring; return the list of the conversions that are done from now on."""
    done = []

    def measure(cells: list[Cell], _: Any) -> Iterator[Cell]:
        done.append((cells[0].model, cells[0].density))
        for cell in cells:
            if cell.model == fail and cell.batch == 16:
                raise KeyboardInterrupt
            yield dataclasses.replace(_cell(cell.model, 1.5), **dict(zip(_KEY, cell.key, strict=True)))

    monkeypatch.setattr(never_slower, "measure", measure)
    return done


_KEY = ("model", "size", "density", "structure", "batch")


def test_a_cut_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "grid.json"
    grid = ["never-slower", "--only", "re[sp]*", "--density", "1", "0.1", "--json", str(file)]  # resnet18, repvgg_a0
    _fake(monkeypatch, fail="repvgg_a0")
    with pytest.raises(KeyboardInterrupt):
        command.main(grid)
    cut = json.loads(file.read_text())
    assert (len(cut["cells"]), cut["left"], cut["ok"]) == (7, 5, False)

    done = _fake(monkeypatch)
    result = command.main([*grid, "--resume"])
    # The conversion that was cut after its first batch size is done again, what was whole is not.
    assert done == [("repvgg_a0", 1.0), ("repvgg_a0", 0.1), ("repvgg_a0", 0.1)]
    assert len({Cell.from_dict(cell).key for cell in result["cells"]}) == len(result["cells"]) == 12
    assert (result["ok"], result["left"]) == (True, 0)
    assert result["cells"][:6] == cut["cells"][:6]
    assert json.loads(file.read_text()) == result

    # Another part of the grid goes into the same file; failed cells are tried again.
    result["cells"][0]["error"] = "it broke"
    file.write_text(json.dumps(result))
    done = _fake(monkeypatch)
    assert len(command.main([*grid, "--density", "0.05", "1", "--resume"])["cells"]) == 20
    assert done == [("resnet18", 0.05)] * 2 + [("resnet18", 1.0)] + [("repvgg_a0", 0.05)] * 2


def test_a_run_is_not_resumed_with_other_settings_or_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fake(monkeypatch)
    file = tmp_path / "grid.json"
    grid = ["never-slower", "--only", "resnet18", "--json", str(file)]
    command.main([*grid, "--resume"])  # there is no file yet: everything is to be done
    with pytest.raises(SystemExit, match="measure"):
        command.main([*grid, "--resume", "--measure", "1"])
    with pytest.raises(SystemExit, match="threads"):
        Results(file, {"environment": {"threads": -1}}).load()
    with pytest.raises(SystemExit, match="--json"):
        command.main(["never-slower", "--resume"])


def test_the_grid_is_180_conversions_of_20_models() -> None:
    parser = argparse.ArgumentParser()
    never_slower.add_arguments(parser)
    grid = never_slower.conversions(parser.parse_args([]))
    assert len(grid) == 180
    assert len({cell.model for cells in grid for cell in cells}) == 20
    assert sum(map(len, grid)) == 360


_TINY = ("--density", "0.1", "--structure", "regrouped", "--budget", "0.02", "--measure", "0.01")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> str:
    """Put a model of four convolutions into the zoo."""
    monkeypatch.setitem(pruned.ZOO, "small", ("-", 16))
    monkeypatch.setattr(pruned, "build", lambda _: small_net())
    return "small"


def test_never_slower_measures_a_cell_end_to_end(small: str, tmp_path: Path) -> None:
    file = tmp_path / "grid.json"
    result = command.main(["never-slower", "--only", small, "--batch", "1", "2", *_TINY, "--json", str(file)])
    assert json.loads(file.read_text()) == json.loads(json.dumps(result))
    assert [(cell["batch"], cell["error"]) for cell in result["cells"]] == [(1, ""), (2, "")]
    for cell in result["cells"]:
        assert cell["sites"] == 4
        assert 0 < cell["rel_err"] <= cell["allowed"] < 1e-4
        assert cell["ratio"]["low"] <= cell["ratio"]["median"] <= cell["ratio"]["high"]
        assert cell["first"] is None or cell["first"]["median"] < never_slower.LEAST
    assert result["worst"] == min(cell["ratio"]["median"] for cell in result["cells"])


def test_tuner_measures_a_case_end_to_end(small: str, tmp_path: Path) -> None:
    file = tmp_path / "numbers.json"
    result = command.main(["tuner", "--models", small, "--repeats", "2", *_TINY, "--json", str(file)])
    (case,) = json.loads(file.read_text())["cases"]
    assert case == json.loads(json.dumps(result["cases"][0]))
    assert len(case["seconds"]) == len(case["regrets"]) == len(case["paths"]) == 2
    assert 0 < case["sites"] == len(case["times"]) <= 4
    assert 0 <= case["clear_flips"] <= 1
    assert min([*case["regrets"], case["reference_regret"]]) >= 0
    assert sum(outcome["repeats"] for outcome in case["outcomes"]) == 2


def test_a_failed_conversion_is_a_cell_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> pruned.Start:
        raise ValueError("a broken pass")

    monkeypatch.setattr(never_slower, "start", fail)
    result = command.main(["never-slower", "--only", "resnet18", "--density", "1"])
    assert {cell["error"] for cell in result["cells"]} == {"ValueError: a broken pass"}
    assert "Traceback" in result["cells"][0]["details"]
    assert (result["ok"], result["worst"], len(result["cells"])) == (False, None, 2)


def test_both_structures_keep_as_many_weights_and_regrouped_ones_lie_in_blocks() -> None:
    model = nn.Sequential(nn.Conv2d(16, 64, 3), nn.Conv2d(64, 64, 3, groups=64))
    plain, blocks = (pruned.make_masks(model, 0.25, structure) for structure in pruned.STRUCTURES)
    for name in plain:
        assert int(blocks[name].sum()) <= int(plain[name].sum())
    assert len(blocks["0"].flatten(1).unique(dim=0)) <= 2
