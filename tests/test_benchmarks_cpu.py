"""`python -m benchmarks cpu` on its smallest workload; onnxruntime and OpenVINO may be there or not."""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import cpu, engines
from fxsparse import calibration
from fxsparse.arms import Arm

ENGINES = ("onnxruntime", "openvino")
TINY = ("cpu", "--networks", "vgg16:32:1", "--zeros", "0.9", "--budget", "0.5")
ROW = {
    "name", "px", "batch", "structure", "zeros", "best dense", "dense ms", "fxsparse ms", "ratio", "ratios", "target",
    "sparse sites", "sites", "convert s",
}  # fmt: skip


_built = functools.cache(cpu.build)  # a network is converted once for all tests


@pytest.fixture(autouse=True)
def quick_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "build", _built)
    for seconds in ("_SITE_S", "_LEAST_S", "_MOST_S", "_MODEL_S"):
        monkeypatch.setattr(calibration, seconds, 0.01)


@pytest.fixture
def no_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the import of every engine that is a package of its own fail."""
    real = importlib.import_module

    def fail(name: str, package: str | None = None) -> ModuleType:
        if name in ENGINES:
            raise ModuleNotFoundError(f"No module named '{name}'")
        return real(name, package)

    monkeypatch.setattr(engines.importlib, "import_module", fail)


def test_rows_and_json_hold_every_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "numbers.json"
    result = command.main([*TINY, "--no-compile", "--repeats", "2", "--json", str(file)])
    assert json.loads(file.read_text()) == json.loads(json.dumps(result))
    (network,) = result["results"]
    (row,) = network["rows"]
    assert set(row) == ROW
    assert (row["name"], row["px"], row["batch"], row["structure"], row["zeros"]) == ("vgg16", 32, 1, "regrouped", 0.9)
    assert row["target"] == cpu.TARGETS["regrouped"]["vgg16:32:1"][0.9]
    assert len(row["ratios"]) == len(network["repeats"]) == 2
    assert min(row["ratios"]) <= row["ratio"] <= max(row["ratios"])
    assert 0 <= row["sparse sites"] <= row["sites"] == 13
    there = {"eager", "channels_last", *ENGINES} - set(network["skipped"])
    assert set(network["ms"]) == set(network["errors"]) == {*there, "fxsparse regrouped 0.9"}
    assert network["ms"][row["best dense"]] == row["dense ms"] == min(network["ms"][name] for name in there)
    assert network["ms"]["fxsparse regrouped 0.9"] == row["fxsparse ms"] > 0
    assert set(network["skipped"]) <= set(ENGINES)
    printed = capsys.readouterr().out
    assert f"| {row['ratio']:.2f}x [" in printed
    assert f"| {row['target']:g}x " in printed
    assert all(reason in printed for reason in network["skipped"].values())


def test_an_engine_that_is_not_installed_is_left_out_with_one_line(
    no_engines: None, capsys: pytest.CaptureFixture[str]
) -> None:
    (network,) = command.main([*TINY, "--no-compile"])["results"]
    assert set(network["skipped"]) == set(ENGINES)
    assert set(network["ms"]) == {"eager", "channels_last", "fxsparse regrouped 0.9"}
    lines = capsys.readouterr().out.splitlines()
    for name in ENGINES:
        wanted = f"{name} is left out: No module named '{name}'. Get it with: {engines.INSTALL}"
        assert [line for line in lines if name in line] == [wanted]


@pytest.mark.parametrize("network", ["vgg17:32:1", "vgg16", "vgg16:big:1"])
def test_a_network_that_is_none_is_one_clear_error(network: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command.main(["cpu", "--networks", network])
    assert caught.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "--networks" in error
    assert f"'{network.partition(':')[0]}" in error


def test_a_wrong_arm_is_an_error_not_a_time(no_engines: None, monkeypatch: pytest.MonkeyPatch) -> None:
    right = cpu.engine_arms

    def wrong(*arguments: Any, **options: Any) -> tuple[Mapping[str, Arm], dict[str, str]]:
        arms, reasons = right(*arguments, **options)
        return {**arms, "eager": lambda: arms["eager"]() * 1.001}, reasons

    monkeypatch.setattr(cpu, "engine_arms", wrong)
    monkeypatch.setattr(cpu, "interleaved", None)  # nothing may be timed
    with pytest.raises(RuntimeError, match="vgg16:32:1: 'eager' differs from the masked dense model"):
        command.main([*TINY, "--no-compile"])


def test_layers_prints_a_row_for_each_sparse_convolution(capsys: pytest.CaptureFixture[str]) -> None:
    (found,) = command.main([*TINY, "--layers"])["layers"]
    assert (found["network"], found["structure"], found["zeros"]) == ("vgg16:32:1", "regrouped", 0.9)
    assert len(found["rows"]) + len(found["dense"]) == 13
    printed = capsys.readouterr().out
    for row in found["rows"]:
        assert f"| {row['name']} " in printed
        assert row["density"] == (1.0 if row["name"] == "features.0.0" else pytest.approx(0.1, abs=0.01))
        assert row["of_roofline"] * row["ms"] == pytest.approx(max(row["flop_ms"], row["byte_ms"]))
    assert f"Run dense: {', '.join(found['dense']) or 'none'}." in printed


def test_scaling_compares_one_thread_with_all_and_puts_the_threads_back(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    (found,) = command.main([*TINY, "--scaling"])["scaling"]
    assert torch.get_num_threads() == found["threads"] == threads
    assert min(found["one_ms"], found["all_ms"], found["ratio"]) > 0
    assert f"{threads} threads {found['all_ms']:.3f} ms: {found['ratio']:.2f}x" in capsys.readouterr().out


def test_layers_and_scaling_exclude_each_other() -> None:
    with pytest.raises(SystemExit):
        command.main([*TINY, "--layers", "--scaling"])
