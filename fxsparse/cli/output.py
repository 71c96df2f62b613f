"""What the commands print: a result as text or JSON on stdout, everything else on stderr; exit codes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fxsparse.errors import FxsparseError

OK = 0
CHECK_FAILED = 1
BAD_REQUEST = 2
UNEXPECTED = 3
INTERRUPTED = 130  # as a shell reports SIGINT
BROKEN_PIPE = 141  # as a shell reports SIGPIPE


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a command found.

    Attributes:
        values: for `--json`: plain JSON values.
        text: for people; empty where the command printed as it went.
        code: the exit code.
    """

    values: dict[str, Any]
    text: str = ""
    code: int = OK

    def show(self, *, as_json: bool) -> None:
        """Print the result on stdout."""
        if as_json:
            print(json.dumps(_finite(self.values), indent=2, allow_nan=False))
        elif self.text:
            print(self.text)
        sys.stdout.flush()


def complain(message: str) -> None:
    """Print an error on stderr."""
    print(f"fxsparse: error: {message}", file=sys.stderr)


def in_one_line(error: BaseException) -> str:
    """Return the type of an exception and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def on_terminal() -> bool:
    """Tell whether stderr is a terminal, where progress bars belong."""
    return sys.stderr.isatty()


def size_of(count: int) -> str:
    """Return a number of bytes in a unit that suits it."""
    for unit, factor in (("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} B"


def stdout_for_result(as_json: bool) -> contextlib.AbstractContextManager[Any]:
    """Send what is printed meanwhile, by fxsparse or by a user's model, to stderr if stdout is to hold JSON alone."""
    return contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()


@contextlib.contextmanager
def logging_to_stderr(verbose: bool) -> Iterator[None]:
    """Print the log of fxsparse from INFO on to stderr meanwhile, if `verbose`."""
    if not verbose:
        yield
        return
    log = logging.getLogger("fxsparse")
    handler, level = logging.StreamHandler(), log.level
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def check_target(path: Path | None, option: str) -> None:
    """Refuse a file that could not be written, before there is anything to write.

    Args:
        path: the file that will be written; None for none.
        option: the option that names it.

    Raises:
        FxsparseError: its folder does not exist or cannot be written to, or it is a folder.
    """
    if path is None:
        return
    if path.is_dir():
        raise FxsparseError(f"{option}: '{path}' is a folder. Name a file.")
    if not path.parent.is_dir():
        raise FxsparseError(f"{option}: the folder '{path.parent}' does not exist. Create it first.")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise FxsparseError(
            f"{option}: nothing can be written to the folder '{path.parent}' ({error.strerror}). Choose another one."
        ) from error


def _finite(value: Any) -> Any:
    """Replace numbers that JSON does not have by null."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
