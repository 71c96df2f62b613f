"""`fxsparse convert`, `calibrate` and `info`: files written, read again, and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from running import Run
from safetensors.torch import save_file

import fxsparse
from fxsparse.cli import models
from fxsparse.plan import Plan

X = ("--input", "2x3x8x8", "--budget", "0.05")
UNMEASURED = ("--input", "2x3x8x8", "--no-calibrate")
# A model that exits with 130 once it is made: other options are checked before.
IN_VAIN = ("nets:interrupts", "--input", "2x3x8x8")


def _factory(folder: Path, name: str) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        return models._attribute("nets", name)


def test_a_converted_model_is_saved_with_its_report_and_plan(run: Run, folder: Path) -> None:
    files = ("--output", "fast.pt2", "--report", "report.html", "--plan", "plan.json")
    result = run("convert", "nets:pruned", *X, *files, "--json")
    assert result.code == 0, result.err
    values = result.json
    assert (values["output"], values["kind"], values["html"]) == ("fast.pt2", "model", "report.html")
    assert values["bytes"] == (folder / "fast.pt2").stat().st_size
    assert [row["name"] for row in values["report"]["rows"]] == ["stem.0", "body"]
    assert (folder / "report.html").read_text().startswith("<!doctype html>")
    (entry,) = Plan.load(folder / "plan.json").entries
    assert (entry.key.shapes, entry.key.dtype, entry.key.deploy) == (((2, 3, 8, 8),), "float32", "eager")

    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        wanted = _factory(folder, "pruned")().eval()(x)
        torch.testing.assert_close(fxsparse.load("fast.pt2")(x), wanted, rtol=1e-4, atol=1e-5)


def test_the_text_has_the_report_and_names_the_files(run: Run) -> None:
    result = run("convert", "nets:pruned", *X, "--output", "fast.pt2", "--plan", "plan.json", "--report", "r.html")
    assert result.code == 0, result.err
    for text in ("Captured by: symbolic.", "Whole model:", "Saved 'fast.pt2' (", "is in 'plan.json' (1 entry)."):
        assert text in result.out
    assert "The report is in 'r.html'." in result.out


def test_without_calibration_the_cost_model_decides_and_nothing_is_measured(run: Run) -> None:
    result = run("convert", "nets:pruned", *UNMEASURED, "--output", "fast.pt2", "--json")
    assert result.code == 0, result.err
    assert result.json["report"]["environment"] == {}
    assert "not measured" in result.json["report"]["plan_notes"][0]


def test_a_recorded_plan_is_followed_without_measuring(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("convert", "nets:pruned", *X, "--output", "fast.pt2", "--plan", "plan.json", "--json")
    first = run(*arguments).json
    monkeypatch.setattr("fxsparse.calibration.measure", None)  # would be called
    again = run(*arguments).json
    assert again["report"]["rows"] == first["report"]["rows"]
    assert again["report"]["environment"]["date"] == first["report"]["environment"]["date"]


def test_a_frozen_model_is_smaller(run: Run) -> None:
    arguments = ("convert", "nets:pruned", *UNMEASURED, "--output", "f.pt2", "--json")
    assert run(*arguments, "--freeze").json["bytes"] < run(*arguments).json["bytes"]


def test_a_model_captured_module_by_module_is_saved_as_weights(run: Run, folder: Path) -> None:
    arguments = ("convert", "nets:Branches", "--prune", "0.9", *UNMEASURED, "--output", "fast.safetensors")
    result = run(*arguments, "--json")
    assert result.code == 0, result.err
    assert result.json["kind"] == "weights"
    assert "captured module by module" in result.json["notes"][-1]
    assert "fxsparse.load_weights(path, model)" in run(*arguments).out
    model = fxsparse.load_weights("fast.safetensors", _factory(folder, "Branches")().eval())
    with torch.no_grad():
        assert model(torch.randn(1, 3, 8, 8)).shape == (1, 10)


def test_saved_weights_and_their_factory_are_a_saved_model(run: Run) -> None:
    converted = ("convert", "nets:Branches", "--prune", "0.9", "--dtype", "bfloat16", *UNMEASURED)
    assert run(*converted, "--output", "fast.safetensors").code == 0
    saved = ("nets:Branches", "--weights", "fast.safetensors", "--dtype", "bfloat16", "--input", "2x3x8x8")
    result = run("calibrate", *saved, "--budget", "0.05", "--output", "again.safetensors", "--json")
    assert result.code == 0, result.err
    values = run("info", "again.safetensors", "--json").json
    assert (values["kind"], values["dtype"], len(values["plan"]["entries"])) == ("weights", "bfloat16", 1)
    result = run("bench", *saved, "--seconds", "0.05", "--no-compile", "--json")
    assert result.code == 0 and result.json["ok"], result
    code, _, err = run("bench", *saved, "--prune", "0.5")
    assert code == 2 and err.startswith("fxsparse: error: --prune is for models that are yet to be")


@pytest.mark.parametrize("option", ["--output", "--report", "--plan"])
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no/such/f", "the folder 'no/such' does not exist"),
        ("nets.py/f", "the folder 'nets.py' does not exist"),
        (".", "'.' is a folder. Name a file"),
        ("/proc/f", "nothing can be written to the folder '/proc'"),
    ],
)
def test_files_that_cannot_be_written_are_refused_before_the_work(
    run: Run, option: str, path: str, message: str
) -> None:
    output = () if option == "--output" else ("--output", "fast.pt2")
    code, out, err = run("convert", *IN_VAIN, *output, option, path)
    assert (code, out) == (2, "")
    assert f"{option}: {message}" in err


def test_a_file_that_holds_no_plan_is_refused_before_the_work(run: Run, folder: Path) -> None:
    (folder / "plan.json").write_text("{}")
    code, _, err = run("convert", *IN_VAIN, "--output", "fast.pt2", "--plan", "plan.json")
    assert code == 2 and "The plan 'plan.json' holds no plan" in err


def test_calibrating_for_other_inputs_adds_to_the_plan(run: Run, folder: Path) -> None:
    assert run("convert", "nets:pruned", *X, "--output", "fast.pt2").code == 0
    more = ("--input", "3x3x8x8", "--budget", "0.05", "--output", "fast3.pt2", "--plan", "plan.json")
    result = run("calibrate", "fast.pt2", *more, "--json")
    assert result.code == 0, result.err
    assert result.json["report"]["rows"][1]["input_shape"] == [3, 16, 8, 8]
    shapes = [entry.key.shapes for entry in Plan.load(folder / "plan.json").entries]
    assert shapes == [((2, 3, 8, 8),), ((3, 3, 8, 8),)]
    saved = run("info", "fast3.pt2", "--json").json
    assert len(saved["plan"]["entries"]) == 2


def test_calibrating_deterministically_follows_the_nearest_entry(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("convert", "nets:pruned", *X, "--output", "fast.pt2").code == 0
    monkeypatch.setattr("fxsparse.calibration.measure", None)  # would be called
    result = run("calibrate", "fast.pt2", "--input", "4x3x8x8", "--deterministic", "--output", "f.pt2", "--json")
    assert result.code == 0, result.err
    assert "measured at batch 2, and is used at batch 4" in result.json["report"]["plan_notes"][0]


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("no.pt2", "'no.pt2' is no model: neither a file that exists"),
        ("nets:Net", "'nets:Net' makes a model that is not converted"),
        ("nets.py", "'nets.py'"),
    ],
)
def test_calibrating_something_else_is_refused(run: Run, file: str, message: str) -> None:
    code, out, err = run("calibrate", file, "--input", "1x3x8x8", "--output", "f.pt2")
    assert (code, out) == (2, "") and message in err


def test_a_frozen_model_cannot_be_calibrated(run: Run) -> None:
    assert run("convert", "nets:pruned", *UNMEASURED, "--output", "fast.pt2", "--freeze").code == 0
    code, _, err = run("calibrate", "fast.pt2", "--input", "1x3x8x8", "--output", "f.pt2")
    assert code == 2 and "This model is frozen" in err


def test_info_prints_report_and_plan_of_a_saved_model(run: Run, folder: Path) -> None:
    converted = run("convert", "nets:pruned", *X, "--output", "fast.pt2", "--json").json
    result = run("info", "fast.pt2", "--json")
    values = result.json
    assert result.code == 0
    assert values["report"] == converted["report"]
    assert values["bytes"] == converted["bytes"]
    assert values["dtype"] == "float32" and values["device"] == "cpu"
    assert values["versions"]["fxsparse"] == fxsparse.__version__
    out = run("info", "fast.pt2").out
    for text in ("fast.pt2: ", "float32 on cpu", "Captured by: symbolic", "measured on", "2x3x8x8", "eager"):
        assert text in out


def test_info_reads_plans(run: Run) -> None:
    assert run("convert", "nets:pruned", *X, "--output", "fast.pt2", "--plan", "plan.json").code == 0
    values = run("info", "plan.json", "--json").json
    assert values["kind"] == "plan" and len(values["plan"]["entries"]) == 1
    assert "plan.json: fxsparse plan" in run("info", "plan.json").out


def test_info_lists_the_tensors_of_a_safetensors_file(run: Run, folder: Path) -> None:
    save_file({"a.weight": torch.zeros(2, 3), "b": torch.zeros((), dtype=torch.int64)}, folder / "t.safetensors")
    values = run("info", "t.safetensors", "--json").json
    assert values["tensors"] == {"a.weight": {"dtype": "F32", "shape": [2, 3]}, "b": {"dtype": "I64", "shape": []}}
    out = run("info", "t.safetensors").out
    assert "2 tensors in safetensors" in out and "2x3" in out and "scalar" in out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "'f' cannot be read (No such file or directory)"),
        (b"", "f"),
        (b"hello world", "f"),
        (b"PK\x03\x04 and more", "f"),
        (b'{"format": 1}', "holds no plan"),
        ((10).to_bytes(8, "little") + b"{broken}  ", "'f' is no usable safetensors file"),
    ],
)
def test_info_refuses_what_it_does_not_know(run: Run, folder: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (folder / "f").write_bytes(content)
    code, out, err = run("info", "f")
    assert (code, out) == (2, "")
    assert err.startswith("fxsparse: error: ") and message in err


def test_what_was_asked_for_reaches_the_settings(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def stop(*_: Any, settings: fxsparse.Settings, **__: Any) -> None:
        seen.append(settings)
        raise KeyboardInterrupt

    monkeypatch.setattr(fxsparse, "convert", stop)
    options = ("--include", "stem*", "--include", "body", "--exclude", "body", "--capture", "export")
    measuring = ("--budget", "3", "--margin", "0.2", "--deploy", "compiled")
    assert run("convert", "nets:Net", "--input", "1x3x8x8", "--output", "f", *options, *measuring).code == 130
    (settings,) = seen
    assert (settings.include, settings.exclude) == (("stem*", "body"), ("body",))
    assert (settings.capture, settings.margin, settings.budget_s) == ("export", 0.2, 3.0)
    assert settings.deploy == "compiled" and not settings.progress
