"""Row lanes: the kernels' own source runs on a CPU, and the convolutions that they prepare, read by read."""

from __future__ import annotations

import math
import shutil
import subprocess
from pathlib import Path

import pytest
import tiles_emulator
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import fxsparse
from fxsparse.ops.packing import pack
from fxsparse.ops.tiles import tile

HERE = Path(__file__).parent
SOURCES = Path(fxsparse.__file__).parent / "csrc"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile the kernels for this machine's CPU."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    built = tmp_path_factory.mktemp("row_lanes") / "check"
    source = HERE / "cuda_on_cpu" / "row_lanes_check.cpp"
    includes = [f"-I{source.parent}", f"-I{SOURCES}"]
    flags = ["-std=c++20", "-O1", "-Wall", "-Wno-unknown-pragmas", "-Wno-attributes", "-pthread"]
    subprocess.run([compiler, *flags, *includes, "-o", str(built), str(source)], check=True)
    return built


@pytest.mark.parametrize("seed", range(3))
def test_the_kernels_compute_what_plain_loops_do(program: Path, seed: int) -> None:
    ran = subprocess.run([str(program), "6", str(seed)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout == "6 rounds of each type\n"


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_tiled_kernels_compute_unfolded_convolutions(data: st.DataObject) -> None:
    """A convolution is one of images of kernel-width columns, whose batch is images and positions of a row."""

    def draw(first: int, last: int) -> int:
        return data.draw(st.integers(first, last))

    batch, height, width, groups = draw(1, 3), draw(1, 7), draw(1, 11), draw(1, 2)
    shape = (groups * draw(1, 40), draw(1, 9), draw(1, 3), draw(1, 5))
    stride, dilation = (draw(1, 2), draw(1, 3)), (draw(1, 2), draw(1, 2))
    top, bottom, left, right = (draw(0, 2), draw(0, 2), draw(0, 4), draw(0, 4))
    torch.manual_seed(draw(0, 99))
    weight = torch.randn(shape, dtype=torch.float64) * (torch.rand(shape) < 0.5)
    x = torch.randn(batch, groups * shape[1], height, width, dtype=torch.float64)
    padded = F.pad(x, (left, right, top, bottom))
    if any(padded.shape[2 + i] < dilation[i] * (shape[2 + i] - 1) + 1 for i in (0, 1)):
        return
    wanted = F.conv2d(padded, weight, None, stride, 0, dilation, groups)
    out_width = wanted.shape[3]
    lanes = -(-out_width // 8) * 8
    rows = F.pad(x, (left, right))
    unfolded = torch.full((batch, lanes, x.shape[1], height, shape[3]), math.nan, dtype=torch.float64)
    for tap in range(shape[3]):
        taken = rows[..., tap * dilation[1] :][..., : (out_width - 1) * stride[1] + 1 : stride[1]]
        unfolded[:, :out_width, ..., tap] = taken.permute(0, 3, 1, 2)
    tiled = tile(pack(weight, fxsparse.regroup(weight != 0, groups=groups)))
    got = tiles_emulator.run(tiled, unfolded.flatten(0, 1), (stride[0], 1), (top, bottom, 0, 0), (dilation[0], 1))
    got = got[..., 0].unflatten(0, (batch, lanes)).permute(0, 2, 3, 1)[..., :out_width]
    assert torch.allclose(got, wanted, atol=1e-10)
