"""Tiled weights by the packed weight that they were made of.

The tiled form follows from the packed one and is never saved. Making it takes far longer than bringing its values up to
date, and copies of a model that share packed tensors, as calibration makes them, share it.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fxsparse.ops import tiles
from fxsparse.ops.packing import PackedWeight
from fxsparse.ops.tiles import TiledWeight


@dataclasses.dataclass
class _Made:
    tiled: TiledWeight
    version: int | None  # of the packed values, or None where torch does not count their changes


_made = WeakTensorKeyDictionary()


def tiled(packed: PackedWeight) -> TiledWeight:
    """Return the tiled form of a packed weight: new, or the one made before, its values up to date.

    What `fxsparse.ops.tiles.tile` raises is not caught.
    """
    known: _Made | None = _made.get(packed.values)
    if known is None:
        with torch.inference_mode(False), torch.no_grad():
            known = _Made(tiles.tile(packed), _version(packed.values))
        _made[packed.values] = known
    elif known.version is None or known.version != _version(packed.values):
        refresh(packed.values)
    return known.tiled


def refresh(values: Tensor) -> None:
    """Write packed values that have changed into their tiled form, in place; nothing if they have none."""
    known: _Made | None = _made.get(values)
    if known is not None:
        with torch.no_grad():
            known.tiled.values.copy_(tiles.tiled_values(values, known.tiled.places))
        known.version = _version(values)


def _version(values: Tensor) -> int | None:
    return None if values.is_inference() else values._version
