"""The C++ example is built by CMake and run on the package that its own script makes."""

from __future__ import annotations

import shutil
from pathlib import Path

import cpp_example
import numpy as np
import pytest

pytestmark = pytest.mark.skipif(bool(cpp_example.missing()), reason=cpp_example.missing())


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cpp_example.build(tmp_path_factory.mktemp("build"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    cpp_example.export(folder)
    return folder


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ((), "device cpu, batch 8, "),
        (("--batch", "1", "--threads", "2"), "device cpu, batch 1, threads 2"),
        (("--batch", "13", "--calls", "2"), "device cpu, batch 13, "),
    ],
)
def test_the_program_agrees_with_python(program: Path, model: Path, options: tuple[str, ...], says: str) -> None:
    done = cpp_example.run(program, model, *cpp_example.LIBRARIES, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert says in done.stdout
    assert ": agrees" in done.stdout


def test_the_program_fails_where_an_output_differs(program: Path, model: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(model, changed)
    expected = np.fromfile(changed / "expected.f32", np.float32)
    expected[-1] += 0.01 * np.abs(expected).max()
    expected.tofile(changed / "expected.f32")
    done = cpp_example.run(program, changed, *cpp_example.LIBRARIES)
    assert done.returncode == 1
    assert "DISAGREES" in done.stdout


def test_the_program_says_what_is_wrong(program: Path, model: Path, tmp_path: Path) -> None:
    library = cpp_example.LIBRARIES[0]
    for arguments, says in (
        ((), "Usage: run_model FOLDER LIBRARY..."),
        ((model,), "Could not find schema for fxsparse::"),
        ((model, tmp_path / "missing.so"), "Could not load a library"),
        ((tmp_path, library), "file open failed"),
        ((model, library, "--batch", "none"), "--batch needs a number of at least 1"),
        ((model, library, "--speed", "1"), "There is no option --speed"),
    ):
        done = cpp_example.run(program, *arguments)
        assert done.returncode == 2
        assert says in done.stderr
        assert done.stdout == ""
