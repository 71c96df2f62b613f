"""Rounds around the user's own loop: rewinding, regrouping, checkpoints that a killed run goes on from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pruning_nets import Net, net, steps
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fxsparse import FxsparseError, Target, pruning
from fxsparse.pruning import checkpoint
from fxsparse.regrouping import Regrouping

EPOCHS = 3


class Killed(Exception):
    """Stands for a power cut."""


def train(model: nn.Module, rounds: pruning.Rounds, kill_at: int | None = None) -> dict[str, Tensor]:
    """Run all rounds; shuffles are drawn from torch's global generator, as a DataLoader's are. May be killed."""
    done = 0
    for step in rounds:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7)
        start = step.restore(optimizer=optimizer, scheduler=scheduler)
        for epoch in range(start.get("epoch", 0), EPOCHS):
            if step.number == 0 and epoch == 1:
                step.mark()
            steps(model, optimizer, 1, seed=int(torch.randint(0, 1000, ())))
            scheduler.step()
            if done == kill_at:
                raise Killed
            done += 1
            step.save({"epoch": epoch + 1}, optimizer=optimizer, scheduler=scheduler)
    return {name: value.clone() for name, value in model.state_dict().items()}


def rounds_of(model: nn.Module, file: Path | None, **options: Any) -> pruning.Rounds:
    after = pruning.Regroup(Target(group_rows=8, partitioner="consecutive"))
    return pruning.Rounds(model, pruning.Magnitude(0.4), 2, after=after, file=file, **options)


def test_a_run_that_is_killed_anywhere_goes_on_to_the_same_result(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = net()
    rounds = rounds_of(model, tmp_path / "whole.safetensors")
    wanted = train(model, rounds)
    for kill_at in (0, 1, 2, 3, 5, 8):
        file = tmp_path / f"{kill_at}.safetensors"
        torch.manual_seed(3)
        broken = net()
        with pytest.raises(Killed):
            train(broken, rounds_of(broken, file), kill_at)
        torch.manual_seed(99)  # a new process has another state, and other weights until it loads
        again = net(7)
        resumed = rounds_of(again, file)
        found = train(again, resumed)
        assert all(torch.equal(found[name], value) for name, value in wanted.items()), kill_at
        assert all(torch.equal(resumed.masks[name], mask) for name, mask in rounds.masks.items())


def test_a_finished_run_has_nothing_left_to_do(tmp_path: Path) -> None:
    model = net()
    wanted = train(model, rounds_of(model, tmp_path / "run.safetensors"))
    other = net(5)
    assert list(rounds_of(other, tmp_path / "run.safetensors")) == []
    assert all(torch.equal(other.state_dict()[name], value) for name, value in wanted.items())


def test_rewinding_brings_the_marked_weights_back_and_the_masks_shrink() -> None:
    model = net()
    seen: list[tuple[float, Tensor]] = []
    marked = torch.empty(0)
    for step in pruning.Rounds(model, pruning.Magnitude(0.5), 2):
        if step.number == 0:
            steps(model, torch.optim.SGD(model.parameters(), lr=0.1), 1)
            step.mark()
            marked = model.body.weight.detach().clone()
        else:
            assert torch.equal(model.body.weight, marked * step.masks["body"])
        seen.append((pruning.kept_share(step.masks), model.body.weight.detach().clone()))
        steps(model, torch.optim.SGD(model.parameters(), lr=0.1), 2)
    assert [share for share, _ in seen] == pytest.approx([1.0, 0.5, 0.25], abs=1e-3)


def test_without_rewinding_trained_weights_stay_and_what_comes_back_is_early() -> None:
    model = net()
    early = model.body.weight.detach().clone()

    class Swap:
        """Keeps what was pruned, in place of what was kept."""

        def __repr__(self) -> str:
            return "Swap()"

        def masks(self, model: nn.Module, masks: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: ~mask for name, mask in masks.items()}

    rounds = pruning.Rounds(model, pruning.Magnitude(0.5), 2, after=Swap(), rewind=False)
    first: dict[str, Tensor] = {}
    for step in rounds:
        steps(model, torch.optim.SGD(model.parameters(), lr=0.1), 1)
        if step.number == 1:
            first = {name: mask.clone() for name, mask in step.masks.items()}
            trained = model.body.weight.detach().clone()
        if step.number == 2:
            back = step.masks["body"] & ~first["body"]
            assert bool(back.any()) and bool((trained[back] == 0).all())
            assert bool((early[back] != 0).all())


def test_regrouped_masks_are_blocks_of_the_same_area() -> None:
    model = net()
    masks = pruning.magnitude_masks(model, 0.3)
    found = pruning.Regroup(Target(group_rows=8, partitioner="consecutive")).masks(model, masks)
    for name, mask in found.items():
        groups = model.get_submodule(name).groups
        regrouping = Regrouping.from_identical_rows(mask, groups=groups)
        assert regrouping.residual_count == 0 and regrouping.fill_in == 0
        assert mask.sum() <= masks[name].sum()


def test_only_the_named_layers_are_pruned_and_refill_works_after_a_round() -> None:
    model = net()
    for _ in pruning.Rounds(model, pruning.Magnitude(0.6), 1, after=pruning.Refill("remaining"), exclude=("stem",)):
        pass
    assert pruning.sparsity(model)["stem"] == 0
    whole = (model.body.weight != 0).flatten(1)
    assert bool((whole.all(1) | ~whole.any(1)).all()) and 0 < int(whole.all(1).sum()) < 32


def test_the_checkpoint_is_safetensors_and_json(tmp_path: Path) -> None:
    file = tmp_path / "run.safetensors"
    model = net()
    train(model, rounds_of(model, file))
    with safe_open(file, framework="pt") as opened:
        values = json.loads(opened.metadata()["values"])
        assert values["number"] == 3 and any(name.endswith("body.weight") for name in opened.keys())  # noqa: SIM118


def test_a_checkpoint_holds_what_optimizers_hold(tmp_path: Path) -> None:
    values = {"a": (1, 2.5, None, True), 3: [torch.arange(4), {"x": "y"}], "__tensor__": float("inf")}
    checkpoint.write(tmp_path / "c", values)
    found = checkpoint.read(tmp_path / "c")
    assert found["a"] == values["a"] and torch.equal(found[3][0], torch.arange(4)) and found[3][1] == {"x": "y"}
    assert found["__tensor__"] == float("inf")


def test_a_write_that_fails_keeps_the_file_before(tmp_path: Path) -> None:
    file = tmp_path / "c"
    checkpoint.write(file, {"a": 1})
    with pytest.raises(FxsparseError, match="cannot hold the object at '/b'"):
        checkpoint.write(file, {"b": object()})
    assert checkpoint.read(file) == {"a": 1} and list(tmp_path.iterdir()) == [file]


def test_wrong_requests_are_refused(tmp_path: Path) -> None:
    model = net()
    with pytest.raises(FxsparseError, match="count=0 is no number of rounds"):
        pruning.Rounds(model, pruning.Magnitude(), 0)
    with pytest.raises(FxsparseError, match="The early state has no 'stem.weight'"):
        pruning.Rounds(model, pruning.Magnitude(), 1, early={})
    file = tmp_path / "run.safetensors"
    train(model, rounds_of(model, file))
    with pytest.raises(FxsparseError, match=r"of another run: its rule is Magnitude\(rate=0.4.*Magnitude\(rate=0.2"):
        pruning.Rounds(Net(), pruning.Magnitude(0.2), 2, file=file)
    (tmp_path / "broken").write_bytes(b"12345678{")
    with pytest.raises(FxsparseError, match="cannot be read"):
        rounds_of(net(), tmp_path / "broken")
    save_file({"a": torch.ones(1)}, tmp_path / "foreign")
    with pytest.raises(FxsparseError, match="is no checkpoint of a pruning run"):
        rounds_of(net(), tmp_path / "foreign")
    with pytest.raises(FxsparseError, match="cannot be written"):
        checkpoint.write(tmp_path / "missing" / "c", {})
    for step in pruning.Rounds(model, pruning.Magnitude(), 1, trained=True):
        with pytest.raises(FxsparseError, match=r"mark\(\) belongs into round 0"):
            step.mark()
