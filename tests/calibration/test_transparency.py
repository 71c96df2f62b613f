"""Which graphs may change their layouts, and which nodes hand a layout on."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import symbolic_trace

import fxsparse
from fxsparse.calibration.transparency import is_elementwise, is_transparent, may_choose_layouts


class Net(nn.Module):
    """A convolution and what follows it."""

    def __init__(self, after: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3)
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.conv(x))


def converted(after: Callable[[Tensor], Tensor]) -> torch.fx.GraphModule:
    return fxsparse.convert(Net(after).eval(), settings=fxsparse.Settings(calibrate=False))


def _add_in_place(y: Tensor) -> Tensor:
    y += torch.sigmoid(torch.ones(1))
    return y


@pytest.mark.parametrize(
    "after",
    [
        lambda y: F.relu(y, inplace=True),
        lambda y: F.relu(y, True),
        lambda y: y.relu_(),
        lambda y: torch.relu(y).clamp_(0, 1),
        _add_in_place,
        lambda y: F.relu(y).view(-1),
        lambda y: F.relu_(F.max_pool2d(y, 2)),
        lambda y: F.dropout(y, 0.5, False).relu_() + 1,
        lambda y: F.relu_(operator.iadd(F.max_pool2d(y, 1), y)),
        lambda y: F.linear(y.flatten(1) + y.sum(), torch.ones(2, 8)).relu_(),
    ],
)
def test_writing_into_a_fresh_value_that_nobody_else_reads_is_no_hindrance(
    after: Callable[[Tensor], Tensor],
) -> None:
    assert may_choose_layouts(converted(after)).ok


def _two_readers(y: Tensor) -> Tensor:
    return F.relu(y, inplace=True) + y


def _write_into_view(y: Tensor) -> Tensor:
    y[:, :2].relu_()
    return y


def _statement(y: Tensor) -> Tensor:
    y.index_fill_(1, torch.zeros(1, dtype=torch.long), 0.0)
    return y


@pytest.mark.parametrize(
    "after",
    [
        _two_readers,
        _write_into_view,
        _statement,
        lambda y: y.flatten().relu_() + y.sum(),
        lambda y: y.detach().relu_() + y,
    ],
    ids=["two readers", "a slice", "a statement", "a flat view", "an alias"],
)
def test_writing_into_what_others_may_see_refuses_layout_changes_and_says_where(
    after: Callable[[Tensor], Tensor],
) -> None:
    support = may_choose_layouts(converted(after))
    assert not support.ok
    assert "writes into" in support.reason


def test_a_node_that_asks_for_strides_refuses_layout_changes() -> None:
    support = may_choose_layouts(converted(lambda y: y.as_strided((1, 1), y.stride()[:2])))
    assert not support.ok
    assert "asks for the memory layout of 'conv'" in support.reason


@pytest.mark.parametrize(
    ("after", "elementwise", "transparent"),
    [
        (F.relu, True, True),
        (lambda y: y * 2, True, True),
        (lambda y: operator.iadd(y, 1), True, True),
        (lambda y: y.sigmoid(), True, True),
        (lambda y: F.max_pool2d(y, 2), False, True),
        (lambda y: torch.cat([y, y], 1), False, True),
        (lambda y: F.interpolate(y, scale_factor=2), False, True),
        (lambda y: y.permute(0, 2, 3, 1), False, False),
        (lambda y: y.reshape(2, -1), False, False),
        (lambda y: F.softmax(y, 1), False, False),
    ],
)
def test_nodes_are_told_apart(after: Callable[[Tensor], Tensor], elementwise: bool, transparent: bool) -> None:
    gm = symbolic_trace(Net(after))
    node = next(n for n in reversed(gm.graph.nodes) if n.op in ("call_function", "call_method"))
    assert is_elementwise(gm, node) is elementwise
    assert is_transparent(gm, node) is transparent


def test_a_subclass_of_a_transparent_module_is_opaque() -> None:
    class Shifted(nn.ReLU):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    class Leaves(torch.fx.Tracer):
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            return True

    for module, expected in ((nn.ReLU(), True), (Shifted(), False)):
        root = nn.Sequential(module)
        graph = Leaves().trace(root)
        gm = torch.fx.GraphModule(root, graph)
        node = next(n for n in gm.graph.nodes if n.op == "call_module")
        assert is_transparent(gm, node) is expected
