"""The shell transcripts of the documentation are what the commands print.

A transcript is a block of Markdown marked `console`. A line that starts with "$ " is a command, lines after it that
start with ">" go on with it, and the rest is what it prints, on stdout and stderr. "..." stands for anything, or
nothing, and white space may differ. The blocks of one file share a folder, from the first to the last. Commands of
fxsparse run in this process, which saves importing torch, and all others in a shell.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fxsparse import cli

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```console\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SHELL = set("|<>&;$`*?~#\n")


def transcripts(text: str) -> Iterator[tuple[str, str]]:
    """Return each command of a Markdown text, and what it should print."""
    for block in BLOCK.findall(text):
        parts = re.split(r"^\$ ", block, flags=re.MULTILINE)
        assert not parts[0], f"a transcript starts with a command, not with {parts[0]!r}"
        for part in parts[1:]:
            first, *rest = part.splitlines(keepends=True)
            more = [line for line in rest if line.startswith(">")]
            yield first + "".join(line[1:].removeprefix(" ") for line in more), "".join(rest[len(more) :])


def is_what(wanted: str, found: str) -> bool:
    """Tell whether an output is what a transcript says."""
    first, *others = (" ".join(part.split()) for part in wanted.split("..."))
    rest = " ".join(found.split())
    if not others:
        return rest == first
    *middle, last = others
    if not rest.startswith(first):
        return False
    rest = rest[len(first) :]
    for part in middle:
        _, there, rest = rest.partition(part) if part else ("", True, rest)
        if not there:
            return False
    return rest.endswith(last)


def perform(command: str, status: int) -> tuple[int, str]:
    """Run a command after one that exited with `status`; return its exit code and what it prints."""
    words = [] if SHELL & set(command.strip()) else shlex.split(command)
    if words[:1] != ["fxsparse"]:
        script = f"(exit {status})\n{command}"
        # `python` is this one, whether or not its environment is activated.
        path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
        done = subprocess.run(
            ["bash", "-c", script],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PATH": path},
        )
        return done.returncode, done.stdout
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        try:
            return cli.main(words[1:]), out.getvalue()
        except SystemExit as stop:
            return int(stop.code or 0), out.getvalue()


@pytest.mark.parametrize("name", ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_transcripts_are_true(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    status = 0
    try:
        for command, wanted in transcripts((ROOT / name).read_text(encoding="utf-8")):
            status, found = perform(command, status)
            assert is_what(wanted, found), f"{name} says of\n$ {command}\nthat it prints\n{wanted}\nIt prints\n{found}"
    finally:
        for module in set(sys.modules) - before:  # made by a transcript: other tests have modules of that name
            if str(tmp_path) in (getattr(sys.modules[module], "__file__", None) or ""):
                del sys.modules[module]


EXAMPLE = """Text
```console
$ cat <<'END'
> one two
> END
one ...
$ fxsparse nothing
...
$ echo $?
2
```
$ no
"""


def test_a_transcript_is_read_with_continuations_and_exit_codes() -> None:
    found = list(transcripts(EXAMPLE))
    assert [wanted for _, wanted in found] == ["one ...\n", "...\n", "2\n"]
    status, outputs = 0, []
    for command, _ in found:
        status, output = perform(command, status)
        outputs.append((status, output))
    assert outputs[0] == (0, "one two\n") and outputs[2] == (0, "2\n")
    assert outputs[1][0] == 2 and "usage: fxsparse" in outputs[1][1]


@pytest.mark.parametrize(
    ("wanted", "found", "right"),
    [
        ("a  b\n", "a\nb", True),
        ("a b", "a b c", False),
        ("a ... c", "a b\nc", True),
        ("a\n...\nc\n", "a\nc\n", True),
        ("...\nc", "c\n", True),
        ("a ... c", "a b d", False),
        ("a ... c", "b a c", False),
        ("a ... b ... c", "a x c", False),
        ("a ... b ... b", "a b", False),
        ("a ...", "a", True),
        ("", "a", False),
    ],
)
def test_an_output_is_compared_with_a_transcript(wanted: str, found: str, right: bool) -> None:
    assert is_what(wanted, found) is right


def test_every_command_has_a_transcript() -> None:
    commands = [command.split() for command, _ in transcripts((ROOT / "docs" / "cli.md").read_text(encoding="utf-8"))]
    named = {words[1] for words in commands if words[0] == "fxsparse"}
    assert {module.__name__.rpartition(".")[2] for module in cli.COMMANDS} <= named
