"""An AOTInductor package that calls the operators with every kind of argument, in fresh Python processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import fxsparse
from fxsparse.ops.packing import pack

pytestmark = pytest.mark.skipif(fxsparse.capabilities().cpu_error is not None, reason="the extension is not built here")
BATCHES = (1, 2, 5)


class Net(nn.Module):
    """Sparse calls as converted models make them, and one in bfloat16 that leaves no argument at its default."""

    def __init__(self) -> None:
        super().__init__()
        convs = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, padding_mode="reflect", bias=False),  # a string; no bias
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=(0, 1), dilation=(1, 2), groups=2),
            nn.Conv2d(32, 32, 1),  # vanilla
        ).eval()
        self.convs = fxsparse.convert(convs, {name: torch.rand(convs[int(name)].weight.shape) < 0.2 for name in "02"})
        fxsparse.set_mode(self.convs, "sparse", sites=("0", "2"))
        assert [row.path for row in self.convs.report.rows] == ["sparse", "sparse", "vanilla"]
        mask = torch.rand(32, 32, 1, 1) < 0.2
        packed = pack((torch.randn(mask.shape) * mask).bfloat16(), fxsparse.regroup(mask))
        for name in ("values", "columns", "panels", "rows"):
            self.register_buffer(name, getattr(packed, name))

    def forward(self, x: Tensor) -> Tensor:
        y = self.convs(x).bfloat16()
        packed = (self.values, self.columns, self.panels, self.rows)
        geometry = ([32, 32, 1, 1], [1, 1], [0, 0, 0, 0], [1, 1], 1, "circular", "hardswish")
        z = torch.ops.fxsparse.conv2d.default(y, *packed, None, *geometry, add=y)
        return z.float()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the package, and inputs and outputs for several batches."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("package")
    net = Net().eval()
    with torch.no_grad():
        samples = {str(n): torch.randn(n, 3, 12, 12) for n in BATCHES}
        outputs = {name: net(x) for name, x in samples.items()}
        program = torch.export.export(net, (samples["2"],), dynamic_shapes=({0: Dim("batch")},))
    torch.save((samples, outputs), path / "samples.pt")
    torch._inductor.aoti_compile_and_package(program, package_path=str(path / "model.pt2"))
    return path


def run_package(folder: Path, first: str) -> subprocess.CompletedProcess[str]:
    """Run the package in a fresh process after the line `first`; it prints relative differences."""
    code = f"""
import json, torch
{first}
model = torch._inductor.aoti_load_package({str(folder / "model.pt2")!r})
samples, outputs = torch.load({str(folder / "samples.pt")!r})
differences = [(model(x) - outputs[name]) / outputs[name].abs().max() for name, x in samples.items()]
print(json.dumps([difference.abs().max().item() for difference in differences]))
"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("loader", ["import fxsparse", "torch.ops.load_library({!r})"])
def test_the_package_runs_in_a_fresh_process_that_has_the_operators(folder: Path, loader: str) -> None:
    done = run_package(folder, loader.format(fxsparse.capabilities().libraries[0]))
    assert done.returncode == 0, done.stderr
    # Inductor's dense convolution may round otherwise, which is a step of bfloat16: 2^-7 of the value.
    differences = json.loads(done.stdout)
    assert len(differences) == len(BATCHES)
    assert max(differences) <= 2**-7


def test_the_package_names_the_missing_operator_where_nothing_is_loaded(folder: Path) -> None:
    done = run_package(folder, "")
    assert done.returncode != 0
    assert "Could not find schema for fxsparse::" in done.stderr
