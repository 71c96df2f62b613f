"""Read a report from JSON values that may come from anywhere."""

from __future__ import annotations

from typing import Any

from fxsparse import json_values
from fxsparse.json_values import Wrong
from fxsparse.plan import LAYOUTS, PATHS
from fxsparse.report import Report, Row

_RUNGS = ("symbolic", "export", "modules")


def report_from_dict(values: Any, place: str = "report") -> Report:
    """Read what `Report.to_dict` returned ; its rows have no pictures.

    Args:
        values: JSON values, from any source.
        place: begins the names of wrong values.

    Raises:
        json_values.Wrong: a value cannot be.
    """
    report: Report = _read_report(values, place)
    return report


def _share(value: Any, place: str) -> float:
    if type(value) not in (int, float) or not 0 <= value < float("inf"):
        raise Wrong(value, place, "a finite number of at least 0")
    return float(value)


_count = json_values.optional(json_values.integer)
_part = json_values.optional(_share)
_shape = json_values.optional(json_values.tuple_of(json_values.integer))
_time = json_values.optional(json_values.milliseconds)
_interval = json_values.optional(json_values.interval)
_texts = json_values.tuple_of(json_values.text)
_read_row = json_values.record(
    Row,
    name=json_values.text,
    weight_shape=_shape,
    input_shape=_shape,
    density=_part,
    blocks=_count,
    fill_in=_part,
    residual=_part,
    path=json_values.one_of(PATHS),
    layout=json_values.optional(json_values.one_of(LAYOUTS)),
    vanilla_ms=_time,
    vanilla_ci=_interval,
    sparse_ms=_time,
    sparse_ci=_interval,
    macs=_count,
    sparse_macs=_count,
    vanilla_bytes=_count,
    sparse_bytes=_count,
    bound_ms=_time,
    reason=json_values.text,
)
_read_report = json_values.record(
    Report,
    rows=json_values.tuple_of(_read_row),
    rung=json_values.one_of(_RUNGS),
    refused=json_values.by_name(json_values.text),
    notes=_texts,
    plan_notes=_texts,
    model_vanilla_ms=_time,
    model_ms=_time,
    environment=json_values.by_name(json_values.text),
    bytes_before=_count,
    bytes_after=_count,
)
