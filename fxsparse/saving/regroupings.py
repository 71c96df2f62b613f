"""Regroupings as bytes (safetensors): what calibration packs again from, and the report's figures come from.

The residual weights are stored as a bitmap of the weight matrix, 1/32 of a float32 weight: smaller than their indices
above a density of 1/64, and whatever bits a file has there, they are in range and in order.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fxsparse import json_values
from fxsparse.errors import FxsparseError
from fxsparse.json_values import Wrong
from fxsparse.regrouping import Regrouping
from fxsparse.regrouping.regrouping import Block
from fxsparse.regrouping.weight_matrix import AnyArray
from fxsparse.saving.site_state import Damaged

_SIZES = ("rows", "columns")  # of a block
_HEADER = "header"


def to_bytes(regroupings: Sequence[Regrouping]) -> bytes:
    """Return regroupings as the bytes of a safetensors file.

    Args:
        regroupings: in the order that sites refer to.
    """
    header, arrays = [], {}
    for i, regrouping in enumerate(regroupings):
        stored = np.zeros(regrouping.shape, bool)
        stored[regrouping.residual_rows, regrouping.residual_columns] = True
        arrays[f"{i}.residual"] = np.packbits(stored)
        for what in _SIZES:
            parts = [getattr(block, what) for block in regrouping.blocks]
            arrays[f"{i}.{what}"] = np.concatenate([*parts, np.empty(0, np.int64)]).astype(np.int32)
            arrays[f"{i}.{what}_of"] = np.array([part.size for part in parts], np.int64)
        header.append({"shape": regrouping.shape, "groups": regrouping.groups, "fill_in": regrouping.fill_in})
    arrays[_HEADER] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    content: bytes = save(arrays)
    return content


def from_bytes(content: bytes) -> list[Regrouping]:
    """Read what `to_bytes` returned, and check it.

    Raises:
        Damaged: the bytes are something else.
    """
    try:
        arrays = load(content)
        header = _read_header(json.loads(arrays[_HEADER].tobytes()), _HEADER)
        return [_read(arrays, i, **sizes) for i, sizes in enumerate(header)]
    except Wrong as error:
        raise Damaged(f"the regroupings are damaged: {error}") from error
    except (SafetensorError, FxsparseError, KeyError, ValueError, IndexError, RecursionError) as error:
        raise Damaged(f"the regroupings are damaged ({type(error).__name__}: {error})") from error


def _read(arrays: dict[str, AnyArray], i: int, shape: tuple[int, int], groups: int, fill_in: int) -> Regrouping:
    rows, columns = (_split(arrays, f"{i}.{what}") for what in _SIZES)
    bits, area = arrays[f"{i}.residual"], math.prod(shape)
    if bits.dtype != np.uint8 or bits.shape != (-(-area // 8),):
        raise Wrong(bits.shape, f"{i}.residual", f"one bit for each of {shape[0]} x {shape[1]} weights")
    residual_rows, residual_columns = np.unpackbits(bits, count=area).reshape(shape).nonzero()
    blocks = tuple(Block(*pair) for pair in zip(rows, columns, strict=True))
    regrouping = Regrouping(shape, groups, blocks, residual_rows, residual_columns, fill_in)
    regrouping.validate()
    return regrouping


def _split(arrays: dict[str, AnyArray], name: str) -> list[AnyArray]:
    """Return the indices of every block."""
    flat, counts = arrays[name], arrays[f"{name}_of"]
    if flat.ndim != 1 or flat.dtype != np.int32 or counts.ndim != 1 or counts.dtype != np.int64:
        raise Wrong(f"{flat.dtype} {flat.shape}", name, "a list of int32, and of their numbers in int64")
    sizes = counts.tolist()
    if (sizes and min(sizes) < 0) or sum(sizes) != flat.size:
        raise Wrong(sum(sizes), f"{name}_of", f"the {flat.size} indices of '{name}', split up")
    ends = list(itertools.accumulate(sizes))
    return [flat[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def _pair(value: object, place: str) -> tuple[int, ...]:
    sizes: tuple[int, ...] = json_values.tuple_of(json_values.integer)(value, place)
    if len(sizes) != 2:
        raise Wrong(value, place, "two integers")
    return sizes


_read_header = json_values.tuple_of(
    json_values.record(dict, shape=_pair, groups=json_values.integer, fill_in=json_values.integer)
)
