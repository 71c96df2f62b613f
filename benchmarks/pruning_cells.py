"""Cells of the pruning experiments: one method at one level, its numbers in a JSON file, its masks beside it."""

from __future__ import annotations

import copy
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tabulate import tabulate
from torch import Tensor, nn

import fxsparse
from fxsparse.arms import dense_arms
from fxsparse.inputs import ExampleInputs
from fxsparse.timing import interleaved

Masks = dict[str, Tensor]


@dataclasses.dataclass
class Cells:
    """A folder of cells, by name.

    Attributes:
        folder: where they are.
        seconds: when to stop, after so many, or None.
    """

    folder: Path
    seconds: float | None = None
    start: float = dataclasses.field(default_factory=time.perf_counter)

    def has(self, name: str) -> bool:
        return (self.folder / f"{name}.json").exists()

    def add(self, name: str, masks: Masks, **numbers: Any) -> None:
        save_file({key: mask.to(torch.uint8).cpu().contiguous() for key, mask in masks.items()}, self.masks_file(name))
        self.update(name, numbers)

    def update(self, name: str, numbers: dict[str, Any]) -> None:
        path = self.folder / f"{name}.json"
        before = json.loads(path.read_text()) if path.exists() else {}
        part = path.with_suffix(".part")
        part.write_text(json.dumps({**before, **numbers}, indent=1) + "\n")
        part.replace(path)
        shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in numbers.items()}
        print(f"{name}: {shown}", flush=True)

    def masks(self, name: str) -> Masks:
        return {key: mask != 0 for key, mask in load_file(self.masks_file(name)).items()}

    def same_masks(self, name: str, key: str) -> dict[str, Any] | None:
        """Return what another cell, of the same masks, has under a key."""
        prefix = name.split("-")[0]
        mine = self.masks_file(name).read_bytes()
        for other, cell in self.all(prefix).items():
            if key in cell and self.masks_file(other).exists() and self.masks_file(other).read_bytes() == mine:
                found: dict[str, Any] = cell[key]
                return found
        return None

    def masks_file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def all(self, prefix: str = "") -> dict[str, dict[str, Any]]:
        files = sorted(self.folder.glob(f"{prefix}*.json"))
        return {path.stem: json.loads(path.read_text()) for path in files}

    @property
    def is_over(self) -> bool:
        """Whether it is time to stop."""
        return self.seconds is not None and time.perf_counter() - self.start > self.seconds


def macs(model: nn.Module, masks: Masks, inputs: ExampleInputs) -> float:
    """Return the share of the multiply-adds that masks leave in the layers that they are of."""
    from fxsparse.pruning.costs import count

    costs = count(model, inputs, list(masks))
    dense = sum(costs.layers[name].dense for name in masks)
    return sum(costs.layers[name].dense * float(mask.float().mean()) for name, mask in masks.items()) / dense


def speed(model: nn.Module, masks: Masks, inputs: ExampleInputs, seconds: float) -> dict[str, float]:
    """Convert, calibrate and time a model under masks against the best dense way to run it.

    Returns:
        Median milliseconds dense and converted, and the speed-up with its 95 % interval.
    """
    with torch.no_grad():
        pruned = copy.deepcopy(model).eval()
        for name, mask in masks.items():
            pruned.get_submodule(name).get_parameter("weight").mul_(mask)
    settings = fxsparse.Settings(budget_s=seconds)
    fast = fxsparse.convert(pruned, masks, example_inputs=inputs, settings=settings)
    # The same graph, its batch norms folded: torch's own fuser needs symbolic tracing, and plain nn.Conv2d alone.
    vanilla = copy.deepcopy(fast)
    fxsparse.set_mode(vanilla, "vanilla")
    arms: dict[str, Callable[[], Any]] = dict(dense_arms(vanilla, inputs))
    arms["fxsparse"] = lambda: inputs.run(fast)
    times = interleaved(arms, torch.device("cpu"), budget_s=seconds, max_rounds=301)
    dense = min(("dense eager", "dense channels_last"), key=lambda arm: times[arm].median_ms)
    ratio = times.ratio(dense, "fxsparse")
    return {
        "dense_ms": times[dense].median_ms,
        "fast_ms": times["fxsparse"].median_ms,
        "speed": ratio.median,
        "speed_low": ratio.low,
        "speed_high": ratio.high,
    }


def spread(values: list[float]) -> str:
    """Return a mean and half of the range."""
    mean = statistics.mean(values)
    return f"{mean:.2f} ±{(max(values) - min(values)) / 2:.2f}" if len(values) > 1 else f"{mean:.2f}"


def table(headers: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return a table as Markdown."""
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)
