"""info: what a file holds, without its tensors; and reports from JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from archives import SHAPE, changed, converted, packed, unpacked

import fxsparse
from fxsparse import FxsparseError, Report
from fxsparse.saving import info, safety, weights_file


@pytest.fixture(scope="module", params=["model", "weights"])
def saved(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, torch.nn.Module, Path]:
    model = converted(rung="modules" if request.param == "weights" else "auto")
    fxsparse.calibrate(model, torch.zeros(SHAPE), budget_s=0.05)
    path = tmp_path_factory.mktemp("saved") / "file"
    (fxsparse.save if request.param == "model" else fxsparse.save_weights)(model, path)
    return request.param, model, path


def test_info_tells_what_was_saved(saved: tuple[str, torch.nn.Module, Path]) -> None:
    kind, model, path = saved
    found = info(path)
    assert (found.kind, found.device, found.dtype) == (kind, "cpu", "float32")
    assert found.versions == {"format": "1", "fxsparse": fxsparse.__version__, "torch": torch.__version__}
    assert found.report.rows == model.report.rows and found.report.environment == model.report.environment
    assert [entry.key for entry in found.plan.entries] == [entry.key for entry in model.plan.entries]
    assert found.bytes == path.stat().st_size == sum(found.parts.values())
    names = [name for name, _ in model.named_buffers() if "_mask" not in name]
    assert found.parts["packed"] == sum(model.get_buffer(n).numel() * model.get_buffer(n).element_size() for n in names)
    assert json.loads(json.dumps(found.to_dict()))["report"]["rung"] == model.report.rung


def test_info_reads_no_tensors(saved: tuple[str, torch.nn.Module, Path], tmp_path: Path) -> None:
    kind, model, path = saved
    content = bytearray(path.read_bytes())
    weight = next(p for n, p in model.named_parameters() if n.endswith("head.weight")).detach().numpy().tobytes()
    at = content.index(weight)
    content[at] ^= 1
    damaged = tmp_path / "damaged"
    damaged.write_bytes(content)
    assert info(damaged).report == info(path).report
    with pytest.raises(FxsparseError, match="damaged"):
        safety.check(damaged) if kind == "model" else weights_file.read(damaged)


def test_info_of_a_model_without_a_plan_has_an_empty_one(tmp_path: Path) -> None:
    fxsparse.save(converted(), tmp_path / "model.pt2")
    assert info(tmp_path / "model.pt2").plan.entries == ()


def test_a_change_of_the_parts_that_are_read_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    fxsparse.save(converted(), path)
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"rung": "symbolic"', b'"rung": "SYMBOLIC"'))
    with pytest.raises(FxsparseError, match="the checksum of the entry 'extra/fxsparse/report.json' is wrong"):
        info(path)
    entries = unpacked(content, tmp_path)
    packed(path, changed(entries, safety.STATE, lambda values: values.update(sites=[])))
    with pytest.raises(FxsparseError, match="an object that holds an object of sites"):
        info(path)


def test_a_report_comes_back_from_its_json(saved: tuple[str, torch.nn.Module, Path]) -> None:
    _, model, _ = saved
    assert Report.from_dict(json.loads(model.report.to_json())) == model.report


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("rows", None, "it.rows is None; it should be a list"),
        ("rung", "os.system", "it.rung is 'os.system'; it should be one of"),
        ("notes", [1], r"it.notes\[0\] is 1"),
        ("model_ms", -1, "it.model_ms is -1"),
        ("bytes_before", 0.5, "it.bytes_before is 0.5"),
        ("environment", {"a": 1}, "environment"),
    ],
)
def test_a_report_with_a_wrong_value_is_refused(field: str, value: object, match: str) -> None:
    values = {**converted().report.to_dict(), field: value}
    with pytest.raises(FxsparseError, match=match):
        Report.from_dict(values, "The file")
