"""Masks in every form, and every error about them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import error_in_float64, masked_dense, random_masks, small_net
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import fxsparse
from fxsparse.masks import bake


def convert(model: nn.Module, masks: object = None) -> nn.Module:
    return fxsparse.convert(model, masks, settings=fxsparse.Settings(calibrate=False))


@pytest.mark.parametrize("name", ["block.conv1", "block.conv1.weight", "block.conv1.weight_mask"])
@pytest.mark.parametrize(
    "form", [lambda m: m, lambda m: m.float() * -2, lambda m: m.to(torch.uint8), lambda m: m.numpy()]
)
def test_a_mask_may_be_named_and_typed_in_every_usual_way(name: str, form) -> None:
    model = small_net()
    mask = random_masks(model)["block.conv1"]
    baked = bake(model, {name: form(mask)})
    assert torch.equal(baked.masks["block.conv1.weight"].kept, mask)
    assert torch.equal(baked.model.block["conv1"].weight, model.block["conv1"].weight * mask)


def test_a_block_list_becomes_exactly_its_blocks() -> None:
    model = small_net()
    blocks = [(np.arange(0, 16), np.arange(5, 60)), (list(range(16, 30)), [0, 3, 100])]
    fast = convert(model, {"block.conv1": blocks})
    row = fast.report.row("block.conv1")
    assert (row.blocks, row.residual, row.fill_in) == (2, 0, 0)
    mask = torch.zeros(32, 144, dtype=torch.bool)
    for rows, columns in blocks:
        mask[np.ix_(rows, columns)] = True
    dense = masked_dense(model, {"block.conv1": mask.view(32, 16, 3, 3)})
    x = torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        assert error_in_float64(fast(x), dense, x) < 1e-6


def test_pruned_models_convert_after_training_steps_and_keep_their_masks() -> None:
    model = small_net().train()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            prune.l1_unstructured(module, "weight", amount=0.7)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        model(torch.randn(4, 3, 8, 8)).square().mean().backward()
        optimizer.step()
    model.eval()
    # The attribute `weight` is stale now (the pre-hook refreshes it in forward) and has a grad_fn.
    x = torch.randn(2, 3, 12, 12)
    for rung in ("symbolic", "modules"):
        fast = fxsparse.convert(model, settings=fxsparse.Settings(capture=rung))
        assert fast.report.row("block.conv1").density == pytest.approx(0.3, abs=1e-3)
        with torch.no_grad():
            assert torch.allclose(fast(x), model(x), atol=1e-5)
    assert prune.is_pruned(model)


def test_a_kept_weight_that_happens_to_be_zero_stays_in_the_mask() -> None:
    model = small_net()
    prune.custom_from_mask(model.stem[0], "weight", torch.rand(16, 3, 3, 3) < 0.5)
    with torch.no_grad():
        model.stem[0].weight_orig.zero_()
    kept = bake(model, None).masks["stem.0.weight"].kept
    assert torch.equal(kept, model.stem[0].weight_mask.bool())


def test_a_nan_in_a_pruned_place_does_not_reach_the_output() -> None:
    model = small_net()
    mask = random_masks(model)["stem.0"]
    with torch.no_grad():
        model.stem[0].weight[~mask] = float("nan")
    fast = convert(model, {"stem.0": mask})
    with torch.no_grad():
        assert fast(torch.randn(1, 3, 8, 8)).isfinite().all()


@pytest.mark.parametrize("kind", ["parametrize", "weight_norm", "parametrized_weight_norm", "spectral_norm"])
def test_reparametrised_weights_are_read_never_lost(kind: str) -> None:
    class Masked(nn.Module):
        def __init__(self, mask: Tensor) -> None:
            super().__init__()
            self.mask = mask

        def forward(self, weight: Tensor) -> Tensor:
            return weight * self.mask

    model = small_net()
    conv = model.block["conv1"]
    if kind == "parametrize":
        parametrize.register_parametrization(conv, "weight", Masked(torch.rand_like(conv.weight) < 0.1))
    elif kind == "weight_norm":
        torch.nn.utils.weight_norm(conv)
        with torch.no_grad():
            conv.weight_g.mul_(2)
    elif kind == "parametrized_weight_norm":
        parametrizations.weight_norm(conv)
    else:
        parametrizations.spectral_norm(conv)
    model.eval()
    x = torch.randn(2, 3, 10, 10)
    with torch.no_grad():
        expected = model(x)
        fast = convert(model)
        assert torch.allclose(fast(x), expected, atol=1e-5)
    if kind == "parametrize":
        assert fast.report.row("block.conv1").path == "sparse"
    mask = torch.rand_like(conv.weight) < 0.3
    with torch.no_grad():
        masked = convert(model, {"block.conv1": mask})
        weight = conv.weight.detach() * mask
        assert torch.allclose(masked.get_submodule("block.conv1").weight != 0, weight != 0)


def test_a_functional_convolution_is_a_site_under_its_parameters_name() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(8, 4, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.kernel, stride=2, padding="valid")

    model = Functional().eval()
    mask = torch.rand(8, 4, 3, 3) < 0.1
    fast = convert(model, {"kernel": mask})
    assert fast.report.row("kernel").path == "sparse"
    x = torch.randn(2, 4, 9, 9)
    with torch.no_grad():
        assert torch.allclose(fast(x), F.conv2d(x, model.kernel * mask, stride=2), atol=1e-5)


def test_a_mask_of_a_linear_layer_is_applied_and_noted() -> None:
    model = small_net()
    mask = torch.rand(5, 32) < 0.5
    fast = convert(model, {"head": mask})
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert error_in_float64(fast(x), masked_dense(model, {"head": mask}), x) < 1e-6
    assert "'head.weight' is masked but is no 2-D convolution's weight" in str(fast.report)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"block.conv3": torch.ones(1)}, r"name 'block.conv3', which is no weight.*Near names: 'block.conv"),
        (
            {"block.conv1": torch.ones(32, 16, 1, 1)},
            r"Mask 'block.conv1' has shape \(32, 16, 1, 1\); the weight has \(32, 16, 3, 3\)",
        ),
        ({"stem.0": torch.full((16, 3, 3, 3), float("nan"))}, "Mask 'stem.0' contains NaN"),
        ({"stem.0": "all"}, "Mask 'stem.0' is a str"),
        ({"stem.0": [([0, 99], [0])]}, r"Mask 'stem.0': .*99"),
        (
            {"stem.0": torch.ones(16, 3, 3, 3), "stem.0.weight": torch.ones(16, 3, 3, 3)},
            "name the weight 'stem.0.weight' twice",
        ),
        ([torch.ones(1)], "masks is a list"),
        ({"head": [([0], [0])]}, "block list; the weight has shape"),
    ],
)
def test_every_bad_mask_gets_one_clear_error(masks: object, message: str) -> None:
    with pytest.raises(fxsparse.FxsparseError, match=message):
        convert(small_net(), masks)


def test_models_that_cannot_be_converted_are_refused_with_the_remedy() -> None:
    with pytest.raises(fxsparse.FxsparseError, match="TorchScript module"):
        convert(torch.jit.script(nn.Conv2d(1, 1, 1)))
    with pytest.raises(fxsparse.FxsparseError, match="not initialised"):
        convert(nn.Sequential(nn.LazyConv2d(4, 3)))
    with torch.device("meta"):
        empty = nn.Conv2d(1, 1, 1)
    with pytest.raises(fxsparse.FxsparseError, match="meta device"):
        convert(empty)

    class NoCopy(nn.Module):
        def __deepcopy__(self, memo: object) -> nn.Module:
            raise RuntimeError("has a lock")

    with pytest.raises(fxsparse.FxsparseError, match="cannot be copied.*has a lock"):
        convert(nn.Sequential(NoCopy()))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (3, "example_inputs is a int"),
        ("x", "example_inputs is a str"),
        ((1, -3, 8, 8), "negative size"),
        ((1, 5, 8, 8), "The model does not run on the example inputs: RuntimeError: .*channels"),
        ((1, 3, 8), "The model does not run on the example inputs: "),
    ],
)
def test_bad_example_inputs_get_one_clear_error(inputs: object, message: str) -> None:
    with pytest.raises(fxsparse.FxsparseError, match=message):
        fxsparse.convert(small_net(), example_inputs=inputs)


def test_bad_settings_get_one_clear_error() -> None:
    with pytest.raises(fxsparse.FxsparseError, match="not a rung"):
        fxsparse.Settings(capture="jit")
    with pytest.raises(fxsparse.FxsparseError, match="margin"):
        fxsparse.Settings(margin=1.5)
    with pytest.raises(fxsparse.FxsparseError, match="not a valid regular expression"):
        fxsparse.convert(small_net(), settings=fxsparse.Settings(include=("re:[",)))
    with pytest.raises(fxsparse.FxsparseError, match="was not converted"):
        fxsparse.calibrate(small_net(), (1, 3, 8, 8))
    with pytest.raises(fxsparse.FxsparseError, match="needs example inputs"):
        fxsparse.calibrate(convert(small_net()), None)
