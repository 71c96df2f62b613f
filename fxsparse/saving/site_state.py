"""Conv sites as JSON values, and the check that the tensors of a site are what its kernels take.

Both directions trust nobody: a value of a file may be anything, so every field is read by its own reader, and packed
tables go through `fxsparse::validate` before a kernel can see them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fxsparse import json_values
from fxsparse.json_values import Wrong
from fxsparse.passes.regroup_weights import SUPPORTED_DTYPES
from fxsparse.plan import LAYOUTS, PACKINGS, PATHS
from fxsparse.regrouping import Regrouping
from fxsparse.sites import PACKED_SUFFIXES, ConvSite, Support

MODES = ("vanilla", "sparse", "training", "test", "benchmark", "calibration")
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
_TABLES = ((torch.int32, 1), (torch.int64, 2), (torch.int64, 2))  # columns, panels, rows
_FIELDS_OF_ROW = 4


class Damaged(Exception):
    """A tensor that cannot be a site's; the message names it, what it is and what it should be."""


def to_dict(site: ConvSite, regrouping: int | None) -> dict[str, Any]:
    """Return a conv site as plain JSON values.

    Args:
        site: the site.
        regrouping: where its regrouping is in the list that is saved beside it, or None where it has none.
    """
    values = {field.name: getattr(site, field.name) for field in dataclasses.fields(site)}
    return {**values, "support": list(site.support), "regrouping": regrouping}


def from_dict(values: Any, place: str, regroupings: Sequence[Regrouping]) -> ConvSite:
    """Read what `to_dict` returned.

    Args:
        values: JSON values, from any source.
        place: begins the names of wrong values.
        regroupings: the list that is saved beside the sites.

    Raises:
        json_values.Wrong: a value cannot be.
    """
    site: ConvSite = _read_site(values, place)
    number: Any = site.regrouping
    if number is not None:
        if number >= len(regroupings):
            raise Wrong(number, f"{place}.regrouping", f"one of the {len(regroupings)} regroupings of the file")
        site = dataclasses.replace(site, regrouping=regroupings[number])
    _check_geometry(site, place)
    return site


def check_tensors(site: ConvSite, tensors: Mapping[str, Tensor]) -> None:
    """Check that a site's weight, bias, mask and packed tensors are there, and that kernels can read them.

    Args:
        site: as `from_dict` read it.
        tensors: all parameters and buffers of the site's graph, by name.

    Raises:
        Damaged: the first tensor that is missing or wrong.
    """
    dense = not site.frozen or site.path == "vanilla"
    if dense or site.weight in tensors:
        weight = _tensor(site, site.weight, tensors)
        _expect(site.weight, weight, shape=site.weight_shape)
    if site.bias is not None:
        _expect(site.bias, _tensor(site, site.bias, tensors), shape=site.weight_shape[:1])
    if site.mask is not None:
        _expect(site.mask, _tensor(site, site.mask, tensors), shape=site.weight_shape, dtype=torch.bool)
    if site.packed is None:
        return
    values, columns, panels, rows = (_tensor(site, name, tensors) for name in site.packed_names)
    if dense and values.dtype != tensors[site.weight].dtype:
        raise Damaged(f"'{site.packed_names[0]}' is {values.dtype}; its weight is {tensors[site.weight].dtype}")
    check_packed(site.packed, values, columns, panels, rows, site.weight_shape, site.groups)


def check_packed(
    name: str,
    values: Tensor,
    columns: Tensor,
    panels: Tensor,
    rows: Tensor,
    weight_shape: Sequence[int],
    groups: int,
) -> None:
    """Check packed tensors before a kernel reads them: dtypes, shapes, contiguity, and every index in the tables.

    Args:
        name: of the packed weight, for the message.
        values: [V], in a dtype that the operators have.
        columns: int32 [.], panels: int64 [P, 4], rows: int64 [16 P, 4]: the tables.
        weight_shape: (O, C / groups, kh, kw).
        groups: convolution groups.

    Raises:
        Damaged: a kernel could read or write out of bounds.
    """
    full = [name + suffix for suffix in PACKED_SUFFIXES]
    if values.dtype not in SUPPORTED_DTYPES:
        raise Damaged(f"'{full[0]}' is {values.dtype}; the operators take {', '.join(map(str, SUPPORTED_DTYPES))}")
    _expect(full[0], values, dim=1)
    for table, leaf, (dtype, dim) in zip((columns, panels, rows), full[1:], _TABLES, strict=True):
        _expect(leaf, table, dtype=dtype, dim=dim)
    for table, leaf in ((panels, full[2]), (rows, full[3])):
        if table.shape[1] != _FIELDS_OF_ROW:
            raise Damaged(f"'{leaf}' has the shape {tuple(table.shape)}; its rows have {_FIELDS_OF_ROW} fields")
    if len(weight_shape) != 4 or weight_shape[0] > len(rows):  # `validate` makes a list of the output channels
        raise Damaged(f"'{full[3]}' has {len(rows)} lanes; the weight has the shape {tuple(weight_shape)}")
    tables = (table.cpu() for table in (columns, panels, rows))
    try:
        torch.ops.fxsparse.validate(*tables, values.numel(), list(weight_shape), groups)
    except RuntimeError as error:
        raise Damaged(f"'{name}': {str(error).strip().splitlines()[0]}") from error


def _tensor(site: ConvSite, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    if name not in tensors:
        raise Damaged(f"the convolution '{site.name}' has no tensor '{name}'")
    return tensors[name]


def _expect(
    name: str,
    tensor: Tensor,
    *,
    shape: tuple[int, ...] | None = None,
    dtype: torch.dtype | None = None,
    dim: int | None = None,
) -> None:
    if tensor.layout != torch.strided:
        raise Damaged(f"'{name}' has the layout {tensor.layout}; it should be torch.strided")
    if shape is not None and tuple(tensor.shape) != shape:
        raise Damaged(f"'{name}' has the shape {tuple(tensor.shape)}; it should be {shape}")
    if dim is not None and (tensor.dim() != dim or not tensor.is_contiguous()):
        raise Damaged(f"'{name}' has the shape {tuple(tensor.shape)}; it should be contiguous, in {dim} dimensions")
    if dtype is not None and tensor.dtype != dtype:
        raise Damaged(f"'{name}' is {tensor.dtype}; it should be {dtype}")


def _check_geometry(site: ConvSite, place: str) -> None:
    """Check what no field shows alone."""
    if site.groups < 1 or site.weight_shape[0] % site.groups:
        raise Wrong(site.groups, f"{place}.groups", f"a divisor of the {site.weight_shape[0]} output channels")
    if site.path == "sparse" and site.packed is None:
        raise Wrong(site.packed, f"{place}.packed", "a name, as the path is sparse")
    if site.resume is not None and site.mode != "training":
        raise Wrong(site.resume, f"{place}.resume", "null outside of the mode training")
    if site.frozen and site.mode != site.path:
        raise Wrong(site.mode, f"{place}.mode", f"'{site.path}', as the site is frozen on that path")
    found = site.regrouping
    wanted = (site.weight_shape[0], math.prod(site.weight_shape[1:]))
    if found is not None and (found.shape, found.groups) != (wanted, site.groups):
        raise Wrong((found.shape, found.groups), f"{place}.regrouping", f"of {wanted} with groups={site.groups}")


def boolean(value: Any, place: str) -> bool:
    """Read true or false."""
    if not isinstance(value, bool):
        raise Wrong(value, place, "true or false")
    return value


def _sizes(count: int, least: int) -> json_values.Reader:
    def read(value: Any, place: str) -> tuple[int, ...]:
        sizes: tuple[int, ...] = json_values.tuple_of(json_values.integer)(value, place)
        if len(sizes) != count or min(sizes) < least:
            raise Wrong(value, place, f"{count} integers of at least {least}")
        return sizes

    return read


def _support(value: Any, place: str) -> Support:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise Wrong(value, place, "a list of true or false and a reason")
    return Support(boolean(value[0], f"{place}[0]"), json_values.text(value[1], f"{place}[1]"))


_shape = json_values.optional(json_values.tuple_of(json_values.integer))
_time = json_values.optional(json_values.milliseconds)
_interval = json_values.optional(json_values.interval)
_name = json_values.optional(json_values.text)
_read_site = json_values.record(
    ConvSite,
    name=json_values.text,
    weight=json_values.text,
    bias=_name,
    weight_shape=_sizes(4, 0),
    stride=_sizes(2, 1),
    padding=_sizes(4, 0),
    dilation=_sizes(2, 1),
    groups=json_values.integer,
    padding_mode=json_values.one_of(PADDING_MODES),
    weight_layout=json_values.one_of(LAYOUTS),
    support=_support,
    regrouping=json_values.optional(json_values.integer),
    estimate=_time,  # a ratio, and as a time a finite number of at least 0
    packed=_name,
    mask=_name,
    path=json_values.one_of(PATHS),
    mode=json_values.one_of(MODES),
    resume=json_values.optional(json_values.one_of(MODES)),
    frozen=boolean,
    layout=json_values.optional(json_values.one_of(LAYOUTS)),
    packing=json_values.one_of(PACKINGS),
    reason=json_values.text,
    input_shape=_shape,
    output_shape=_shape,
    vanilla_ms=_time,
    vanilla_ci=_interval,
    sparse_ms=_time,
    sparse_ci=_interval,
    bound_ms=_time,
)
