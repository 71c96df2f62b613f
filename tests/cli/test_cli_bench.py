"""`fxsparse bench`: what is timed, against what, and what happens where outputs disagree."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from running import Run
from torch import nn

import fxsparse
from fxsparse import arms, output_agreement, sites
from fxsparse.inputs import ExampleInputs
from fxsparse.report import graphs_of

QUICK = ("--input", "2x3x8x8", "--budget", "0.05", "--seconds", "0.05")


def test_the_arms_are_timed_interleaved_and_agree(run: Run) -> None:
    result = run("bench", "nets:pruned", *QUICK, "--no-compile", "--json")
    assert result.code == 0
    values = result.json
    assert list(values["times"]) == ["dense eager", "dense channels_last", "fxsparse"]
    assert values["ok"] and values["best_fxsparse"] == "fxsparse" and values["best_dense"].startswith("dense")
    assert values["times"][values["best_dense"]]["speed"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert values["gain"] == values["times"]["fxsparse"]["speed"]
    assert len({timing["rounds"] for timing in values["times"].values()}) == 1
    for timing in values["times"].values():
        assert 0 < timing["ci_low_ms"] <= timing["median_ms"] <= timing["ci_high_ms"]
        assert timing["error"] <= values["allowed_error"] < 1e-4
    assert len(values["report"]["rows"]) == 2


def test_the_table_has_every_arm_and_the_gain(run: Run) -> None:
    code, out, _ = run("bench", "nets:pruned", *QUICK, "--no-compile")
    assert code == 0
    for text in ("dense eager", "dense channels_last", "median ms", "95 % CI", "The outputs agree", "the speed of"):
        assert text in out


def test_compiled_arms_are_timed_or_left_out_with_the_reason(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def compiled(model: nn.Module, inputs: ExampleInputs, **_: Any) -> arms.Arm:
        asked.append(model)
        if len(asked) == 2:
            raise RuntimeError("no compiler\nat all")
        return lambda: inputs.run(model)

    monkeypatch.setattr(arms, "compiled", compiled)
    values = run("bench", "nets:pruned", *QUICK, "--json").json
    assert list(values["times"]) == ["dense eager", "dense channels_last", "fxsparse", "dense compiled"]
    assert values["notes"] == ["'fxsparse compiled': torch.compile is left out: RuntimeError: no compiler"]


def test_batch_norms_are_folded_in_the_dense_arms_where_torch_fx_can_trace(run: Run) -> None:
    assert run("bench", "nets:pruned", *QUICK, "--no-compile", "--json").json["notes"] == []
    values = run("bench", "nets:Branches", "--prune", "0.9", *QUICK, "--no-compile", "--json").json
    assert any("Batch norms are not folded in the dense arms" in note for note in values["notes"])
    assert values["ok"] and values["report"]["rung"] == "modules"


def test_a_model_with_a_dtype_in_its_code_is_compared_by_a_guess(run: Run) -> None:
    values = run("bench", "nets:InFloat32", "--prune", "0.9", *QUICK, "--no-compile", "--json").json
    assert values["ok"]
    assert any("does not run in float64" in note for note in values["notes"])


def test_half_precision_is_measured_by_its_own_rounding(run: Run) -> None:
    values = run("bench", "nets:pruned", *QUICK, "--no-compile", "--dtype", "bfloat16", "--json").json
    assert values["ok"]
    assert 1e-3 < values["allowed_error"] < 1


def _tampering(convert: Any) -> Any:
    def tamper(*arguments: Any, **options: Any) -> nn.Module:
        model = convert(*arguments, **options)
        fxsparse.set_mode(model, "sparse")
        for gm in graphs_of(model):
            for _, site in sites.conv_sites(gm):
                if site.name == "body":
                    sites.attribute(gm, site.packed_names[0]).mul_(1.5)
        return model

    return tamper


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_outputs_that_disagree_fail_with_the_place_and_no_times(
    run: Run, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    monkeypatch.setattr(fxsparse, "convert", _tampering(fxsparse.convert))
    result = run("bench", "nets:pruned", *QUICK, "--no-compile", *options)
    assert result.code == 1
    text = result.json["error"] if options else result.out
    assert not options or result.json["ok"] is False
    assert "'fxsparse' does not compute what the masked dense model does: the largest error is" in text
    assert "in output tensor 0 at [" in text and " instead of " in text
    assert "'body'" in text and "Nothing was timed." in text


def test_an_output_of_another_shape_fails(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(*arguments: Any, original: Any = fxsparse.convert, **options: Any) -> nn.Module:
        model = original(*arguments, **options)
        model.register_forward_hook(lambda *call: call[-1][:1])
        return model

    monkeypatch.setattr(fxsparse, "convert", convert)
    code, out, _ = run("bench", "nets:pruned", *QUICK, "--no-compile")
    assert code == 1
    assert "The output has shape (1, 10); (2, 10) is wanted." in out
    assert "The two paths of every convolution agree." in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nets:pruned", "--input", "2x3x8x8", "--seconds", "0"), "--seconds 0 is no time"),
        (("nets:pruned", "--input", "2x3x8x8", "--budget", "-1"), "budget_s=-1.0 is no time"),
        (("nets:pruned", "--input", "2x3x8x8", "--margin", "1"), "margin=1.0 is outside"),
        (("nets:Constant", "--args", "[Infinity]", *QUICK), "output is not finite"),
        (("nets:Constant", "--args", "[1]", *QUICK), "no floating-point tensor"),
        (("nets:pruned",), "the following arguments are required: --input"),
    ],
)
def test_what_cannot_be_timed_is_refused(run: Run, arguments: tuple[str, ...], message: str) -> None:
    code, _, err = run("bench", *arguments, "--no-compile")
    assert code == 2 and message in err


def test_a_saved_model_is_compared_with_its_dense_form(run: Run, folder: Path) -> None:
    assert run("convert", "nets:pruned", *QUICK[:4], "--output", "fast.pt2").code == 0
    values = run("bench", "fast.pt2", "--input", "2x3x8x8", "--seconds", "0.05", "--no-compile", "--json").json
    assert values["ok"] and list(values["times"]) == ["dense eager", "dense channels_last", "fxsparse"]
    for option, value in (("--margin", "0.1"), ("--prune", "0.5"), ("--include", "body")):
        code, _, err = run("bench", "fast.pt2", "--input", "2x3x8x8", option, value)
        assert code == 2 and err.startswith(f"fxsparse: error: {option} is for ")


def test_compiling_freezes_a_copy_and_gives_what_the_model_gives() -> None:
    """The one test that runs Inductor."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    inputs = ExampleInputs((torch.randn(1, 3, 6, 6),), {})
    arm, reason = arms.compiled_or_reason(model, inputs, limit_s=300)
    assert arm is not None and reason == ""
    with torch.inference_mode():
        torch.testing.assert_close(arm(), model(*inputs.args))


def test_a_compilation_that_takes_too_long_is_given_up() -> None:
    class Slow(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch._dynamo.graph_break()
            while True:
                x = x + 1

    arm, reason = arms.compiled_or_reason(Slow(), ExampleInputs((torch.zeros(1),), {}), limit_s=1)
    assert arm is None
    assert reason == "torch.compile is left out: TimeoutError: it took over 1 s"


def test_dense_arms_run_on_inputs_of_their_layout() -> None:
    layouts = []
    model = nn.Conv2d(3, 4, 3).eval()
    model.register_forward_pre_hook(lambda module, args: layouts.append((args[0].stride(), module.weight.stride())))
    dense = arms.dense_arms(model, ExampleInputs((torch.randn(2, 3, 6, 6),), {}))
    for arm in dense.values():
        arm()
    assert layouts == [((108, 36, 6, 1), (27, 9, 3, 1)), ((108, 1, 18, 3), (27, 1, 9, 3))]


def test_folding_removes_the_batch_norms_and_keeps_the_model() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    model[1].running_mean.normal_()
    x = torch.randn(2, 3, 6, 6)
    folded = arms.fold_batch_norm(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    torch.testing.assert_close(folded(x), model(x))
    assert isinstance(model[1], nn.BatchNorm2d)


def test_own_error_leaves_integers_alone_and_scales_with_the_dtype() -> None:
    class Gather(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 7))

        def forward(self, index: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return self.weight[index] @ x

    model, index = Gather().eval(), torch.tensor([0, 4])
    _, single = output_agreement.own_error(model, index, torch.randn(7, 3))
    _, half = output_agreement.own_error(model.bfloat16(), index, torch.randn(7, 3).bfloat16())
    assert single < 1e-6 < half < 0.1
    eps = torch.finfo(torch.bfloat16).eps
    allowed = output_agreement.allowed_error(half, torch.bfloat16, measured_in=torch.bfloat16)
    assert allowed == pytest.approx(output_agreement.FACTOR * half + output_agreement.FLOOR * eps)
    assert dataclasses.asdict(output_agreement.Agreement(half, allowed))["error"] == half
