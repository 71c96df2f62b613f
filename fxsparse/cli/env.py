"""Print what a bug report needs: versions, machine, kernels, compilers and environment variables."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from typing import Any

import torch

import fxsparse
from fxsparse.cli.output import Outcome
from fxsparse.plan import device_name

HELP = "print what a bug report needs"
EPILOG = """\
examples:
  fxsparse env
  fxsparse env --json > environment.json
"""

_PACKAGES = ("numpy", "safetensors", "tabulate", "tqdm", "triton", "torchvision", "timm", "mtkahypar")
_COMPILERS = ("c++", "g++", "clang++", "nvcc", "ninja")
_VARIABLES = ("FXSPARSE_", "OMP_", "GOMP_", "KMP_", "MKL_", "DNNL_", "ONEDNN_", "ATEN_", "TORCH", "PYTORCH_", "CUDA_")
_VARIABLES_EXACT = ("CC", "CXX", "CXXFLAGS", "LD_PRELOAD", "LD_LIBRARY_PATH", "XDG_CACHE_HOME")
_COMMAND_LIMIT_S = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare no options of its own."""


def run(arguments: argparse.Namespace) -> Outcome:
    """Collect and print."""
    values = collect()
    width = max(len(name) for section in values.values() for name in section)
    lines = []
    for title, section in values.items():
        lines.append(f"{title}:")
        lines += [f"  {name:<{width}}  {'-' if value is None else value}" for name, value in section.items()]
    return Outcome(values, "\n".join(lines))


def collect() -> dict[str, dict[str, Any]]:
    """Return what is known about this installation and machine, by section."""
    kernels = fxsparse.capabilities()
    return {
        "versions": {
            "fxsparse": fxsparse.__version__,
            "torch": torch.__version__,
            "torch CUDA": torch.version.cuda,
            "python": f"{platform.python_version()} ({platform.python_implementation()})",
            **{name: _version(name) for name in _PACKAGES},
        },
        "machine": {
            "system": platform.platform(),
            "CPU": device_name(torch.device("cpu")),
            "processors": os.cpu_count(),
            "processors allowed": len(os.sched_getaffinity(0)) if sys.platform == "linux" else None,
            "torch threads": torch.get_num_threads(),
            "torch CPU capability": torch.backends.cpu.get_cpu_capability(),
        },
        "kernels": {
            "CPU kernels": kernels.cpu,
            "CPU error": kernels.cpu_error,
            "CUDA kernels": "loaded" if kernels.cuda else "not loaded",
            "CUDA error": kernels.cuda_error,
            "libraries": ", ".join(kernels.libraries) or None,
        },
        "GPUs": {
            "driver": _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            **{f"GPU {i}": _gpu(i) for i in range(torch.cuda.device_count())},
        },
        "compilers": {name: _first_line(name, "--version") for name in _COMPILERS},
        "variables": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(_VARIABLES) or name in _VARIABLES_EXACT
        },
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    return f"{properties.name}, compute capability {properties.major}.{properties.minor}"


def _first_line(program: str, *arguments: str) -> str | None:
    """Return the line of a program's output that names its version; None where it is not there or fails."""
    path = shutil.which(program)
    if path is None:
        return None
    try:
        done = subprocess.run([path, *arguments], capture_output=True, text=True, timeout=_COMMAND_LIMIT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"found, but {type(error).__name__}"
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        return f"found, but it failed with exit code {done.returncode}"
    return next((line.strip() for line in lines if "release" in line), lines[0].strip())
