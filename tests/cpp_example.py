"""Builds and runs `examples/cpp`."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import torch

import fxsparse

SOURCE = Path(__file__).parent.parent / "examples" / "cpp"
LIBRARIES = fxsparse.capabilities().libraries


def missing() -> str:
    """Say what keeps the example from being built here, or ""."""
    tools = [tool for tool in ("cmake", "make", "g++") if shutil.which(tool) is None]
    if tools:
        return f"not installed here: {', '.join(tools)}"
    return "" if LIBRARIES else "the extension is not built here"


def build(folder: Path) -> Path:
    """Configure and build in a folder; return the program."""
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    _run("cmake", "-S", str(SOURCE), "-B", str(folder), "-DCMAKE_BUILD_TYPE=Release", prefix)
    _run("cmake", "--build", str(folder))
    return folder / "run_model"


def export(folder: Path, device: str = "cpu") -> None:
    """Write the package and its samples by the example's own script."""
    report = _run(sys.executable, str(SOURCE / "export.py"), str(folder), "--device", device)
    assert "3 of 3 convolutions run sparse" in report


def run(program: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the program."""
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=False)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
