"""`info`: what a saved file holds, read from its JSON parts alone."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fxsparse import json_values
from fxsparse.plan import Plan
from fxsparse.report import Report
from fxsparse.saving import safety, weights_file
from fxsparse.saving.report_state import report_from_dict
from fxsparse.sites import PACKED_SUFFIXES

# torch.export's numbers and safetensors' names of the dtypes that a model computes in.
_DTYPES = {6: "float16", 7: "float32", 8: "float64", 13: "bfloat16"}
_NAMES = {"F16": "float16", "F32": "float32", "F64": "float64", "BF16": "bfloat16"}


@dataclasses.dataclass(frozen=True)
class SavedInfo:
    """What a saved file holds.

    Attributes:
        kind: "model" (of `fxsparse.save`) or "weights" (of `fxsparse.save_weights`).
        versions: of the file's format, and of fxsparse and torch, which wrote it.
        device: that the model was on.
        dtype: that most of its weights are in.
        bytes: of the file.
        parts: of these, by part: "weights" (and everything else that is dense), "packed", "program" (all the rest).
        report: what became of every convolution.
        plan: empty where nothing was measured.
    """

    kind: str
    versions: dict[str, str]
    device: str
    dtype: str
    bytes: int
    parts: dict[str, int]
    report: Report
    plan: Plan

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**values, "report": self.report.to_dict(), "plan": self.plan.to_dict()}


def info(path: str | Path) -> SavedInfo:
    """Tell what a file of `fxsparse.save` or `fxsparse.save_weights` holds; its tensors are not read.

    Args:
        path: of the file.

    Raises:
        FxsparseError: the file cannot be read, is neither, is damaged in the parts that are read, or a newer version
            wrote it.
    """
    path = Path(path)
    return _of_weights(path) if weights_file.is_weights(path) else _of_model(path)


def _of_model(path: Path) -> SavedInfo:
    with safety.opened(path) as archive:
        manifest = safety.read_manifest(archive)
        state, plan, report, weights, constants = (
            safety.read_summed_json(archive, name, manifest)
            for name in (safety.STATE, safety.PLAN, safety.REPORT, safety.WEIGHTS_LIST, safety.CONSTANTS_LIST)
        )
        packed = safety.packed_stems(state)
        tensors = safety.tensors_of(archive, weights, constants)
        by_entry = {entry: (name, dtype) for name, (entry, dtype) in tensors.items()}
        sizes = [(name, _DTYPES.get(dtype), archive.entries[entry].size) for entry, (name, dtype) in by_entry.items()]
        return SavedInfo(
            "model",
            _versions(manifest),
            json_values.text(state.get("device"), "device"),
            _dtype(sizes),
            path.stat().st_size,
            _parts(path, sizes, packed),
            report_from_dict(report),
            Plan.from_dict(plan, f"The plan in '{path}'"),
        )


def _of_weights(path: Path) -> SavedInfo:
    header = weights_file.read_header(path)
    with safety.reading(path):
        document = header.document
        graphs = json_values.by_name(lambda value, place: value["sites"])(document["graphs"], "graphs")
        stems = {
            f"{name}.{site['packed']}" if name else str(site["packed"])
            for name, sites in graphs.items()
            for site in sites
            if site["packed"] is not None
        }
        sizes = [(name, _NAMES.get(dtype), nbytes) for name, (dtype, nbytes) in header.tensors.items()]
        return SavedInfo(
            "weights",
            _versions(document),
            json_values.text(document["device"], "device"),
            _dtype(sizes),
            path.stat().st_size,
            _parts(path, sizes, stems),
            report_from_dict(document["report"]),
            Plan.from_dict(document["plan"], f"The plan in '{path}'"),
        )


def _versions(values: Mapping[str, Any]) -> dict[str, str]:
    written = {name: json_values.text(values.get(name), name) for name in ("fxsparse", "torch")}
    return {"format": str(json_values.integer(values.get("version"), "version")), **written}


def _dtype(tensors: Iterable[tuple[str, str | None, int]]) -> str:
    """Return the dtype that most bytes of floating-point tensors are in; "none" where there are none."""
    nbytes: Counter[str] = Counter()
    for _, dtype, size in tensors:
        if dtype is not None:
            nbytes[dtype] += size
    return max(nbytes, key=nbytes.__getitem__, default="none")


def _parts(path: Path, tensors: Iterable[tuple[str, str | None, int]], stems: Iterable[str]) -> dict[str, int]:
    names = {stem + suffix for stem in stems for suffix in PACKED_SUFFIXES}
    parts = {"weights": 0, "packed": 0}
    for name, _, size in tensors:
        parts["packed" if name in names else "weights"] += size
    return {**parts, "program": path.stat().st_size - sum(parts.values())}
