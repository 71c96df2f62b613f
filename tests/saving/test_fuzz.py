"""Damaged files: every one is refused by FxsparseError, or is a model; none crashes, hangs or runs code."""

from __future__ import annotations

import resource
from pathlib import Path

import fuzz
from mutations import OF_MODELS, OF_WEIGHTS

_KINDS = len(OF_MODELS) + len(OF_WEIGHTS)


def test_damaged_files_are_refused_or_load(tmp_path: Path) -> None:
    # A worker's peak begins with what this process has, which the tests before have left.
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result = fuzz.run(files=6 * _KINDS, seed=0, folder=tmp_path)
    print(result)
    assert set(result) == {*OF_MODELS, *OF_WEIGHTS}
    bad = {outcome: result.total(outcome) for outcome in fuzz.OUTCOMES if outcome not in fuzz.GOOD}
    assert bad == dict.fromkeys(bad, 0)
    assert not result.ran
    assert result.peak < before + 1e9
    for kind in ("truncated", "one bit flipped", "entry twice", "entry removed, sums right", "newer version"):
        assert set(result[kind]) == {"refused"}, kind
    assert set(result["hostile, sums right"]) == {"refused"}
    assert result["bit of a weight, sums right"]["loaded"] == 6


def test_a_worker_that_dies_is_seen(tmp_path: Path, monkeypatch) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text("import os; print('refused', flush=True); os.abort()")
    monkeypatch.setattr(fuzz, "__file__", str(worker))
    paths = [tmp_path / "a", tmp_path / "b"]
    assert list(fuzz._outcomes(paths, fuzz.Result())) == ["refused", "crash"]
