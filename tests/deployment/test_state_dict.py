"""state_dict and load_state_dict of converted models: dense checkpoints are folded, masked and packed again."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from models import error_in_float64, masked_dense, random_masks, small_net
from states import RUNGS, X, converted, loads_silently, passes_test_mode, same_state, sparse
from torch import Tensor, nn
from torch.nn.utils import prune

import fxsparse
from fxsparse import FxsparseError, Mode, sites
from fxsparse.report import graphs_of


@pytest.fixture(params=RUNGS)
def rung(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def masks() -> dict[str, Tensor]:
    return random_masks(small_net())


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_dense_checkpoint_gives_what_converting_its_model_gives(
    rung: str, assign: bool, bias: bool, masks: dict[str, Tensor]
) -> None:
    fast = converted(small_net(bias=bias), masks, rung)
    other = masked_dense(small_net(bias=bias), masks)
    state = other.state_dict()
    kept = {key: value.clone() for key, value in state.items()}
    loads_silently(fast, state, assign=assign)
    assert same_state(fast, converted(other, masks, rung))
    assert all(torch.equal(state[key], kept[key]) for key in kept)
    assert passes_test_mode(fast)
    with torch.no_grad():
        assert error_in_float64(fast(X), other, X) < 1e-6


def test_what_the_masks_prune_is_set_to_zero_with_a_warning_that_says_how_much(masks: dict[str, Tensor]) -> None:
    fast, other = converted(small_net(), masks, fold_batch_norm=False), small_net()
    weights = {f"{name}.weight": mask for name, mask in masks.items()}
    state = masked_dense(other, masks).state_dict()
    loads_silently(fast, state)
    position = tuple((~masks["block.conv1"]).nonzero()[0])
    state["block.conv1.weight"][position] = 3.0
    total = float(state["block.conv1.weight"].norm())
    with pytest.warns(
        UserWarning, match=rf"has 1 weights that.*with {3 / total:.3%} of the norm.*'block.conv1.weight'"
    ):
        fast.load_state_dict(state)
    assert state["block.conv1.weight"][position] == 3.0
    with pytest.warns(UserWarning) as caught:
        fast.load_state_dict(other.state_dict())
    assert len(caught) == 1
    assert f"has {sum(int((~mask).sum()) for mask in masks.values())} weights" in str(caught[0].message)
    for name, mask in weights.items():
        assert torch.equal(fast.state_dict()[name], other.state_dict()[name].masked_fill(~mask, 0))
    assert passes_test_mode(fast)


def test_kept_weights_may_be_zero_in_the_checkpoint(rung: str, masks: dict[str, Tensor]) -> None:
    fast = converted(small_net(), masks, rung)
    sparser = {name: mask & (torch.rand(mask.shape) < 0.5) for name, mask in masks.items()}
    other = masked_dense(small_net(), sparser)
    loads_silently(fast, other.state_dict())
    assert same_state(fast, converted(other, masks, rung))
    third = masked_dense(small_net(), masks)  # they can come back
    loads_silently(fast, third.state_dict())
    assert same_state(fast, converted(third, masks, rung))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("assign", [False, True])
def test_its_own_state_dict_makes_the_round_trip(
    rung: str, frozen: bool, assign: bool, masks: dict[str, Tensor]
) -> None:
    one, two = (converted(masked_dense(small_net(), masks), masks, rung) for _ in range(2))
    if frozen:
        fxsparse.freeze(one), fxsparse.freeze(two)
    loads_silently(two, one.state_dict(), assign=assign)
    assert same_state(one, two)
    with torch.no_grad():
        assert torch.equal(one(X), two(X))


def test_a_state_dict_of_a_graph_with_nothing_pruned_is_told_from_a_dense_one() -> None:
    model, other = small_net(bias=True), small_net(bias=True)
    one, two = converted(model, None), converted(other, None)
    assert one.state_dict().keys() < model.state_dict().keys()  # no new name: only the norms tell
    loads_silently(two, one.state_dict())
    assert same_state(one, two)
    loads_silently(two, other.state_dict())
    assert same_state(two, converted(other, None))


def test_frozen_and_unfrozen_models_load_each_other_and_dense_checkpoints(rung: str, masks: dict[str, Tensor]) -> None:
    first, second = (masked_dense(small_net(), masks) for _ in range(2))
    whole, frozen = (converted(model, masks, rung) for model in (first, second))
    for model in (whole, frozen):
        fxsparse.set_mode(model, Mode.SPARSE)
    fxsparse.freeze(frozen)
    assert "block.conv1.weight" not in frozen.state_dict()
    state = frozen.state_dict()
    loads_silently(whole, state)
    with torch.no_grad():
        assert torch.equal(whole(X), frozen(X))
        assert passes_test_mode(whole)
        loads_silently(whole, first.state_dict())
        loads_silently(frozen, whole.state_dict())
        assert torch.equal(whole(X), frozen(X))
        loads_silently(frozen, second.state_dict())
    assert same_state(frozen, fxsparse.freeze(sparse(converted(second, masks, rung))))
    # Of its masks only the zeros are left, and those stay.
    with pytest.warns(UserWarning, match="not zero where the masks prune"):
        frozen.load_state_dict(small_net().state_dict())
    for gm in graphs_of(frozen):
        for _, site in sites.conv_sites(gm):
            packed = [sites.attribute(gm, name) for name in site.packed_names]
            unpacked = torch.ops.fxsparse.unpack(*packed, list(site.weight_shape))
            assert not unpacked[~masks[site.name]].any()


def test_a_frozen_vanilla_site_keeps_its_zeros(masks: dict[str, Tensor]) -> None:
    fast = converted(small_net(), masks, fold_batch_norm=False)
    fxsparse.set_mode(fast, Mode.VANILLA)
    fxsparse.freeze(fast)
    with pytest.warns(UserWarning, match="not zero where the masks prune"):
        fast.load_state_dict(small_net().state_dict())
    assert not fast.state_dict()["block.conv1.weight"][~masks["block.conv1"]].any()


def test_loading_works_in_training_and_the_optimizer_goes_on(rung: str, masks: dict[str, Tensor]) -> None:
    fast = converted(small_net(), masks, rung).train()
    parameters = list(fast.parameters())
    other = masked_dense(small_net(), masks)
    loads_silently(fast, other.state_dict())
    assert [id(p) for p in fast.parameters()] == [id(p) for p in parameters]
    torch.optim.SGD(parameters, lr=0.1)
    fast.eval()
    assert same_state(fast, converted(other, masks, rung))
    assert passes_test_mode(fast)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_models_dtype_stays_unless_tensors_are_assigned(rung: str, dtype: torch.dtype) -> None:
    model, other = small_net(bias=True), small_net(bias=True)
    masks = random_masks(model)
    fast = converted(model, masks, rung).to(dtype)
    loads_silently(fast, masked_dense(other, masks).state_dict())
    assert {p.dtype for p in fast.parameters()} == {dtype}
    assert passes_test_mode(fast)
    expected = converted(other, masks, rung).to(dtype).state_dict()
    for name, value in fast.state_dict().items():
        if not value.is_floating_point() or rung == "modules":
            assert torch.equal(value, expected[name])
        else:  # folded in double and rounded once, not twice
            assert torch.allclose(
                value, expected[name], rtol=2 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
            )
    loads_silently(fast, masked_dense(other, masks).state_dict(), assign=True)
    assert same_state(fast, converted(other, masks, rung))


def test_copies_of_a_model_load_dense_checkpoints(rung: str, masks: dict[str, Tensor]) -> None:
    fast = copy.copy(copy.deepcopy(converted(small_net(), masks, rung)))
    other = masked_dense(small_net(), masks)
    loads_silently(fast, other.state_dict())
    assert same_state(fast, converted(other, masks, rung))


def test_what_is_remembered_of_the_dense_model_is_plain_data(masks: dict[str, Tensor]) -> None:
    fast = converted(small_net(), masks)
    remembered = {key: fast.meta[key] for key in ("fxsparse_dense_keys", "fxsparse_folded_norms")}
    assert json.loads(json.dumps(remembered)) == remembered
    assert remembered["fxsparse_dense_keys"] == list(small_net().state_dict())
    assert len(remembered["fxsparse_folded_norms"]) == 3
    made = copy.deepcopy(fast)
    made.meta.update(json.loads(json.dumps(remembered)))
    other = masked_dense(small_net(), masks)
    loads_silently(made, other.state_dict())
    assert same_state(made, converted(other, masks))


def test_a_model_inside_a_bigger_one_loads_that_ones_checkpoint(rung: str, masks: dict[str, Tensor]) -> None:
    class Detector(nn.Module):
        def __init__(self, backbone: nn.Module) -> None:
            super().__init__()
            self.backbone = backbone
            self.box = nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.box(self.backbone(x))

    other = masked_dense(small_net(), masks)
    detector, dense = Detector(converted(small_net(), masks, rung)), Detector(other)
    loads_silently(detector, dense.state_dict())
    assert same_state(detector.backbone, converted(other, masks, rung))
    with torch.no_grad():
        assert error_in_float64(detector(X), dense, X) < 1e-6
    state = dense.state_dict()
    del state["backbone.stem.1.running_mean" if rung != "modules" else "backbone.stem.0.weight"]
    state["backbone.more"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r'Missing key.*"backbone\.stem\.[\s\S]*Unexpected key.*"backbone\.more"'):
        detector.load_state_dict(state)


def test_parameters_that_the_graph_does_not_use_are_left_out(rung: str, masks: dict[str, Tensor]) -> None:
    def with_extras(model: nn.Module) -> nn.Module:
        model.aux = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        model.register_buffer("scratch", torch.ones(2), persistent=False)
        return model.eval()

    fast, other = converted(with_extras(small_net()), masks, rung), with_extras(masked_dense(small_net(), masks))
    loads_silently(fast, other.state_dict())
    assert same_state(fast, converted(other, masks, rung))


def test_constants_of_the_graph_stay(rung: str) -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            self.register_buffer("mean", torch.full((1, 3, 1, 1), 0.5), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x - self.mean) + torch.tensor([1.5])

    masks = {"conv": torch.rand(8, 3, 3, 3) < 0.3}
    fast, other = converted(Shifted().eval(), masks, rung), masked_dense(Shifted().eval(), masks)
    loads_silently(fast, other.state_dict())
    with torch.no_grad():
        assert error_in_float64(fast(X), other, X) < 1e-6


def test_checkpoints_of_pruned_models_load(rung: str) -> None:
    model = small_net()
    prune.random_unstructured(model.block["conv1"], "weight", amount=0.9)
    prune.random_unstructured(model.head, "weight", amount=0.5)
    fast = converted(model, None, rung)
    other = copy.deepcopy(fast)
    with torch.no_grad():
        model.block["conv1"].weight_orig.mul_(2)
        model.block["conv1"].weight_orig[model.block["conv1"].weight_mask == 0] = torch.inf
    state = model.state_dict()
    if rung == "modules":  # a layer of the user's own, whose pruning is no business of any graph
        prune.remove(model.head, "weight")
        state.update({"head.weight": model.head.weight.data})
        del state["head.weight_orig"], state["head.weight_mask"]
    loads_silently(fast, state)
    weight = "block.conv1.weight"
    assert torch.equal(fast.state_dict()[weight], 2 * other.state_dict()[weight])
    assert passes_test_mode(fast)


class Standardised(nn.Module):
    """Weight standardisation: the weight is computed at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv.weight / self.conv.weight.square().mean((1, 2, 3), keepdim=True).sqrt()
        return self.bn(nn.functional.conv2d(x, weight))


@pytest.mark.parametrize("way", ["symbolic", "export"])
def test_computed_weights_are_computed_again(way: str) -> None:
    masks = {"conv": torch.rand(8, 3, 3, 3) < 0.3}
    fast, other = converted(Standardised().eval(), masks, way), Standardised().eval()
    other.bn.running_mean.normal_()
    fast = copy.deepcopy(fast)
    with pytest.warns(UserWarning, match=r"not zero where the masks prune.*\('conv.weight'\)"):
        fast.load_state_dict(other.state_dict())  # masked before it is computed with, as at conversion
    assert same_state(fast, converted(other, masks, way))
    other = masked_dense(Standardised().eval(), masks)
    loads_silently(fast, other.state_dict())
    assert same_state(fast, converted(other, masks, way))
    loads_silently(fast, fast.state_dict())
    state = other.state_dict()
    del state["conv.weight"]
    assert fast.load_state_dict(state, strict=False).missing_keys == ["conv.weight"]
    before = fast.state_dict()["conv.weight_folded"].clone()
    with pytest.raises(RuntimeError, match="size mismatch for conv.weight:"):
        fast.load_state_dict({**state, "conv.weight": torch.zeros(3)})
    assert torch.equal(fast.state_dict()["conv.weight_folded"], before)
    assert passes_test_mode(fast)
    del fast.meta["fxsparse_computed_weights"]  # which a file does not hold
    with pytest.raises(FxsparseError, match="weight of 'conv' was computed from others.*Convert the original"):
        fast.load_state_dict(other.state_dict())


def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 8, 3, bias=False)
            self.b = nn.Conv2d(3, 8, 3, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x)

    masks = {"a": torch.rand(8, 3, 3, 3) < 0.3}
    fast, other = converted(Tied().eval(), masks), masked_dense(Tied().eval(), masks)
    loads_silently(fast, other.state_dict())
    assert same_state(fast, converted(other, masks))
    assert passes_test_mode(fast)


def test_a_model_that_was_on_the_meta_device_takes_its_tables_from_a_converted_one(
    rung: str, masks: dict[str, Tensor]
) -> None:
    other = converted(small_net(), masks, rung)
    with torch.no_grad():
        expected = other(X)
    for assign in (True, False):
        fast = converted(small_net(), masks, rung).to("meta")
        if not assign:
            fast = fast.to_empty(device="cpu")
        with pytest.raises(FxsparseError, match="has no content: the model was on the meta device"):
            fast.load_state_dict(small_net().state_dict(), assign=assign)
        loads_silently(fast, other.state_dict(), assign=assign)
        assert same_state(fast, other)
        with torch.no_grad():
            assert torch.equal(fast(X), expected)
    broken = {k: v.clone() for k, v in other.state_dict().items()}
    broken["block.conv1.weight_columns"][0] = -1
    fast = converted(small_net(), masks, rung).to("meta")
    with pytest.raises(FxsparseError, match="'block.conv1.weight' cannot be used: .*damaged"):
        fast.load_state_dict(broken, assign=True)
