"""Files that save_weights cannot have written: one clear error each, and nothing in them runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from archives import changed_weights
from models import random_masks, small_net

import fxsparse
from fxsparse import FxsparseError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "weights.safetensors"


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return a good file."""
    path = tmp_path_factory.mktemp("good") / "weights.safetensors"
    model = small_net()
    fxsparse.save_weights(fxsparse.convert(model, random_masks(model)), path)
    return path.read_bytes()


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 8, b"\xff" * 100, b"\x02\0\0\0\0\0\0\0{}", b"\x05\0\0\0\0\0\0\0{    "]
)
def test_files_that_are_none_of_save_weights_are_refused(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    with pytest.raises(FxsparseError, match="is no file that fxsparse.save_weights wrote|is no valid JSON"):
        fxsparse.load_weights(path, small_net())


def test_plain_safetensors_and_missing_files_are_refused(path: Path) -> None:
    with pytest.raises(FxsparseError, match="is no file. Name a file that fxsparse.save_weights wrote"):
        fxsparse.load_weights(path, small_net())
    for metadata in (None, {"format": "pt"}, {"fxsparse": "{}"}):
        safetensors.torch.save_file({"a": torch.zeros(2)}, path, metadata)
        with pytest.raises(FxsparseError, match="is no file that fxsparse.save_weights wrote"):
            fxsparse.load_weights(path, small_net())


def _site(**changes: Any) -> Callable[..., None]:
    return lambda document, listed, data: document["graphs"][""]["sites"][0].update(changes)


def _document(**changes: Any) -> Callable[..., None]:
    return lambda document, listed, data: document.update(changes)


def _remove(name: str) -> Callable[..., None]:
    def change(document: Any, listed: Any, data: bytearray) -> None:
        document["tied"][name] = "head.weight"

    return change


def _swap_tables(document: Any, listed: Any, data: bytearray) -> None:
    first, second, *_ = document["graphs"][""]["sites"]
    first["packed"], second["packed"] = second["packed"], first["packed"]


HOSTILE: dict[str, tuple[Callable[..., None], str]] = {
    "newer": (_document(version=2), "newer fxsparse.*Upgrade"),
    "unknown field": (_document(other=1), "an object with exactly the fields"),
    "unknown rung": (_document(rung="os.system"), "rung is 'os.system'"),
    "graph that is not there": (_document(graphs={}), "convolutions in ''; the file has 0"),
    "graphs that are none": (_document(graphs=[]), "graphs is"),
    "alias of nothing": (_document(tied={"a": "b"}), "a tensor of the file"),
    "alias over a tensor": (_remove("head.bias"), "a tensor of the file"),
    "layout of a bias": (_document(channels_last=["head.bias"]), "four dimensions"),
    "training flags of nothing": (_document(training=[1]), "training"),
    "huge inputs": (_document(inputs={"args": [{"shape": [1 << 40], "dtype": "float32"}], "kwargs": {}}), "at most"),
    "move that has no place": (
        lambda d, *_: d["graphs"][""].update(
            moves=[{"graph": "", "value": "x", "layout": "channels_last", "readers": ["nobody"]}]
        ),
        "changes of layout",
    ),
    "packed under another name": (_site(packed="forward"), "the name of a weight"),
    "packed tables of another weight": (_swap_tables, "damaged"),
    "mask under another name": (_site(mask="__class__"), "the name of a weight, and '_mask'"),
    "other regrouping": (_site(regrouping=99), "regroupings of the file"),
    "other groups": (_site(groups=0), "groups is 0"),
    "booleans that are neither": (
        lambda d, listed, data: data.__setitem__(listed["stem.0.weight_mask"]["data_offsets"][0], 2),
        "bytes that are 0 or 1",
    ),
    "regroupings that are none": (
        lambda d, listed, data: data.__setitem__(
            slice(*listed["fxsparse:regroupings"]["data_offsets"]),
            bytes(listed["fxsparse:regroupings"]["shape"][0]),
        ),
        "regroupings are damaged",
    ),
    "tensor behind the end": (
        lambda d, listed, data: listed["head.bias"].update(data_offsets=[0, 1 << 40]),
        "number of bytes",
    ),
    "tensor that ends before it begins": (
        lambda d, listed, data: listed["head.bias"].update(data_offsets=[20, 0]),
        "a begin and an end",
    ),
    "three offsets": (lambda d, listed, data: listed["head.bias"].update(data_offsets=[0, 1, 2]), "a begin and an end"),
    "tensor larger than its bytes": (lambda d, listed, data: listed["head.bias"].update(shape=[1 << 40]), "loaded"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused(name: str, content: bytes, path: Path) -> None:
    change, match = HOSTILE[name]
    path.write_bytes(changed_weights(content, change))
    with pytest.raises(FxsparseError, match=match) as caught:
        fxsparse.load_weights(path, small_net())
    assert "weights.safetensors" in str(caught.value)
