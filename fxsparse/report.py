"""What became of every convolution, and why: a dataclass whose `str` is a table."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from tabulate import tabulate
from torch import nn
from torch.fx import GraphModule

from fxsparse import sites
from fxsparse.sites import ConvSite

# torch.fx keeps what is under this key of `meta` as attributes when a GraphModule is copied.
_PRESERVED = "_user_preserved_attributes"


@dataclasses.dataclass(frozen=True)
class Row:
    """One convolution.

    Attributes:
        name: in the user's model.
        weight_shape: (O, C / groups, kh, kw), or None where the convolution is no conv site.
        input_shape: as seen in calibration, or None.
        density: share of the weights kept.
        blocks: number of blocks.
        fill_in: zeros stored in blocks, as a share of the kept weights.
        residual: weights outside the blocks, as a share of the kept weights.
        path: "sparse" or "vanilla".
        vanilla_ms, sparse_ms: medians of one call, or None where not measured.
        reason: why it has this path.
    """

    name: str
    weight_shape: tuple[int, ...] | None
    input_shape: tuple[int, ...] | None
    density: float | None
    blocks: int | None
    fill_in: float | None
    residual: float | None
    path: str
    vanilla_ms: float | None
    sparse_ms: float | None
    reason: str


@dataclasses.dataclass(frozen=True)
class Report:
    """What a conversion did.

    Attributes:
        rows: every convolution, in the order of the graph.
        rung: the capture rung that ran.
        refused: why each earlier rung did not.
        notes: what the user should know besides.
        model_vanilla_ms, model_ms: the whole model, every site vanilla and as converted, measured against each
            other, or None.
    """

    rows: tuple[Row, ...]
    rung: str
    refused: dict[str, str]
    notes: tuple[str, ...]
    model_vanilla_ms: float | None = None
    model_ms: float | None = None

    @property
    def sparse(self) -> int:
        """Number of convolutions that run sparse."""
        return sum(row.path == "sparse" for row in self.rows)

    def row(self, name: str) -> Row:
        """Return the row of a convolution by name (the first, where a module is called twice)."""
        return next(row for row in self.rows if row.name == name)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        """Return the table, with a line on the capture and one on the totals."""
        table = tabulate([_cells(row) for row in self.rows], headers=_HEADERS, disable_numparse=True)
        lines = [table, ""]
        lines.append(f"{self.sparse} of {len(self.rows)} convolutions run sparse. Captured by: {self.rung}.")
        if self.model_ms is not None and self.model_vanilla_ms is not None:
            gain = self.model_vanilla_ms / self.model_ms
            lines.append(
                f"Whole model: vanilla {self.model_vanilla_ms:.3f} ms, converted {self.model_ms:.3f} ms ({gain:.2f}x)."
            )
        lines += [f"Rung '{rung}' refused: {reason}." for rung, reason in self.refused.items()]
        lines += [f"Note: {note}" for note in self.notes]
        return "\n".join(lines)


_HEADERS = (
    "convolution",
    "weight",
    "input",
    "density",
    "blocks",
    "fill-in",
    "residual",
    "path",
    "vanilla ms",
    "sparse ms",
    "gain",
    "why",
)


def _cells(row: Row) -> list[str]:
    gain = row.vanilla_ms / row.sparse_ms if row.vanilla_ms and row.sparse_ms else None
    return [
        row.name,
        "-" if row.weight_shape is None else "x".join(map(str, row.weight_shape)),
        "-" if row.input_shape is None else "x".join(map(str, row.input_shape)),
        _number(row.density, ".3f"),
        _number(row.blocks, "d"),
        _number(row.fill_in, ".1%"),
        _number(row.residual, ".1%"),
        row.path,
        _number(row.vanilla_ms, ".3f"),
        _number(row.sparse_ms, ".3f"),
        _number(gain, ".2f") + ("x" if gain else ""),
        row.reason,
    ]


def _number(value: float | int | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def row_of(site: ConvSite) -> Row:
    """Describe a conv site."""
    regrouping = site.regrouping
    kept = max(regrouping.kept, 1) if regrouping else 1
    return Row(
        name=site.name,
        weight_shape=site.weight_shape,
        input_shape=site.input_shape,
        density=regrouping.density if regrouping else None,
        blocks=len(regrouping.blocks) if regrouping else None,
        fill_in=regrouping.fill_in / kept if regrouping else None,
        residual=regrouping.residual_count / kept if regrouping else None,
        path=site.path,
        vanilla_ms=site.vanilla_ms,
        sparse_ms=site.sparse_ms,
        reason=site.reason,
    )


def refresh(model: nn.Module, report: Report, **changes: Any) -> Report:
    """Attach to a model its report, with the rows of its conv sites as they are now."""
    now = [row_of(site) for gm in graphs_of(model) for _, site in sites.conv_sites(gm)]
    others = [row for row in report.rows if row.weight_shape is None]
    report = dataclasses.replace(report, rows=(*now, *others), **changes)
    model.__dict__["report"] = report
    if isinstance(model, GraphModule):
        model.meta[_PRESERVED] = {**model.meta.get(_PRESERVED, {}), "report": report}
    return report


def graphs_of(model: nn.Module) -> list[GraphModule]:
    """Return the graphs of a converted model that hold conv sites: itself, or the swapped convolutions."""
    return [m for m in model.modules() if isinstance(m, GraphModule) and any(sites.conv_sites(m))]
