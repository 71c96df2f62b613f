"""The packed weights of a compiled model follow its own, whatever writes them; and training is the model's own."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable

import pytest
import torch
from compiling import Inner, assert_right, compiled, only_report, pruned_net, sparse_sites
from models import masked_dense, random_masks, small_net
from torch import Tensor, nn

import fxsparse
from fxsparse import dynamo, layouts, sites
from fxsparse.plan import Plan


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch.compiler.reset()


def other_values(model: nn.Module) -> dict[str, Tensor]:
    """Return a state dict with other weights under the same masks."""
    return {name: value * -1.5 if value.dim() == 4 else value for name, value in model.state_dict().items()}


def optimizer_step(model: nn.Module) -> None:
    """Step as one who trains the pruned model does: with zero gradients where it is pruned."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with torch.enable_grad():
        model(torch.randn(2, 3, 16, 16)).square().sum().backward()
    for p in model.parameters():
        if p.dim() == 4:
            p.grad.masked_fill_(p == 0, 0)
    optimizer.step()


def load_state_dict(model: nn.Module) -> None:
    model.load_state_dict(other_values(model))


def assign_state_dict(model: nn.Module) -> None:
    model.load_state_dict(other_values(model), assign=True)


def new_data(model: nn.Module) -> None:
    for p in model.parameters():
        p.data = p.data * -1.5


def new_data_twice(model: nn.Module) -> None:
    """Give the allocator every chance to hand out the first address again."""
    for p in model.parameters():
        value = p.detach() * -1.5
        p.data = torch.empty(0)
        p.data = value


def copy_into(model: nn.Module) -> None:
    for p in model.parameters():
        p.copy_(p * -1.5)


def in_place(model: nn.Module) -> None:
    for p in model.parameters():
        p.mul_(-1.5)


def in_place_in_inference_mode(model: nn.Module) -> None:
    with torch.inference_mode():
        in_place(model)


def foreach(model: nn.Module) -> None:
    torch._foreach_mul_(list(model.parameters()), -1.5)


def through_detach(model: nn.Module) -> None:
    for p in model.parameters():
        p.detach().mul_(-1.5)


CHANGES = [
    *(optimizer_step, load_state_dict, assign_state_dict, new_data, new_data_twice, copy_into, in_place),
    *(in_place_in_inference_mode, foreach, through_detach),
]


@pytest.mark.parametrize("change", CHANGES)
def test_no_write_leaves_a_packed_weight_behind(change: Callable[[nn.Module], None]) -> None:
    model, inner = pruned_net(), Inner()
    fast = compiled(model, inner)
    x = torch.randn(2, 3, 16, 16)
    assert_right(fast, model, x)
    with torch.no_grad():
        before = fast(x)
        change(model)
        assert not torch.allclose(fast(x), before)
    assert_right(fast, model, x)
    assert inner.sparse() == [4] * inner.count
    assert inner.count == (2 if change is assign_state_dict else 1)  # that one brings other parameters
    with torch.inference_mode():
        change(model) if change is not optimizer_step else in_place(model)
        y = fast(x)
    assert_right(lambda _: y.clone(), model, x)


def test_a_replaced_module_or_parameter_is_seen() -> None:
    model = pruned_net()
    fast = compiled(model)
    assert_right(fast, model)
    conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
    conv.weight.data.masked_fill_(torch.rand_like(conv.weight) > 0.05, 0)
    model.stem[0] = conv
    assert_right(fast, model)
    assert sparse_sites(fast)[-1] == 4
    model.block["conv1"].weight = nn.Parameter(torch.randn(32, 16, 3, 3))
    assert_right(fast, model)
    assert sparse_sites(fast)[-1] == 3
    with torch.no_grad():
        model.stem[0].weight.mul_(2)
    assert_right(fast, model)


def test_another_dtype_compiles_again() -> None:
    model = pruned_net()
    fast = compiled(model)
    assert_right(fast, model)
    model.double()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(fast(x), model(x), rtol=1e-12, atol=1e-12)
    assert sparse_sites(fast)[-1] == 4


def test_writes_that_torch_does_not_count_need_a_refresh() -> None:
    model, other = pruned_net(), pruned_net()
    fast, unconcerned = compiled(model), compiled(other)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        before, kept = fast(x), unconcerned(x)
        model.stem[0].weight.data.mul_(2)
        other.stem[0].weight.data.mul_(2)
        assert torch.equal(fast(x), before)  # documented
        dynamo.refresh(fast)
        assert_right(fast, model, x)
        assert torch.equal(unconcerned(x), kept)
        dynamo.refresh()
        assert_right(unconcerned, other, x)
        model.stem[0].weight.detach().numpy()[:] *= 2
        dynamo.refresh(model)
    assert_right(fast, model, x)


@pytest.mark.parametrize("batches", [(2,), (2, 5)], ids=["one batch", "dynamic"])
def test_lost_zeros_take_the_graph_to_vanilla_and_back(
    batches: tuple[int, ...], caplog: pytest.LogCaptureFixture
) -> None:
    model, inner = pruned_net(), Inner()
    saved = copy.deepcopy(model.state_dict())
    fast = compiled(model, inner)

    def check() -> None:
        for batch in batches:
            x = torch.randn(batch, 3, 16, 16)
            if len(batches) > 1:
                torch._dynamo.mark_dynamic(x, 0)
            assert_right(fast, model, x)

    check()
    with torch.no_grad(), caplog.at_level(logging.WARNING, logger="fxsparse"):
        model.block["conv1"].weight.add_(0.1)
        check()
        model.stem[0].weight.mul_(2)
        check()
    assert caplog.text.count("'block.conv1.weight' is not zero any more where it was") == 1
    report = only_report(fast)
    assert report.sparse == 0
    assert "the whole graph runs vanilla until it is again" in report.plan_notes[-1]
    assert inner.sparse() == [4, 0]
    model.load_state_dict(saved)
    check()
    assert only_report(fast).sparse == 4
    assert inner.count == 2
    torch.compiler.reset()
    with torch.no_grad():
        model.block["conv1"].weight.fill_(1)
    assert_right(fast, model)
    assert sparse_sites(fast)[-1] == 3


def test_given_masks_hold_whatever_is_written() -> None:
    model = small_net()
    masks = random_masks(model, 0.05)
    fast = compiled(model, masks=masks)
    assert_right(fast, masked_dense(model, masks))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p))
    assert_right(fast, masked_dense(model, masks))
    assert sparse_sites(fast) == [4]


def test_dense_weights_in_another_layout_are_copies_that_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    def calibrate(model, inputs, **kwargs):
        for node, site in sites.conv_sites(model):
            sites.set_path(model, node, "sparse" if site.name == "block.short" else "vanilla")
            layouts.place(model, [layouts.move_of_weight("", site, "channels_last")])
        model.recompile()
        model.plan = Plan()
        return model

    monkeypatch.setattr("fxsparse.dynamo.conversion.calibrate", calibrate)
    model, inner = pruned_net(), Inner()
    fast = compiled(model, inner, settings=fxsparse.Settings())
    assert_right(fast, model)
    assert all(p.is_contiguous() for p in model.parameters())
    copied = [b for b in inner.graphs[0].buffers() if b.dim() == 4 and not b.is_contiguous()]
    assert len(copied) == 3
    in_place_addresses = [b.data_ptr() for b in inner.graphs[0].buffers()]
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(-2)
    assert_right(fast, model)
    assert [b.data_ptr() for b in inner.graphs[0].buffers()] == in_place_addresses


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_gradients_are_those_of_the_model(inner: str) -> None:
    model = pruned_net()
    other = copy.deepcopy(model)
    fast = compiled(model, inner)
    x, z = torch.randn(2, 3, 16, 16).requires_grad_(), torch.empty(0)
    z = x.detach().clone().requires_grad_()
    fast(x).square().sum().backward()
    other(z).square().sum().backward()
    torch.testing.assert_close(x.grad, z.grad, rtol=1e-4, atol=1e-5)
    for (name, a), (_, b) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    assert model.stem[0].weight.grad[model.stem[0].weight == 0].any()  # as in the model itself
    (report,) = dynamo.reports(fast)
    assert "under torch.no_grad()" in report.notes[-1]
    assert all("gradients are needed" in row.reason for row in report.rows)
    assert [row.name for row in report.rows] == ["stem.0", "block.conv1", "block.conv2", "block.short"]


def test_gradients_of_weights_that_a_mask_prunes_are_zero() -> None:
    model = small_net()
    masks = random_masks(model, 0.3)
    fast = compiled(model, "aot_eager", masks=masks)
    fast(torch.randn(2, 3, 16, 16)).square().sum().backward()
    for name, mask in masks.items():
        grad = model.get_submodule(name).weight.grad
        assert not grad[~mask].any()
        assert grad[mask].any()


def test_training_and_evaluation_take_turns() -> None:
    model, inner = pruned_net(), Inner()
    fast = compiled(model, inner)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    kept = {name: p != 0 for name, p in model.named_parameters() if p.dim() == 4}
    x = torch.randn(4, 3, 16, 16)
    for _ in range(3):
        optimizer.zero_grad()
        fast(x).square().sum().backward()
        for name, p in model.named_parameters():
            if name in kept:
                p.grad.masked_fill_(~kept[name], 0)
        optimizer.step()
        assert_right(fast, model, x)
    assert inner.sparse() == [0, 4]
    assert sorted(sparse_sites(fast)) == [0, 4]


def test_a_frozen_model_is_sparse_with_gradients_enabled() -> None:
    model = pruned_net().requires_grad_(False)
    fast = compiled(model)
    y = fast(torch.randn(2, 3, 16, 16))
    assert not y.requires_grad
    assert sparse_sites(fast) == [4]
