"""Check the lists of a saved model's tensors, its weights and its constants, against the bytes that are there."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from fxsparse import json_values
from fxsparse.json_values import Wrong
from fxsparse.saving import program_values as values_of

BOOL = 12
_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 2, 7: 4, 8: 8, 9: 4, 10: 8, 11: 16, BOOL: 1, 13: 2, 28: 2}
_BYTES |= {**dict.fromkeys(range(29, 34), 1), 34: 4, 35: 8}  # by torch.export's number of a dtype
_WITH_GRADIENT = (6, 7, 8, 9, 10, 11, 13)
_STRIDED = 7
_MOST_DIMENSIONS = 64
# So that no tensor without elements has sizes that make others huge.
_EMPTY_AREA = 1 << 20


def read(values: Any, payloads: Mapping[str, int], prefix: str) -> dict[str, tuple[str, int]]:
    """Read one list of tensors.

    Args:
        values: the JSON values of the list.
        payloads: sizes in bytes of the stored files that it may name.
        prefix: what the names of these files begin with.

    Returns:
        By tensor, the file that holds it and the number of its dtype.

    Raises:
        Wrong: a tensor is pickled, or is not inside its file.
    """
    config = values_of.fields_of(values, "it", ("config",))["config"]
    found: dict[str, tuple[str, int]] = {}
    dtypes: dict[str, int] = {}
    for name, item in json_values.by_name(lambda value, place: value)(config, "config").items():
        place = f"config['{name:.100}']"
        values_of.tensor_name(name, place)
        file, dtype = _read_tensor(item, place, payloads, prefix)
        if dtypes.setdefault(file, dtype) != dtype:  # torch reads the file in the dtype of the first
            raise Wrong(dtype, f"{place}.tensor_meta.dtype", f"{dtypes[file]}, as another tensor in '{file}'")
        found[name] = (file, dtype)
    unused = sorted(set(payloads) - set(dtypes))
    if unused:
        raise Wrong(unused, "the list of stored files that no tensor is in", "empty")
    return found


def _read_tensor(value: Any, place: str, payloads: Mapping[str, int], prefix: str) -> tuple[str, int]:
    fields = values_of.fields_of(value, place, ("path_name", "is_param", "use_pickle", "tensor_meta"))
    file = json_values.text(fields["path_name"], f"{place}.path_name")
    if not re.fullmatch(re.escape(prefix) + r"\d+", file) or file not in payloads:
        raise Wrong(file, f"{place}.path_name", "the name of a stored file")
    if fields["use_pickle"] is not False:
        raise Wrong(fields["use_pickle"], f"{place}.use_pickle", "false: fxsparse neither writes nor reads pickles")
    values_of.boolean(fields["is_param"], f"{place}.is_param")
    here, meta = f"{place}.tensor_meta", fields["tensor_meta"]
    values_of.tensor_meta(meta, here)
    dtype = meta["dtype"]
    if dtype not in _BYTES:
        raise Wrong(dtype, f"{here}.dtype", "the number of a dtype")
    if meta["layout"] != _STRIDED:
        raise Wrong(meta["layout"], f"{here}.layout", f"{_STRIDED} (strided)")
    if meta["requires_grad"] and dtype not in _WITH_GRADIENT:
        raise Wrong(True, f"{here}.requires_grad", "false, as the dtype has no gradients")
    sizes, strides, (offset,) = (
        [_as_integer(item, f"{here}.{field}") for item in items]
        for field, items in (
            ("sizes", meta["sizes"]),
            ("strides", meta["strides"]),
            ("storage_offset", [meta["storage_offset"]]),
        )
    )
    elements, rest = divmod(payloads[file], _BYTES[dtype])
    last = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    area = math.prod(max(size, 1) for size in sizes)
    inside = area <= _EMPTY_AREA if 0 in sizes else last < elements and area <= elements
    if rest or not inside or offset > elements or len(sizes) > _MOST_DIMENSIONS:
        raise Wrong((sizes, strides, offset), here, f"sizes, strides and an offset within the {elements} elements")
    return file, dtype


def _as_integer(value: Any, place: str) -> int:
    return int(json_values.integer(values_of.fields_of(value, place, ("as_int",))["as_int"], place))
