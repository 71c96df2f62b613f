"""What the demo found, as numbers and as tables."""

from __future__ import annotations

import dataclasses
from typing import Any

from tabulate import tabulate

from fxsparse.demo.measure import TOLERANCE, Agreement
from fxsparse.timing import Timing

CONVERTED = ("converted, unstructured", "converted, regrouped")


@dataclasses.dataclass(frozen=True)
class Stage:
    """One model of the demo.

    Attributes:
        name: which.
        kept: share of the prunable weights that it keeps.
        accuracy: on the test images.
        seconds: what making it took.
    """

    name: str
    kept: float
    accuracy: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Result:
    """Everything that the demo measured.

    Attributes:
        facts: data, net, settings and machine.
        stages: the models, in the order in which they were made.
        agreements: each converted model against its masked dense one.
        times: by batch size, then by arm.
        reports: by batch size, then by arm: the report of each conversion.
        notes: what was left out, and why.
        seconds: of the whole demo.
    """

    facts: dict[str, Any]
    stages: list[Stage]
    agreements: list[Agreement]
    times: dict[int, dict[str, Timing]]
    reports: dict[int, dict[str, dict[str, Any]]]
    notes: list[str]
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether every converted model computes what its masked dense one does."""
        return all(agreement.ok for agreement in self.agreements)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        values = dataclasses.asdict(self)
        values["ok"] = self.ok
        for batch, arms in self.times.items():
            ratios = against_best_dense(arms)
            for name in arms:
                values["times"][batch][name]["against_best_dense"] = ratios[name]
        return values


def against_best_dense(times: dict[str, Timing]) -> dict[str, float]:
    """Return how many times faster than the fastest dense arm each arm is."""
    best = min(timing.median_ms for name, timing in times.items() if name not in CONVERTED)
    return {name: best / timing.median_ms for name, timing in times.items()}


def accuracy_table(stages: list[Stage]) -> str:
    """Return the accuracy table."""
    rows = [(s.name, f"{s.kept:.1%}", f"{s.accuracy:.2%}", f"{s.seconds:.1f}") for s in stages]
    headers = ("model", "weights kept", "test accuracy", "seconds")
    return tabulate(rows, headers=headers, disable_numparse=True, colalign=("left", "right", "right", "right"))


def speed_table(times: dict[int, dict[str, Timing]]) -> str:
    """Return the speed table: medians with quartiles, and the ratio to the fastest dense arm of the batch."""
    ratios = {batch: against_best_dense(arms) for batch, arms in times.items()}
    names = dict.fromkeys(name for arms in times.values() for name in arms)
    rows = []
    for name in names:
        row = [name]
        for batch, arms in times.items():
            row += [_cell(arms[name]), f"{ratios[batch][name]:.2f}x"] if name in arms else ["-", "-"]
        rows.append(row)
    headers = ["model"]
    for batch in times:
        headers += [f"batch {batch}: ms", "speed"]
    return tabulate(rows, headers=headers, disable_numparse=True, colalign=("left", *["right"] * 2 * len(times)))


def agreement_line(agreement: Agreement) -> str:
    """Return one sentence on a comparison."""
    verdict = "agrees" if agreement.ok else "DIFFERS"
    return (
        f"{agreement.name} {verdict} with its masked dense model: logits differ by at most "
        f"{agreement.difference:.1e} (allowed {TOLERANCE * agreement.scale:.1e}), {agreement.changed} of "
        f"{agreement.images} predictions change."
    )


def _cell(timing: Timing) -> str:
    return f"{timing.median_ms:.3f} ({timing.low_ms:.3f}-{timing.high_ms:.3f})"
