"""What the kernels of a device want from a regrouping: the row-group size and the price of a weight."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from fxsparse.errors import FxsparseError

PARTITIONERS = ("consecutive", "clustering", "hypergraph")


@dataclass(frozen=True)
class Target:
    """Prices and sizes that decide which weights go into blocks.

    The unit of every cost is the MAC: one weight used at one output position.

    Attributes:
        group_rows: the rows of one row group. Only rows with identical columns make larger blocks.
        block_cost: the cost of one block MAC.
        residual_cost: the cost of one residual MAC. 3.5 was measured on AVX-512 with ``block_cost`` 1.
        lanes: block rows are padded to a multiple of this, so that one block column of R rows costs
            ``ceil(R / lanes) * lanes * block_cost``.
        partitioner: how rows are split into groups. ``consecutive`` takes them in order, ``clustering`` is
            balanced spherical k-means, ``hypergraph`` is Mt-KaHyPar with the connectivity objective (needs
            ``pip install fxsparse[hypergraph]``).
        seed: seed of the partitioner, >= 0.

    Raises:
        FxsparseError: a value is out of its range; a value has the wrong type.
    """

    group_rows: int = 32
    block_cost: float = 1.0
    residual_cost: float = 3.5
    lanes: int = 16
    partitioner: str = "clustering"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every field and bring numpy numbers to plain ones, so that the target is JSON-able."""
        for name, least in (("group_rows", 1), ("lanes", 1), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
                raise FxsparseError(f"Target.{name} is {value!r}. Give an integer of at least {least}.")
            if value < least:
                raise FxsparseError(f"Target.{name} is {value}. Give an integer of at least {least}.")
            object.__setattr__(self, name, int(value))
        for name in ("block_cost", "residual_cost"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
                raise FxsparseError(f"Target.{name} is {value!r}. Give a finite number above 0.")
            if not (math.isfinite(value) and value > 0):
                raise FxsparseError(f"Target.{name} is {value}. Give a finite number above 0.")
            object.__setattr__(self, name, float(value))
        if self.partitioner not in PARTITIONERS:
            raise FxsparseError(f"Target.partitioner is {self.partitioner!r}. Give one of {', '.join(PARTITIONERS)}.")

    def padded(self, rows: int) -> int:
        """Return ``rows`` rounded up to a multiple of ``lanes``."""
        return -(-int(rows) // self.lanes) * self.lanes

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON-able dict; ``from_dict`` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Target:
        """Make a target from ``to_dict``'s dict; missing fields take their defaults.

        Raises:
            FxsparseError: a key is not a field of ``Target``, or a value is out of its range.
        """
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                raise FxsparseError(f"Target has no field {name!r}. Its fields are {', '.join(known)}.")
        return cls(**values)
