"""What `save` and `load` refuse: one clear error each, and nothing half written."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import random_masks, small_net
from torch import Tensor, nn

import fxsparse
from fxsparse import FxsparseError

QUICK = fxsparse.Settings(calibrate=False)


def fast_net(example_inputs: Any = (2, 3, 12, 12), **settings: Any) -> nn.Module:
    model = small_net()
    chosen = fxsparse.Settings(calibrate=False, **settings)
    return fxsparse.convert(model, random_masks(model), example_inputs=example_inputs, settings=chosen)


def refused(message: str, model: nn.Module, path: Path, **how: Any) -> None:
    with pytest.raises(FxsparseError, match=message):
        fxsparse.save(model, path, **how)
    assert list(path.parent.iterdir()) == [] if path.parent.exists() else True


def test_a_model_that_is_no_single_graph_is_sent_to_save_weights(tmp_path: Path) -> None:
    refused("rung 'modules'.*fxsparse.save_weights", fast_net(capture="modules"), tmp_path / "m.pt2")


def test_a_model_that_was_not_converted(tmp_path: Path) -> None:
    refused("not converted", small_net(), tmp_path / "m.pt2")


def test_without_known_inputs_they_can_be_given(tmp_path: Path) -> None:
    fast = fast_net(None)
    refused(r"example_inputs=x", fast, tmp_path / "m.pt2")
    fxsparse.save(fast, tmp_path / "m.pt2", example_inputs=(1, 3, 9, 9))
    loaded = fxsparse.load(tmp_path / "m.pt2")
    x = torch.randn(3, 3, 20, 20)
    with torch.no_grad():
        assert torch.equal(fast(x), loaded(x))
    (tmp_path / "m.pt2").unlink()
    refused("torch.export refuses the model.*save_weights", fast, tmp_path / "m.pt2", example_inputs=(1, 5, 9, 9))


def test_hooks_are_refused_by_name(tmp_path: Path) -> None:
    fast = fast_net()
    fast.head.register_forward_hook(lambda *args: None)
    refused("module 'head'.*has the forward hook", fast, tmp_path / "m.pt2")


@pytest.mark.parametrize(
    "value", [object(), torch.ones(2), (1, 2), {1: 2}, float("nan")], ids=lambda value: type(value).__name__
)
def test_attributes_that_json_cannot_hold(value: Any, tmp_path: Path) -> None:
    fast = fast_net()
    fast.__dict__["mine"] = value
    refused("attribute 'mine'.*pickle", fast, tmp_path / "m.pt2")


class Special(nn.Parameter):
    pass


def test_tensors_of_a_special_class(tmp_path: Path) -> None:
    fast = fast_net()
    fast.head.bias = Special(fast.head.bias.detach())
    refused("a tensor of the model is a Special|A tensor of the model is a Special", fast, tmp_path / "m.pt2")


def test_a_model_on_two_devices(tmp_path: Path) -> None:
    fast = fast_net()
    fast.head.to("meta")
    refused("on cpu and meta", fast, tmp_path / "m.pt2")


def test_a_folder_that_is_missing_and_a_file_that_is_kept_whole(tmp_path: Path, monkeypatch) -> None:
    fast = fast_net()
    with pytest.raises(FxsparseError, match="Name a file in a folder that exists"):
        fxsparse.save(fast, tmp_path / "missing" / "m.pt2")
    path = tmp_path / "m.pt2"
    path.write_bytes(b"before")

    def full(*args: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "writestr", full)
        with pytest.raises(FxsparseError, match="no space left"):
            fxsparse.save(fast, path)
    assert path.read_bytes() == b"before"
    fxsparse.save(fast, str(path))
    assert isinstance(fxsparse.load(str(path)), nn.Module)
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.pt2"]


class Private(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch._foreach_add([self.conv(x)], 1.0)[0]


def test_a_graph_that_load_would_refuse_is_refused_by_save(tmp_path: Path) -> None:
    model = Private().eval()
    fast = fxsparse.convert(model, random_masks(model), example_inputs=(2, 3, 8, 8), settings=QUICK)
    refused("cannot be saved.*safe to load.*save_weights", fast, tmp_path / "m.pt2")


@pytest.mark.parametrize("device", ["cuda:99", "nonsense"])
def test_a_device_that_is_not_there(device: str, archive: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.pt2").write_bytes(archive)
    with pytest.raises(FxsparseError, match=f"map_location is '{device}', which is not there.*map_location='cpu'"):
        fxsparse.load(tmp_path / "m.pt2", map_location=device)


def test_a_file_from_a_device_that_is_not_here_says_how_to_load_it(tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    fast = fast_net()
    fxsparse.save(fast, path)
    change_json(path, "state", lambda state: {**state, "device": "cuda:99"})
    with pytest.raises(FxsparseError, match="was saved from cuda:99, which is not there.*map_location='cpu'"):
        fxsparse.load(path)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(fxsparse.load(path, map_location="cpu")(x), fast(x))


def change_json(path: Path, name: str, change: Callable[[Any], Any]) -> None:
    """Rewrite a JSON entry of an archive, with the digests that belong to it."""
    import hashlib

    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    root = next(iter(entries)).partition("/")[0]
    key, manifest_key = f"{root}/extra/fxsparse/{name}.json", f"{root}/extra/fxsparse/manifest.json"
    entries[key] = json.dumps(change(json.loads(entries[key]))).encode()
    if name != "manifest":
        manifest = json.loads(entries[manifest_key])
        manifest["sha256"][f"extra/fxsparse/{name}.json"] = hashlib.sha256(entries[key]).hexdigest()
        entries[manifest_key] = json.dumps(manifest).encode()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for entry, content in entries.items():
            archive.writestr(entry, content)


def test_a_newer_version_is_refused(archive: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.pt2").write_bytes(archive)
    change_json(tmp_path / "m.pt2", "manifest", lambda manifest: {**manifest, "version": 2})
    with pytest.raises(FxsparseError, match="newer"):
        fxsparse.load(tmp_path / "m.pt2")


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("saved") / "m.pt2"
    torch.manual_seed(0)
    fxsparse.save(fast_net(cache=False), path)
    return path.read_bytes()


def in_site(**changes: Any) -> Callable[[Any], Any]:
    def change(state: Any) -> Any:
        (name, site), *others = state["sites"].items()
        return {**state, "sites": {name: {**site, **changes}, **dict(others)}}

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (in_site(weight_shape=[16, 3, 3]), "weight_shape"),
        (in_site(weight_shape=[2**40, 3, 3, 3]), "regrouping|shape"),
        (in_site(stride=[0, 1]), "stride"),
        (in_site(padding=[-1, 0, 0, 0]), "padding"),
        (in_site(groups=0), "groups"),
        (in_site(groups=5), "groups"),
        (in_site(mode="nonsense"), "mode"),
        (in_site(path="sparse", packed=None), "packed"),
        (in_site(packed="block.conv1.weight"), "damaged"),
        (in_site(weight="head.weight"), "shape"),
        (in_site(weight="nowhere"), "no tensor 'nowhere'"),
        (in_site(bias="stem.0.weight"), "shape"),
        (in_site(mask="stem.0.weight"), "torch.bool"),
        (in_site(regrouping=99), "regrouping"),
        (in_site(support=[1]), "support"),
        (in_site(frozen="yes"), "frozen"),
        (in_site(frozen=True, mode="test"), "mode"),
        (in_site(resume="sparse"), "resume"),
        (lambda state: {**state, "sites": {"relu": next(iter(state["sites"].values()))}}, "no convolution 'relu'"),
        (lambda state: {**state, "sites": {"nowhere": next(iter(state["sites"].values()))}}, "'nowhere'"),
        (lambda state: {**state, "attributes": {"_modules": {}}}, "attributes"),
        (lambda state: {**state, "attributes": {"forward": 1}}, "attributes"),
        (lambda state: {**state, "class": "a b"}, "class"),
        (lambda state: {**state, "device": "meta"}, "device"),
        (lambda state: {**state, "inputs": []}, "inputs"),
        (lambda state: {**state, "inputs": [{"shape": [1], "dtype": "no"}]}, "dtype"),
        (lambda state: {**state, "meta": {"other": 1}}, "meta"),
        (
            lambda state: {**state, "moves": [{"graph": "", "value": "x", "layout": "contiguous", "readers": ["no"]}]},
            "layout",
        ),
        (lambda state: {**state, "more": 1}, "fields"),
    ],
)
def test_a_state_that_cannot_be_is_refused(
    change: Callable[[Any], Any], message: str, archive: bytes, tmp_path: Path
) -> None:
    (tmp_path / "m.pt2").write_bytes(archive)
    change_json(tmp_path / "m.pt2", "state", change)
    with pytest.raises(FxsparseError, match=message) as caught:
        fxsparse.load(tmp_path / "m.pt2")
    assert re.search(r"m\.pt2", str(caught.value))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("plan", lambda plan: {**plan, "entries": 1}, "entries"),
        ("report", lambda report: {**report, "rung": "other"}, "rung"),
        ("report", lambda report: {**report, "rows": [{}]}, "rows"),
        ("report", lambda report: {**report, "model_ms": float("inf")}, "model_ms|JSON|Infinity"),
    ],
)
def test_a_plan_or_report_that_cannot_be_is_refused(
    name: str, change: Any, message: str, archive: bytes, tmp_path: Path
) -> None:
    (tmp_path / "m.pt2").write_bytes(archive)
    change_json(tmp_path / "m.pt2", name, change)
    with pytest.raises(FxsparseError, match=message):
        fxsparse.load(tmp_path / "m.pt2")
