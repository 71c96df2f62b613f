"""State dicts that do not fit a converted model: what is reported, what is refused, and that nothing is half done."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from models import masked_dense, random_masks, small_net
from states import RUNGS, X, converted, loads_silently, passes_test_mode, same_state, sparse
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fxsparse
from fxsparse import FxsparseError, sites
from fxsparse.calibration import packings

TABLES = ("columns", "panels", "rows")


@pytest.fixture(params=RUNGS)
def rung(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def masks() -> dict[str, Tensor]:
    return random_masks(small_net())


def test_missing_and_unexpected_keys_are_reported_as_torch_does(masks: dict[str, Tensor]) -> None:
    fast = converted(small_net(bias=True), masks)
    before = {key: value.clone() for key, value in fast.state_dict().items()}
    state = masked_dense(small_net(bias=True), masks).state_dict()
    for key in ("stem.1.running_var", "block.conv1.weight", "head.bias"):
        del state[key]
    state["stem.7"] = torch.zeros(1)
    found = fast.load_state_dict(state, strict=False)
    assert sorted(found.missing_keys) == ["block.conv1.weight", "head.bias", "stem.1.running_var"]
    assert found.unexpected_keys == ["stem.7"]
    after = fast.state_dict()
    for name in ("stem.0", "block.conv1"):  # what cannot be folded stays as it was, weight and bias together
        for key in (k for k in before if k.startswith(name)):
            assert torch.equal(after[key], before[key])
    assert not torch.equal(after["block.conv2.weight"], before["block.conv2.weight"])
    assert passes_test_mode(fast)
    with pytest.raises(RuntimeError, match='Missing key.*"stem.1.running_var"'):
        fast.load_state_dict(state)


def test_missing_packed_tensors_of_its_own_state_dict_are_reported(rung: str, masks: dict[str, Tensor]) -> None:
    fast, other = (converted(small_net(), masks, rung) for _ in range(2))
    state = other.state_dict()
    del state["block.conv1.weight_rows"]
    found = fast.load_state_dict(state, strict=False)
    assert (found.missing_keys, found.unexpected_keys) == (["block.conv1.weight_rows"], [])
    assert same_state(fast, other)
    fxsparse.freeze(sparse(fast))
    with pytest.raises(RuntimeError, match='Missing key.*"block.conv1.weight'):
        fast.load_state_dict({k: v for k, v in state.items() if not k.startswith("block.conv1.weight")})


@pytest.mark.parametrize("key", ["block.conv1.weight", "block.bn1.running_var", "head.weight"])
@pytest.mark.parametrize("value", [torch.zeros(2, 3), "no tensor"])
def test_sizes_that_do_not_fit_are_reported_as_torch_does(key: str, value: object, masks: dict[str, Tensor]) -> None:
    fast = converted(small_net(bias=True), masks)
    before = {k: v.clone() for k, v in fast.state_dict().items() if k.startswith("block.conv1")}
    state = masked_dense(small_net(bias=True), masks).state_dict()
    state[key] = value
    with pytest.raises(RuntimeError, match=rf"Error\(s\) in loading state_dict[\s\S]*{key}"):
        fast.load_state_dict(state)
    if key != "head.weight":
        assert all(torch.equal(fast.state_dict()[k], v) for k, v in before.items())
    assert passes_test_mode(fast)


def test_a_state_dict_under_other_masks_is_refused_and_changes_nothing(rung: str) -> None:
    model = small_net()
    fast, other = converted(model, random_masks(model), rung), converted(model, random_masks(model), rung)
    before = copy.deepcopy(fast)
    with pytest.raises(FxsparseError, match="under other masks.*weight_mask' differs"):
        fast.load_state_dict(other.state_dict())
    assert same_state(fast, before)
    fxsparse.freeze(sparse(fast)), fxsparse.freeze(sparse(other))
    before = copy.deepcopy(fast)
    with pytest.raises(FxsparseError, match="under other masks.*weight_rows' differs"):
        fast.load_state_dict(other.state_dict())
    assert same_state(fast, before)


def test_another_packing_of_the_same_masks_is_packed_as_the_model_is(masks: dict[str, Tensor]) -> None:
    fast, other = (converted(masked_dense(small_net(), masks), masks) for _ in range(2))
    for node, site in list(sites.conv_sites(other)):
        packings.repack(other, site, "rows")
        sites.update(node, packing="rows")
    state = other.state_dict()
    tables = {k: v.clone() for k, v in fast.state_dict().items() if k.endswith(TABLES)}
    assert any(state[key].shape != table.shape for key, table in tables.items())
    loads_silently(fast, state)
    assert all(torch.equal(fast.state_dict()[key], table) for key, table in tables.items())
    assert passes_test_mode(fast)
    with torch.no_grad():
        assert torch.allclose(fast(X), other(X), atol=1e-5)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("table", TABLES)
def test_tables_that_would_read_out_of_bounds_are_refused(table: str, frozen: bool, masks: dict[str, Tensor]) -> None:
    fast = sparse(converted(masked_dense(small_net(), masks), masks))
    if frozen:
        fxsparse.freeze(fast)
    before = copy.deepcopy(fast)
    for index in (0, -1):
        state = {key: value.clone() for key, value in fast.state_dict().items()}
        state[f"block.conv2.weight_{table}"].view(-1)[index] = 2**31 - 1
        for assign in (False, True):
            with pytest.raises(FxsparseError, match="'block.conv2.weight' cannot be used: .*damaged"):
                fast.load_state_dict(state, assign=assign)
    state[f"block.conv2.weight_{table}"] = state[f"block.conv2.weight_{table}"].double()
    with pytest.raises(FxsparseError, match="'block.conv2.weight' cannot be used: .*dtype"):
        fast.load_state_dict(state)
    state["block.conv2.weight_values"] = torch.zeros(2, 2)
    with pytest.raises(FxsparseError, match="cannot be used: the values are"):
        fast.load_state_dict(state)
    state["block.conv2.weight_values"] = "no tensor"
    with pytest.raises(FxsparseError, match="cannot be used: they are no dense tensors"):
        fast.load_state_dict(state)
    assert same_state(fast, before)


@pytest.mark.parametrize(
    "reparametrise",
    [parametrizations.weight_norm, parametrizations.spectral_norm, nn.utils.weight_norm, nn.utils.spectral_norm],
)
@pytest.mark.parametrize("way", ["symbolic", "modules"])
def test_checkpoints_with_reparametrisations_are_refused(way: str, reparametrise, masks: dict[str, Tensor]) -> None:
    fast, other = converted(small_net(), masks, way), masked_dense(small_net(), masks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reparametrise(other.block["conv1"])
    before = copy.deepcopy(fast)
    with pytest.raises(FxsparseError, match="in the place of 'block.conv1.weight'.*make it permanent"):
        fast.load_state_dict(other.state_dict())
    if way == "symbolic":
        assert same_state(fast, before)
