"""Checkpoints of a pruning run: nested plain values with tensors in them, in one safetensors file.

The tensors are safetensors, the rest is JSON in the file's header, so no pickle is read or written. A file is replaced
as a whole: a run that is killed while it writes keeps the one before.
"""

from __future__ import annotations

import json
import random
import secrets
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fxsparse.errors import FxsparseError

_FORMAT = "fxsparse pruning run"
_TENSOR, _TUPLE, _PAIRS = "__tensor__", "__tuple__", "__pairs__"  # mark what JSON does not have


def write(path: Path, values: Any) -> None:
    """Write values to a file, whole or not at all.

    Args:
        path: the file.
        values: dicts, lists and tuples, nested, of tensors, numbers, strings, booleans and None.

    Raises:
        FxsparseError: the file cannot be written, or some value is of another type.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_packed(values, tensors, ""), allow_nan=True)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        try:
            save_file(tensors, temporary, metadata={"format": _FORMAT, "values": text})
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise FxsparseError(
            f"The checkpoint '{path}' cannot be written ({error}). Name a file in a folder that exists and has room."
        ) from error


def read(path: Path) -> Any:
    """Read what `write` wrote; tensors come on the CPU.

    Raises:
        FxsparseError: the file cannot be read, or is no such checkpoint.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != _FORMAT:
                raise FxsparseError(
                    f"'{path}' is no checkpoint of a pruning run. Name another file, or remove this one."
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return _unpacked(json.loads(header["values"]), tensors)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, FxsparseError):
            raise
        raise FxsparseError(
            f"The checkpoint '{path}' cannot be read ({error}). Remove the file to start the run again."
        ) from error


def random_state() -> dict[str, Any]:
    """Return the state of the random number generators of torch, numpy and Python, as JSON values."""
    kind, keys, place, has_gauss, gauss = np.random.get_state(legacy=True)
    version, internal, second = random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": [state.numpy().tobytes().hex() for state in cuda],
        "numpy": [kind, keys.tolist(), int(place), int(has_gauss), float(gauss)],  # type: ignore[union-attr]
        "python": [version, list(internal), second],
    }


def set_random_state(values: dict[str, Any]) -> None:
    """Bring the random number generators to a state that `random_state` returned."""
    torch.set_rng_state(_bytes(values["torch"]))
    if values["cuda"]:
        torch.cuda.set_rng_state_all([_bytes(state) for state in values["cuda"]])
    kind, keys, *rest = values["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    version, internal, second = values["python"]
    random.setstate((version, tuple(internal), second))


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def _packed(value: Any, tensors: dict[str, Tensor], place: str) -> Any:
    if isinstance(value, Tensor):
        name = f"{len(tensors):05d}{place}"
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {_TENSOR: name}
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith("__") for key in value):
            return {key: _packed(item, tensors, f"{place}/{key}") for key, item in value.items()}
        pairs = [[_packed(k, tensors, place), _packed(v, tensors, f"{place}/{k}")] for k, v in value.items()]
        return {_PAIRS: pairs}
    if isinstance(value, list):
        return [_packed(item, tensors, f"{place}/{i}") for i, item in enumerate(value)]
    if isinstance(value, tuple):
        return {_TUPLE: [_packed(item, tensors, f"{place}/{i}") for i, item in enumerate(value)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise FxsparseError(
        f"A checkpoint cannot hold the {type(value).__name__} at '{place or '/'}'. Give tensors, numbers, strings, "
        "booleans and None, in dicts, lists and tuples."
    )


def _unpacked(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpacked(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return tensors[value[_TENSOR]]
    if _TUPLE in value:
        return tuple(_unpacked(item, tensors) for item in value[_TUPLE])
    if _PAIRS in value:
        return {_unpacked(k, tensors): _unpacked(v, tensors) for k, v in value[_PAIRS]}
    return {key: _unpacked(item, tensors) for key, item in value.items()}
