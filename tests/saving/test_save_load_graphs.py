"""Round trips of graphs of every kind: inputs, outputs, sizes, dtypes, capture rungs, and changes of layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import small_net
from round_trips import Branches, assert_runs_as, converted, round_trip
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import fxsparse
from fxsparse import layouts, sites
from fxsparse.plan import Move


@pytest.mark.parametrize("mode", ["vanilla", "sparse"])
def test_a_graph_with_branches_keyword_inputs_and_nested_outputs_computes_the_same_bits(
    mode: str, tmp_path: Path
) -> None:
    scale = torch.tensor(1.5)
    fast = converted(Branches(), {"x": torch.randn(2, 3, 12, 12), "scale": scale})
    fxsparse.set_mode(fast, mode)
    loaded = round_trip(fast, tmp_path)
    for batch in (0, 1, 3):
        for size in ((12, 12), (9, 14)):
            x = torch.randn(batch, 3, *size)
            assert_runs_as(fast, loaded, x=x, scale=scale)
            assert_runs_as(fast, loaded, x=x.contiguous(memory_format=torch.channels_last), scale=scale)


def test_changes_of_layout_come_back_at_the_same_places(tmp_path: Path) -> None:
    fast = converted(Branches(), {"x": torch.randn(2, 3, 12, 12), "scale": torch.tensor(2.0)})
    fxsparse.set_mode(fast, "vanilla")
    node = {site.name: node.name for node, site in sites.conv_sites(fast)}
    left, right = (n.name for n in fast.graph.nodes if n.op == "call_function" and "getitem" in n.name)
    moves = [
        Move("", "x", "channels_last", (node["reflect"],)),  # read through a pad
        Move("", node["reflect"], "channels_last", ("nothing",)),  # read by what exports to nothing
        Move("", "nothing", "contiguous", (node["depthwise"],)),  # and back behind it, for one reader
        Move("", left, "contiguous", ("cat",)),
        Move("", right, "contiguous", ("cat",)),
        Move("", "parameter pointwise.weight", "channels_last", ()),
    ]
    assert layouts.place(fast, moves) == []
    fast.recompile()
    loaded = round_trip(fast, tmp_path)
    assert len(layouts.current(loaded)) == len(layouts.current(fast))
    assert image_strides(fast) == image_strides(loaded)
    fast.train()
    trained = round_trip(fxsparse.load(tmp_path / "model.pt2").train(), tmp_path)  # the moves are laid aside
    assert layouts.current(trained) == ()
    assert set(layouts.current(trained.eval())) == set(layouts.current(loaded))
    assert image_strides(trained) == image_strides(loaded)


def image_strides(model: nn.Module) -> dict[str, list[Any]]:
    """Return the strides of what each convolution reads, of its weight and of what it gives, and those of the rest."""
    seen: dict[str, list[Any]] = {}

    class Watch(torch.fx.Interpreter):
        def run_node(self, node: torch.fx.Node) -> Any:
            value = super().run_node(node)
            site = sites.site_of(node)
            if site is not None:
                read = [self.env[other].stride() for other in node.all_input_nodes]
                seen.setdefault(site.name, []).append((read, value.stride()))
            elif node.name == "cat":
                seen["cat"] = [self.env[other].stride() for other in node.all_input_nodes]
            return value

    Watch(model).run(torch.zeros(2, 3, 12, 12), torch.tensor(1.0))
    return seen


def test_the_moves_of_a_plan_are_translated_to_the_saved_graph(tmp_path: Path) -> None:
    fast = converted(Branches(), {"x": torch.randn(2, 3, 12, 12), "scale": torch.tensor(2.0)})
    fxsparse.set_mode(fast, "vanilla")
    inputs = {"x": torch.randn(2, 3, 12, 12), "scale": torch.tensor(2.0)}
    fxsparse.calibrate(fast, inputs, budget_s=0.5)
    node = {site.name: node.name for node, site in sites.conv_sites(fast)}
    move = Move("", node["reflect"], "channels_last", ("nothing",))
    plan = fxsparse.Plan((fast.plan.entries[0].__class__(**{**vars(fast.plan.entries[0]), "moves": (move,)}),))
    fxsparse.calibrate(fast, inputs, plan=plan, deterministic=True)
    assert layouts.current(fast) == (move,)
    loaded = round_trip(fast, tmp_path)
    now = layouts.current(loaded)
    fxsparse.calibrate(loaded, inputs, deterministic=True)
    assert layouts.current(loaded) == now == loaded.plan.entries[0].moves
    assert now[0].value != move.value or now[0].readers != move.readers
    fxsparse.set_mode(fast, "vanilla")
    fxsparse.set_mode(loaded, "vanilla")
    assert_runs_as(fast, loaded, **inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    fast = converted(small_net().to(dtype), torch.randn(2, 3, 16, 16, dtype=dtype))
    loaded = round_trip(fast, tmp_path)
    assert_runs_as(fast, loaded, torch.randn(3, 3, 10, 10, dtype=dtype))


class Shaped(nn.Module):
    """Asks for a shape in Python, so that the rung `export` captures it; two inputs, one of them optional."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.register_buffer("offset", torch.randn(8, 1, 1))

    def forward(self, x: Tensor, parts: list[Tensor], twice: bool = False) -> tuple[Tensor, Tensor]:
        x = self.conv(x) + self.offset
        if x.shape[2] > 100:
            x = x[:, :, :100]
        y = x.flatten(1) @ torch.ones(x.shape[1] * x.shape[2] * x.shape[3], 2)
        return y * 2 if twice else y, sum(parts)


def test_a_model_of_the_rung_export_with_a_list_of_inputs_and_a_constant(tmp_path: Path) -> None:
    inputs = (torch.randn(2, 3, 8, 8), [torch.randn(3), torch.randn(3)], True)
    fast = converted(Shaped(), inputs)
    assert fast.report.rung == "export"
    loaded = round_trip(fast, tmp_path)
    assert_runs_as(fast, loaded, *inputs)
    assert_runs_as(fast, loaded, torch.randn(5, 3, 8, 8), inputs[1], True)
    assert "always computes with that value" in str(loaded.report)
    assert_runs_as(fast, round_trip(loaded, tmp_path), *inputs)


class Positions(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.position = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.position


def test_buffers_that_are_not_persistent_stay_so(tmp_path: Path) -> None:
    fast = converted(Positions(1, 8, 1, 1), (2, 3, 6, 6))
    fast.conv.register_buffer("scratch", torch.randn(3), persistent=False)
    loaded = round_trip(fast, tmp_path)
    assert torch.equal(loaded.get_buffer("conv.scratch"), fast.get_buffer("conv.scratch"))
    assert list(loaded.state_dict()) == list(fast.state_dict())
    assert "conv.scratch" not in loaded.state_dict()


def test_sizes_that_a_model_fixes_are_noted_and_the_others_stay_dynamic(tmp_path: Path) -> None:
    fast = converted(Positions(1, 8, 6, 6), (1, 3, 6, 6))
    loaded = round_trip(fast, tmp_path)
    assert "'x' of height and width 6 x 6 only" in str(loaded.report)
    assert "batch size" not in str(loaded.report)
    assert_runs_as(fast, loaded, torch.randn(5, 3, 6, 6))
    loaded = round_trip(converted(Positions(2, 8, 1, 1), (2, 3, 6, 6)), tmp_path)
    assert "'x' of batch size 2 only" in str(loaded.report)
    assert "height" not in str(loaded.report)


def test_sizes_that_only_a_guard_fixes_are_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As export was seen to leave them: the guard is there, and the symbol stays in the shape.
    monkeypatch.setattr(ShapeEnv, "_maybe_guard_rel", lambda self, expr: None)
    loaded = round_trip(converted(Positions(1, 8, 6, 1), (1, 3, 6, 6)), tmp_path)
    assert "'x' of height and width 6 x any only" in str(loaded.report)
    assert "batch size" not in str(loaded.report)


def test_torchvision_resnet18_end_to_end(tmp_path: Path) -> None:
    torchvision = pytest.importorskip("torchvision")
    fast = converted(torchvision.models.resnet18(), (1, 3, 64, 64))
    loaded = round_trip(fast, tmp_path)
    assert_runs_as(fast, loaded, torch.randn(2, 3, 64, 64))
    assert_runs_as(fast, loaded, torch.randn(1, 3, 40, 72))
