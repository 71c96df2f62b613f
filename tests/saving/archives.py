"""Small saved models, and their files taken apart and put together again with sums that are right."""

from __future__ import annotations

import hashlib
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fxsparse
from fxsparse.saving import safety, weights_file

Entries = dict[str, bytes]
SHAPE = (2, 3, 8, 8)


class TinyNet(nn.Module):
    """Two convolutions and a classifier; nothing is folded, and its layers have plain names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 16, 3, stride=2, groups=2)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return self.head(x.mean((2, 3)))


def tiny_net() -> nn.Module:
    return TinyNet().eval()


def converted(*, frozen: bool = False, rung: str = "auto") -> nn.Module:
    """Return a converted TinyNet whose convolutions run sparse."""
    torch.manual_seed(0)
    model = tiny_net()
    masks = {name: torch.rand_like(getattr(model, name).weight) < 0.2 for name in ("first", "second")}
    settings = fxsparse.Settings(capture=rung, calibrate=False)
    fast = fxsparse.convert(model, masks, example_inputs=torch.zeros(SHAPE), settings=settings)
    fxsparse.set_mode(fast, "sparse")
    return fxsparse.freeze(fast) if frozen else fast


def unpacked(content: bytes, folder: Path) -> Entries:
    """Return the entries of a saved model, without their root folder."""
    path = folder / "unpacked.zip"
    path.write_bytes(content)
    with zipfile.ZipFile(path) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def packed(path: Path, entries: Entries, *, root: str = "archive") -> bytes:
    """Write entries as a saved model, with a manifest that fits them; return the file."""
    others = {name: content for name, content in entries.items() if name != safety.MANIFEST}
    manifest = parsed(entries[safety.MANIFEST])
    if isinstance(manifest, dict) and "sha256" in manifest:
        manifest["sha256"] = {name: hashlib.sha256(content).hexdigest() for name, content in others.items()}
        others[safety.MANIFEST] = json.dumps(manifest).encode()
    else:
        others[safety.MANIFEST] = entries[safety.MANIFEST]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in others.items():
            archive.writestr(zipfile.ZipInfo(f"{root}/{name}"), content)
    return path.read_bytes()


def parsed(content: bytes) -> Any:
    """Return JSON values, or None where there are none."""
    try:
        return json.loads(content)
    except ValueError:
        return None


def changed(entries: Entries, name: str, change: Callable[[Any], Any]) -> Entries:
    """Return entries with the JSON values of one of them changed in place, or replaced by what is returned."""
    values = json.loads(entries[name])
    result = change(values)
    return {**entries, name: json.dumps(values if result is None else result).encode()}


def changed_weights(content: bytes, change: Callable[[dict[str, Any], dict[str, Any], bytearray], None]) -> bytes:
    """Return a file of `save_weights` after a change of its description, its list of tensors and their bytes."""
    (length,) = struct.unpack_from("<Q", content)
    listed = json.loads(content[8 : 8 + length])
    document = json.loads(listed.pop("__metadata__")["fxsparse"])
    data = bytearray(content[8 + length :])
    del document["sha256"]
    change(document, listed, data)
    document["sha256"] = weights_file._digest(listed, document, memoryview(data))
    header = json.dumps({"__metadata__": {"fxsparse": json.dumps(document)}, **listed}).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + data
