"""Time a model dense and through fxsparse, all interleaved in one run, after checking that the outputs agree.

Dense is what a user could run without fxsparse: eager with batch norms folded, the same in channels_last, and through
torch.compile with frozen weights. A saved model is compared with fxsparse.to_dense of it.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
from functools import partial
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

import fxsparse
from fxsparse import report as reports
from fxsparse.arms import Arm, compiled_or_reason, dense_arms, fold_batch_norm
from fxsparse.cli import arguments as options
from fxsparse.cli import models
from fxsparse.cli.output import CHECK_FAILED, OK, Outcome, in_one_line, on_terminal
from fxsparse.errors import FxsparseError
from fxsparse.inputs import ExampleInputs
from fxsparse.masks import bake
from fxsparse.output_agreement import Agreement, allowed_error, largest_error, own_error, tensors
from fxsparse.timing import Timings, interleaved

HELP = "time a model dense and through fxsparse, interleaved"
EPILOG = """\
examples:
  fxsparse bench nets:build --weights pruned.safetensors --input 8x3x32x32
  fxsparse bench fast.pt2 --input 1x3x224x224 --no-compile --json
"""

_SECONDS = 5.0
_MOST_ROUNDS = 101
_COMPILE_LIMIT_S = 600
# Of float32, where the model does not run in float64: the worst of the 130 models of the zoos has a tenth of that.
_OWN_ERROR = 1e-4
_TF32_ERROR = 2.0**-11  # of one rounding to TF32; those of a sum mostly cancel out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    options.add_model(parser, kinds="package.module:factory, or a file that fxsparse.save wrote")
    options.add_inputs(parser, required=True)
    options.add_settings(parser, measures=True)
    group = parser.add_argument_group("timing")
    group.add_argument("--no-compile", action="store_true", help="leave torch.compile out, which takes long")
    group.add_argument(
        "--seconds", type=float, default=_SECONDS, metavar="S", help=f"for timing, about (default: {_SECONDS:g})"
    )


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """What every arm has to compute.

    Attributes:
        output: of the masked dense model.
        allowed: how far another order of summation may be from it.
    """

    output: Any
    allowed: float


def run(arguments: argparse.Namespace) -> Outcome:
    """Check and time."""
    if not arguments.seconds > 0:
        raise FxsparseError(f"--seconds {arguments.seconds:g} is no time. Give seconds above 0.")
    with models.surroundings(arguments):
        found = models.subject(arguments, takes_saved=True)
        assert found.inputs is not None  # --input is required
        notes = list(found.notes)
        fast, dense, folded = _models(arguments, found, notes)
        wanted = _wanted(dense, found.inputs, notes)
        arms = dense_arms(folded, found.inputs)
        arms["fxsparse"] = partial(found.inputs.run, fast)
        if not arguments.no_compile:
            for name, model in (("dense compiled", folded), ("fxsparse compiled", fast)):
                arm, reason = compiled_or_reason(model, found.inputs, _COMPILE_LIMIT_S)
                if arm is None:
                    notes.append(f"'{name}': {reason}")
                else:
                    arms[name] = arm
        agreements, failure = _check(arms, wanted)
        if failure:
            text = f"{failure} {_disagreeing_site(fast, found.inputs)} Nothing was timed."
            return Outcome({"ok": False, "error": text, "notes": notes}, text, CHECK_FAILED)
        device = torch.device(arguments.device)
        times = interleaved(arms, device, budget_s=arguments.seconds, max_rounds=_MOST_ROUNDS)
        return _outcome(times, agreements, fast, notes)


def _models(
    arguments: argparse.Namespace, found: models.Subject, notes: list[str]
) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Return the converted model, the masked dense one that says what is right, and the dense one to time."""
    if found.saved:
        refused = [name for name in ("budget", "margin", "deploy") if getattr(arguments, name) is not None]
        if refused:
            raise FxsparseError(
                f"--{refused[0]} is for calibration; a saved model runs by its plan. Leave it out, or run "
                "'fxsparse calibrate' first."
            )
        dense = fxsparse.to_dense(found.model)
        return found.model, dense, dense
    settings = options.settings_of(arguments, progress=on_terminal())
    fast = fxsparse.convert(found.model, found.masks, example_inputs=found.inputs, settings=settings)
    dense = bake(found.model, found.masks).model
    return fast, dense, _folded(dense, notes)


def _folded(dense: nn.Module, notes: list[str]) -> nn.Module:
    """Fold the batch norms with torch's own fuser, where it can trace the model."""
    try:
        return fold_batch_norm(dense)
    except Exception as error:  # tracing runs the user's code on proxies, which raises anything
        notes.append(f"Batch norms are not folded in the dense arms: torch.fx cannot trace it ({in_one_line(error)}).")
        return dense


def _wanted(dense: nn.Module, inputs: ExampleInputs, notes: list[str]) -> _Wanted:
    with torch.inference_mode():
        output = inputs.run(dense)
    found = tensors(output)
    if not found:
        raise FxsparseError("The model's output has no floating-point tensor, so there is nothing to compare.")
    if not all(bool(tensor.isfinite().all()) for tensor in found):
        raise FxsparseError("The dense model's output is not finite on these inputs, so there is nothing to compare.")
    dtype = found[0].dtype
    if dtype is torch.float32 and found[0].is_cuda and torch.backends.cudnn.allow_tf32:
        # Which convolutions use it differs from one layout to the other.
        notes.append("cuDNN may compute float32 convolutions in TF32 (10 bits), and the outputs may differ by that.")
        return _Wanted(output, allowed_error(_TF32_ERROR, dtype))
    try:
        own = own_error(dense, *inputs.args)[1]
    except Exception as error:  # a model with a dtype written into its code
        notes.append(
            f"How far outputs may differ is a guess: the model does not run in float64 ({in_one_line(error)})."
        )
        return _Wanted(output, allowed_error(_OWN_ERROR, dtype))
    return _Wanted(output, allowed_error(own, dtype, measured_in=dtype))


def _check(arms: dict[str, Arm], wanted: _Wanted) -> tuple[dict[str, Agreement], str]:
    """Compare the output of every arm; return the agreements, or say where the first arm disagrees."""
    agreements = {}
    for name, arm in arms.items():
        with torch.inference_mode():  # as in the timing, so that compiled arms are not compiled again
            output = arm()
        try:
            agreements[name] = Agreement(largest_error(output, wanted.output), wanted.allowed)
        except ValueError as error:
            return {}, f"'{name}' does not compute what the masked dense model does. {error}"
        if not agreements[name].ok:
            place = _worst_place(output, wanted.output)
            return {}, (
                f"'{name}' does not compute what the masked dense model does: the largest error is "
                f"{agreements[name].error:.1e} of the largest value (allowed {wanted.allowed:.1e}), {place}."
            )
    return agreements, ""


def _worst_place(output: Any, wanted: Any) -> str:
    """Say at which element two outputs of one structure differ most."""
    pairs = list(zip(tensors(output), tensors(wanted), strict=True))
    errors = [(a.double() - b.double()).abs().nan_to_num(nan=torch.inf) for a, b in pairs]
    k = max(range(len(pairs)), key=lambda i: float(errors[i].max()))
    index = tuple(int(i) for i in torch.unravel_index(errors[k].argmax(), errors[k].shape))
    got, right = (float(t[index]) for t in pairs[k])
    return f"in output tensor {k} at {list(index)}: {got:.6g} instead of {right:.6g}"


def _disagreeing_site(model: nn.Module, inputs: ExampleInputs) -> str:
    """Say which convolution's two paths disagree first, or why that cannot be told."""
    try:
        tested = copy.deepcopy(model)
        fxsparse.set_mode(tested, "test")
        with torch.inference_mode():
            inputs.run(tested)
    except FxsparseError as error:
        return str(error)
    return "The two paths of every convolution agree."


def _outcome(times: Timings, agreements: dict[str, Agreement], fast: nn.Module, notes: list[str]) -> Outcome:
    best_dense, best_fast = (
        min((name for name in times if name.startswith(kind)), key=lambda name: times[name].median_ms)
        for kind in ("dense", "fxsparse")
    )
    rows = []
    values: dict[str, Any] = {}
    for name, timing in times.items():
        speed = times.ratio(best_dense, name)
        values[name] = {
            **dataclasses.asdict(timing),
            "speed": dataclasses.asdict(speed),
            "error": agreements[name].error,
        }
        rows.append(
            (
                name,
                f"{timing.median_ms:.3f}",
                f"{timing.ci_low_ms:.3f}-{timing.ci_high_ms:.3f}",
                f"{speed.median:.2f}x",
                f"{speed.low:.2f}-{speed.high:.2f}",
                f"{agreements[name].error:.1e}",
            )
        )
    headers = ("arm", "median ms", "95 % CI", "speed", "95 % CI", "error")
    table = tabulate(rows, headers=headers, disable_numparse=True, colalign=("left", *["right"] * 5))
    gain = times.ratio(best_dense, best_fast)
    report = reports.report_of(fast)
    allowed = next(iter(agreements.values())).allowed
    lines = [
        table,
        "",
        f"The outputs agree: every error, as a share of the largest value, is within {allowed:.1e}.",
        f"'{best_fast}' runs at {gain.median:.2f}x ({gain.low:.2f}-{gain.high:.2f}) the speed of '{best_dense}', the "
        f"fastest dense arm; {report.sparse} of {len(report.rows)} convolutions run sparse.",
        *(f"Note: {note}" for note in notes),
    ]
    result = {
        "ok": True,
        "times": values,
        "best_dense": best_dense,
        "best_fxsparse": best_fast,
        "gain": dataclasses.asdict(gain),
        "allowed_error": allowed,
        "notes": notes,
        "report": report.to_dict(),
    }
    return Outcome(result, "\n".join(lines), OK)
