"""save_weights and load_weights: the same bits out of a plain model of the same class, and one clear error else."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from models import random_masks, small_net
from torch import Tensor, nn

import fxsparse
from fxsparse import FxsparseError, layouts, sites
from fxsparse.calibration import applying
from fxsparse.plan import Move, Plan, PlanEntry, PlanKey

X = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)
UNCALIBRATED = fxsparse.Settings(calibrate=False)


class Branching(nn.Module):
    """Control flow on data, a hook and a convolution that is called twice: the rung `modules` alone takes it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.again = nn.Conv2d(16, 16, 3, padding="same", padding_mode="reflect")
        self.norm = nn.BatchNorm2d(16)
        self.register_buffer("count", torch.zeros((), dtype=torch.long), persistent=False)
        self.again.register_forward_hook(lambda module, args, output: output * 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(2 if x.sum() > 0 else 1):
            x = self.norm(self.again(x))
        return x


class Tied(nn.Module):
    """Two convolutions on one weight."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 3, 3, padding=1)
        self.b = nn.Conv2d(3, 3, 3, padding=1)
        if tied:
            self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


def convert(model: nn.Module, rung: str = "auto") -> nn.Module:
    settings = fxsparse.Settings(capture=rung, calibrate=False)
    return fxsparse.convert(model, random_masks(model), example_inputs=X, settings=settings)


def assert_same(loaded: nn.Module, saved: nn.Module) -> None:
    assert torch.equal(loaded(X), saved(X))
    one, other = loaded.state_dict(), saved.state_dict()
    assert list(one) == list(other)
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]) and tensor.stride() == other[name].stride(), name
    assert loaded.report == saved.report
    assert loaded.__dict__.get("plan") == saved.__dict__.get("plan")
    for (key, _, a), (same, _, b) in zip(applying.keyed(loaded), applying.keyed(saved), strict=True):
        assert key == same and sites.site_of(a) == sites.site_of(b)
    assert [m.training for m in loaded.modules()] == [m.training for m in saved.modules()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "weights.safetensors"


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return a good file."""
    path = tmp_path_factory.mktemp("good") / "weights.safetensors"
    fxsparse.save_weights(convert(small_net()), path)
    return path.read_bytes()


@pytest.mark.parametrize(
    ("rung", "state"),
    [
        *((rung, state) for rung in ("symbolic", "modules") for state in ("sparse", "frozen", "test", "training")),
        ("symbolic", "estimated"),
        ("export", "sparse"),
        ("export", "frozen"),
    ],
)
def test_a_plain_model_becomes_the_saved_one(
    rung: str, state: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = convert(small_net(bias=True), rung)
    if state == "frozen":
        fxsparse.freeze(fast)
    elif state == "training":
        fast.train()
    elif state in ("sparse", "test"):
        fxsparse.set_mode(fast, state)
    fxsparse.save_weights(fast, path)
    plain = small_net(bias=True)
    before = copy.deepcopy(plain.state_dict())

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing is regrouped or packed again")

    # By name: the package has functions of the names of these modules.
    monkeypatch.setattr(sys.modules["fxsparse.passes.regroup_weights"], "regroup", refuse)
    monkeypatch.setattr(sys.modules["fxsparse.passes.lower_to_sparse"], "pack", refuse)
    loaded = fxsparse.load_weights(path, plain)
    assert_same(loaded, fast)
    assert all(torch.equal(tensor, before[name]) for name, tensor in plain.state_dict().items())


def test_a_model_of_the_rung_modules_keeps_its_code_and_its_hooks(path: Path) -> None:
    fast = convert(Branching().eval())
    assert fast.report.rung == "modules"
    fxsparse.set_mode(fast, "sparse", sites="again")
    fast.count += 3
    fxsparse.save_weights(fast, path)
    loaded = fxsparse.load_weights(path, Branching().eval())
    assert_same(loaded, fast)
    assert loaded.count == 3 and type(loaded) is Branching


def test_layouts_and_the_plan_come_back(path: Path) -> None:
    fast = convert(small_net())
    gm = applying.graphs(fast)[""]
    nodes = [node for node, _ in sites.conv_sites(gm)]
    reader = next(iter(nodes[0].users))
    weight = layouts.move_of_weight("", sites.site_of(nodes[2]), "channels_last")
    assert not layouts.place(gm, [Move("", nodes[0].name, "channels_last", (reader.name,)), weight])
    gm.recompile()
    plans, moves = applying.current(fast)
    entry = PlanEntry(PlanKey("cpu x1 threads", "float32", ((2, 3, 16, 16),), "eager"), plans, moves)
    fast.plan = Plan((entry,))
    fxsparse.save_weights(fast, path)
    loaded = fxsparse.load_weights(path, small_net())
    assert_same(loaded, fast)
    assert layouts.current(applying.graphs(loaded)[""]) == layouts.current(gm) != ()


def test_everything_works_on_the_loaded_model(path: Path, tmp_path: Path) -> None:
    fast = convert(small_net())
    fxsparse.save_weights(fast, path)
    loaded = fxsparse.load_weights(path, small_net())
    with fxsparse.set_mode(loaded, "test"):
        assert torch.equal(loaded(X), fast(X))
    assert torch.equal(fxsparse.to_dense(loaded)(X), fxsparse.to_dense(fast)(X))
    loaded.train()
    loaded(X).sum().backward()
    loaded.eval()
    fxsparse.calibrate(loaded, X, budget_s=0.1)
    again = tmp_path / "again.safetensors"
    fxsparse.save_weights(fast, again)
    assert again.read_bytes() == path.read_bytes()
    assert fxsparse.freeze(fxsparse.load_weights(again, small_net())).report.bytes_after is not None


def test_a_frozen_file_is_smaller_than_the_dense_weights(path: Path, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(16, 64, 3), nn.Conv2d(64, 64, 3)).eval()
    fast = fxsparse.convert(model, random_masks(model, 0.05), settings=UNCALIBRATED)
    fxsparse.set_mode(fast, "sparse")
    fxsparse.save_weights(fxsparse.freeze(fast), path)
    dense = tmp_path / "dense.safetensors"
    safetensors.torch.save_file(model.state_dict(), dense)
    assert path.stat().st_size < dense.stat().st_size / 2


@pytest.mark.parametrize("rung", ["symbolic", "modules"])
@pytest.mark.parametrize("state", ["dense", "frozen"])
def test_tied_weights_are_stored_once_and_stay_tied(rung: str, state: str, path: Path) -> None:
    fast = convert(Tied().eval(), rung)
    fxsparse.set_mode(fast, "sparse")
    if state == "frozen":
        fxsparse.freeze(fast)
    fxsparse.save_weights(fast, path)
    loaded = fxsparse.load_weights(path, Tied().eval())
    assert_same(loaded, fast)
    if state == "dense":
        assert loaded.a.weight is loaded.b.weight
        with pytest.raises(FxsparseError, match="are one tensor; in the file they are two|does not fit"):
            fxsparse.save_weights(convert(Tied(tied=False).eval(), rung), path)
            fxsparse.load_weights(path, Tied().eval())


def test_a_model_in_another_dtype_needs_a_plain_model_in_that_dtype(path: Path) -> None:
    fast = convert(small_net()).bfloat16()
    fxsparse.save_weights(fast, path)
    loaded = fxsparse.load_weights(path, small_net().bfloat16())
    assert torch.equal(loaded(X.bfloat16()), fast(X.bfloat16()))
    with pytest.raises(FxsparseError, match=r"'stem.0.weight' is float32 \(16, 3, 3, 3\); the file has bfloat16"):
        fxsparse.load_weights(path, small_net())


def test_a_model_that_was_not_folded_stays_so(path: Path) -> None:
    model = small_net()
    settings = fxsparse.Settings(fold_batch_norm=False, calibrate=False)
    fast = fxsparse.convert(model, random_masks(model), settings=settings)
    fxsparse.save_weights(fast, path)
    assert_same(fxsparse.load_weights(path, small_net()), fast)


def test_the_rung_export_needs_inputs_where_the_file_does_not_know_them(path: Path) -> None:
    fast = convert(small_net(), "export")
    del fast._example_inputs
    fxsparse.save_weights(fast, path)
    with pytest.raises(FxsparseError, match="torch.export needs example inputs"):
        fxsparse.load_weights(path, small_net())
    loaded = fxsparse.load_weights(path, small_net(), example_inputs=X)
    assert torch.equal(loaded(X), fast(X))


def _wider() -> nn.Module:
    model = small_net()
    model.head = nn.Linear(32, 6)
    return model


def _renamed() -> nn.Module:
    model = small_net()
    model.stem[0] = nn.Conv2d(3, 16, 3, padding=0, bias=False)
    return model


def _more() -> nn.Module:
    model = small_net()
    model.extra = nn.Linear(2, 2)
    return model


@pytest.mark.parametrize(
    ("other", "match"),
    [
        (_wider, r"'head.weight' is float32 \(6, 32\); the file has float32 \(5, 32\); 'head.bias'"),
        (_renamed, r"padding of 'stem.0' is \(0, 0, 0, 0\); the file has \(1, 1, 1, 1\)"),
        (lambda: small_net().train(), "bias of 'stem.0' is None; the file has 'stem.0.bias'"),
        (lambda: nn.Sequential(nn.Linear(2, 2)).eval(), "0 convolutions in ''; the file has 4|the file has 4"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 1)).eval(), "1 convolutions in ''; the file has 4; name of '0'"),
    ],
)
def test_another_model_is_refused(other: Callable[[], nn.Module], match: str, content: bytes, path: Path) -> None:
    path.write_bytes(content)
    with pytest.raises(FxsparseError, match=match) as caught:
        fxsparse.load_weights(path, other())
    assert "The model does not fit" in str(caught.value) and "as it was given to fxsparse.convert" in str(caught.value)


def test_missing_and_extra_tensors_are_refused(path: Path) -> None:
    fxsparse.save_weights(convert(_more(), "modules"), path)
    with pytest.raises(FxsparseError, match="the file has 'extra.bias' besides; the file has 'extra.weight' besides"):
        fxsparse.load_weights(path, small_net())
    fxsparse.save_weights(convert(small_net(), "modules"), path)
    with pytest.raises(FxsparseError, match="'extra.weight' is not in the file; 'extra.bias' is not in the file"):
        fxsparse.load_weights(path, _more())


def test_what_was_not_converted_cannot_be_saved(path: Path) -> None:
    with pytest.raises(FxsparseError, match="not converted"):
        fxsparse.save_weights(small_net(), path)


def test_a_file_is_replaced_as_a_whole_or_not_at_all(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = convert(small_net())
    with pytest.raises(FxsparseError, match="cannot be written .*Name a file in a folder that exists"):
        fxsparse.save_weights(fast, path.parent / "missing" / "weights")
    path.write_bytes(b"before")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(FxsparseError, match="No space left"):
        fxsparse.save_weights(fast, path)
    assert [p.name for p in path.parent.iterdir()] == [path.name] and path.read_bytes() == b"before"
