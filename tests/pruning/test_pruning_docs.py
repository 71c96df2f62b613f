"""The code of docs/pruning.md runs, in order, in one place."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import fxsparse
from fxsparse import calibration

PAGE = Path(__file__).parents[2] / "docs" / "pruning.md"


def test_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn", reason="the tutorial's digits come with scikit-learn")
    monkeypatch.chdir(tmp_path)
    for seconds in ("_SITE_S", "_LEAST_S", "_MOST_S", "_MODEL_S"):  # what calibration chooses is not asserted
        monkeypatch.setattr(calibration, seconds, 0.02)
    source = "\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL))
    names: dict[str, object] = {"__name__": "tutorial"}
    exec(compile(source, str(PAGE), "exec"), names)
    out = capsys.readouterr().out
    found = re.search(r"dense ([\d.]+)%, pruned ([\d.]+)%", out)
    assert found and float(found[1]) > 90 and float(found[2]) > float(found[1]) - 10
    assert "convolutions run sparse" in out and (tmp_path / "run.safetensors").exists()
    masks = names["masks"]
    assert isinstance(masks, dict) and all(isinstance(mask, torch.Tensor) for mask in masks.values())
    assert fxsparse.pruning.kept_share(masks) == pytest.approx(0.64, abs=0.02)
