"""What `fxsparse.prune` found: the pruned model, its masks, and what each layer keeps and costs."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from tabulate import tabulate
from torch import nn

from fxsparse.pruning.layers import Masks


@dataclasses.dataclass(frozen=True)
class LayerRow:
    """One layer.

    Attributes:
        name: of the module.
        shape: of its weight.
        kept: share of its weights that is kept.
        dense: its cost with all its weights, in the unit of the report.
        cost: what it is expected to cost now.
        reason: why it stays dense, or "".
    """

    name: str
    shape: tuple[int, ...]
    kept: float
    dense: float
    cost: float
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class PruneReport:
    """What was pruned, and what that should bring.

    Attributes:
        rows: the convolutions, in the model's order.
        unit: of the costs: "ms" or "MACs".
        dense: cost of the dense model.
        budget: what the model may cost.
        expected: what it should cost, by the prices of its layers.
        measured_ms: what a trial conversion under these masks took, or None where nothing was measured.
        kept: share of the weights kept, of all layers that may be pruned together.
        seconds: what pruning took.
        notes: what the user should know.
    """

    rows: tuple[LayerRow, ...]
    unit: str
    dense: float
    budget: float
    expected: float
    measured_ms: float | None
    kept: float
    seconds: float
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        """Return the table and what is to be said on it."""
        rows = [
            (
                row.name,
                "x".join(map(str, row.shape)),
                f"{row.kept:.3f}",
                self._shown(row.dense),
                self._shown(row.cost),
                row.reason,
            )
            for row in self.rows
        ]
        headers = ("convolution", "weight", "kept", f"dense {self.unit}", f"expected {self.unit}", "why")
        table = tabulate(
            rows, headers=headers, disable_numparse=True, colalign=("left", "left", *["right"] * 3, "left")
        )
        lines = [
            table,
            "",
            f"{self.kept:.1%} of the weights are kept. Dense {self._shown(self.dense)} {self.unit}, budget "
            f"{self._shown(self.budget)}, expected {self._shown(self.expected)}"
            + ("." if self.measured_ms is None else f", measured {self.measured_ms:.3f}."),
            f"Pruning took {self.seconds:.1f} s.",
            *(f"Note: {note}" for note in self.notes),
        ]
        return "\n".join(lines)

    def _shown(self, value: float) -> str:
        return f"{value:.3f}" if self.unit == "ms" else f"{value / 1e6:.2f}M"


@dataclasses.dataclass(frozen=True, eq=False)
class Pruned:
    """A pruned model.

    Attributes:
        model: in evaluation mode; pruned weights are zero.
        masks: by module name, for `fxsparse.convert`, or for `fxsparse.pruning.hold` to train further.
        report: what became of every layer.
    """

    model: nn.Module
    masks: Masks
    report: PruneReport

    def __repr__(self) -> str:
        """Show what is kept."""
        return f"Pruned({type(self.model).__name__}, {self.report.kept:.1%} of {len(self.masks)} layers' weights kept)"
