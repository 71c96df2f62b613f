"""freeze and to_dense: what is left, what it computes, and what is refused afterwards."""

from __future__ import annotations

import copy

import pytest
import torch
from models import error_in_float64, masked_dense, random_masks, small_net
from torch import Tensor, nn

import fxsparse
from fxsparse import Mode, sites
from fxsparse.freezing import nbytes
from fxsparse.report import graphs_of

RUNGS = ("symbolic", "export", "modules")
X = torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def converted(rung: str, masks: dict[str, Tensor], model: nn.Module, **options: object) -> nn.Module:
    chosen = fxsparse.Settings(calibrate=False, capture=rung, cache=False, **options)
    return fxsparse.convert(model, masks, example_inputs=X, settings=chosen)


@pytest.fixture(params=RUNGS)
def fast(request: pytest.FixtureRequest) -> nn.Module:
    """A converted model with a vanilla site that is packed, one that is not, and two sparse ones."""
    model = small_net()
    made = converted(request.param, random_masks(model), model, exclude=("block.short",))
    fxsparse.set_mode(made, Mode.VANILLA, sites="stem.0")
    return made


def test_frozen_models_compute_the_same_bits_in_fewer_bytes(fast: nn.Module) -> None:
    with torch.no_grad():
        expected = fast(X)
        before = nbytes(fast)
        assert fxsparse.freeze(fast) is fast
        assert torch.equal(fast(X), expected)
        assert torch.equal(copy.deepcopy(fast)(X), expected)
    names = set(fast.state_dict())
    assert "stem.0.weight" in names
    assert not {n for n in names if n.endswith("_mask")}
    assert not {n for n in names if n.startswith("stem.0.weight_")}
    assert "block.conv1.weight" not in names
    assert "block.conv1.weight_values" in names
    assert (fast.report.bytes_before, fast.report.bytes_after) == (before, nbytes(fast))
    assert nbytes(fast) < before
    assert "Frozen: " in str(fast.report)
    fxsparse.freeze(fast)
    with torch.no_grad():
        assert torch.equal(fast(X), expected)


def test_memory_that_several_tensors_share_counts_once() -> None:
    model = nn.Module()
    storage = torch.zeros(100)
    for name in ("a", "b"):
        model.register_buffer(name, storage[: 10 if name == "a" else 50])
    assert nbytes(model) == 400


@pytest.mark.parametrize("mode", [Mode.TRAINING, Mode.TEST, Mode.BENCHMARK, Mode.CALIBRATION])
def test_a_model_in_another_mode_is_not_frozen(fast: nn.Module, mode: Mode) -> None:
    keys = set(fast.state_dict())
    fxsparse.set_mode(fast, mode, sites="block.conv1")
    with pytest.raises(fxsparse.FxsparseError, match=f"'block.conv1' is in the mode '{mode.value}'.*Leave it first"):
        fxsparse.freeze(fast)
    assert set(fast.state_dict()) == keys


@pytest.mark.parametrize("mode", list(Mode))
def test_modes_whose_tensors_are_gone_are_refused(fast: nn.Module, mode: Mode) -> None:
    fxsparse.freeze(fast)
    site = "stem.0" if mode is Mode.SPARSE else "block.conv1"
    with torch.no_grad():
        expected = fast(X)
        with pytest.raises(fxsparse.FxsparseError, match=f"'{site}'.*(is frozen on|names no convolution)"):
            fxsparse.set_mode(fast, mode, sites=site)
        assert torch.equal(fast(X), expected)


def test_frozen_models_do_not_train_and_a_context_does_not_bring_back_what_is_gone(fast: nn.Module) -> None:
    with pytest.raises(fxsparse.FxsparseError, match="frozen"), fxsparse.set_mode(fast, Mode.VANILLA):
        fxsparse.freeze(fast)
    with pytest.raises(fxsparse.FxsparseError, match="frozen on its vanilla path.*'training'"):
        fast.train()
    fast.eval()


def test_freeze_keeps_what_another_site_reads() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(8, 8, 3, padding=1)
            self.b = nn.Conv2d(8, 8, 3, padding=1)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x)

    fast = fxsparse.convert(Tied().eval(), {"a": torch.rand(8, 8, 3, 3) < 0.1})
    (first, _), *_ = sites.conv_sites(fast)
    sites.set_path(fast, first, "vanilla")
    fast.recompile()
    x = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        expected = fast(x)
        fxsparse.freeze(fast)
        assert torch.equal(fast(x), expected)
        assert torch.allclose(fxsparse.to_dense(fast)(x), expected, atol=1e-5)
    assert "a.weight_values" in fast.state_dict()


@pytest.mark.parametrize("function", [fxsparse.freeze, fxsparse.to_dense])
def test_a_model_that_was_not_converted_is_refused(function) -> None:
    with pytest.raises(fxsparse.FxsparseError, match="not converted"):
        function(small_net())


def leftovers(model: nn.Module) -> list[str]:
    """Name everything of fxsparse in a model."""
    found = [name for name in model.state_dict() if "_mask" in name or "weight_" in name]
    found += [name for name in ("report", "plan") if hasattr(model, name)]
    for name, module in model.named_modules():
        if type(module).__module__.startswith("fxsparse") or any(
            base.__module__.startswith("fxsparse") for base in type(module).__mro__
        ):
            found.append(name or "the model")
        if isinstance(module, torch.fx.GraphModule):
            found += [n.name for n in module.graph.nodes if "fxsparse" in str(n.target) or "fxsparse" in n.meta]
            found += [key for key in module.meta if "fxsparse" in key]
    return found


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("frozen", [False, True])
def test_the_dense_model_computes_the_same_and_nothing_of_fxsparse_is_left(rung: str, frozen: bool) -> None:
    model = small_net()
    masks = random_masks(model)
    fast = converted(rung, masks, model)
    keys = set(fast.state_dict())
    if frozen:
        fxsparse.freeze(fast)
        keys = set(fast.state_dict())
    dense = fxsparse.to_dense(fast)
    assert leftovers(dense) == []
    assert set(fast.state_dict()) == keys
    assert {p.requires_grad for p in dense.parameters()} == {True}
    assert not dense.training
    with torch.no_grad():
        assert error_in_float64(dense(X), masked_dense(model, masks), X) < 1e-6
        exported = torch.export.export(dense, (X,))
    assert not [n for n in exported.graph.nodes if "fxsparse" in str(n.target)]
    assert type(dense) is type(model) if rung == "modules" else isinstance(dense, torch.fx.GraphModule)


@pytest.mark.parametrize("mode", list(Mode))
def test_the_dense_model_is_the_same_from_every_mode(fast: nn.Module, mode: Mode) -> None:
    with torch.no_grad():
        expected = fast(X)
        fxsparse.set_mode(fast, mode)
        dense = fxsparse.to_dense(fast)
        assert leftovers(dense) == []
        assert torch.allclose(dense(X), expected, atol=1e-5)
        assert not dense._forward_pre_hooks


def test_the_dense_model_of_one_in_training_has_its_masked_weights_of_now(fast: nn.Module) -> None:
    fast.train()
    with torch.no_grad():
        for gm in graphs_of(fast):
            for _, site in sites.conv_sites(gm):
                sites.attribute(gm, site.weight).add_(0.1)
        dense, copied = fxsparse.to_dense(fast), copy.deepcopy(fast)
        assert dense.training
        assert torch.allclose(dense(X), copied(X), atol=1e-5)
        for gm in graphs_of(fast):
            for _, site in sites.conv_sites(gm):
                assert sites.attribute(gm, site.weight).all()


def test_the_dense_model_keeps_which_parameters_want_gradients() -> None:
    model = small_net()
    model.block["conv1"].weight.requires_grad_(False)
    dense = fxsparse.to_dense(converted("symbolic", random_masks(model), model))
    wanted = {name for name, p in dense.named_parameters() if not p.requires_grad}
    assert wanted == {"block.conv1.weight"}


def test_a_swapped_convolution_comes_back_as_the_module_that_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(8, 16, 3, padding="same", padding_mode="reflect", groups=2), nn.ReLU()).eval()
    seen: list[int] = []
    model[0].register_forward_hook(lambda m, a, out: seen.append(1))
    fast = fxsparse.convert(model, {"0": torch.rand(16, 4, 3, 3) < 0.2})
    assert fast.report.rung == "modules"
    dense = fxsparse.to_dense(fast)
    assert type(dense[0]) is nn.Conv2d
    assert str(dense[0]) == str(model[0])
    x = torch.randn(1, 8, 6, 6)
    seen.clear()
    with torch.no_grad():
        assert torch.allclose(dense(x), fast(x), atol=1e-5)
    assert seen == [1, 1]
