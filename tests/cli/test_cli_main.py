"""What all commands share: exit codes, errors without tracebacks, JSON alone on stdout, logs on stderr."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from running import Run

import fxsparse
from fxsparse import cli
from fxsparse.cli import env, explain

COMMANDS = ("demo", "prune", "convert", "explain", "calibrate", "bench", "info", "env")


def test_the_version_is_printed(run: Run) -> None:
    assert run("--version") == (0, f"fxsparse {fxsparse.__version__}\n", "")


def test_the_help_names_every_command_and_exit_code(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    for text in (*COMMANDS, "exit codes:", "130", "examples:"):
        assert text in out


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_has_examples_and_the_shared_options(run: Run, command: str) -> None:
    code, out, _ = run(command, "--help")
    assert code == 0
    for text in (f"fxsparse {command} ", "examples:", "--json", "--debug", "--verbose"):
        assert text in out


@pytest.mark.parametrize("arguments", [(), ("unknown",), ("explain",), ("env", "--unknown")])
def test_arguments_that_argparse_refuses_exit_with_2(run: Run, arguments: tuple[str, ...]) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert "usage: fxsparse" in err


def test_a_bad_request_is_one_line_without_a_traceback(run: Run) -> None:
    code, out, err = run("explain", "nets:missing")
    assert (code, out) == (2, "")
    assert err.startswith("fxsparse: error: 'nets' has no 'missing'") and err.count("\n") == 1


def test_debug_shows_the_traceback_and_keeps_the_exit_code(run: Run) -> None:
    code, _, err = run("explain", "nets:fails", "--debug")
    assert code == 2
    assert "Traceback" in err and "RuntimeError: no such dataset" in err
    assert "Traceback" not in run("explain", "nets:fails").err


def test_an_unexpected_exception_exits_with_3_and_a_hint(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise OSError("disk on fire\nmore")

    monkeypatch.setattr(env, "run", fail)
    code, out, err = run("env")
    assert (code, out) == (3, "")
    assert err.startswith("fxsparse: error: OSError: disk on fire\n")
    assert "--debug" in err and "fxsparse env" in err and "Traceback" not in err and "more" not in err


def test_an_interrupt_exits_with_130(run: Run) -> None:
    assert run("explain", "nets:interrupts") == (130, "", "fxsparse: interrupted\n")


def test_json_is_alone_on_stdout_though_the_factory_prints(run: Run) -> None:
    result = run("explain", "nets:chatty", "--json")
    assert result.json["report"]["rung"] == "symbolic"
    assert "said by the factory" in result.err
    assert run("explain", "nets:chatty").out.startswith("said by the factory\n")


def test_an_error_leaves_stdout_empty_with_json(run: Run) -> None:
    code, out, err = run("explain", "nets:chatty", "--masks", "missing.safetensors", "--json")
    assert (code, out) == (2, "")
    assert "there is no file 'missing.safetensors'" in err


def test_numbers_that_json_lacks_become_null(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"a": [float("nan"), 1.5, (float("inf"),)], 2: None}
    monkeypatch.setattr(env, "run", lambda _: cli.output.Outcome(values))  # type: ignore[arg-type]
    assert run("env", "--json").json == {"a": [None, 1.5, [None]], "2": None}


def test_verbose_logs_to_stderr_while_it_runs_only(run: Run) -> None:
    log = logging.getLogger("fxsparse")
    before = (log.level, list(log.handlers))
    assert "fxsparse.conversion: Passes on ''" in run("explain", "nets:Net", "--verbose").err
    assert (log.level, log.handlers) == before
    assert "Passes on" not in run("explain", "nets:Net").err


def test_progress_bars_are_for_terminals(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    report = fxsparse.explain(torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1)).eval())

    def note(*_: Any, settings: fxsparse.Settings, **__: Any) -> fxsparse.Report:
        seen.append(settings.progress)
        return report

    monkeypatch.setattr(fxsparse, "explain", note)
    run("explain", "nets:Net")
    monkeypatch.setattr(explain, "on_terminal", lambda: True)
    run("explain", "nets:Net")
    assert seen == [False, True]


def test_the_modules_run_and_a_closed_pipe_is_quiet(folder: Path) -> None:
    """Both ways to start it as a module, in real processes."""
    process = {"capture_output": True, "text": True, "env": {**os.environ, "PYTHONUNBUFFERED": ""}}
    line = f"{sys.executable} -m fxsparse.cli env | true; echo ${{PIPESTATUS[0]}}"
    closed = subprocess.run(["bash", "-c", line], **process)  # type: ignore[call-overload]
    assert (closed.stdout, closed.stderr) == (f"{cli.output.BROKEN_PIPE}\n", "")
    named = subprocess.run([sys.executable, "-m", "fxsparse", "info", "no.pt2"], **process)  # type: ignore[call-overload]
    assert (named.returncode, named.stdout) == (2, "")
    assert named.stderr.startswith("fxsparse: error: 'no.pt2' cannot be read")
