"""The settings of `fxsparse.prune`, and its budget, read and checked."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from fxsparse.errors import FxsparseError
from fxsparse.pruning.costs import SOURCES
from fxsparse.pruning.fitting import RIDGE
from fxsparse.pruning.strips import PARTITIONERS


@dataclasses.dataclass(frozen=True)
class PruneSettings:
    """The choices of `fxsparse.prune` that seldom matter.

    Attributes:
        include, exclude: names of the convolutions to prune: exact, glob or `re:` pattern.
        cost: "measured" prices layers by calibration on this device, "macs" by multiply-adds.
        group_rows: rows of a row group; None takes 32, and 16 for layers of less than 96 rows.
        partitioner: "consecutive" rows, or "clustering" (balanced k-means).
        samples: inputs of `data` that are used without training.
        rounds: with training, how often is pruned, in geometric steps; None takes one for each halving.
        rewind: with training, whether each round starts from the weights that the model came with.
        ridge: without training, the share of the mean input energy that draws weights to their old values.
        calibrate_s: seconds of each calibration; None as in `fxsparse.calibrate`.
        seed: of clustering and sampling.
        progress: show progress bars.
    """

    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    cost: str = "measured"
    group_rows: int | None = None
    partitioner: str = "consecutive"
    samples: int = 256
    rounds: int | None = None
    rewind: bool = False
    ridge: float = RIDGE
    calibrate_s: float | None = None
    seed: int = 0
    progress: bool = False

    def __post_init__(self) -> None:
        """Check the values."""
        if self.cost not in SOURCES:
            raise FxsparseError(f"cost='{self.cost}' is not known. Choose one of {', '.join(SOURCES)}.")
        if self.partitioner not in PARTITIONERS:
            raise FxsparseError(
                f"partitioner='{self.partitioner}' is not known. Choose one of {', '.join(PARTITIONERS)}."
            )
        for name in ("group_rows", "samples", "rounds"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise FxsparseError(f"{name}={value!r} is no number. Give an integer of at least 1.")
        if not 0 < self.ridge < 1:
            raise FxsparseError(f"ridge={self.ridge} is outside (0, 1). It is a share: 0.01 is usual.")


def read_budget(budget: Any) -> tuple[float | None, float | None]:
    """Read a budget: (share, None) or (None, milliseconds).

    Raises:
        FxsparseError: it is neither.
    """
    if isinstance(budget, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*ms\s*", budget)
        if match and float(match[1]) > 0:
            return None, float(match[1])
    elif isinstance(budget, (int, float)) and not isinstance(budget, bool) and 0 < budget < 1:
        return float(budget), None
    raise FxsparseError(
        f"budget={budget!r} is none. Give a share of the dense time, as 0.3, or milliseconds, as '2.5 ms'."
    )
