"""Damaged tables of tiled weights, each in a process of its own, because a trap ends the context."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

DAMAGES = {
    "tile_columns": ((0, (1 << 23) - 1), (1, -5), (2, 9 << 27)),
    "tiles": ((0, 1 << 40), (1, 1 << 20), (2, 1 << 33), (3, 0)),
    "tile_rows": ((3, 1000),),
}
_CODE = """
import sys
import torch
sys.path.insert(0, {folder!r})
from drawn import Drawn
from {module} import OP, _arguments
arguments = _arguments(Drawn(dtype=torch.{dtype}, batch={batch}), **{options})
table = arguments[{name!r}]
table.view(-1)[{index}] = {value}
try:
    OP(**arguments)
    torch.cuda.synchronize()
except RuntimeError as error:
    print("REFUSED", error)
"""


def outputs(module: str, batch: int, calls: list[tuple[str, dict[str, str], bool]]) -> dict[str, str]:
    """Return what the processes print, by damage; all run at once.

    Args:
        module: the tests' module that has `OP` and `_arguments`.
        batch: images.
        calls: dtype, options of `_arguments`, and whether every damage is tried or the first of each table.
    """
    running = {}
    for dtype, options, every in calls:
        for name, changes in DAMAGES.items():
            for index, value in changes if every else changes[:1]:
                values = {"module": module, "batch": batch, "dtype": dtype, "options": options}
                values |= {"name": name, "index": index, "value": value}
                code = _CODE.format(folder=str(Path(__file__).parent), **values)
                running[str(values)] = subprocess.Popen(
                    [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
                )
    return {damage: process.communicate()[0] for damage, process in running.items()}
