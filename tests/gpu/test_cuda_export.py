"""torch.export, AOTInductor and the C++ example on CUDA."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import cpp_example
import pytest
import torch
from models import random_masks, small_net
from programs import sparse_calls
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.passes import move_to_device_pass
from torch.utils.cpp_extension import CUDA_HOME

import fxsparse

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("exact_float32")]
PLAIN_PACKAGE = """
import sys, torch
with torch.no_grad():
    program = torch.export.export(torch.nn.Linear(4, 4), (torch.randn(2, 4),))
    torch._inductor.aoti_load_package(torch._inductor.aoti_compile_and_package(program, package_path=sys.argv[1]))
"""


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skip where torch cannot load what the compiler of this machine makes of a model without us: it would crash."""
    path = tmp_path_factory.mktemp("plain") / "model.pt2"
    done = subprocess.run([sys.executable, "-c", PLAIN_PACKAGE, str(path)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a package of a plain nn.Linear does not load here (exit code {done.returncode})")


needs_toolkit = pytest.mark.skipif(CUDA_HOME is None, reason="no CUDA toolkit, whose headers AOTInductor compiles with")
BATCHES = (1, 2, 5)


def converted(device: str = "cuda") -> nn.Module:
    """Return a converted SmallNet with one vanilla convolution."""
    model = small_net().to(device)
    fast = fxsparse.convert(model, random_masks(model))
    fxsparse.set_mode(fast, "sparse")
    fxsparse.set_mode(fast, "vanilla", sites="block.conv1")
    assert fast.report.sparse == 3
    return fast


def images(batch: int, device: str = "cuda") -> Tensor:
    return torch.randn(batch, 3, 16, 16, device=device)


def export(model: nn.Module, device: str = "cuda") -> ExportedProgram:
    return torch.export.export(model, (images(2, device),), dynamic_shapes=({0: Dim("batch")},))


@torch.no_grad()
def test_an_exported_model_runs_any_batch() -> None:
    fast = converted()
    program = export(fast)
    assert sparse_calls(program.graph) == 3
    for batch in BATCHES:
        x = images(batch)
        torch.testing.assert_close(program.module()(x), fast(x), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_program_exported_on_cpu_moves_to_cuda() -> None:
    fast = converted("cpu")
    program = move_to_device_pass(export(fast, "cpu"), "cuda")
    assert sparse_calls(program.graph) == 3
    x = images(5, "cpu")
    torch.testing.assert_close(program.module()(x.cuda()).cpu(), fast(x), atol=1e-4, rtol=1e-4)


@needs_toolkit
@pytest.mark.usefixtures("packages")
@torch.no_grad()
def test_an_aot_inductor_package_runs_any_batch(tmp_path: Path) -> None:
    fast = converted()
    path = torch._inductor.aoti_compile_and_package(export(fast), package_path=str(tmp_path / "model.pt2"))
    package = torch._inductor.aoti_load_package(path)
    for batch in BATCHES:
        x = images(batch)
        torch.testing.assert_close(package(x), fast(x), atol=1e-4, rtol=1e-4)
    stream = torch.cuda.Stream()  # the operators follow the stream that torch is on
    with torch.cuda.stream(stream):
        out = package(x)
    stream.synchronize()
    torch.testing.assert_close(out, fast(x), atol=1e-4, rtol=1e-4)


@needs_toolkit
@pytest.mark.usefixtures("packages")
@pytest.mark.skipif(bool(cpp_example.missing()), reason=cpp_example.missing())
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH, which find_package(Torch) asks for")
def test_the_cpp_example_runs_a_cuda_package(tmp_path: Path) -> None:
    cpp_example.export(tmp_path / "model", "cuda")
    program = cpp_example.build(tmp_path / "build")
    for options in ((), ("--batch", "3")):
        done = cpp_example.run(program, tmp_path / "model", *cpp_example.LIBRARIES, *options)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "device cuda" in done.stdout
        assert ": agrees" in done.stdout
