"""The file of `save_weights`: safetensors, with everything that is no tensor as JSON in the header.

Safetensors is a length, a JSON header with the dtype, shape and place of every tensor, and their bytes: nothing in it
runs. Its reader refuses places outside of the file. It has no checksum, so the JSON has one over all the rest.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import secrets
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import load, save
from torch import Tensor

from fxsparse import json_values
from fxsparse.errors import FxsparseError
from fxsparse.json_values import Wrong
from fxsparse.saving import safety

FORMAT = "fxsparse weights"
VERSION = 1
"""Of the JSON. Raise this when a field is added, removed or changes its meaning."""

_KEY = "fxsparse"  # of the JSON, in the metadata
_METADATA = "__metadata__"
_SUM = "sha256"
_LENGTH = struct.Struct("<Q")
_LARGEST_HEADER = 64 << 20


@dataclasses.dataclass(frozen=True)
class Header:
    """What is in front of the tensors' bytes.

    Attributes:
        document: the JSON object that `write` got; only its `format` and `version` have been checked.
        tensors: by name, the dtype as safetensors calls it and the number of bytes.
        nbytes: of the header.
        total: SHA-256 of everything, as the file says.
    """

    document: dict[str, Any]
    tensors: dict[str, tuple[str, int]]
    nbytes: int
    total: str


def write(path: Path, tensors: Mapping[str, Tensor], document: Mapping[str, Any]) -> None:
    """Write a file, whole or not at all.

    Args:
        path: of the file.
        tensors: by name; no two share memory.
        document: plain JSON values.

    Raises:
        FxsparseError: the file cannot be written.
    """
    plain = memoryview(save({name: tensor.contiguous() for name, tensor in tensors.items()}))
    (length,) = _LENGTH.unpack_from(plain)
    entries = json.loads(bytes(plain[_LENGTH.size : _LENGTH.size + length]))
    data = plain[_LENGTH.size + length :]
    written = {"format": FORMAT, "version": VERSION, **document}
    written[_SUM] = _digest(entries, written, data)
    header = json.dumps({_METADATA: {_KEY: json.dumps(written, allow_nan=False)}, **entries}).encode()
    header += b" " * (-len(header) % 8)  # so that the tensors are aligned
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        try:
            with temporary.open("wb") as file:
                file.write(_LENGTH.pack(len(header)) + header)
                file.write(data)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise FxsparseError(
            f"The weights cannot be written to '{path}' ({error}). Name a file in a folder that exists."
        ) from error


def is_weights(path: Path) -> bool:
    """Tell whether a file begins as safetensors do: with the length of a JSON object."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(_LENGTH.size + 1)[_LENGTH.size :] == b"{"


def read_header(path: Path) -> Header:
    """Read what is in front of the tensors.

    Raises:
        FxsparseError: this is no file of `save_weights`, or one of a newer version.
    """
    safety.refuse_no_file(path, "fxsparse.save_weights")
    with safety.reading(path), path.open("rb") as file:
        return _read_header(path, file)


def read(path: Path) -> tuple[Header, dict[str, Tensor]]:
    """Read the whole file.

    Returns:
        The header, and every tensor in memory of its own, on the CPU.

    Raises:
        FxsparseError: this is no file of `save_weights`, it is damaged, or a newer version wrote it.
    """
    header = read_header(path)
    with safety.reading(path):
        content = path.read_bytes()
        start = _LENGTH.size + header.nbytes
        entries = json.loads(content[_LENGTH.size : start])
        del entries[_METADATA]
        if _digest(entries, header.document, memoryview(content)[start:]) != header.total:
            raise FxsparseError(f"'{path}' is damaged: its SHA-256 differs from what was saved. {safety.REMEDY}")
        tensors: dict[str, Tensor] = load(content)
        for name, tensor in tensors.items():
            if tensor.dtype == torch.bool and bool((tensor.view(torch.uint8) > 1).any()):
                raise Wrong(name, "a tensor of booleans", "of bytes that are 0 or 1")
        return header, tensors


def _read_header(path: Path, file: BinaryIO) -> Header:
    foreign = FxsparseError(f"'{path}' is no file that fxsparse.save_weights wrote. {safety.REMEDY}")
    start = file.read(_LENGTH.size)
    if len(start) != _LENGTH.size:
        raise foreign
    (length,) = _LENGTH.unpack(start)
    rest = path.stat().st_size - _LENGTH.size
    if length > min(rest, _LARGEST_HEADER):
        raise foreign
    entries = safety.parse_json(file.read(length), f"'{path}': the header")
    metadata = entries.pop(_METADATA, None) if isinstance(entries, dict) else None
    if not isinstance(metadata, dict) or set(metadata) != {_KEY} or not isinstance(metadata[_KEY], str):
        raise foreign
    document = safety.parse_json(metadata[_KEY], f"'{path}': the description of the weights")
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise foreign
    safety.refuse_newer(path, document.get("version"), VERSION)
    total = json_values.text(document.pop(_SUM, None), _SUM)
    tensors = json_values.by_name(_read_entry)(entries, "the header")
    if sum(nbytes for _, nbytes in tensors.values()) != rest - length:
        raise Wrong(rest - length, "the number of bytes after the header", "that of its tensors")
    return Header(document, tensors, length, total)


def _read_entry(value: Any, place: str) -> tuple[str, int]:
    (dtype, begin, end) = _read_fields(value, place)
    if begin > end:
        raise Wrong((begin, end), f"{place}.data_offsets", "a begin and an end")
    return dtype, end - begin


def _offsets(value: Any, place: str) -> tuple[int, ...]:
    offsets: tuple[int, ...] = json_values.tuple_of(json_values.integer)(value, place)
    if len(offsets) != 2:
        raise Wrong(value, place, "a begin and an end")
    return offsets


def _digest(entries: Mapping[str, Any], document: Mapping[str, Any], data: memoryview) -> str:
    digest = hashlib.sha256()
    for part in (entries, document):
        digest.update(json.dumps(part, sort_keys=True).encode() + b"\n")
    digest.update(data)
    return digest.hexdigest()


_read_fields = json_values.record(
    lambda dtype, shape, data_offsets: (dtype, *data_offsets),
    dtype=json_values.text,
    shape=json_values.tuple_of(json_values.integer),
    data_offsets=_offsets,
)
