"""Whole-model comparisons of a converted model with the ways a user would run the dense one (`fxsparse/arms.py`).

The best dense arm is the baseline, not the slowest.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

import fxsparse
from benchmarks.engines import engine_arms
from fxsparse.arms import channels_last, dense_arms, fold_batch_norm
from fxsparse.arms import compiled as compiled_arm
from fxsparse.inputs import ExampleInputs
from fxsparse.output_agreement import Agreement, allowed_error, largest_error, own_error
from fxsparse.timing import Timing, interleaved


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Whole-model times, measured interleaved.

    Attributes:
        times: by arm; the converted model's arms start with "fxsparse".
        agreement: of each arm's output with the masked dense model's.
    """

    times: dict[str, Timing]
    agreement: dict[str, Agreement]

    @property
    def best_dense(self) -> str:
        """Name of the fastest arm that is not fxsparse."""
        return min((n for n in self.times if not n.startswith("fxsparse")), key=self._median)

    @property
    def best_sparse(self) -> str:
        """Name of the fastest fxsparse arm."""
        return min((n for n in self.times if n.startswith("fxsparse")), key=self._median)

    @property
    def ratio(self) -> float:
        """Time of the best dense arm over time of the best fxsparse arm."""
        return self._median(self.best_dense) / self._median(self.best_sparse)

    def _median(self, name: str) -> float:
        return self.times[name].median_ms

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "times": {name: dataclasses.asdict(time) for name, time in self.times.items()},
            "agreement": {name: dataclasses.asdict(value) for name, value in self.agreement.items()},
            "best_dense": self.best_dense,
            "best_sparse": self.best_sparse,
            "ratio": self.ratio,
        }

    def __str__(self) -> str:
        """Return the table of the arms and the ratio."""
        rows = [
            [
                name,
                f"{time.median_ms:.3f}",
                f"{time.low_ms:.3f}-{time.high_ms:.3f}",
                f"{self._median(self.best_sparse) / time.median_ms:.2f}x",
                f"{self.agreement[name].error:.1e}",
            ]
            for name, time in self.times.items()
        ]
        headers = ("arm", "median ms", "quartiles", "speed vs fxsparse", "rel err")
        table = tabulate(rows, headers=headers, disable_numparse=True)
        best = f"{self.best_dense} / {self.best_sparse}"
        return f"{table}\nBest dense over fxsparse ({best}): {self.ratio:.2f}x."


@dataclasses.dataclass(frozen=True)
class Converted:
    """A model converted in the two layouts that a user may run it in, each measured on its own input.

    Attributes:
        modules: by arm name, "fxsparse" (NCHW) and "fxsparse channels_last".
        inputs: the same image batch in each layout.
    """

    modules: dict[str, nn.Module]
    inputs: dict[str, Tensor]

    def report(self, arm: str = "fxsparse") -> fxsparse.Report:
        """Return the report of one of them."""
        report = self.modules[arm].report
        assert isinstance(report, fxsparse.Report)
        return report

    def reports(self) -> dict[str, Any]:
        """Return all reports as plain JSON values."""
        return {arm: self.report(arm).to_dict() for arm in self.modules}


def convert(model: nn.Module, masks: Any, x: Tensor, settings: fxsparse.Settings) -> Converted:
    """Convert a model as it is and in channels_last; both start as the user would have them."""
    last = channels_last(model)
    inputs = {"fxsparse": x, "fxsparse channels_last": x.contiguous(memory_format=torch.channels_last)}
    modules = {
        arm: fxsparse.convert(start, masks, example_inputs=(inputs[arm],), settings=settings)
        for arm, start in zip(inputs, (model, last), strict=True)
    }
    return Converted(modules, inputs)


def compare(
    dense: nn.Module,
    converted: Converted,
    x: Tensor,
    *,
    compiled: bool = False,
    engines: bool = False,
    budget_s: float = 5.0,
) -> Comparison:
    """Check the converted models and every dense arm against the masked dense model, then time them interleaved.

    Args:
        dense: the masked dense model, float32, in eval mode.
        converted: what `convert` made of it.
        x: the input.
        compiled: also run both through torch.compile, with freezing.
        engines: also run the dense model in onnxruntime and OpenVINO; one that is not there is named.
        budget_s: time for the measurement.

    Raises:
        RuntimeError: an arm's output is further from the dense model's than rounding explains.
    """
    wanted, own = own_error(dense, x)
    inputs = ExampleInputs((x,), {})
    folded = fold_batch_norm(dense)
    arms = dense_arms(folded, inputs)
    if compiled:
        arms["dense compiled"] = compiled_arm(folded, inputs)
    if engines:
        found, missing = engine_arms(folded, x, compiled=False)
        arms |= {f"dense {name}": found[name] for name in ("onnxruntime", "openvino") if name in found}
        print("\n".join(missing.values()))
    for name, module in converted.modules.items():
        arms[name] = partial(module, converted.inputs[name])
    if compiled:
        arms["fxsparse compiled"] = compiled_arm(converted.modules["fxsparse"], inputs)
    agreement = {}
    allowed = allowed_error(own, x.dtype)
    for name, arm in arms.items():
        with torch.inference_mode():  # as in the timing, so that compiled arms are not compiled again
            agreement[name] = Agreement(largest_error(arm(), wanted), allowed)
        if not agreement[name].ok:
            error = agreement[name].error
            raise RuntimeError(f"The arm '{name}' differs from the dense model by {error:.3g} (allowed {allowed:.3g}).")
    # An engine's threads spin for a while after a call, on the cores that the next arm wants.
    settle_ms = 5.0 if engines else 0.0
    return Comparison(interleaved(arms, x.device, budget_s=budget_s, max_rounds=101, settle_ms=settle_ms), agreement)


def budget_arguments(parser: Any) -> None:
    """Declare the options of a command that times whole models."""
    parser.add_argument("--compile", action="store_true", help="add the arms under torch.compile (freezing)")
    parser.add_argument("--budget", type=float, default=5.0, metavar="SECONDS", help="time for a measurement")
