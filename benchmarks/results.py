"""Where a command's numbers go: one JSON file, replaced as a whole, so that a run that was cut can be resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Results:
    """The file of `--json`, or none.

    Attributes:
        header: what every file starts with: the command and its environment.
    """

    def __init__(self, path: Path | None, header: dict[str, Any]) -> None:
        self.path = path
        self.header = header

    def save(self, result: dict[str, Any]) -> dict[str, Any]:
        """Write the numbers, if there is a file, and return what it holds."""
        whole = {**self.header, **result}
        if self.path is not None:
            part = self.path.with_name(self.path.name + ".part")
            part.write_text(json.dumps(whole, indent=2) + "\n")
            part.replace(self.path)  # a run cut in the middle of this leaves the old file whole
        return whole

    def load(self) -> dict[str, Any]:
        """Return what an earlier run wrote, or {} if there is no file yet.

        Raises:
            SystemExit: no file was named, or the file's numbers are from another command or environment.
        """
        if self.path is None:
            raise SystemExit("--resume needs --json PATH, the file of the run to go on with.")
        if not self.path.exists():
            return {}
        whole: dict[str, Any] = json.loads(self.path.read_text())
        for key, now in self.header.items():
            if whole.get(key) != now:
                raise SystemExit(
                    f"{self.path} was written with {key} {whole.get(key)}; now it is {now}. Give another --json."
                )
        return whole
