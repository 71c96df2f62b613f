"""The command line on CUDA: models saved from it, measured on it, moved to and from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fxsparse import cli

pytestmark = pytest.mark.gpu
MODEL = ("models:small_net", "--prune", "0.9", "--input", "4x3x16x16")
QUICK = ("--budget", "1")


def _run(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    capsys.readouterr()
    code = cli.main([*arguments, "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out)


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_bench_checks_and_times_on_cuda(capsys: pytest.CaptureFixture[str], dtype: str) -> None:
    options = ("--device", "cuda", "--dtype", dtype, "--seconds", "0.5", "--no-compile")
    values = _run(capsys, "bench", *MODEL, *QUICK, *options)
    assert values["ok"] and list(values["times"]) == ["dense eager", "dense channels_last", "fxsparse"]
    assert values["report"]["environment"]["device"] == torch.cuda.get_device_name()


def test_a_model_moves_between_the_devices(capsys: pytest.CaptureFixture[str]) -> None:
    _run(capsys, "convert", *MODEL, *QUICK, "--device", "cuda", "--output", "cuda.pt2")
    assert _run(capsys, "info", "cuda.pt2")["device"].startswith("cuda")
    _run(capsys, "calibrate", "cuda.pt2", "--input", "2x3x16x16", *QUICK, "--output", "cpu.pt2")
    saved = _run(capsys, "info", "cpu.pt2")
    assert saved["device"] == "cpu"
    devices = [entry["key"]["device"] for entry in saved["plan"]["entries"]]
    assert devices[0] == torch.cuda.get_device_name() and devices[1].endswith("threads")
    quick = ("--no-compile", "--seconds", "0.5")
    values = _run(capsys, "bench", "cpu.pt2", "--input", "2x3x16x16", "--device", "cuda", *quick)
    assert values["ok"]


def test_env_names_the_gpu_and_its_driver(capsys: pytest.CaptureFixture[str]) -> None:
    values = _run(capsys, "env")
    assert torch.cuda.get_device_name(0) in values["GPUs"]["GPU 0"]
    assert values["kernels"]["CUDA kernels"] == "loaded"
