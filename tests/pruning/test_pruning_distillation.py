"""The distillation loss: its value, its gradients, and what it leaves alone."""

from __future__ import annotations

import copy

import pytest
import torch
from pruning_nets import images, net
from torch import Tensor, nn

import fxsparse
from fxsparse import pruning
from fxsparse.errors import FxsparseError


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("shape", [(7, 5), (3, 4, 6, 2)])
def test_it_is_the_mean_divergence_of_the_softened_answers(shape: tuple[int, ...], temperature: float) -> None:
    taught, logits = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    loss = pruning.Distillation(nn.Identity(), temperature)
    p = torch.softmax(taught / temperature, 1)
    q = torch.softmax(logits / temperature, 1)
    wanted = temperature**2 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(loss(logits, taught), wanted)
    assert loss(taught, taught) == 0


def test_gradients_reach_the_pruned_model_alone() -> None:
    teacher, x = net().train(), torch.randn(6, 3, 8, 8)
    student = copy.deepcopy(teacher).train()
    before = copy.deepcopy(teacher.state_dict())
    loss = pruning.Distillation(teacher)
    assert not teacher.training
    loss(student(x), x).backward()
    assert all(p.grad is not None for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_no_image_gives_no_loss() -> None:
    logits = torch.randn(0, 5, requires_grad=True)
    loss = pruning.Distillation(nn.Identity())(logits, torch.randn(0, 5))
    loss.backward()
    assert loss == 0 and logits.grad is not None


def test_a_pruned_net_comes_closer_to_its_dense_self_without_labels() -> None:
    model, x = net().eval(), images(64)[0]
    with torch.no_grad():
        model.head.weight.mul_(100)  # answers that differ from image to image
    settings = fxsparse.PruneSettings(cost="macs", samples=64, exclude=("stem",))
    pruned = fxsparse.prune(model, budget=0.4, data=x, settings=settings)
    loss = pruning.Distillation(model)

    def distance() -> float:
        with torch.inference_mode():
            return float(loss(pruned.model.eval()(x), x))

    before = distance()
    optimizer = torch.optim.Adam(pruned.model.parameters(), lr=1e-3)
    with pruning.hold(pruned.model, pruned.masks):
        for _ in range(60):
            optimizer.zero_grad()
            loss(pruned.model(x), x).backward()
            optimizer.step()
    assert distance() < 0.5 * before
    for name, mask in pruned.masks.items():
        assert not pruned.model.get_submodule(name).weight[~mask].any()  # type: ignore[index, union-attr]


class Two(nn.Module):
    """Gives two tensors."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


def test_refusals() -> None:
    with pytest.raises(FxsparseError, match="temperature=0 is not above 0"):
        pruning.Distillation(nn.Identity(), 0)
    with pytest.raises(FxsparseError, match="temperature=nan is not above 0"):
        pruning.Distillation(nn.Identity(), float("nan"))
    with pytest.raises(FxsparseError, match="The teacher gives tuple, the pruned model \\(2, 5\\)"):
        pruning.Distillation(Two())(torch.randn(2, 5), torch.randn(2, 5))
    with pytest.raises(FxsparseError, match="The teacher gives \\(5,\\)"):
        pruning.Distillation(nn.Identity())(torch.randn(5), torch.randn(5))
    with pytest.raises(FxsparseError, match="The teacher gives \\(2, 6\\)"):
        pruning.Distillation(nn.Identity())(torch.randn(2, 5), torch.randn(2, 6))
