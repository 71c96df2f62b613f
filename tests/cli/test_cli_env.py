"""`fxsparse env`: what a bug report needs."""

from __future__ import annotations

import dataclasses
import os
import platform
import stat
import types
from pathlib import Path

import pytest
import torch
from running import Run

import fxsparse
from fxsparse.cli import env


def _program(path: Path, content: str) -> None:
    path.write_text(content)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_versions_machine_and_kernels_are_there(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("FXSPARSE_SOMETHING", "else")
    monkeypatch.setenv("PASSWORD", "secret")
    result = run("env", "--json")
    values = result.json
    assert result.code == 0 and "secret" not in result.out
    assert values["versions"]["fxsparse"] == fxsparse.__version__
    assert values["versions"]["torch"] == torch.__version__
    assert values["versions"]["python"].startswith(platform.python_version())
    assert values["machine"]["torch threads"] == torch.get_num_threads()
    assert values["kernels"]["CPU kernels"] == fxsparse.capabilities().cpu
    assert values["variables"]["OMP_NUM_THREADS"] == "1" and values["variables"]["FXSPARSE_SOMETHING"] == "else"


def test_the_text_has_a_line_for_each_value(run: Run) -> None:
    out = run("env").out
    for section, entries in env.collect().items():
        assert f"{section}:\n" in out
        assert all(f"  {name} " in out for name in entries)


def test_errors_of_the_libraries_are_said(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = dataclasses.replace(
        fxsparse.capabilities(),
        cpu="reference",
        cuda=False,
        cpu_error="_C.abi3.so was not built",
        cuda_error="needs the CPU library",
    )
    monkeypatch.setattr(fxsparse, "capabilities", lambda: missing)
    out = run("env").out
    for text in ("reference", "_C.abi3.so was not built", "not loaded", "needs the CPU library"):
        assert text in out


def test_programs_are_asked_for_their_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _program(tmp_path / "g++", "#!/bin/sh\necho 'g++ 12.2'\necho more\n")
    _program(tmp_path / "nvcc", "#!/bin/sh\necho 'a compiler'\necho ' release 13.0, V13'\n")
    _program(tmp_path / "ninja", "#!/bin/sh\nexit 7\n")
    _program(tmp_path / "clang++", "no program\n\x7f")
    _program(tmp_path / "nvidia-smi", "#!/bin/sh\necho 570.1\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    values = env.collect()
    assert values["compilers"] == {
        "c++": None,
        "g++": "g++ 12.2",
        "clang++": "found, but OSError",
        "nvcc": "release 13.0, V13",
        "ninja": "found, but it failed with exit code 7",
    }
    assert values["GPUs"]["driver"] == "570.1"


def test_gpus_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = types.SimpleNamespace(name="A GPU", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setenv("PATH", os.devnull)
    assert env.collect()["GPUs"] == {
        "driver": None,
        "GPU 0": "A GPU, compute capability 9.0",
        "GPU 1": "A GPU, compute capability 9.0",
    }
