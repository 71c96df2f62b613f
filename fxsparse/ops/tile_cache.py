"""Tiled weights by the packed weight that they were made of.

The tiled form follows from the packed one and is never saved. Making it takes far longer than bringing its values up to
date, and copies of a model that share packed tensors, as calibration makes them, share it.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from fxsparse.ops import tiles
from fxsparse.ops.packing import PackedWeight
from fxsparse.ops.tiles import TiledWeight, WideTiles


class _Seen:
    """A tensor as it was: tells whether another one is the same and unchanged."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = TensorWeakRef(tensor)
        self._version = _version(tensor)
        self._content = tensor.clone() if self._version is None else None

    def is_still(self, tensor: Tensor) -> bool:
        if self._tensor() is not tensor:
            return False
        return self._version == _version(tensor) if self._content is None else torch.equal(self._content, tensor)


@dataclasses.dataclass
class _Made:
    tables: tuple[_Seen, ...]
    version: int | None  # of the packed values, or None where torch does not count their changes
    tiled: dict[int, TiledWeight] = dataclasses.field(default_factory=dict)  # by rows
    wide: WideTiles | None = None


_made = WeakTensorKeyDictionary()


def tiled(packed: PackedWeight, tile_rows: int = tiles.ROWS) -> TiledWeight:
    """Return the tiled form of a packed weight: new, or the one made before of these tables, its values up to date.

    What `fxsparse.ops.tiles.tile` raises is not caught.
    """
    known = _known(packed)
    if known.version is None or known.version != _version(packed.values):
        refresh(packed.values)
    if tile_rows not in known.tiled:
        with torch.inference_mode(False), torch.no_grad():
            known.tiled[tile_rows] = tiles.tile(packed, tile_rows)
    return known.tiled[tile_rows]


def wide_tiles(packed: PackedWeight) -> WideTiles:
    """Return what `fxsparse.ops.tiles.wide_tiles` says of a packed weight."""
    known = _known(packed)
    if known.wide is None:
        known.wide = tiles.wide_tiles(packed)
    return known.wide


def refresh(values: Tensor) -> None:
    """Write packed values that have changed into their tiled forms, in place; nothing if they have none."""
    known: _Made | None = _made.get(values)
    if known is not None:
        with torch.no_grad():
            for made in known.tiled.values():
                made.values.copy_(tiles.tiled_values(values, made.places))
        known.version = _version(values)


def _known(packed: PackedWeight) -> _Made:
    """Return what is known of a packed weight, nothing if its tables are others now."""
    known: _Made | None = _made.get(packed.values)
    tables = (packed.columns, packed.panels, packed.rows)
    if known is None or not all(seen.is_still(table) for seen, table in zip(known.tables, tables, strict=True)):
        known = _Made(tuple(map(_Seen, tables)), _version(packed.values))
        _made[packed.values] = known
    return known


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version
