"""Loading: capabilities, the reference where nothing is built, and what importing costs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import fxsparse
from fxsparse.ops import library


def run_python(code: str, **env: str) -> str:
    """Run code in a fresh interpreter and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **env},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_extension_is_built_and_capabilities_say_so() -> None:
    able = fxsparse.capabilities()
    assert able.cpu in ("avx512", "avx2", "baseline")
    assert able.cpu_error is None
    assert Path(able.libraries[0]).name == "_C.abi3.so"
    assert all(Path(path).is_file() for path in able.libraries)
    assert library.has_kernel(torch.device("cpu"))


def test_the_python_schemas_are_those_of_the_extension() -> None:
    for name, schema in library.SCHEMAS.items():
        compiled = getattr(torch.ops.fxsparse, name).default._schema
        assert torch._C.parse_schema(f"fxsparse::{name}{schema}") == compiled


def test_without_the_extension_the_reference_runs_with_one_warning_that_says_how_to_build() -> None:
    out = run_python(
        """
        import json, warnings, torch

        def missing(path):
            raise OSError("not here")

        torch.ops.load_library = missing
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            import fxsparse
            conv = torch.nn.Conv2d(8, 32, 3, padding=1).eval()
            mask = torch.rand_like(conv.weight) < 0.1
            fast = fxsparse.convert(torch.nn.Sequential(conv), {"0": mask})
            x = torch.randn(2, 8, 6, 6)
            with torch.no_grad():
                got = fast(x)
        expected = torch.nn.functional.conv2d(x, conv.weight * mask, conv.bias, padding=1)
        ours = [str(w.message) for w in seen if "fxsparse" in str(w.message)]
        able = fxsparse.capabilities()
        print(json.dumps([ours, able.cpu, able.cpu_error, able.cuda, fast.report.sparse, str(fast.report),
                          (got - expected).abs().max().item(), able.libraries]))
        """
    )
    warned, cpu, error, cuda, sparse, report, difference, libraries = json.loads(out)
    assert len(warned) == 1
    assert "pip install --no-build-isolation ." in warned[0]
    assert (cpu, error, cuda, sparse) == ("reference", "not here", False, 1)
    assert libraries == []
    assert "There is no compiled kernel for 'cpu' here" in report
    assert difference < 1e-5


def test_importing_starts_no_cuda_and_costs_under_50_ms(tmp_path: Path) -> None:
    # As it is installed: pip compiles modules to bytecode. Here the first of four imports does, or none would.
    bytecode = {"PYTHONPYCACHEPREFIX": str(tmp_path), "PYTHONDONTWRITEBYTECODE": ""}
    costs = []
    for _ in range(4):
        out = run_python(
            """
            import torch, time, sys
            start = time.process_time()
            import fxsparse
            took = time.process_time() - start
            print(took, torch.cuda.is_initialized(), "fxsparse.conversion" in sys.modules, "tabulate" in sys.modules)
            """,
            **bytecode,
        )
        took, cuda, *rest = out.split()
        assert (cuda, *rest) == ("False", "False", "False")
        costs.append(float(took))
    # The figure is the design's. Processor time, and the best of some: other tests run beside this one.
    assert min(costs) < 0.05


@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline"])
def test_every_instruction_set_agrees_with_float64(isa: str) -> None:
    order = ["baseline", "avx2", "avx512"]
    if order.index(isa) > order.index(fxsparse.capabilities().cpu):
        pytest.skip(f"this CPU has no {isa}")
    here = str(Path(__file__).parent)
    out = run_python(
        """
        import torch, fxsparse
        from cases import Case
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            for options in ({}, {"stride": (2, 2)}, {"mask": "unstructured"}, {"size": (7, 7), "batch": 6},
                            {"out_channels": 70, "groups": 2}, {"activation": "silu", "add": True},
                            {"padding_mode": "reflect"}, {"kernel": (1, 1), "padding": (0, 0, 0, 0)},
                            {"size": (2, 2), "batch": 9}, {"size": (5, 61)}, {"mask": "full"}):
                Case(dtype=dtype, **options).check()
        print(fxsparse.capabilities().cpu)
        """,
        FXSPARSE_CPU_ISA=isa,
        PYTHONPATH=os.pathsep.join([here, *sys.path]),
    )
    assert out.strip() == isa
