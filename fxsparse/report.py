"""What became of every convolution, and why: a dataclass whose `str` is a table."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tabulate import tabulate
from torch import nn
from torch.fx import GraphModule

from fxsparse import json_values, sites
from fxsparse.errors import FxsparseError
from fxsparse.sites import ConvSite

if TYPE_CHECKING:
    from fxsparse.pictures import WeightPicture

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
        layout: the memory layout that it computes in, "contiguous" or "channels_last", or None where not measured.
        vanilla_ms, sparse_ms: medians of one call, of vanilla in the layout that the plan gives it and of the best
            sparse configuration, or None where not measured.
        vanilla_ci, sparse_ci: 95 % confidence intervals of those medians.
        macs: multiply-adds of the dense convolution at `input_shape`.
        sparse_macs: multiply-adds that the sparse path does: blocks with fill-in and lane padding, and residual.
        vanilla_bytes: bytes of the dense weight.
        sparse_bytes: bytes of the packed weight with its tables.
        bound_ms: roofline bound of the chosen path on the machine that measured it.
        reason: why it has this path.
        picture: its weight matrix before and after regrouping, for the HTML page; not part of `to_dict`.
    """

    name: str
    weight_shape: tuple[int, ...] | None = None
    input_shape: tuple[int, ...] | None = None
    density: float | None = None
    blocks: int | None = None
    fill_in: float | None = None
    residual: float | None = None
    path: str = "vanilla"
    layout: str | None = None
    vanilla_ms: float | None = None
    vanilla_ci: tuple[float, float] | None = None
    sparse_ms: float | None = None
    sparse_ci: tuple[float, float] | None = None
    macs: int | None = None
    sparse_macs: int | None = None
    vanilla_bytes: int | None = None
    sparse_bytes: int | None = None
    bound_ms: float | None = None
    reason: str = ""
    picture: WeightPicture | None = dataclasses.field(default=None, repr=False, compare=False)


@dataclasses.dataclass(frozen=True)
class Report:
    """What a conversion did.

    Attributes:
        rows: every convolution, in the order of the graph.
        rung: the capture rung that ran.
        refused: why each earlier rung did not.
        notes: what the user should know besides.
        plan_notes: what calibration, or the plan that is followed, has to say.
        model_vanilla_ms, model_ms: the whole model, every site vanilla and as converted, measured against each
            other, or None.
        environment: device, versions, threads and date of the measurement; empty where nothing was measured.
        bytes_before, bytes_after: of all parameters and buffers, before and after `fxsparse.freeze`, or None.
    """

    rows: tuple[Row, ...]
    rung: str
    refused: dict[str, str]
    notes: tuple[str, ...]
    plan_notes: tuple[str, ...] = ()
    model_vanilla_ms: float | None = None
    model_ms: float | None = None
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    bytes_before: int | None = None
    bytes_after: int | None = None

    @property
    def sparse(self) -> int:
        """Number of convolutions that run sparse."""
        return sum(row.path == "sparse" for row in self.rows)

    def row(self, name: str) -> Row:
        """Return the row of a convolution by name (the first, where a module is called twice)."""
        return next(row for row in self.rows if row.name == name)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["rows"] = [
            {f.name: getattr(row, f.name) for f in dataclasses.fields(row) if f.name != "picture"} for row in self.rows
        ]
        return values

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @staticmethod
    def from_dict(values: Any, source: str = "The report") -> Report:
        """Read what `to_dict` returned, or the same out of JSON text; the rows have no pictures.

        Args:
            values: JSON values, from any source.
            source: begins the message of an error; a file's name, for example.

        Raises:
            FxsparseError: some value cannot be.
        """
        from fxsparse.saving.report_state import report_from_dict  # which makes reports

        try:
            return report_from_dict(values, "it")
        except json_values.Wrong as error:
            raise FxsparseError(f"{source} is not usable: {error}. Convert or calibrate the model again.") from error

    def to_html(self, path: str | Path) -> None:
        """Write the report as one self-contained page.

        Raises:
            FxsparseError: the file cannot be written.
        """
        from fxsparse import page  # a template and its reader: not for those who print a table

        try:
            Path(path).write_text(page.render(self), encoding="utf-8")
        except OSError as error:
            raise FxsparseError(f"The report cannot be written to '{path}': {error}.") from error

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
        if self.bytes_before is not None and self.bytes_after is not None:
            lines.append(f"Frozen: {self.bytes_before / 1e6:.2f} MB before, {self.bytes_after / 1e6:.2f} MB after.")
        lines += [f"Rung '{rung}' refused: {reason}." for rung, reason in self.refused.items()]
        lines += [f"Note: {note}" for note in (*self.notes, *self.plan_notes)]
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
    "layout",
    "vanilla ms",
    "sparse ms",
    "gain",
    "of bound",
    "why",
)


def _cells(row: Row) -> list[str]:
    gain = row.vanilla_ms / row.sparse_ms if row.vanilla_ms and row.sparse_ms else None
    chosen_ms = row.sparse_ms if row.path == "sparse" else row.vanilla_ms
    reached = row.bound_ms / chosen_ms if row.bound_ms is not None and chosen_ms else None
    return [
        row.name,
        "-" if row.weight_shape is None else "x".join(map(str, row.weight_shape)),
        "-" if row.input_shape is None else "x".join(map(str, row.input_shape)),
        _number(row.density, ".3f"),
        _number(row.blocks, "d"),
        _number(row.fill_in, ".1%"),
        _number(row.residual, ".1%"),
        row.path,
        row.layout or "-",
        _number(row.vanilla_ms, ".3f"),
        _number(row.sparse_ms, ".3f"),
        _number(gain, ".2f") + ("x" if gain else ""),
        _number(reached, ".0%"),
        row.reason,
    ]


def _number(value: float | int | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def row_of(gm: GraphModule, site: ConvSite, picture: WeightPicture | None = None) -> Row:
    """Describe a conv site."""
    regrouping = site.regrouping
    blocks = residual = fill_in = None
    if regrouping is not None:
        kept = max(regrouping.kept, 1)
        in_rows = site.packing == "rows"
        blocks = 0 if in_rows else len(regrouping.blocks)
        fill_in = 0.0 if in_rows else regrouping.fill_in / kept
        residual = 1.0 if in_rows else regrouping.residual_count / kept
    macs, sparse_macs = multiply_adds(site, gm)
    return Row(
        name=site.name,
        weight_shape=site.weight_shape,
        input_shape=site.input_shape,
        density=regrouping.density if regrouping else None,
        blocks=blocks,
        fill_in=fill_in,
        residual=residual,
        path=site.path,
        layout=site.layout,
        vanilla_ms=site.vanilla_ms,
        vanilla_ci=site.vanilla_ci,
        sparse_ms=site.sparse_ms,
        sparse_ci=site.sparse_ci,
        macs=macs,
        sparse_macs=sparse_macs,
        vanilla_bytes=_bytes(gm, (site.weight,)),
        sparse_bytes=_bytes(gm, site.packed_names) if site.packed else None,
        bound_ms=site.bound_ms,
        reason=site.reason,
        picture=picture,
    )


def multiply_adds(site: ConvSite, gm: GraphModule) -> tuple[int | None, int | None]:
    """Return the multiply-adds of a site's vanilla and sparse path at the shapes seen, or None where unknown."""
    if site.output_shape is None:
        return None, None
    channels = site.output_shape[-3]
    positions = math.prod(site.output_shape) // channels if channels else 0
    stored = sites.attribute(gm, site.packed_names[0]).numel() if _bytes(gm, _packed(site)) is not None else None
    return positions * math.prod(site.weight_shape), None if stored is None else positions * stored


def _packed(site: ConvSite) -> tuple[str, ...]:
    return site.packed_names if site.packed else ()


def _bytes(gm: GraphModule, names: tuple[str, ...]) -> int | None:
    """Sum the bytes of some tensors; None where there are none, or `freeze` has dropped one."""
    total = 0
    for name in names:
        owner, _, leaf = name.rpartition(".")
        tensor = getattr(gm.get_submodule(owner), leaf, None)
        if tensor is None:
            return None
        total += tensor.numel() * tensor.element_size()
    return total if names else None


def draw(model: nn.Module) -> dict[str, WeightPicture]:
    """Return a picture of every regrouped weight, by the name of its convolution."""
    from fxsparse.pictures import picture

    drawn = {}
    for gm in graphs_of(model):
        for _, site in sites.conv_sites(gm):
            if site.regrouping is not None and site.mask is not None:
                mask = sites.attribute(gm, site.mask).reshape(site.weight_shape[0], -1)
                drawn[site.name] = picture(mask.cpu().numpy(), site.regrouping)
    return drawn


def refresh(
    model: nn.Module, report: Report, pictures: Mapping[str, WeightPicture | None] | None = None, **changes: Any
) -> Report:
    """Attach to a model its report, with the rows of its conv sites as they are now.

    Args:
        model: a converted model.
        report: its report so far.
        pictures: of its weights, by convolution; None keeps those of the report.
        changes: to fields of the report.
    """
    if pictures is None:
        pictures = {row.name: row.picture for row in report.rows}
    now = [row_of(gm, site, pictures.get(site.name)) for gm in graphs_of(model) for _, site in sites.conv_sites(gm)]
    others = [row for row in report.rows if row.weight_shape is None]
    report = dataclasses.replace(report, rows=(*now, *others), **changes)
    attach(model, "report", report)
    return report


def attach(model: nn.Module, name: str, value: Any) -> None:
    """Set an attribute of a converted model that copies keep."""
    model.__dict__[name] = value
    if isinstance(model, GraphModule):
        model.meta[_PRESERVED] = {**model.meta.get(_PRESERVED, {}), name: value}


def report_of(model: nn.Module) -> Report:
    """Return the report of a converted model.

    Raises:
        FxsparseError: the model was not converted.
    """
    report = model.__dict__.get("report")
    if not isinstance(report, Report):
        raise FxsparseError("This model was not converted. Call fxsparse.convert(model, masks) first.")
    return report


def graphs_of(model: nn.Module) -> list[GraphModule]:
    """Return the graphs of a converted model that hold conv sites: itself, or the swapped convolutions."""
    return [m for m in model.modules() if isinstance(m, GraphModule) and any(sites.conv_sites(m))]
